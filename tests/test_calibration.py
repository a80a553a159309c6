"""``reliability`` of posteriors that are calibrated by construction, and of some that are not."""

import pytest
import torch

import pyro_gs as pgs


def test_reliability_of_a_calibrated_and_an_overconfident_posterior():
    # In pairs of rows the answer is right with the probability p that the marginals state.
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20000, generator=generator) / 2 + 0.5
    right = torch.bernoulli(p, generator=generator)
    pair = torch.eye(2)

    def matrices(x):
        return x[:, None, None] * pair + (1 - x)[:, None, None] * (1 - pair)

    honest = pgs.reliability(matrices(p), matrices(right))
    # Five bins of about 8000 rows, in pairs: standard error below .5 / sqrt(4000) = .008; five of them
    assert (honest.confidence - honest.accuracy).abs().max() < 0.04
    bold = pgs.reliability(matrices(torch.full_like(p, 0.95)), matrices(right))
    assert bold.count.tolist() == [40000]
    assert bold.calibration_error == pytest.approx(0.2, abs=0.02)
    assert honest.lower.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


def test_reliability_of_chosen_answers_and_rows():
    marginals = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]])
    answer = pgs.to_matrix(torch.tensor([1, 2, 0]))
    curve = pgs.reliability(marginals, answer, bins=1, answer=answer)
    assert float(curve.confidence) == pytest.approx(0.3)
    assert curve.calibration_error == pytest.approx(0.7)
    curve = pgs.reliability(marginals, torch.eye(3), rows=torch.tensor([True, False, False]))
    assert curve.count.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"marginals": torch.ones(2, 2)}, ValueError, r"row 0 of marginals must be probabilities.*\[1.0, 1.0\]"),
        ({"marginals": torch.full((2, 2), torch.nan)}, ValueError, "row 0 of marginals"),
        ({"marginals": torch.eye(2, dtype=torch.long)}, TypeError, "floating"),
        ({"truth": torch.ones(2, 2)}, ValueError, "truth is not a permutation"),
        ({"answer": torch.eye(3)}, ValueError, "answer must broadcast"),
        ({"bins": 0}, ValueError, "bins must be an integer of at least 1, but is 0"),
        ({"rows": torch.ones(2)}, TypeError, "rows must be a tensor of dtype torch.bool"),
        ({"rows": torch.zeros(2, dtype=torch.bool)}, ValueError, "at least one True"),
    ],
)
def test_bad_reliability(change, error, message):
    with pytest.raises(error, match=message):
        pgs.reliability(**({"marginals": torch.eye(2), "truth": torch.eye(2)} | change))


def test_a_probability_on_an_edge_is_in_one_bin_whatever_its_rounding():
    half = torch.tensor([0.5 - 1e-9, 0.5], dtype=torch.float64)
    marginals = torch.stack([half, 1 - half], -1)
    answer = torch.eye(2, dtype=torch.float64)
    assert pgs.reliability(marginals, answer, answer=answer).count.tolist() == [2]


def test_corrected_probabilities_are_calibrated_on_fresh_data():
    # The answer is right in 60 % of the pairs that say .95 and in 90 % of those that say .85: not even the order is right.
    generator = torch.Generator().manual_seed(1)

    def draw():
        said = torch.where(torch.rand(8000, generator=generator) < 0.5, 0.95, 0.85)
        right = torch.bernoulli(torch.where(said > 0.9, 0.6, 0.9), generator=generator)
        return [x[:, None, None] * torch.eye(2) + (1 - x)[:, None, None] * (1 - torch.eye(2)) for x in (said, right)]

    (marginals, truth), (fresh, fresh_truth) = draw(), draw()
    curve = pgs.reliability(marginals, truth)
    assert pgs.reliability(fresh, fresh_truth).calibration_error > 0.15
    corrected = pgs.recalibrate(fresh, curve, answer=pgs.matching(fresh))
    # monotone: both get the mean, .75
    assert (corrected.amax((-2, -1)) - 0.75).abs().max() < 0.02
    assert pgs.reliability(corrected, fresh_truth).calibration_error < 0.02
    assert curve.corrected(torch.tensor([0.0, 0.9, 1.0])).tolist() == pytest.approx([0.75] * 3, abs=0.02)


def test_few_answers_change_little_and_make_nothing_certain():
    """Against the true rate of answers that are right with the square of what is said, and with what is said."""
    generator = torch.Generator().manual_seed(0)
    for power in (1, 2):
        said, nothing = [], []
        for _ in range(100):
            p = torch.rand(40, generator=generator, dtype=torch.float64) / 2 + 0.5
            right = torch.bernoulli(p**power, generator=generator)
            which = (p * 10).long().clamp(max=9)
            count = torch.bincount(which, minlength=10)
            used = count > 0
            sums = [torch.zeros(10, dtype=torch.float64).index_add(0, which, x)[used] / count[used] for x in (p, right)]
            curve = pgs.Reliability(torch.arange(10)[used] / 10, 0.1, count[used], *sums)
            fresh = torch.linspace(0.5, 1, 50, dtype=torch.float64)
            corrected = curve.corrected(fresh)
            assert 0 < float(corrected.min()) <= float(corrected.max()) < 1
            said.append((corrected - fresh**power).square().mean())
            # the same without the answer that each bin counts more
            exact = pgs.Reliability(curve.lower, 0.1, count[used] * 10**6, *sums)
            nothing.append((exact.corrected(fresh) - fresh**power).square().mean())
        # the ratio of the two is .66 and .82; over 100 repetitions its standard error is below .05
        assert sum(said) < 0.95 * sum(nothing)


@pytest.mark.parametrize(
    ("confidence", "error", "message"),
    [
        (torch.tensor([0.5, torch.nan]), ValueError, r"confidence must be within \[0, 1\], but has nan"),
        (torch.tensor(1.5), ValueError, "but has 1.5"),
        ([0.5], TypeError, "confidence"),
    ],
)
def test_bad_confidence(confidence, error, message):
    curve = pgs.reliability(torch.eye(2), torch.eye(2))
    with pytest.raises(error, match=message):
        curve.corrected(confidence)


def test_recalibrate_moves_the_rest_of_a_row():
    half = pgs.Reliability(torch.tensor([0.9]), 0.1, torch.tensor([10]), torch.tensor([0.95]), torch.tensor([0.455]))
    marginals = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]])
    allowed = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    assert torch.allclose(pgs.recalibrate(marginals, half, allowed=allowed), expected)
    batch = pgs.recalibrate(marginals.expand(4, 3, 3), half, allowed=allowed, answer=torch.eye(3))
    assert torch.allclose(batch, expected.expand(4, 3, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"marginals": torch.ones(2, 2)}, ValueError, "row 0 of marginals"),
        ({"curve": 0.5}, TypeError, "curve must be a Reliability, as pyro_gs.reliability gives, but is float"),
        ({"answer": torch.ones(2, 2)}, ValueError, "answer is not a permutation"),
        ({"allowed": torch.ones(2, 2)}, TypeError, "allowed must be a boolean tensor"),
        ({"allowed": torch.ones(3, 3).bool()}, ValueError, "allowed must broadcast"),
        ({"allowed": torch.eye(2).flip(0).bool()}, ValueError, r"zero where not allowed, but has 1 at \(0, 0\)"),
    ],
)
def test_bad_recalibrate(change, error, message):
    curve = pgs.reliability(torch.eye(2), torch.eye(2))
    with pytest.raises(error, match=message):
        pgs.recalibrate(**({"marginals": torch.eye(2), "curve": curve} | change))
