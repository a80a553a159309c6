"""Worked examples, one package each: they are read and run, not installed."""
