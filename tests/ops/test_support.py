import itertools

import pytest
import torch

from pyro_gs.ops.support import SupportWarning, component_sums, find_support, hall_violator


def permutations_of(mask):
    n = len(mask)
    return [p for p in itertools.permutations(range(n)) if all(mask[i, j] for i, j in enumerate(p))]


def test_full_mask_has_no_pattern():
    support = find_support(torch.ones(2, 4, 4, dtype=torch.bool))
    assert support.full
    assert component_sums(torch.ones(2, 4), support)[:, 0].tolist() == [4, 4]


@pytest.mark.filterwarnings("ignore::pyro_gs.SupportWarning")
def test_pruning_and_components_against_enumeration():
    seen = 0
    for seed in range(60):
        mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)) < 0.45
        perms = permutations_of(mask)
        if not perms:
            with pytest.raises(ValueError, match="allows no permutation"):
                find_support(mask)
            rows, columns = hall_violator(mask)
            assert mask[rows].any(0).nonzero()[:, 0].tolist() == columns
            assert len(columns) < len(rows)
            continue
        seen += 1
        want = torch.zeros(5, 5, dtype=torch.bool)
        for p in perms:
            want[range(5), list(p)] = True
        support = find_support(mask)
        assert torch.equal(support.allowed, want)
        # an entry is allowed only inside a component, and each component is connected by allowed entries
        same = support.row_component[:, None] == support.component[None, :]
        assert not (want & ~same).any()
        assert int(support.grounded.sum()) == len(support.component.unique())
    assert seen > 10


def test_entry_on_no_permutation_warns_or_raises():
    mask = torch.tensor([[True, False], [True, True]])  # case 2b
    with pytest.warns(SupportWarning, match="permits row 1, column 0, which lies on no permutation"):
        support = find_support(mask)
    assert torch.equal(support.allowed, torch.eye(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="lies on no permutation"):
        find_support(mask, prune=False)


def test_expanded_and_selected_supports():
    mask = torch.eye(3, dtype=torch.bool) | torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    support = find_support(mask).expand(torch.Size((2, 4)))
    assert support.allowed.shape == (2, 4, 3, 3)
    assert support.grounded.shape == (2, 4, 3)
    assert component_sums(torch.ones(2, 4, 3), support)[0, 0].sort().values.tolist() == [0, 1, 2]
