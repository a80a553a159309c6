"""The law over candidates against the dense law under the same mask."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.distributions import kl_divergence

import pyro_gs as pgs
from pyro_gs import GumbelSinkhorn, SparseGumbelSinkhorn, gumbel_noise_kl, tightened_kl, to_dense, to_sparse
from pyro_gs.distributions.relaxed import RelaxedPermutation, plain
from pyro_gs.ops.gumbel import gumbel_noise

pytestmark = pytest.mark.usefixtures("float64_only")

BAND = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 1
BLOCKS = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 1)) > 0


def logits(scale=1.0):
    return (scale * torch.randn(2, 6, 6)).masked_fill(~torch.stack([BAND, BLOCKS]), -torch.inf)


@pytest.fixture
def both():
    """A sparse and a dense law, of batch shape (2,)."""
    x = logits()
    temperature = torch.tensor([0.5, 1.0])
    return SparseGumbelSinkhorn(temperature, *to_sparse(x)), GumbelSinkhorn(temperature, x)


def noise_of(law, shape, monkeypatch):
    """Make both laws draw the same noise at the same pairs."""
    noise = gumbel_noise(torch.Size(shape), torch.zeros(()))

    def draw(shape, like):
        return noise if shape[-1] == 6 else noise.gather(-1, law.candidates.expand(shape))

    for module in ("gumbel_sinkhorn", "sparse_gumbel_sinkhorn"):
        monkeypatch.setattr(f"pyro_gs.distributions.{module}.gumbel_noise", draw)


def test_draws_are_those_of_the_dense_law(both, monkeypatch):
    sparse, dense = both
    noise_of(sparse, (3, 2, 6, 6), monkeypatch)
    value, want = sparse.rsample((3,)), dense.rsample((3,))
    assert torch.allclose(to_dense(plain(value), sparse.candidates), plain(want), atol=1e-9)
    assert torch.equal(sparse.hard_sample((3,)), pgs.to_index(dense.hard_sample((3,))))
    assert torch.equal(to_dense(sparse.mode, sparse.candidates), dense.mode)


def test_densities_are_those_of_the_dense_law(both):
    sparse, dense = both
    value = sparse.rsample((4,))
    matrix = to_dense(plain(value), sparse.candidates)
    assert torch.allclose(sparse.log_prob(value), dense.log_prob(matrix), atol=1e-6)
    assert torch.equal(sparse.to_dense().logits, dense.logits)
    assert torch.equal(sparse.support.check(plain(value)), dense.support.check(matrix))


def test_a_cold_draw_keeps_its_logarithm():
    law = SparseGumbelSinkhorn(0.002, *to_sparse(logits(3.0)))
    value = law.sample((20,))
    assert isinstance(value, RelaxedPermutation)
    assert (plain(value) == 0).any()
    assert value.log_p.exp().sub(plain(value)).abs().max() < 1e-9
    assert law.log_prob(value).isfinite().all()
    lost = plain(value)[:, :1]
    with pytest.raises(ValueError, match="has a zero at row"):
        SparseGumbelSinkhorn(0.002, law.logits[:1], law.candidates[:1]).log_prob(lost)


@pytest.mark.parametrize("kl", [gumbel_noise_kl, tightened_kl])
def test_divergences_are_those_of_the_dense_laws(kl):
    x, x0 = logits(), logits(0.3)
    for t, t0 in ((1.0, 1.0), (0.5, torch.tensor([1.0, 2.0]))):
        free, free0 = (torch.where(z > -torch.inf, z, 0.0).requires_grad_() for z in (x, x0))
        found, gradients = [], []
        for law in (lambda t, z: GumbelSinkhorn(t, z), lambda t, z: SparseGumbelSinkhorn(t, *to_sparse(z))):
            q, p = (law(tau, torch.where(x > -torch.inf, z, -torch.inf)) for tau, z in ((t, free), (t0, free0)))
            found.append(kl(q, p))
            gradients.append(torch.autograd.grad(found[-1].sum(), (free, free0)))
        assert torch.allclose(*found, atol=1e-8)
        for dense, sparse in zip(*gradients, strict=True):
            assert torch.allclose(dense, sparse, atol=1e-8)


def test_divergence_of_laws_that_do_not_fit(both):
    sparse, _ = both
    uniform = SparseGumbelSinkhorn(1.0, torch.where(sparse.logits > -torch.inf, 0.0, -torch.inf), sparse.candidates)
    assert torch.equal(kl_divergence(sparse, uniform), tightened_kl(sparse, uniform))
    other = SparseGumbelSinkhorn(1.0, uniform.logits.flip(-1), sparse.candidates.flip(-1))
    with pytest.raises(ValueError, match="q and p must have the same candidates, in the same order"):
        kl_divergence(sparse, other)
    with pytest.raises(TypeError, match="both be dense or both sparse, but are SparseGumbelSinkhorn and GumbelSinkhorn"):
        gumbel_noise_kl(SparseGumbelSinkhorn(1.0, *to_sparse(torch.zeros(3, 3))), GumbelSinkhorn(1.0, torch.zeros(3, 3)))
    fewer = SparseGumbelSinkhorn(1.0, torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0, 1], [0, 1]]))
    one = SparseGumbelSinkhorn(1.0, torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]), torch.tensor([[0, 1], [0, 1]]))
    assert gumbel_noise_kl(one, fewer) == torch.inf


def test_pairs_on_no_permutation_are_forbidden():
    x = torch.zeros(3, 2)
    with pytest.warns(pgs.SupportWarning, match="row 0, column 1, which lies on no permutation"):
        law = SparseGumbelSinkhorn(1.0, x, torch.tensor([[0, 1], [1, 2], [1, 2]]))
    assert law.logits[0].tolist() == [0.0, -torch.inf]
    assert (plain(law.sample((5,)))[:, 0] == torch.tensor([1.0, 0.0])).all()


def test_bad_input():
    candidates = torch.tensor([[0, 1], [1, 0]])
    for arguments, error, message in [
        ((0.0, torch.zeros(2, 2), candidates), ValueError, "temperature must be positive"),
        ((1.0, torch.zeros(2, 2).half(), candidates), TypeError, "logits must have dtype torch.float32 or torch.float64"),
        ((1.0, torch.zeros(2, 2), candidates + 1), ValueError, "candidates has column 2 at row 0"),
        ((torch.ones(3), torch.zeros(2, 2, 2), candidates), ValueError, "temperature of shape .* does not broadcast"),
    ]:
        with pytest.raises(error, match=message):
            SparseGumbelSinkhorn(*arguments)
    law = SparseGumbelSinkhorn(1.0, torch.zeros(2, 2), candidates)
    with pytest.raises(ValueError, match="value is not in the support of SparseGumbelSinkhorn"):
        law.log_prob(torch.ones(2, 2))
    with pytest.raises(ValueError, match="num_samples"):
        law.entropy(0)


# --- in a model and a guide


def scene(n=12, k=4):
    """Points on a circle, where they are seen, and the candidates of each: the truth and its neighbours to one side."""
    angle = 2 * torch.pi * torch.arange(n) / n
    x = torch.stack([angle.cos(), angle.sin()], -1)
    order = torch.randperm(n)
    y = x[order] + 0.02 * torch.randn(n, 2)
    return x, y, order, (order[:, None] + torch.arange(-1, k - 1)) % n


def model(x, y, candidates):
    P = pyro.sample("P", SparseGumbelSinkhorn(1.0, torch.zeros(candidates.shape), candidates))
    pyro.sample("y", dist.Normal((P[..., None] * x[candidates]).sum(-2), 0.05).to_event(2), obs=y)


def guide(x, y, candidates):
    X = pyro.param("X", lambda: torch.zeros(candidates.shape))
    pyro.sample("P", SparseGumbelSinkhorn(0.5, X, candidates))


def test_a_guide_finds_the_matching():
    x, y, order, candidates = scene()
    svi = SVI(model, guide, Adam({"lr": 0.3}), TraceMeanField_ELBO())
    losses = [svi.step(x, y, candidates) for _ in range(50)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    law = SparseGumbelSinkhorn(0.5, pyro.param("X").detach(), candidates)
    right = (law.hard_sample((200,)) == order).double().mean()
    assert right > 0.8  # 1 / 4 for a guess among candidates


def test_the_objective_is_that_of_the_dense_law(monkeypatch):
    """TraceMeanField_ELBO at the same noise, dense and sparse, and its gradient."""
    torch.manual_seed(2)
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    start = logits()[0]
    law = SparseGumbelSinkhorn(0.5, *to_sparse(start))
    noise_of(law, (6, 6), monkeypatch)
    free = start.masked_fill(start == -torch.inf, 0.0).requires_grad_()
    found = []
    for make, read in (
        (lambda t, z: GumbelSinkhorn(t, z), lambda P: P @ x),
        (lambda t, z: SparseGumbelSinkhorn(t, *to_sparse(z)), lambda P: (P[..., None] * x[law.candidates]).sum(-2)),
    ):

        def prior(make=make, read=read):
            P = pyro.sample("P", make(1.0, torch.where(start > -torch.inf, 0.0, -torch.inf)))
            pyro.sample("y", dist.Normal(read(P), 0.5).to_event(2), obs=y)

        def posterior(make=make):
            pyro.sample("P", make(0.5, torch.where(start > -torch.inf, free, -torch.inf)))

        loss = TraceMeanField_ELBO().differentiable_loss(prior, posterior)
        found.append((loss.detach(), torch.autograd.grad(loss, free)[0]))
    for dense, sparse in zip(*found, strict=True):
        assert torch.allclose(dense, sparse, atol=1e-8)


def test_densities_in_an_elbo():
    x, y, _, candidates = scene(6, 3)
    Trace_ELBO().differentiable_loss(model, guide, x, y, candidates).backward()
    assert pyro.param("X").grad.isfinite().all()


def test_where_it_does_not_fit_it_says_so():
    x, y, _, candidates = scene(6, 3)
    with pytest.raises(NotImplementedError, match="has no unconstraining transform"):
        AutoNormal(model)(x, y, candidates)
    with pytest.raises(NotImplementedError, match="harden knows no hard law of SparseGumbelSinkhorn"):
        pgs.harden(guide)(x, y, candidates)
