"""Sorting numbers, and images of numbers, with Sinkhorn networks and their competitors."""
