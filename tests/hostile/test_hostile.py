"""Hostile tensors: each call gives an answer without NaN or an exception that its docstring lists, and changes nothing.

``--hostile N`` tries N inputs for every call (by default 25); the count of what was tried is printed at the end.
"""

import inspect
import warnings

import pytest
import torch
from calls import CALLS, ELSEWHERE, documented
from hostile_tensors import Given
from hypothesis import given
from hypothesis import strategies as st
from trials import bounded, has_nan, names_of, state, tensors, trials

import pyro_gs as pgs

pytestmark = pytest.mark.usefixtures("float64_only")


def answer(function, arguments):
    """What a call returns, and gradients of the sum of its finite entries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = function(**arguments)
        # where +inf is the answer a sum has no gradient; -inf is a zero probability, whose entry is left out
        outputs = [out for out in tensors(result) if out.requires_grad and not bool((out == torch.inf).any())]
        inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        gradients = ()
        if outputs and inputs:
            total = sum(torch.where(out.isfinite(), out, 0).sum() for out in outputs)
            gradients = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else ()
    return result, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_right_answer_or_a_documented_exception(call, request):
    tried = request.config.hostile_tried
    allowed = documented(*call.raises)

    @trials(request)
    @given(st.data())
    def check(data):
        arguments = {name: data.draw(strategy, label=name) for name, strategy in call.arguments.items()}
        givens = [Given(value) for value in arguments.values() if isinstance(value, torch.Tensor)]
        before, generator = state(), torch.get_rng_state()
        result, gradients, refusal = (), (), None
        try:
            with bounded():
                result, gradients = answer(call.function, arguments)
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

    check()


def test_no_public_function_is_left_out():
    called = {name for call in CALLS for name in (call.name.partition(" ")[0],)}
    assert called <= {*pgs.__all__, *pgs.nn.__all__}
    missing = {name for name in pgs.__all__ if callable(getattr(pgs, name)) and name not in ELSEWHERE} - called
    missing -= {
        name for name in missing if inspect.isclass(getattr(pgs, name)) and issubclass(getattr(pgs, name), Exception)
    }
    assert not missing
    functions = {name for name in pgs.nn.__all__ if inspect.isfunction(getattr(pgs.nn, name))}
    assert functions <= called
