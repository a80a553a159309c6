"""Jigsaw puzzles by Sinkhorn networks (Mena et al. 2018, Section 5.2), and by others."""
