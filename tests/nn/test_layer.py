"""The layer alone: what it computes, its draws, options and errors."""

import pytest
import torch
from sets import MASK, N

import pyro_gs as pgs
from pyro_gs.nn import SinkhornLayer, mask_logits


def test_is_the_operator(tol):
    x = torch.randn(4, N, N)
    for mode in (True, False):
        layer = SinkhornLayer(0.3).train(mode)
        assert torch.allclose(layer(x), pgs.sinkhorn(x, temperature=0.3), atol=10 * tol)
        assert torch.allclose(layer.log_p(x), pgs.log_sinkhorn(x, temperature=0.3), atol=1e3 * tol)
    truncated = SinkhornLayer(0.3, num_iters=2)
    assert torch.allclose(truncated(x), pgs.sinkhorn(x, temperature=0.3, num_iters=2), atol=tol)
    assert (truncated(x).sum(-1) - 1).abs().max() > 0.01


def test_draws_follow_the_law():
    """``S((X + c eps) / tau)`` is Gumbel-Sinkhorn with ``X / c`` at ``tau / c``, and M of it Gumbel-matching."""
    x, count = torch.randn(3, 3), 20_000
    layer = SinkhornLayer(0.8, noise=2.0, num_samples=count)
    relaxed = pgs.GumbelSinkhorn(0.4, x / 2).sample((count,))
    error = (layer(x).var(0) + relaxed.var(0)).sqrt() / count**0.5
    assert ((layer(x).mean(0) - relaxed.mean(0)).abs() < 5 * error).all()  # 9 entries, 5 standard errors
    hard = SinkhornLayer(0.8, noise=2.0, num_samples=count, hard=True)(x)
    law = pgs.GumbelMatching(x / 2)
    P = law.enumerate_support()
    want = (law.log_prob(P).exp()[:, None, None] * P).sum(0)
    assert ((hard.mean(0) - want).abs() < 5 * (want * (1 - want) / count).sqrt()).all()


def test_noise_only_in_training():
    x = torch.randn(2, N, N)
    layer = SinkhornLayer(1.0, noise=1.0, num_samples=3)
    assert layer(x).shape == (3, 2, N, N)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert layer(x).shape == (3, 2, N, N)
    assert torch.equal(layer(x), SinkhornLayer(1.0)(x).expand(3, 2, N, N))


def test_settings_between_calls():
    x = torch.randn(N, N)
    layer = SinkhornLayer(1.0)
    layer.temperature = 0.2
    assert torch.equal(layer(x), SinkhornLayer(0.2)(x))
    layer.noise = 1.0
    assert not torch.equal(layer(x), SinkhornLayer(0.2)(x))
    assert "temperature=0.2, noise=1" in repr(layer)
    with pytest.raises(ValueError, match="temperature must be positive and finite, but is 0"):
        layer.temperature = 0
    assert layer.temperature == 0.2


@pytest.mark.parametrize("masked", [False, True])
def test_straight_through(masked):
    """Hard forward, relaxed backward, at the same noise."""
    mask = MASK if masked else None
    x = torch.randn(3, N, N, requires_grad=True)
    results = []
    for hard in (True, False):
        torch.manual_seed(4)
        P = SinkhornLayer(0.5, noise=1.0, hard=hard)(x, mask)
        weight = torch.linspace(-1, 1, N * N).reshape(N, N).square()
        results.append((P, torch.autograd.grad((weight * P).sum(), x)[0]))
    (hard, hard_grad), (soft, soft_grad) = results
    assert pgs.constraints.permutation.check(hard.detach().round()).all()
    assert torch.allclose(hard, pgs.matching(soft.detach().log()))  # M(log S(z)) = M(z)
    assert torch.equal(hard_grad, soft_grad)
    assert (hard_grad != 0).any()


@pytest.mark.parametrize(
    "options", [{}, {"noise": 1.0}, {"noise": 1.0, "num_samples": 2}, {"num_iters": 3}, {"noise": 1.0, "num_iters": 3}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(options, masked, float64_only):
    """Against finite differences with the noise held."""
    layer = SinkhornLayer(0.6, **options)
    mask = MASK[0] if masked else None

    def matrices(x):
        torch.manual_seed(7)
        return layer(x, mask)

    def logarithms(x):
        torch.manual_seed(7)
        log_p = layer.log_p(x, mask)
        return log_p[log_p > -torch.inf]

    x = torch.randn(N, N, requires_grad=True)
    assert torch.autograd.gradcheck(matrices, x)
    assert torch.autograd.gradcheck(logarithms, x)


def test_logarithm_where_entries_underflow():
    x = 1000 * torch.eye(3)
    log_p = SinkhornLayer(1.0).log_p(x)
    assert torch.allclose(log_p.diagonal(), torch.zeros(3))
    assert (log_p + 1000 * (1 - torch.eye(3))).abs().max() < 1  # off the diagonal about -1000, where P is zero


def test_mask_logits():
    x = torch.randn(3, N, N)
    z = mask_logits(x, MASK)
    assert torch.equal(z[1], x[1])
    assert z[0, 1].tolist() == [-torch.inf] * 3 + [0, -torch.inf]
    assert z[0, 4].tolist() == [-torch.inf] * 4 + [0]
    assert torch.equal(z[0][MASK[0]][:, :3], x[0][MASK[0]][:, :3])
    assert torch.equal(mask_logits(x[0], MASK[0]), z[0])
    draws = pgs.GumbelSinkhorn(0.5, z).sample((2,))  # laws take them
    assert torch.equal(draws[:, 2, [0, 1, 2, 4]], torch.eye(N)[1:].expand(2, 4, N))


def test_under_vmap(tol):
    x = torch.randn(4, N, N)
    layer = SinkhornLayer(0.5)
    assert torch.allclose(torch.func.vmap(layer)(x), layer(x), atol=10 * tol)


def test_float32_stays():
    x = torch.randn(2, N, N, dtype=torch.float32)
    layer = SinkhornLayer(0.5, noise=1.0)
    assert layer(x, MASK[:2]).dtype == layer.log_p(x).dtype == torch.float32
    assert SinkhornLayer(hard=True)(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, but is -1"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, but is Tensor"),
        ({"hard": "yes"}, TypeError, "hard must be True or False, but is 'yes'"),
        ({"noise": -0.5}, ValueError, "noise must be at least 0 and finite, but is -0.5"),
        ({"noise": "1"}, TypeError, "noise must be a number, but is str"),
        ({"num_samples": 0}, ValueError, "num_samples must be an integer of at least 1, but is 0"),
        ({"num_iters": 1.5}, ValueError, "num_iters must be an integer of at least 1, but is 1.5"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        SinkhornLayer(**options)


@pytest.mark.parametrize(
    ("logits", "mask", "error", "text"),
    [
        (torch.zeros(2, 3, 4), None, ValueError, "logits must be square"),
        ([[0.0]], None, TypeError, "logits must be a torch.Tensor of shape .* but got list"),
        (torch.zeros(3, 3).long(), None, TypeError, "logits must have a floating dtype"),
        (torch.full((2, 3, 3), torch.nan), None, ValueError, r"logits of batch item 0 has the entry nan at row 0, column 0"),
        (torch.full((3, 3), torch.nan), torch.ones(3).bool(), ValueError, "logits has the entry nan"),
        (torch.zeros(3, 3), torch.ones(3), TypeError, "mask must be a bool tensor .* but is torch.float"),
        (torch.zeros(3, 3), [True] * 3, TypeError, "mask must be a bool tensor .* but is list"),
        (
            torch.zeros(3, 3),
            torch.ones(1).bool(),
            ValueError,
            r"mask must broadcast to \(3,\), .* shape \(1,\)",
        ),
        (torch.zeros(3, 3), torch.ones(2, 3).bool(), ValueError, r"mask must broadcast to \(3,\)"),
        (
            torch.zeros(2, 3, 3),
            torch.eye(3)[:2].bool() & torch.tensor([True, False, True]),
            ValueError,
            "mask of batch item 1",
        ),
    ],
)
@pytest.mark.parametrize("mode", [True, False])
def test_bad_input(logits, mask, error, text, mode):
    with pytest.raises(error, match=text):
        SinkhornLayer(noise=1.0).train(mode)(logits, mask)


def test_warnings_of_the_operator_pass_through():
    x = torch.zeros(2, 2)
    x[1, 0] = -torch.inf
    with pytest.warns(pgs.SupportWarning):
        SinkhornLayer()(x)
