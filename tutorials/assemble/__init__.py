"""Digits assembled from the pieces of others (Mena et al. 2018, Section 5.3)."""
