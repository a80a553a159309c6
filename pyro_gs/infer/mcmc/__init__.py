"""Markov chain Monte Carlo over latent permutations, alone and beside HMC or NUTS for the rest."""
