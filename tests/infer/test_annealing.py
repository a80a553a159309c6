import pytest

from pyro_gs import ConstantSchedule, ExponentialSchedule, LinearSchedule


def test_schedules():
    assert [ConstantSchedule(0.5)(step) for step in (0, 7)] == [0.5, 0.5]
    assert [LinearSchedule(1.0, 0.0 + 0.2, 4)(step) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert [ExponentialSchedule(1.0, 0.01, 2)(step) for step in (0, 1, 2, 3)] == pytest.approx([1.0, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("kind", [ExponentialSchedule, LinearSchedule])
def test_bad_schedules(kind):
    with pytest.raises(ValueError, match="end must be positive and finite, but is 0"):
        kind(1.0, 0.0, 10)
    with pytest.raises(ValueError, match="start must be positive and finite, but is nan"):
        kind(float("nan"), 1.0, 10)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, but is 0"):
        kind(1.0, 0.5, 0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        ConstantSchedule(-1.0)
