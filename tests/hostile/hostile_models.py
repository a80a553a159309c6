"""Small models as users write them, rightly and wrongly, built from drawn pieces."""

import contextlib
import dataclasses
import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from hostile_tensors import Given, rarely
from hypothesis import strategies as st
from trials import names_of

import pyro_gs as pgs

LAYOUTS = ("alone", "plate", "event", "subsampled", "in turn", "empty plate")
FACTORS = ("plain", "none", "nan", "nan somewhere", "inf", "-inf", "-inf somewhere", "huge", "raises", "narrow", "number")
LAWS = {
    "uniform": lambda n, x, allowed: pgs.UniformPermutation(n, allowed),
    "gibbs": lambda n, x, allowed: pgs.GibbsPermutation(torch.where(allowed, x, -math.inf)),
    "gumbel": lambda n, x, allowed: pgs.GumbelMatching(torch.where(allowed, x, -math.inf)),
    "ranking": lambda n, x, allowed: pgs.PlackettLuce(x.sum(-1)),
    "mallows": lambda n, x, allowed: pgs.Mallows(torch.eye(n, dtype=x.dtype), 1.0),
    "relaxed": lambda n, x, allowed: pgs.GumbelSinkhorn(0.5, torch.where(allowed, x, -math.inf)),
}


class ModelError(Exception):
    """Of a model's own."""


@dataclasses.dataclass
class Pieces:
    """A model and its arguments.

    ``names``: of its permutation sites. ``latent``: whether they are. ``scale``: whether it has another latent site.
    """

    n: int
    law: str
    layout: str
    names: tuple
    latent: bool
    scale: bool
    factor: str
    masked: bool | None
    allowed: torch.Tensor
    x: torch.Tensor
    args: tuple

    def model(self, x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5)) if self.scale else None
        muted = contextlib.nullcontext() if self.masked is None else poutine.mask(mask=self.masked)
        with muted:
            for name in self.names:
                self._site(name, x, scale)

    def _site(self, name, x, scale):
        law = LAWS[self.law](self.n, x, self.allowed)
        obs = None if self.latent else torch.eye(self.n, dtype=x.dtype)
        if self.layout == "in turn":
            for k in pyro.plate(f"{name}_items", 2):
                P = pyro.sample(f"{name}_{k}", law, obs=obs)
                self._factor(f"{name}_f_{k}", P, x, scale)
            return
        plate = contextlib.nullcontext()
        if self.layout == "event":
            law, obs = law.expand([2]).to_event(1), None if obs is None else obs.expand(2, -1, -1)
        elif self.layout != "alone":
            size, part = {"plate": (2, None), "subsampled": (3, 2), "empty plate": (0, None)}[self.layout]
            plate = pyro.plate(f"{name}_items", size, subsample_size=part)
        with plate:
            P = pyro.sample(name, law, obs=obs)
            self._factor(f"{name}_f", P, x, scale)

    def _factor(self, name, P, x, scale):
        if self.factor == "none":
            return
        if self.factor == "raises":
            raise ModelError("no luck")
        fit = (P * x).sum((-2, -1))
        if self.layout == "event":
            fit = fit.sum(-1)
        if scale is not None:
            fit = fit * scale
        first = P[..., 0, 0] if self.layout != "event" else P[..., 0, 0, 0]
        fit = {
            "nan": fit + math.nan,
            "nan somewhere": torch.where(first > 0.5, math.nan, fit),
            "inf": fit + math.inf,
            "-inf": fit - math.inf,
            "-inf somewhere": torch.where(first > 0.5, -math.inf, fit),
            "huge": 1e300 * fit,
            "narrow": (P.reshape(-1, self.n, self.n)[0] * x).sum(),
            "number": float(fit.detach().sum()),
        }.get(self.factor, fit)
        pyro.factor(name, fit)

    def faults(self):
        """What the model, or Pyro with its checks or, as in MCMC, without, raises when it is run alone and scored."""
        found = set()
        for checked in (True, False):
            try:
                with warnings.catch_warnings(), poutine.block(), pyro.validation_enabled(checked):
                    warnings.simplefilter("ignore")
                    poutine.trace(self.model).get_trace(*self.args).compute_log_prob()
            except Exception as error:
                found |= names_of(error)
        return found

    @property
    def sites(self):
        """Names of the latent permutations."""
        if not self.latent:
            return ()
        return tuple(f"{name}_{k}" for name in self.names for k in range(2)) if self.layout == "in turn" else self.names

    @property
    def givens(self):
        return [Given(self.x), Given(self.allowed)]


@st.composite
def models(draw, gradients=True, scale=False):
    """Pieces, mostly of a model that all can take.

    ``gradients``: the argument may ask for some. ``scale``: that site is there, mostly.
    """

    def seldom(usual, others):
        return draw(st.sampled_from(others)) if draw(rarely) == 0 else usual

    n = draw(st.sampled_from([2, 3, 3, 1, 4]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    count = n * n
    x = torch.tensor(draw(st.lists(st.floats(-3, 3), min_size=count, max_size=count)), dtype=dtype).reshape(n, n)
    if draw(rarely) == 0:
        x[0, 0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
    allowed = torch.ones(n, n, dtype=torch.bool)
    if draw(st.integers(0, 3)) == 0:
        bits = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(n, n)
        allowed = bits | torch.eye(n, dtype=torch.bool) if draw(rarely) else bits
    return Pieces(
        n=n,
        law=draw(st.sampled_from(["uniform"] * 6 + ["gibbs", "gumbel"] * 2 + ["ranking", "mallows", "relaxed"])),
        layout=draw(st.sampled_from(["alone"] * 8 + ["plate"] * 5 + list(LAYOUTS))),
        names=draw(st.sampled_from([("P",)] * 14 + [("P", "Q"), (), ("P", "P"), ("net.P",)])),
        latent=bool(draw(rarely)),
        scale=seldom(scale, [not scale]),
        factor=draw(st.sampled_from(["plain"] * 20 + list(FACTORS))),
        masked=seldom(None, [True, False]),
        allowed=allowed,
        x=x.requires_grad_(gradients and draw(st.booleans())),
        args=seldom((x,), [(), (x, x), (None,), (x.double(),), (x[:1],)]),
    )
