"""Markov chains over permutations, and what tells whether they converged."""
