"""Inference over latent permutations: the relaxing handler, the guide, temperature schedules."""
