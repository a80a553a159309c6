import pytest
import torch

from pyro_gs import matching, to_index
from pyro_gs.nn import EachItem
from tutorials.jigsaw.neighbours import NeighbourScores
from tutorials.jigsaw.puzzle import scrambled


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(n, channels=1, pixels=8):
    items = EachItem(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * pixels**2, 6)), item_dim=3)
    return NeighbourScores(items, 6, n, channels)


def puzzles(k, batch=3, pixels=8):
    return scrambled(torch.rand(batch, 1, k * pixels, k * pixels, generator=generator()), k, generator(1))


def right_neighbours(index, k):
    """Of pieces at positions ``index``, by hand: the piece, or n, to the right, to the left, below and above."""
    at = {place: piece for piece, place in enumerate(index)}
    found = torch.zeros(4, k * k, k * k + 1)
    for piece, place in enumerate(index):
        row, column = divmod(place, k)
        for direction, (down, right) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
            inside = 0 <= row + down < k and 0 <= column + right < k
            found[direction, piece, at[(row + down) * k + column + right] if inside else k * k] = 1
    return found


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rounds_find_the_arrangement_of_known_neighbours(k):
    """With nothing known of the pieces alone; every one of the k x k positions follows from the frame and the neighbours."""
    shown = puzzles(k)
    neighbours = torch.stack([right_neighbours(index.tolist(), k) for index in shown.index])
    logits = scores(k * k).arranged(torch.zeros(3, k * k, k * k), (neighbours + 1e-9).log())
    assert torch.equal(to_index(matching(logits)), shown.index)


def test_loss_is_the_cross_entropy_of_the_neighbours():
    shown = puzzles(3)
    network = scores(9)
    _, neighbours = network.compared(shown.pieces)
    assert torch.allclose(neighbours.exp().sum(-1), torch.ones(()))
    true = torch.stack([right_neighbours(index.tolist(), 3) for index in shown.index])
    expected = torch.stack([-neighbours[b][true[b] == 1].mean() for b in range(3)])
    assert torch.allclose(network.loss(neighbours, shown.target), expected)


def test_no_piece_is_its_own_neighbour():
    _, neighbours = scores(4).compared(puzzles(2).pieces)
    assert neighbours[..., :4].exp().diagonal(dim1=-2, dim2=-1).abs().max() == 0


@pytest.mark.parametrize("turned", [False, True])
def test_a_border_that_goes_on_unchanged_fits_best(turned):
    """Untrained: the same features on both sides, from the border inwards."""
    ramps = [torch.linspace(i / 3, (i + 1) / 3, 8).expand(8, 8) for i in range(3)]  # one ends as grey as the next begins
    pieces = torch.stack([*ramps, torch.ones(8, 8)])[None, :, None]
    _, neighbours = scores(4).compared(pieces.mT if turned else pieces)
    after, before = neighbours[0, 2 * turned], neighbours[0, 2 * turned + 1]
    assert after[0, :4].argmax() == 1
    assert after[1, :4].argmax() == 2
    assert before[2, :4].argmax() == 1


def test_the_frame_alone_tells_the_corners():
    """Pieces of 2 x 2 are told apart by the sides that have no neighbour; which piece is where else is not known."""
    shown = puzzles(2)
    neighbours = torch.stack([right_neighbours(index.tolist(), 2) for index in shown.index])
    neighbours[..., :4] = 0.25
    logits = scores(4).arranged(torch.zeros(3, 4, 4), (neighbours + 1e-9).log())
    assert torch.equal(to_index(matching(logits)), shown.index)


def test_what_either_neighbour_sees_counts_alike():
    """That j is to the right of i, as i sees it, says what j sees to its left; above and below likewise."""
    network, alone = scores(9), torch.randn(2, 9, 9)
    neighbours = torch.randn(2, 4, 9, 10).log_softmax(-1)
    other = torch.cat([neighbours[:, [1, 0, 3, 2], :, :9].mT, neighbours[..., 9:]], -1)
    assert torch.allclose(network.arranged(alone, neighbours), network.arranged(alone, other))
    assert not torch.allclose(network.arranged(alone, neighbours), network.arranged(alone, neighbours.flip(1)))


def test_rounds_carry_what_is_known_of_one_piece_to_all():
    """One piece's place and all neighbours are known, the frame is not; the farthest piece is six neighbours away."""
    shown, network = puzzles(4), scores(16)
    neighbours = torch.stack([right_neighbours(index.tolist(), 4) for index in shown.index])
    neighbours[..., 16] = 0.5
    alone = torch.zeros(3, 16, 16)
    corner = (shown.index == 0).nonzero()[:, 1]
    alone[torch.arange(3), corner, 0] = 20.0
    found = to_index(matching(network.arranged(alone, (neighbours + 1e-9).log())))
    assert torch.equal(found, shown.index)
    network.rounds = 1
    found = to_index(matching(network.arranged(alone, (neighbours + 1e-9).log())))
    assert not (found == shown.index).all(-1).any()


def test_what_pieces_see_of_each_other_is_heard():
    network, pieces = scores(4), puzzles(2).pieces
    before = network(pieces)
    network.sets = torch.nn.Tanh()
    assert not torch.allclose(network(pieces), before)


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_small_pieces_and_gradients(pixels):
    network = scores(4, pixels=pixels)
    logits = network(puzzles(2, pixels=pixels).pieces)
    assert logits.shape == (3, 4, 4)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_a_number_of_pieces_that_is_no_square():
    with pytest.raises(ValueError, match="n=6: expected a square number"):
        scores(6)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0)])
def test_no_puzzles(shape):
    assert scores(4)(torch.zeros(*shape, 4, 1, 8, 8)).shape == (*shape, 4, 4)


@pytest.mark.parametrize(("n", "channels", "width"), [(0, 1, 8), (-4, 1, 8), (4, 0, 8), (4, 1, 0), (4.0, 1, 8)])
def test_counts(n, channels, width):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        NeighbourScores(torch.nn.Identity(), 4, n, channels, width=width)


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="mask: NeighbourScores takes sets of one size without padding"):
        scores(4)(puzzles(2).pieces, torch.ones(4).bool())
