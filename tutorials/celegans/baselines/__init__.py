"""Methods to compare with: one a module, each with the same ``fit``."""

from tutorials.celegans.baselines.collapsed_mcmc import fit as fit_collapsed_mcmc
from tutorials.celegans.baselines.gibbs_mcmc import fit as fit_gibbs_mcmc
from tutorials.celegans.baselines.map_faq import fit as fit_map_faq
from tutorials.celegans.baselines.naive_vi import fit as fit_naive_vi

__all__ = ["fit_collapsed_mcmc", "fit_gibbs_mcmc", "fit_map_faq", "fit_naive_vi"]
