"""Methods to compare with: one a module, each with the same ``fit``."""

from tutorials.celegans.baselines.collapsed_mcmc import fit as fit_collapsed_mcmc
from tutorials.celegans.baselines.gibbs_mcmc import fit as fit_gibbs_mcmc
from tutorials.celegans.baselines.map_faq import fit as fit_map_faq
from tutorials.celegans.baselines.naive_vi import fit as fit_naive_vi
from tutorials.celegans.baselines.rounding_vi import fit as fit_rounding_vi
from tutorials.celegans.baselines.stick_breaking_vi import fit as fit_stick_breaking_vi
from tutorials.celegans.baselines.tempered_mcmc import fit as fit_tempered_mcmc

__all__ = [
    "fit_collapsed_mcmc",
    "fit_gibbs_mcmc",
    "fit_map_faq",
    "fit_naive_vi",
    "fit_rounding_vi",
    "fit_stick_breaking_vi",
    "fit_tempered_mcmc",
]
