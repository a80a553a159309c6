"""Operators on matrices of logits: Sinkhorn, its Laplacian, matching, support, permanents."""
