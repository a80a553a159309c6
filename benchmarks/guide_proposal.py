"""How often proposals from a fitted guide are accepted, by the law that stands in for the guide's hard one.

Noisy points are matched to their originals: ``y = P x + scale * noise``, points N(0, 1) in the plane. The guide is
``AutoGumbelSinkhorn`` at temperature 1 after 300 steps of Adam on the relaxed ELBO. From draws of the posterior, exact up to
20 rows and by a long chain of ``GibbsPermutation.sample`` above, one proposal each: the mean probability to accept it, and
of accepting it where it is another permutation than the present one.

``gibbs marginals`` and ``sequential marginals`` are alternatives that ``GuideProposal`` does not offer: the logarithms of
the guide's hard marginals (of 2,000 draws, a hundredth of every row shared out evenly) in the place of its logits.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from matching import describe_machine, table
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

import pyro_gs as pgs
from pyro_gs.infer.mcmc.guide_laws import GibbsLaw, ProposalLaw, RelaxedLaw, SequentialLaw, centred

CASES = [(5, 0.5), (5, 1.0), (10, 0.25), (10, 0.5), (10, 1.0), (20, 0.05), (20, 0.1), (20, 0.25), (50, 0.02), (50, 0.05)]
STATES = 400


def model(x: Tensor, y: Tensor, scale: float) -> None:
    """Match noisy points ``y`` to their originals ``x``, both (n, 2)."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P @ x, scale).to_event(2), obs=y)


def fitted(x: Tensor, y: Tensor, scale: float, steps: int) -> pgs.AutoGumbelSinkhorn:
    """A guide after ``steps`` of Adam, the learning rate falling from 0.2 to 0.02."""
    pyro.clear_param_store()
    guide = pgs.AutoGumbelSinkhorn(model)
    optimizer = ClippedAdam({"lr": 0.2, "lrd": 0.1 ** (1 / steps)})
    svi = SVI(pgs.relax(model), guide, optimizer, Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y, scale)
    return guide


@torch.no_grad()
def acceptance(law: ProposalLaw, states: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean probability to accept a proposal from states (S, n) of the posterior ``exp <logits, P>``; and to move by it."""

    def score(index: Tensor) -> Tensor:
        return logits.gather(-1, index.T).sum(0)

    index, weight = law.draw(len(states))
    ratio = score(index[:, 0]) - score(states) + law.weigh(states[:, None])[:, 0] - weight[:, 0]
    probability = ratio.clamp(max=0.0).exp()
    moves = (index[:, 0] != states).any(-1)
    return float(probability.mean()), float((probability * moves).mean())


def compare(n: int, scale: float, steps: int, seed: int) -> dict[str, tuple[float, float]]:
    """Acceptance by law."""
    torch.manual_seed(seed)
    x = torch.randn(n, 2)
    y = x[torch.randperm(n)] + scale * torch.randn(n, 2)
    guide = fitted(x, y, scale, steps)
    posterior = -((y[:, None] - x) ** 2).sum(-1) / (2 * scale**2)
    states = pgs.GibbsPermutation(posterior).sample((STATES,)).argmax(-1)
    logits = guide.logits("P").detach()[None]
    log_marginals = (0.99 * guide.hard_sample((2000,))["P"].mean(0) + 0.01 / n).log()[None]
    laws: dict[str, ProposalLaw] = {}
    if n <= 20:
        laws = {"gibbs": GibbsLaw(logits), "gibbs marginals": GibbsLaw(log_marginals)}
    laws["sequential"] = SequentialLaw(centred(logits))
    laws["sequential marginals"] = SequentialLaw(log_marginals)
    laws["relaxed"] = RelaxedLaw(logits)
    return {name: acceptance(law, states, posterior) for name, law in laws.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of SVI")
    parser.add_argument("--repeats", type=int, default=3, help="data sets a row; their mean is printed")
    parser.add_argument("--largest", type=int, default=50, help="rows")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(describe_machine())
    names = ["gibbs", "gibbs marginals", "sequential", "sequential marginals", "relaxed"]
    rows = []
    for n, scale in CASES:
        if n > options.largest:
            continue
        found = [compare(n, scale, options.steps, seed) for seed in range(options.repeats)]
        cells = []
        for name in names:
            values = torch.tensor([one[name] for one in found if name in one])
            cells.append(" / ".join(f"{v:.3f}" for v in values.mean(0).tolist()) if len(values) else "")
        rows.append([str(n), f"{scale:g}", *cells])
    print(table(["n", "scale", *(f"{name} (accepted / moved)" for name in names)], rows))


if __name__ == "__main__":
    main()
