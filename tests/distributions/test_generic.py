"""One suite for every law; each test names the one of Pyro's own (in its ``tests/distributions``) that it corresponds to.

Pyro's ``test_gof`` has its place in the tests of each law, ``test_cdf_icdf`` none: matrices have no order.
"""

import contextlib
import copy
import inspect
import io
import itertools
import math
import pickle
import warnings

import pyro
import pytest
import torch
from dist_fixture import FIXTURES, SAMPLE, SCORE
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from torch.distributions import kl_divergence

import pyro_gs
from pyro_gs import GumbelSinkhorn, GumbelSinkhornStraightThrough, RoundingPermutation, StickBreakingPermutation
from pyro_gs.distributions.relaxed import plain


@pytest.fixture(params=FIXTURES, ids=str)
def fixture(request):
    return request.param


@pytest.fixture
def law(fixture):
    return fixture.make()


def only(keep, reason):
    """Fixtures for which a check has a meaning; the others are left out, and not skipped one by one."""
    kept = [f for f in FIXTURES if keep(f)]
    assert kept, reason
    return pytest.mark.parametrize("fixture", kept, ids=str)


def is_discrete(fixture):
    return not fixture.law.has_rsample


def is_enumerable(fixture):
    return is_discrete(fixture) and fixture.make().event_shape[-1] <= 4


def close(a, b):
    a, b = plain(a), plain(b)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-4 if a.dtype == torch.float32 else 1e-7)


def parameters(fixture):
    """Free real parameters, as leaves, and the law as a function of them."""
    given = fixture.params()
    free = {
        name: value
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "center"
    }
    leaves = [torch.where(value == -torch.inf, 0.0, value).requires_grad_() for value in free.values()]

    def build(*values):
        parts = {
            name: torch.where(value == -torch.inf, -torch.inf, new)
            for (name, value), new in zip(free.items(), values, strict=True)
        }
        return fixture.law(**{**given, **parts})

    return leaves, build


def has_parameters(fixture):
    return bool(parameters(fixture)[0])


def test_every_public_law_is_here():
    public = [getattr(pyro_gs, name) for name in pyro_gs.__all__]
    laws = {value for value in public if isinstance(value, type) and issubclass(value, TorchDistribution)}
    assert laws == {fixture.law for fixture in FIXTURES}


# --- all laws


def test_shapes(fixture, law):
    # test_distributions.py: test_batch_log_prob_shape; test_shapes.py
    event = law.event_shape
    assert law.batch_shape == fixture.batch_shape
    assert law.event_dim == 2
    assert event[0] == event[1] or fixture.law is pyro_gs.SparseGumbelSinkhorn
    assert law.shape((7,)) == (7, *law.batch_shape, *event)
    for sample_shape in ((), (3,), (2, 3)):
        value = law.sample(torch.Size(sample_shape))
        assert value.shape == sample_shape + law.batch_shape + event
        assert law.log_prob(value).shape == sample_shape + law.batch_shape
        assert law.log_prob(value).isfinite().all()


def test_support_shape(fixture, law):
    # test_distributions.py: test_support_shape, test_support_is_discrete, test_support_is_not_discrete
    value = law.sample(torch.Size((5,)))
    inside = law.support.check(plain(value))
    assert inside.shape == (5, *law.batch_shape)
    if fixture.law is GumbelSinkhornStraightThrough:  # values on the vertices, densities at the relaxed points behind them
        assert pyro_gs.constraints.permutation.check(value).all()
    assert inside.all()
    assert law.support.event_dim == law.event_dim
    assert law.support.is_discrete == is_discrete(fixture)
    outside = torch.full_like(plain(value), torch.nan if fixture.law is RoundingPermutation else 0.9)
    assert not law.support.check(outside if law.event_shape[0] > 1 else outside - 0.5).any()


def test_infer_shapes(fixture, law):
    # test_distributions.py: test_infer_shapes
    shapes = {name: getattr(value, "shape", ()) for name, value in fixture.params().items()}
    assert fixture.law.infer_shapes(**shapes) == (law.batch_shape, law.event_shape)


def test_batch_entropy_shape(fixture, law):
    # test_distributions.py: test_batch_entropy_shape
    if fixture.law in (StickBreakingPermutation, RoundingPermutation):
        with pytest.raises(NotImplementedError):
            law.entropy()
        return
    assert law.entropy().shape == law.batch_shape
    assert law.entropy().isfinite().all()


def moments(law):
    """What a law has of mean, variance, mode and marginals (with their standard errors)."""
    for name in ("mean", "variance", "mode"):
        with contextlib.suppress(NotImplementedError):
            yield name, getattr(law, name)
    if hasattr(law, "marginals"):
        found = law.marginals()
        for part in found if isinstance(found, tuple) else [found]:
            yield "marginals", part


def test_moments_have_the_shape_of_a_sample(fixture, law):
    # test_independent.py: test_independent, for mean and variance
    found = list(moments(law))
    assert found or not is_discrete(fixture)
    for name, value in found:
        assert value.shape == law.shape(), name
        assert value.isfinite().all(), name


def test_score_errors_event_dim_mismatch(law):
    # test_distributions.py: test_score_errors_event_dim_mismatch
    n, k = law.event_shape
    for shape in ((*law.shape(), 1), law.shape()[:-1], (*law.batch_shape, n + 1, k + 1)):
        if shape[-2:] != (n, k):
            with pytest.raises(ValueError, match=rf"value must have shape \(\.\.\., {n}, {k}\), but has"):
                law.log_prob(torch.ones(shape))


def test_score_errors_non_broadcastable_data_shape(law):
    # test_distributions.py: test_score_errors_non_broadcastable_data_shape
    law = law.expand((2, *law.batch_shape))
    with pytest.raises(ValueError, match="value of shape .* does not broadcast with"):
        law.log_prob(law.sample()[:1].expand(3, *law.batch_shape[1:], *law.event_shape))


def check_sample_shapes(fixture, small, large):
    """The samples of either score under both, as far as a density is exact, alike."""
    for value in (small.sample(), large.sample()):
        found = large.log_prob(value)
        assert found.shape == large.batch_shape
        if fixture.exact:
            assert close(small.log_prob(value).expand(large.batch_shape), found)


@only(lambda f: is_discrete(f) and f.law is not pyro_gs.GumbelMatching, "what a law has exactly, not by draws")
def test_items_of_an_expanded_law_are_alike(law):
    # what test_distributions.py leaves to each law
    def of(any_law, name):
        found = getattr(any_law, name)
        return found() if callable(found) else found

    for name in {"mean", "marginals", "mode", "entropy", "log_normalizer"} & set(dir(law)):
        want = None
        with contextlib.suppress(NotImplementedError):  # torch's own, of what a law does not have
            want = of(law, name)
        for shape in ((3,), (2, 1)) if want is not None else ():
            assert close(of(law.expand((*shape, *law.batch_shape)), name), want.expand(*shape, *want.shape)), name


@pytest.mark.parametrize("sample_shape", [(), (2, 3)])
def test_expand_by_and_expand_new_dim(fixture, law, sample_shape):
    # test_distributions.py: test_expand_by, test_expand_new_dim
    shape = sample_shape + law.batch_shape
    for shape_type in (torch.Size, tuple, list):
        for large in (law.expand_by(shape_type(sample_shape)), law.expand(shape_type(shape))):
            assert type(large) is type(law)
            assert large.batch_shape == shape
    check_sample_shapes(fixture, law, large)
    default = TorchDistribution.expand(law, torch.Size(shape))
    assert isinstance(default, ExpandedDistribution)
    check_sample_shapes(fixture, law, default)


def test_expand_existing_dim(fixture, law):
    # test_distributions.py: test_expand_existing_dim
    law = law.expand((1, *law.batch_shape))
    large = law.expand((5, *law.batch_shape[1:]))
    assert type(large) is type(law)
    check_sample_shapes(fixture, law, large)
    if law.event_shape[0] > 1:  # items of an expanded law are draws of their own
        value = plain(law.expand((64, *law.batch_shape[1:])).sample())
        assert not (value == value[:1]).all()


@pytest.mark.parametrize("sample_shapes", [[(2, 1), (2, 3)], [(2, 1, 1), (2, 1, 3), (2, 5, 3)]])
def test_subsequent_expands(fixture, law, sample_shapes):
    # test_distributions.py: test_subsequent_expands_ok
    batch_shape, small = law.batch_shape, law
    for shape in sample_shapes:
        large = small.expand(shape + batch_shape)
        assert type(large) is type(law)
        assert large.batch_shape == shape + batch_shape
        check_sample_shapes(fixture, small, large)
        small = large


@pytest.mark.parametrize(("first", "then"), [((2, 1), (4, 3)), ((2, 4), (2, 2, 1)), ((1, 2, 1), (2, 1))])
def test_expand_error(law, first, then):
    # test_distributions.py: test_expand_error
    large = law.expand(first + law.batch_shape)
    with pytest.raises((RuntimeError, ValueError)):
        large.expand(then + law.batch_shape)


def test_options_survive_expand(fixture, law):
    # what test_distributions.py does not ask: parameters and options of an expanded law
    large = law.expand((2, *law.batch_shape))
    for name, value in fixture.params().items():
        mine = getattr(large, name)
        if isinstance(value, torch.Tensor):
            assert close(mine[0], getattr(law, name)), name
        elif isinstance(value, (str, int)):
            assert mine == value, name
    assert large._validate_args == law._validate_args


def test_to_event(fixture, law):
    # test_independent.py: test_independent, test_expand; test_distributions.py: test_expand_reshaped_distribution
    law = law.expand((2, 3, *law.batch_shape))
    for dims in range(1, len(law.batch_shape) + 1):
        joint = law.to_event(dims)
        cut = len(law.batch_shape) - dims
        assert joint.batch_shape == law.batch_shape[:cut]
        assert joint.event_shape == law.batch_shape[cut:] + law.event_shape
        value = joint.sample((2,))
        assert value.shape == (2, *law.batch_shape, *law.event_shape)
        found = joint.log_prob(value)
        assert found.shape == (2, *joint.batch_shape)
        if fixture.exact:
            assert close(found, law.log_prob(value).flatten(1 + cut).sum(-1))
        large = joint.expand((4, *joint.batch_shape))
        assert large.sample().shape == (4, *law.batch_shape, *law.event_shape)
    with pytest.raises(ValueError, match="reinterpreted_batch_ndims"):
        law.to_event(len(law.batch_shape) + 1)


def test_mask(fixture, law):
    # test_mask.py: test_mask
    law = law.expand((2, *law.batch_shape))
    mask = torch.rand(law.batch_shape) < 0.5
    hidden = law.mask(mask)
    assert hidden.batch_shape == law.batch_shape
    assert hidden.event_shape == law.event_shape
    value = law.sample()
    found = hidden.log_prob(value)
    assert (found[~mask] == 0).all()
    if fixture.exact:
        assert close(found, torch.where(mask, law.log_prob(value), 0.0))
        for mine, want in zip(hidden.score_parts(value), law.score_parts(value).scale_and_mask(mask=mask), strict=True):
            assert close(torch.as_tensor(mine), torch.as_tensor(want))
        assert close(found, scale_and_mask(law.log_prob(value), mask=mask))
    for flag in (True, False):
        assert law.mask(flag).log_prob(value).shape == law.batch_shape
    assert (law.mask(False).log_prob(value) == 0).all()
    if is_enumerable(fixture):
        assert torch.equal(hidden.enumerate_support(), law.enumerate_support())


def test_mask_invalid_shape(law):
    # test_mask.py: test_mask_invalid_shape
    law = law.expand((2, *law.batch_shape))
    with pytest.raises(ValueError):  # noqa: PT011, Pyro's own
        law.mask(torch.ones(3, *law.batch_shape[1:], dtype=torch.bool))


@only(lambda f: f.kl, "laws with a KL divergence")
def test_kl(fixture):
    # test_kl.py: test_kl_independent_normal; test_mask.py: test_kl_divergence
    q, p = fixture.make(), fixture.make()
    want = kl_divergence(q, p)
    assert want.shape == q.batch_shape
    assert (want >= 0).all()
    shape = (3, 2, *q.batch_shape)
    large, other = q.expand(shape), p.expand(shape)
    assert close(kl_divergence(large, other), want.expand(shape))  # expand keeps the class, and so the KL
    assert close(kl_divergence(large, p), want.expand(shape))
    assert close(kl_divergence(q, other), want.expand(shape))
    assert close(kl_divergence(large.to_event(1), other.to_event(1)), kl_divergence(large, other).sum(-1))
    mask = torch.rand(shape) < 0.5
    parts = [kl_divergence(large.mask(m).to_event(2), other.mask(m).to_event(2)) for m in (mask, ~mask)]
    assert close(sum(parts), kl_divergence(large.to_event(2), other.to_event(2)))
    assert close(kl_divergence(q, q), torch.zeros(q.batch_shape))


@only(lambda f: not f.kl, "laws without one")
def test_kl_is_refused(fixture):
    # a law without a KL divergence says so, and TraceMeanField_ELBO samples it
    with pytest.raises(NotImplementedError):
        kl_divergence(fixture.make(), fixture.make())


def test_score_parts(fixture, law):
    # test_score_parts of Pyro's tests of single laws: what has_rsample decides
    value = law.sample()
    log_prob, score, entropy = law.score_parts(value)
    assert log_prob.shape == law.batch_shape
    if law.has_rsample:
        assert score == 0
        assert torch.equal(entropy, log_prob)
    else:
        assert torch.equal(score, log_prob)
        assert entropy == 0


def test_copies(fixture, law):
    # test_pickle.py: test_pickle
    buffer = io.BytesIO()
    torch.save(law, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law), torch.load(buffer, weights_only=False)):
        assert type(again) is type(law)
        torch.manual_seed(1)
        want = law.sample()
        torch.manual_seed(1)
        assert torch.equal(plain(want), plain(again.sample()))
        if fixture.exact:
            assert torch.equal(law.log_prob(want), again.log_prob(want))
        for value in (pickle.loads(pickle.dumps(want)), copy.deepcopy(want)):
            assert torch.equal(plain(want), plain(value))
            if fixture.exact:
                assert torch.equal(law.log_prob(want), law.log_prob(value))


def test_same_seed_same_sample(law):
    # test_distributions.py has none
    torch.manual_seed(3)
    one = law.sample((2,))
    torch.manual_seed(3)
    assert torch.equal(plain(one), plain(law.sample((2,))))


def test_in_plates_the_class_is_kept(law):
    # test_distributions.py has none; without it a plate would hide the registered KL
    sizes = [3 if size == 1 else size for size in (law.batch_shape or (3,))]

    def model():
        with contextlib.ExitStack() as stack:
            for dim, size in enumerate(sizes):
                stack.enter_context(pyro.plate(f"plate {dim}", size, dim=dim - len(sizes)))
            pyro.sample("P", law)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["P"]
    assert type(site["fn"]) is type(law)
    assert site["value"].shape == (*sizes, *law.event_shape)
    assert site["log_prob"].shape == tuple(sizes)


# --- gradients


@pytest.mark.usefixtures("float64_only")
@only(lambda f: f.exact and has_parameters(f), "laws with real parameters")
def test_gradient_of_log_prob(fixture):
    # test_gradient_flow.py; against finite differences
    leaves, build = parameters(fixture)
    value = fixture.make().sample((2,))
    assert torch.autograd.gradcheck(lambda *x: build(*x).log_prob(value), leaves, fast_mode=True)


@pytest.mark.usefixtures("float64_only")
@only(
    lambda f: f.law.has_rsample and f.law is not GumbelSinkhornStraightThrough and has_parameters(f),
    "reparametrized laws",
)
def test_gradient_of_samples(fixture):
    # test_gradient_flow.py; against finite differences, at the same noise
    leaves, build = parameters(fixture)

    def draw(*x):
        torch.manual_seed(1)
        return plain(build(*x).rsample((2,)))

    assert torch.autograd.gradcheck(draw, leaves, fast_mode=True)


@only(lambda f: f.law is GumbelSinkhornStraightThrough, "straight-through laws")
def test_straight_through_gradient(fixture):
    # test_relaxed_straight_through.py: test_onehot_svi_usage and the like; the gradient is that of the relaxed sample
    leaves, build = parameters(fixture)
    weight = torch.randn(fixture.make().shape())
    found = []
    for kind in (GumbelSinkhorn, GumbelSinkhornStraightThrough):
        law = build(*leaves)
        torch.manual_seed(1)
        value = kind.rsample(law)
        found.append(torch.autograd.grad((plain(value) * weight).sum(), leaves, allow_unused=True))
    for soft, hard in zip(*found, strict=True):
        assert torch.equal(soft, hard)


def test_samples_carry_no_gradient(fixture):
    # test_distributions.py has none; ``sample`` is ``rsample`` without a history
    leaves, build = parameters(fixture)
    law = build(*leaves)
    assert not law.sample().requires_grad
    if law.has_rsample and leaves and law.event_shape[0] > 1:
        assert law.rsample().requires_grad


# --- enumeration


@only(is_enumerable, "enumerable laws")
def test_enumerate_support(fixture):
    # test_distributions.py: test_enumerate_support, test_enumerate_support_shape, test_expand_enumerate_support
    law = fixture.make()
    wide = law.enumerate_support()
    narrow = law.enumerate_support(expand=False)
    assert wide.shape == (len(wide), *law.batch_shape, *law.event_shape)
    assert torch.equal(wide, law.enumerate_support(expand=True))
    assert narrow.shape == (len(wide),) + (1,) * len(law.batch_shape) + law.event_shape
    assert (wide == narrow).all()
    if fixture.exact:
        assert close(torch.logsumexp(law.log_prob(wide), 0), torch.zeros(law.batch_shape))
    if isinstance(law, pyro_gs.GibbsMatching):  # not of permutations: test_gibbs_matching.py lists its support
        return
    assert pyro_gs.constraints.permutation.check(wide).all()
    # Against all n! of them: those that some item allows, each once, in lexicographic order.
    n = law.n
    everything = pyro_gs.to_matrix(torch.tensor(list(itertools.permutations(range(n)))))
    score = law.log_prob(everything.reshape(-1, *narrow.shape[1:])).reshape(len(everything), -1)
    assert torch.equal(narrow.reshape(-1, n, n), everything[(score > -math.inf).any(1)])
    large = law.expand((4, *law.batch_shape))
    assert large.enumerate_support().shape == (len(wide), 4, *law.batch_shape, n, n)


@only(lambda f: not is_discrete(f), "continuous laws")
def test_continuous_laws_are_not_enumerated(fixture):
    # test_distributions.py: test_enumerate_support_shape skips them
    assert not fixture.law.has_enumerate_support
    with pytest.raises(NotImplementedError):
        fixture.make().enumerate_support()


def test_too_many_to_enumerate():
    # test_distributions.py has none; n! grows
    for law in (pyro_gs.GibbsPermutation(torch.zeros(9, 9)), pyro_gs.PlackettLuce(torch.zeros(9))):
        with pytest.raises(ValueError, match="with n=9 has about 362880 permutations, more than the 40320"):
            law.enumerate_support()


# --- arguments and validation


def test_arg_constraints(fixture, law):
    # test_distributions.py: test_distribution_validate_args; torch's own tests of arg_constraints
    options = {"self", "validate_args", "num_particles", "normalizer", "capacities", "n"}
    assert set(fixture.law.arg_constraints) == set(inspect.signature(fixture.law.__init__).parameters) - options
    for name, constraint in fixture.law.arg_constraints.items():
        value = getattr(law, name)
        if value is None:  # not given
            continue
        good = constraint.check(value)
        assert good.all(), name
        assert good.shape == value.shape[: value.dim() - constraint.event_dim], name
        assert good.shape == law.batch_shape, name
        if value.is_floating_point():
            assert not constraint.check(torch.full_like(value, torch.nan)).any(), name


def bad_value(law):
    return torch.full(law.shape(), torch.nan if isinstance(law, RoundingPermutation) else 0.7)


def test_validation(fixture, law):
    # test_distributions.py: test_distribution_validate_args; here for values, since arguments are checked in any case
    for checked in (law, law.expand((2, *law.batch_shape)), fixture.make(validate_args=True), copy.deepcopy(law)):
        with pytest.raises(ValueError, match="value|P is not doubly"):
            checked.log_prob(bad_value(law))


def test_validation_can_be_turned_off(fixture):
    # test_distributions.py: test_distribution_validate_args; pyro.enable_validation calls set_default_validate_args
    with pyro.validation_enabled(False):
        careless, careful = fixture.make(), fixture.make(validate_args=True)
    for law in (careless, fixture.make(validate_args=False), careless.expand((2, *careless.batch_shape))):
        assert law._validate_args is False
        if is_discrete(fixture):
            assert (law.log_prob(bad_value(law)) == -torch.inf).all()
        elif isinstance(law, GumbelSinkhorn) and law._support.full:
            assert law.log_prob(bad_value(law)).shape == law.batch_shape
    with pytest.raises(ValueError, match="value|P is not doubly"):
        careful.log_prob(bad_value(careful))


# --- dtype and device


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_dtype_follows_the_parameters(fixture, given, default):
    # test_tensor_type.py; whatever the default dtype
    torch.set_default_dtype(torch.float64)
    law = fixture.make(dtype=given)
    torch.set_default_dtype(default)
    dtype = default if fixture.law is pyro_gs.UniformPermutation else given
    value = law.sample((2,))
    assert value.dtype == dtype
    assert law.log_prob(value).dtype == dtype
    other = value.to(torch.float32 if dtype == torch.float64 else torch.float64)
    if is_discrete(fixture):
        assert law.log_prob(other).dtype in (given, other.dtype)
    large = law.expand((2, *law.batch_shape))
    assert large.sample().dtype == dtype
    for name, part in moments(law):
        assert part.dtype == dtype, name
    with contextlib.suppress(NotImplementedError):
        assert law.entropy().dtype == dtype
    if fixture.kl:
        assert kl_divergence(law, law).dtype == dtype
    if is_enumerable(fixture):
        assert law.enumerate_support().dtype == dtype


@pytest.mark.cuda
def test_device_follows_the_parameters(fixture):
    # test_cuda.py: test_sample, test_batch_log_pdf
    law = fixture.make(device="cuda")
    value = law.sample((2,))
    assert value.device.type == law.log_prob(value).device.type == "cuda"
    if fixture.exact:
        torch.manual_seed(0)
        here = fixture.make(device="cpu")
        torch.manual_seed(0)
        there = fixture.make(device="cuda")
        assert close(here.log_prob(value.cpu()), there.log_prob(value).cpu())
    if is_enumerable(fixture):
        assert law.enumerate_support().device.type == "cuda"


# --- torch.jit.trace


REFUSAL = "torch.jit.trace cannot record .* which looks at values; take Trace_ELBO in place of JitTrace_ELBO"


def traced(function, inputs):
    """As Pyro traces: after a call that is not traced, without validation and without the warnings of a tracer."""
    function(*inputs)
    with warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(function, tuple(x.detach() for x in inputs), check_trace=False)


def check_traced(function, inputs, others):
    """The trace of a function at some inputs is right at others, with its gradient."""
    found = traced(function, inputs)
    for seed in range(3):
        outputs = []
        for one in (function, found):
            torch.manual_seed(seed)
            out = one(*others)
            outputs.append(out)
            if out.requires_grad:
                weight = torch.linspace(-1.0, 1.0, out.numel()).reshape(out.shape)
                outputs += torch.autograd.grad((out * weight).sum(), others)
        half = len(outputs) // 2
        assert all(close(a, b) for a, b in zip(outputs[:half], outputs[half:], strict=True))


@only(lambda f: f.exact, "laws with an exact log_prob")
def test_jit_log_prob(fixture):
    # tests/infer/test_jit.py: test_svi
    value = fixture.make().sample((2,)).detach()
    leaves, build = parameters(fixture)

    def score(*x):
        return build(*x).log_prob(value) if leaves else build().log_prob(*x)

    inputs, others = (leaves, parameters(fixture)[0]) if leaves else ([value], [fixture.make().sample((2,))])
    if "log_prob" in fixture.jit:
        check_traced(score, inputs, others)
        return
    with pytest.raises(NotImplementedError, match=REFUSAL):
        traced(score, inputs)


@only(has_parameters, "laws with real parameters")
def test_jit_sample(fixture):
    # tests/infer/test_jit.py: test_svi
    leaves, build = parameters(fixture)

    def draw(*x):
        return plain(build(*x)())

    if "sample" in fixture.jit:
        check_traced(draw, leaves, parameters(fixture)[0])
        return
    with pytest.raises(NotImplementedError, match=REFUSAL):
        traced(draw, leaves)


@only(lambda f: f.law.has_rsample and f.jit == SAMPLE | SCORE, "reparametrized laws that can be traced")
def test_jit_log_prob_of_a_sample(fixture):
    # tests/infer/test_jit.py: test_svi, of which this is the entropy
    leaves, build = parameters(fixture)

    def score(*x):
        law = build(*x)
        return law.log_prob(law.rsample((2,)))

    check_traced(score, leaves, parameters(fixture)[0])
