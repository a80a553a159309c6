"""What every trial of hostile input has: a bound on its time, and state that it must not change."""

import contextlib
import dataclasses
import signal

import pyro
import torch
from hypothesis import HealthCheck, settings
from pyro.poutine.indep_messenger import _DIM_ALLOCATOR
from pyro.poutine.runtime import _PYRO_STACK

SECONDS = 20  # of processor time; what is asked takes milliseconds


class Hung(BaseException):
    pass


def _hung(*_):
    raise Hung


@contextlib.contextmanager
def bounded():
    """Raise Hung where what is inside takes too long."""
    previous = signal.signal(signal.SIGVTALRM, _hung)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def trials(request, share=1.0):
    """Settings for a share of as many inputs as ``--hostile`` says."""
    return settings(
        max_examples=max(1, round(share * request.config.getoption("--hostile"))),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def state():
    """What no call may change."""
    return [
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.distributions.Distribution._validate_args,
        torch.are_deterministic_algorithms_enabled(),
        pyro.distributions.is_validation_enabled(),
        pyro.infer.util.is_validation_enabled(),
        pyro.poutine.util.is_validation_enabled(),
        list(_PYRO_STACK),
        list(_DIM_ALLOCATOR._stack),
    ]


def names_of(error):
    """Of an exception's class and what it is derived from, without Exception."""
    return {kind.__name__ for kind in type(error).__mro__[:-3]}


def has_nan(result):
    """Whether a tensor or a number in what a call returns is NaN."""
    return any(bool(out.isnan().any()) for out in tensors(result))


def tensors(result):
    """All tensors in what a call returns, numbers among them."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, float):
        yield torch.tensor(result)
    elif isinstance(result, dict):
        for value in result.values():
            yield from tensors(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from tensors(value)
    elif dataclasses.is_dataclass(result):
        yield from tensors([getattr(result, field.name) for field in dataclasses.fields(result)])
