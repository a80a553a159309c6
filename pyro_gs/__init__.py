"""Latent permutations for Pyro: Sinkhorn operators, Gumbel-Sinkhorn laws, guides and handlers."""

from pyro_gs import nn
from pyro_gs.calibration import Reliability, recalibrate, reliability
from pyro_gs.distributions import constraints
from pyro_gs.distributions.birkhoff import BirkhoffTransform, DivergenceError
from pyro_gs.distributions.gibbs_matching import GibbsMatching
from pyro_gs.distributions.gibbs_permutation import GibbsPermutation
from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.kl import gumbel_noise_kl, monte_carlo_kl, tightened_kl
from pyro_gs.distributions.mallows import Mallows
from pyro_gs.distributions.matching_integral import EstimateWarning
from pyro_gs.distributions.plackett_luce import PlackettLuce
from pyro_gs.distributions.relaxed_plackett_luce import RelaxedPlackettLuce
from pyro_gs.distributions.rounding import RoundingPermutation
from pyro_gs.distributions.sparse_gumbel_sinkhorn import SparseGumbelSinkhorn
from pyro_gs.distributions.stick_breaking import StickBreakingPermutation
from pyro_gs.distributions.straight_through import GumbelSinkhornStraightThrough
from pyro_gs.distributions.transforms import RoundingTransform, StickBreakingTransform
from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.infer.annealing import AnnealedSVI, ConstantSchedule, ExponentialSchedule, LinearSchedule
from pyro_gs.infer.autoguide import AutoGumbelSinkhorn
from pyro_gs.infer.autoguide_linderman import AutoRounding, AutoStickBreaking
from pyro_gs.infer.autoguide_matching import AutoGumbelMatching
from pyro_gs.infer.compare import Comparison, compare
from pyro_gs.infer.diagnostics import (
    TemperatureWarning,
    check_temperature_effect,
    gradient_variance,
    relaxation_gap,
    saturation,
)
from pyro_gs.infer.enumeration import EnumeratedPosterior, enumerate_posterior, permutation_posterior
from pyro_gs.infer.handlers import RelaxMessenger, register_relaxation, relax
from pyro_gs.infer.hardening import HardenMessenger, harden, register_hard_law
from pyro_gs.infer.index_handler import IndexMessenger, indexed
from pyro_gs.infer.initialization import init_to_matching
from pyro_gs.infer.log_joint import VectorizationWarning
from pyro_gs.infer.mcmc.block_gibbs import BlockGibbs
from pyro_gs.infer.mcmc.convergence import ConvergenceWarning, convergence, posterior_dict
from pyro_gs.infer.mcmc.guide_proposal import GuideProposal
from pyro_gs.infer.mcmc.hmc_gibbs import HMCGibbs
from pyro_gs.infer.mcmc.locally_balanced import LocallyBalanced
from pyro_gs.infer.mcmc.move_sequence import MoveSequence
from pyro_gs.infer.mcmc.parallel_tempering import ParallelTempering
from pyro_gs.infer.mcmc.rounding import RoundedPosterior, round_samples
from pyro_gs.infer.mcmc.swap_metropolis import SwapMetropolis
from pyro_gs.infer.mcmc.swaps import Swaps
from pyro_gs.infer.restarts import PartialRestarts
from pyro_gs.ops.candidates import log_sparse_sinkhorn, sparse_matching, sparse_sinkhorn, to_dense, to_sparse
from pyro_gs.ops.implicit import SinkhornSolution, SinkhornWarning
from pyro_gs.ops.laplacian import laplacian_logdet, laplacian_solve
from pyro_gs.ops.matching import matching, to_index, to_matrix
from pyro_gs.ops.padding import pad_logits, unpad
from pyro_gs.ops.permanent import log_permanent, log_permanent_bounds
from pyro_gs.ops.ranking import kendall_distance
from pyro_gs.ops.sinkhorn import log_sinkhorn, sinkhorn, solve_sinkhorn
from pyro_gs.ops.support import SupportWarning
from pyro_gs.summary import summary

__version__ = "0.1.0"

__all__ = [
    "AnnealedSVI",
    "AutoGumbelMatching",
    "AutoGumbelSinkhorn",
    "AutoRounding",
    "AutoStickBreaking",
    "BirkhoffTransform",
    "BlockGibbs",
    "Comparison",
    "ConstantSchedule",
    "ConvergenceWarning",
    "DivergenceError",
    "EnumeratedPosterior",
    "EstimateWarning",
    "ExponentialSchedule",
    "GibbsMatching",
    "GibbsPermutation",
    "GuideProposal",
    "GumbelMatching",
    "GumbelSinkhorn",
    "GumbelSinkhornStraightThrough",
    "HMCGibbs",
    "HardenMessenger",
    "IndexMessenger",
    "LinearSchedule",
    "LocallyBalanced",
    "Mallows",
    "MoveSequence",
    "ParallelTempering",
    "PartialRestarts",
    "PlackettLuce",
    "RelaxMessenger",
    "RelaxedPlackettLuce",
    "Reliability",
    "RoundedPosterior",
    "RoundingPermutation",
    "RoundingTransform",
    "SinkhornSolution",
    "SinkhornWarning",
    "SparseGumbelSinkhorn",
    "StickBreakingPermutation",
    "StickBreakingTransform",
    "SupportWarning",
    "SwapMetropolis",
    "Swaps",
    "TemperatureWarning",
    "UniformPermutation",
    "VectorizationWarning",
    "check_temperature_effect",
    "compare",
    "constraints",
    "convergence",
    "enumerate_posterior",
    "gradient_variance",
    "gumbel_noise_kl",
    "harden",
    "indexed",
    "init_to_matching",
    "kendall_distance",
    "laplacian_logdet",
    "laplacian_solve",
    "log_permanent",
    "log_permanent_bounds",
    "log_sinkhorn",
    "log_sparse_sinkhorn",
    "matching",
    "monte_carlo_kl",
    "nn",
    "pad_logits",
    "permutation_posterior",
    "posterior_dict",
    "recalibrate",
    "register_hard_law",
    "register_relaxation",
    "relax",
    "relaxation_gap",
    "reliability",
    "round_samples",
    "saturation",
    "sinkhorn",
    "solve_sinkhorn",
    "sparse_matching",
    "sparse_sinkhorn",
    "summary",
    "tightened_kl",
    "to_dense",
    "to_index",
    "to_matrix",
    "to_sparse",
    "unpad",
]
