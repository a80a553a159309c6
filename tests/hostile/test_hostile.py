"""Hostile tensors: each call gives an answer without NaN or an exception that its docstring lists, and changes nothing.

Where `right.py` knows how, the answer is checked against the definition; that of any layout against that of a plain copy.

``--hostile N`` tries N inputs for every call (by default 25); the count of what was tried is printed at the end.
"""

import warnings

import calls_of_models
import calls_of_results
import pytest
import torch
from calls import CALLS, NOT_CALLED, documented
from hostile_tensors import Given
from hypothesis import given
from hypothesis import strategies as st
from right import RIGHT
from trials import bounded, has_nan, names_of, state, tensors, trials

import pyro_gs as pgs
from pyro_gs import plotting

pytestmark = pytest.mark.usefixtures("float64_only")


def answer(function, arguments):
    """What a call returns, gradients of the sum of its finite entries, and whether it warns that it did not get there."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = function(**arguments)
        # where +inf is the answer a sum has no gradient; -inf is a zero probability, whose entry is left out
        outputs = [out for out in tensors(result) if out.requires_grad and not bool((out == torch.inf).any())]
        inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        gradients = ()
        if outputs and inputs:
            total = sum(torch.where(out.isfinite(), out, 0).sum() for out in outputs)
            gradients = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else ()
    unfinished = any(issubclass(each.category, pgs.SinkhornWarning) for each in told)
    return result, [gradient for gradient in gradients if gradient is not None], unfinished


def plain(value):
    """A tensor's values in plain memory."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone(memory_format=torch.contiguous_format).requires_grad_(value.requires_grad)


def alike(one, other):
    """The same numbers up to rounding, infinities among them."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return (
        torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
        if one.is_floating_point()
        else torch.equal(one, other)
    )


@pytest.mark.parametrize("call", [*CALLS, *calls_of_results.CALLS], ids=str)
def test_a_right_answer_or_a_documented_exception(call, request):
    tried = request.config.hostile_tried
    allowed = documented(*call.raises)

    @trials(request)
    @given(st.data())
    def check(data):
        arguments = {name: data.draw(strategy, label=name) for name, strategy in call.arguments.items()}
        givens = [Given(value) for value in arguments.values() if isinstance(value, torch.Tensor)]
        before, generator = state(), torch.get_rng_state()
        result, gradients, unfinished, refusal = (), (), False, None
        try:
            with bounded():
                result, gradients, unfinished = answer(call.function, arguments)
        except Exception as error:
            refusal = error
        tried["answered" if refusal is None else "refused"] += 1
        if refusal is not None:
            if not names_of(refusal) & allowed or not str(refusal).strip():
                raise refusal
        if call.looks:
            assert not has_nan(result), "NaN in the answer"
            assert not has_nan(gradients), "NaN in the gradient"
        assert all(each.unchanged() for each in givens), "an argument was changed"
        assert state() == before, "global state was changed"
        assert call.draws or torch.equal(torch.get_rng_state(), generator), "the global generator was used"
        if refusal is None and not unfinished:
            if call.name in RIGHT:
                RIGHT[call.name](arguments, result)
            if not all(each.value.is_contiguous() for each in givens):
                torch.set_rng_state(generator)
                again, slopes, _ = answer(call.function, {name: plain(value) for name, value in arguments.items()})
                assert all(map(alike, tensors(result), tensors(again))), "another layout, another answer"
                assert all(map(alike, gradients, slopes)), "another layout, another gradient"

    check()


def test_no_public_name_is_left_out():
    called = {call.name.partition(" ")[0] for call in [*CALLS, *calls_of_results.CALLS, *calls_of_models.CALLS]}
    pictures = {name for name in vars(plotting) if name.startswith("plot_")}
    public = {name for name in pgs.__all__ if callable(getattr(pgs, name))} | set(pgs.nn.__all__) | pictures
    public -= {name for name in public if isinstance(vars(pgs).get(name), type) and issubclass(vars(pgs)[name], Exception)}
    assert called <= public
    assert not called & NOT_CALLED
    assert public - called == NOT_CALLED
