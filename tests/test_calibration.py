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
