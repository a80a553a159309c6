import dataclasses

import pytest
import torch

from pyro_gs.infer.objective import OBJECTIVES
from tutorials.celegans.__main__ import METHODS
from tutorials.celegans.cells import BASE, TABLES, Cell, eta_for_candidates, mean_candidates
from tutorials.celegans.connectome import load_connectome


@pytest.mark.parametrize("candidates", [2.5, 10.0, 60.0, 139.0])
def test_eta_gives_the_number_of_candidates_wanted(candidates):
    connectome = load_connectome().thin(139, torch.Generator().manual_seed(0))
    eta = eta_for_candidates(connectome, candidates)
    got = ((connectome.body[:, None] - connectome.body).abs() < eta).sum(1).double().mean()
    # A further distance adds two candidates among 139 neurons; left and right neurons often lie equally far along the body.
    assert float(got) == pytest.approx(candidates, abs=0.1)


def test_eta_counts_that_known_neurons_have_one_candidate_and_take_it():
    cell = Cell(eta=None, candidates=20.0, known=0.3, worms=40, steps=2)
    # The mean over 40 worms, which differ in who is known; over all draws of that it is 20 up to ties.
    assert mean_candidates(cell.data(0)[1]) == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize(("candidates", "known"), [(1.0, 0.0), (140.0, 0.0), (100.0, 0.5), (float("nan"), 0.0)])
def test_eta_refuses_what_no_eta_gives(candidates, known):
    connectome = load_connectome().thin(139, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=rf"candidates={candidates}: expected 1.* to .* with 139 neurons and known={known}"):
        eta_for_candidates(connectome, candidates, known)


def test_a_cell_has_one_rule_for_candidates():
    for eta, candidates in ((None, None), (0.1, 10.0)):
        with pytest.raises(ValueError, match="expected exactly one of them"):
            Cell(eta=eta, candidates=candidates)


def test_budget_is_no_setting_of_the_data():
    assert Cell(budget=1.0) == Cell(budget=2.0)
    assert "budget" not in Cell().settings
    assert set(Cell().settings) == {field.name for field in dataclasses.fields(Cell)} - {"budget"}


def test_methods_get_a_wrong_connectome_and_the_same_data():
    right, worms = Cell(neurons=40, steps=20).data(3)
    wrong, same = Cell(neurons=40, steps=20, dropped=0.2, added=0.1).data(3)
    assert torch.equal(worms.traces, same.traces)
    edges = int(right.adjacency.sum())
    assert int((right.adjacency & ~wrong.adjacency).sum()) == round(0.2 * edges)
    assert int((wrong.adjacency & ~right.adjacency).sum()) == round(0.1 * edges)


def test_settings_reach_the_data():
    connectome, worms = Cell(worms=2, neurons=50, steps=30, sigma=2.0, graph="chemical", unseen=0.1, known=0.4).data(0)
    assert (connectome.graph, len(connectome), worms.sigma) == ("chemical", 50, 2.0)
    assert worms.traces.shape == (2, 31, 50)
    assert worms.known.sum(1).tolist() == [20, 20]
    assert worms.observed.sum(1).tolist() == [45, 45]


def test_tables_are_those_of_the_paper():
    first, second = TABLES["table1"].cells, TABLES["table2"].cells
    assert [(c.candidates, c.worms, c.known) for c in first] == [(c, j, 0.0) for c in (10, 30, 45, 60) for j in (1, 4)]
    assert [(c.known, c.eta, c.worms) for c in second] == [(k, e, 4) for k in (0.4, 0.3, 0.2, 0.1) for e in (0.1, 0.2)]
    assert TABLES["objectives"].cells == first + second
    assert TABLES["objectives"].objectives == OBJECTIVES


def test_sweeps_change_one_setting_of_the_base():
    for name, table in TABLES.items():
        assert len(set(table.cells)) == len(table.cells)
        assert set(table.methods) <= set(METHODS)
        if name not in ("table1", "table2", "objectives", "all"):
            assert BASE in table.cells
            for cell in table.cells:
                changed = [key for key, value in cell.settings.items() if value != BASE.settings[key]]
                assert changed in ([], [table.axis]) if table.axis else len(changed) <= 1


def test_quick_cells_are_small_and_stay_apart():
    for table in TABLES.values():
        quick = table.quick()
        assert len(set(quick.cells)) == len(table.cells)
        assert not set(quick.cells) & set(table.cells)
        assert all(cell.neurons <= 60 and cell.budget <= 1 for cell in quick.cells)
