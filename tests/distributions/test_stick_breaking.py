import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from scipy import integrate

from pyro_gs import GumbelSinkhorn
from pyro_gs.distributions.relaxed import plain
from pyro_gs.distributions.stick_breaking import StickBreakingPermutation

FAILURE_RATE = 2e-5


def complete(block):
    """The doubly stochastic matrix of an upper left block."""
    top = torch.cat([block, 1 - block.sum(-1, keepdim=True)], -1)
    return torch.cat([top, 1 - top.sum(-2, keepdim=True)], -2)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_fit_the_density_n2(temperature):
    law = StickBreakingPermutation(temperature, torch.randn(1, 1), 0.7)
    P = law.sample(torch.Size((40_000,)))
    assert auto_goodness_of_fit(plain(P)[:, :1, 0], law.log_prob(P).exp()) > FAILURE_RATE


@pytest.mark.usefixtures("float64_only")
def test_total_mass_n2():
    law = StickBreakingPermutation(0.8, torch.tensor([[0.6]]), 0.5)

    def density(p):
        return float(law.log_prob(complete(torch.tensor([[p]]))).exp())

    assert integrate.quad(density, 0, 1, epsabs=1e-10)[0] == pytest.approx(1.0, abs=1e-8)


@pytest.mark.usefixtures("float64_only")
def test_samples_fit_the_density_n3():
    # Against a law of the same matrices and base measure, exact at n = 3: mass, means and squares under its weights. (The
    # nearest neighbours of auto_goodness_of_fit are biased in four dimensions.)
    law = StickBreakingPermutation(0.8, torch.tensor([[0.4, -0.3], [-0.2, 0.3]]), 0.8)
    P = law.sample(torch.Size((100_000,)))
    other = GumbelSinkhorn(0.9, plain(P).mean(0).log())
    Q = other.sample(torch.Size((15_000,)))
    weights = (law.log_prob(Q) - other.log_prob(Q)).exp()[:, None, None]
    assert float(weights.mean()) == pytest.approx(1.0, abs=4.5 * float(weights.std()) / len(Q) ** 0.5)
    for power in (1, 2):
        want, got = plain(P) ** power, weights * plain(Q) ** power
        error = (want.var(0) / len(P) + got.var(0) / len(Q)).sqrt()
        assert (error < 0.01).all()
        assert ((want.mean(0) - got.mean(0)).abs() < 4.5 * error).all()  # 7e-6 each


def test_values_outside():
    law = StickBreakingPermutation(1.0, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="value is not in the support of StickBreakingPermutation"):
        law.log_prob(torch.full((3, 3), 0.4))
    with pytest.raises(ValueError, match="P has a zero at row 0, column 1"):
        law.log_prob(torch.eye(3))
