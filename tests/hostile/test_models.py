"""Hostile models: inference gives a right answer or an exception that it documents or that the model raises by itself.

``--hostile N`` tries N / 5 models for every way of inference.
"""

import warnings

import pyro
import pytest
import torch
from calls import documented
from calls_of_models import CALLS
from hostile_models import models
from hypothesis import given
from hypothesis import strategies as st
from trials import bounded, has_nan, names_of, state, trials

pytestmark = pytest.mark.usefixtures("float64_only")


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_right_answer_or_a_documented_exception(call, request):
    tried, allowed = request.config.hostile_tried, documented(*call.raises)

    @trials(request, 0.2)
    @given(st.data())
    def check(data):
        pieces = data.draw(models(gradients=not call.learns, scale=call.scale))  # SVI leaves some, as Pyro does
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        faults, givens = pieces.faults(), pieces.givens
        before, generator = state(), torch.get_rng_state()
        result, refusal = (), None
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = call.function(pieces)
        except Exception as error:
            refusal = error
        tried["answered" if refusal is None else "refused"] += 1
        if refusal is not None:
            if not names_of(refusal) & (allowed | faults) or not str(refusal).strip():
                raise refusal
        assert not has_nan(result), "NaN in the answer"
        assert all(each.unchanged() for each in givens), "an argument was changed"
        assert state() == before, "global state was changed"
        assert call.draws or torch.equal(torch.get_rng_state(), generator), "the global generator was used"
        assert call.learns or not pyro.get_param_store(), "parameters were left"

    check()
