import math

import pytest
import torch
from pyro.distributions import Normal
from pyro.distributions.testing.gof import auto_goodness_of_fit

from pyro_gs import UniformPermutation, matching, sinkhorn
from pyro_gs.distributions.rounding import RoundingPermutation

FAILURE_RATE = 2e-5


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("n", [1, 2])
def test_samples_fit_the_density(n, temperature):
    law = RoundingPermutation(temperature, sinkhorn(torch.randn(n, n)), 0.4)
    X = law.sample(torch.Size((40_000,)))
    assert auto_goodness_of_fit(X.reshape(len(X), -1), law.log_prob(X).exp()) > FAILURE_RATE


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize(("n", "temperature"), [(2, 0.5), (2, 0.9), (3, 0.6)])
def test_mass_of_every_vertex(n, temperature):
    # Importance sampling from a mixture of wider normals, one around every vertex.
    law = RoundingPermutation(temperature, sinkhorn(torch.randn(n, n)), 0.5)
    vertices = UniformPermutation(n).enumerate_support()
    centres = Normal(temperature * law.loc + (1 - temperature) * vertices, 0.6 * temperature)
    X = centres.loc[torch.randint(len(vertices), (100_000,))]
    X = X + 0.6 * temperature * torch.randn_like(X)
    proposal = centres.log_prob(X[:, None]).sum((-2, -1)).logsumexp(-1) - math.log(len(vertices))
    weights = (law.log_prob(X) - proposal).exp()
    assert (weights == 0).float().mean() > 0.01  # the gaps count: without them the mass would be above one
    Y = law.sample(torch.Size((100_000,)))
    for vertex in vertices:
        want, got = ((matching(x) == vertex).all(-1).all(-1).double() for x in (Y, X))
        got = got * weights
        error = float((want.var() + got.var()) / len(X)) ** 0.5
        assert error < 0.01
        assert float(got.mean()) == pytest.approx(float(want.mean()), abs=4.5 * error)  # 7e-6
    assert float(weights.mean()) == pytest.approx(1.0, abs=4.5 * float(weights.std()) / len(X) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 0.7, 1.0])
def test_no_sample_falls_into_a_gap(temperature, dtype):
    law = RoundingPermutation(temperature, torch.full((5, 5), 0.2, dtype=dtype), 1e-3 if temperature > 0.5 else 1.0)
    X = law.sample(torch.Size((20_000,)))
    assert law.log_prob(X).isfinite().all()


def test_gaps_between_the_vertices():
    law = RoundingPermutation(0.2, torch.full((3, 3), 1 / 3), 1.0)
    assert law.log_prob(torch.full((3, 3), 1 / 3)) == -torch.inf
    assert law.log_prob(torch.eye(3)).isfinite()
    values = torch.stack([torch.full((3, 3), 1 / 3), torch.eye(3)])
    assert law.log_prob(values).isfinite().tolist() == [False, True]


def test_density_without_rounding_is_normal():
    law = RoundingPermutation(1.0, torch.randn(3, 3), 0.3)
    X = torch.randn(10, 3, 3)
    assert torch.allclose(law.log_prob(X), Normal(law.loc, law.scale).log_prob(X).sum((-2, -1)))


def test_samples_tend_to_vertices():
    X = RoundingPermutation(0.01, torch.full((4, 4), 0.25), 0.1).sample(torch.Size((100,)))
    assert torch.allclose(X, matching(X), atol=0.01)


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature must be at most 1 for RoundingTransform, but is 2.0"):
        RoundingPermutation(2.0, torch.zeros(2, 2))


def test_infinite_values():
    with pytest.raises(ValueError, match="X must be finite, but is inf at row 0, column 0"):
        RoundingPermutation(0.5, torch.zeros(2, 2)).log_prob(torch.full((2, 2), torch.inf))
