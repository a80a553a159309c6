"""Pictures show what they are given: heights, positions of marks, labels, masks."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import pyro_gs as pgs
from pyro_gs import plotting


@pytest.fixture(autouse=True)
def _agg():
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.fixture
def draws():
    """Two chains of 30 draws, n = 4; row 3 never moves."""
    return pgs.to_matrix(torch.cat([torch.argsort(torch.rand(2, 30, 3), -1), torch.full((2, 30, 1), 3)], -1))


def marks(ax, label):
    (found,) = (c for c in ax.collections if c.get_label() == label)
    return found.get_offsets().data.tolist()


def legend(ax):
    return [] if ax.get_legend() is None else [text.get_text() for text in ax.get_legend().get_texts()]


def test_marginals(draws):
    truth = pgs.to_matrix(torch.tensor([1, 0, 2, 3]))
    site = pgs.summary({"P": draws}, group_by_chain=True, truth=truth)["P"]
    ax = plotting.plot_marginals(site)
    assert np.allclose(ax.images[0].get_array(), site.marginals)
    assert marks(ax, "MAP") == [[j, i] for i, j in enumerate(pgs.to_index(site.map).tolist())]
    assert marks(ax, "truth") == [[1, 0], [0, 1], [2, 2], [3, 3]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("column", "row")
    assert legend(ax) == ["MAP", "truth"]
    assert ax.figure.axes[1].get_ylabel() == "posterior probability"
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (0, 1)


def test_forbidden_pairs_are_masked():
    allowed = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    ax = plotting.plot_marginals(p, allowed=allowed, map=torch.eye(3))
    assert (ax.images[0].get_array().mask == ~allowed.numpy()).all()
    assert legend(ax) == ["forbidden", "MAP"]
    drawn = plotting.plot_marginals(p, allowed=torch.ones(3, 3, dtype=torch.bool))
    assert legend(drawn) == []


def test_draws_on_the_axes_that_it_is_given(draws):
    site = pgs.summary({"P": draws}, group_by_chain=True, truth=torch.eye(4))["P"]
    figure, axes = plt.subplots(2, 3)
    functions = (plotting.plot_marginals, plotting.plot_confidence, plotting.plot_entropy, plotting.plot_reliability)
    for function, ax in zip(functions, axes.flat, strict=False):
        assert function(site, ax=ax) is ax
    assert plt.get_fignums() == [figure.number]
    out = plotting.plot_trace({"P": draws}, group_by_chain=True, ax=axes.flat[4:])
    assert out.tolist() == list(axes.flat[4:])


def test_confidence():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.1, 0.6], [0.0, 0.7, 0.3]])
    ax = plotting.plot_confidence(p, truth=torch.eye(3))
    bars = ax.containers[0]
    assert [bar.get_height() for bar in bars] == pytest.approx([0.7, 0.6, 0.7])
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert bars[0].get_facecolor() != bars[1].get_facecolor() == bars[2].get_facecolor()
    assert legend(ax) == ["right (1)", "wrong (2)"]
    assert ax.get_ylabel() == "largest marginal probability"
    assert legend(plotting.plot_confidence(p)) == []


def test_entropy():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    ax = plotting.plot_entropy(p)
    assert [bar.get_height() for bar in ax.containers[0]] == pytest.approx([math.log(2), math.log(2), 0])
    assert ax.get_ylabel() == "entropy (nats)"
    (line,) = (patch for patch in ax.patches if patch.get_label() == "uniform: log 3")
    assert line.get_data().values.tolist() == pytest.approx([math.log(3)] * 3)
    ax = plotting.plot_entropy(p, allowed=p > 0)
    (line,) = (patch for patch in ax.patches if patch.get_label() == "uniform over the allowed columns")
    assert line.get_data().values.tolist() == pytest.approx([math.log(2), math.log(2), 0])


def test_reliability():
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    curve = pgs.reliability(torch.stack([p, torch.eye(2), torch.eye(2)]), torch.eye(2))
    ax = plotting.plot_reliability(curve)
    assert marks(ax, "answers") == [[0.75, 1.0], [1.0, 1.0]]
    assert [text.get_text() for text in ax.texts] == ["2", "4"]
    assert ax.get_title() == f"calibration error {0.25 * 2 / 6:.3f}, 6 answers"
    (bars,) = (c for c in ax.collections if c.get_label() == "two standard errors")
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.75 - 2 * math.sqrt(0.75 * 0.25 / 2), 1.0))
    assert ax.get_ylabel() == "share that is right"


def test_trace(draws):
    log_density = torch.randn(2, 30)
    top, distance, density = plotting.plot_trace({"P": draws}, group_by_chain=True, log_density=log_density)
    index = pgs.to_index(draws)
    ticks = dict(zip([t.get_text() for t in top.get_yticklabels()], top.get_yticks(), strict=True))
    assert list(ticks) == ["row 0: 0 to 2", "row 1: 0 to 2", "row 2: 0 to 2", "row 3: 3"]
    assert ticks["row 0: 0 to 2"] > ticks["row 3: 3"]  # from top to bottom
    lines = top.get_lines()
    assert len(lines) == 8
    for row in range(4):
        for chain in range(2):
            height = (lines[2 * row + chain].get_ydata() - top.get_yticks()[row]) / 0.4
            expected = index[chain, :, row].numpy() - 1 if row < 3 else np.zeros(30)
            assert np.allclose(height, expected)
            assert lines[2 * row + chain].get_color() == f"C{chain}"
    assert legend(top) == ["chain 0", "chain 1"]
    reference = pgs.summary({"P": draws}, group_by_chain=True)["P"].map
    expected = (index != pgs.to_index(reference)).double().mean(-1)
    assert np.allclose([line.get_ydata() for line in distance.get_lines()], expected)
    assert np.allclose([line.get_ydata() for line in density.get_lines()], log_density)
    assert density.get_xlabel() == "draw"
    assert density.get_ylabel() == "log density\n(nats)"


def test_trace_of_chosen_rows_and_item():
    draws = pgs.to_matrix(torch.argsort(torch.rand(40, 2, 20), -1))
    top, _ = plotting.plot_trace({"P": draws}, item=1)
    assert len(top.get_yticks()) == 8
    top, _ = plotting.plot_trace({"P": draws, "mu": torch.zeros(40)}, item=1, rows=[5])
    (line,) = top.get_lines()
    column = pgs.to_index(draws)[:, 1, 5].double()
    expected = 0.1 + 0.8 * (column - column.min()) / (column.max() - column.min())
    assert np.allclose(line.get_ydata(), expected)
    assert top.get_yticklabels()[0].get_text().startswith("row 5: ")
    assert legend(top) == []


def test_trace_of_relaxed_draws_shows_their_matchings():
    relaxed = pgs.sinkhorn(3 * torch.randn(20, 4, 4))
    hard = pgs.matching(relaxed.log())
    lines = [plotting.plot_trace({"P": x}, rows=[0, 1, 2, 3])[0].get_lines() for x in (relaxed, hard)]
    for one, other in zip(*lines, strict=True):
        assert np.allclose(one.get_ydata(), other.get_ydata())


@pytest.mark.parametrize("n", [1, 3, 279])
def test_sizes_render(n):
    draws = pgs.to_matrix(torch.argsort(torch.rand(2, 10, n), -1))
    site = pgs.summary({"P": draws}, group_by_chain=True, truth=torch.eye(n))["P"]
    functions = (plotting.plot_marginals, plotting.plot_confidence, plotting.plot_entropy, plotting.plot_reliability)
    for ax in [*(f(site) for f in functions), *plotting.plot_trace({"P": draws}, group_by_chain=True)]:
        ax.figure.canvas.draw()


TWO = torch.eye(2).expand(5, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plotting.plot_marginals(TWO), ValueError, r"shape \(5, 2, 2\); choose one: marginals\[0\]"),
        (lambda: plotting.plot_marginals(torch.ones(2, 2)), ValueError, "row 0 of marginals must be probabilities"),
        (lambda: plotting.plot_confidence([1]), TypeError, "marginals must be a torch.Tensor"),
        (lambda: plotting.plot_entropy(pgs.summary({"P": TWO, "Q": TWO})), ValueError, r"choose one: summary\['P'\]"),
        (lambda: plotting.plot_marginals(TWO[0], map=torch.eye(3)), ValueError, "map must broadcast"),
        (lambda: plotting.plot_marginals(TWO[0], allowed=torch.eye(2)), TypeError, "allowed must be a tensor of dtype"),
        (lambda: plotting.plot_entropy(TWO[0], allowed=torch.eye(3) > 0), ValueError, "allowed must have shape"),
        (
            lambda: plotting.plot_entropy(TWO[0], allowed=torch.tensor([[True, True], [False, False]])),
            ValueError,
            "row 1 has none",
        ),
        (lambda: plotting.plot_reliability(TWO), TypeError, "curve must be a Reliability"),
        (lambda: plotting.plot_reliability(pgs.summary({"P": TWO})), ValueError, "without the truth"),
        (lambda: plotting.plot_trace({"P": TWO, "Q": TWO}), ValueError, r"choose one: site='P'"),
        (lambda: plotting.plot_trace({"P": TWO}, rows=[2]), ValueError, "rows must be integers from 0 to 1"),
        (lambda: plotting.plot_trace({"P": TWO}, rows=[]), ValueError, "at least one"),
        (lambda: plotting.plot_trace({"P": TWO}, item=1), ValueError, r"item must be an index of the batch shape \(\)"),
        (lambda: plotting.plot_trace({"P": TWO[:, None]}), ValueError, r"batch shape \(1,\) of site 'P', but is \(\)"),
        (lambda: plotting.plot_trace({"P": TWO}, ax=[None]), ValueError, "ax must hold 2 axes, but holds 1"),
        (lambda: plotting.plot_trace({"P": TWO}, log_density=torch.zeros(4)), ValueError, r"must have shape \(1, 5\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []
