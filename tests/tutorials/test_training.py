import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_gs.nn import EachItem, RankScores, ScoreNetwork, SinkhornLayer, SinkhornNetwork, cross_entropy
from tutorials import training
from tutorials.training import train

TOP = Path(training.__file__).parents[1]


class Sorting(nn.Module):
    """Batches of numbers to sort, noise of the layer from torch's global generator, a batch norm for buffers."""

    def __init__(self):
        super().__init__()
        encoder = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.network = SinkhornNetwork(ScoreNetwork(EachItem(encoder), RankScores(8)), SinkhornLayer(0.5, noise=0.5))
        self.shares = []

    def forward(self, generator, share):
        self.shares.append(share)
        items = torch.rand(4, 5, 1, generator=generator)
        target = torch.eye(5)[items[..., 0].argsort(-1).argsort(-1)]
        return cross_entropy(self.network.log_p(items), target).mean()


def objective(seed=0):
    torch.manual_seed(seed)
    return Sorting()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, 12)


OPTIONS = {"seed": 3, "settings": {"n": 5, "method": "ours"}, "scheduler": cosine}


def test_a_stopped_run_ends_in_the_numbers_of_one_that_was_not(tmp_path):
    whole = objective()
    losses = train(whole, 12, path=None, **OPTIONS)
    assert len(losses) == 12
    assert whole.shares == [i / 12 for i in range(12)]
    assert not whole.training

    class StopError(Exception):
        pass

    def stop(generator, share):
        if share >= 7 / 12:
            raise StopError
        return Sorting.forward(first, generator, share)

    first, path = objective(), tmp_path / "deep" / "a.pt"
    first.forward = stop
    with pytest.raises(StopError):
        train(first, 12, path=path, every=0.0, **OPTIONS)
    second = objective(seed=1)  # other parameters: those of the checkpoint count
    assert train(second, 12, path=path, **OPTIONS) == losses
    assert second.shares == whole.shares[7:]
    assert same(second, whole)
    third = objective(seed=2)
    assert train(third, 12, path=path, **OPTIONS) == losses
    assert third.shares == []
    assert same(third, whole)


def test_random_numbers_of_the_caller_are_as_before(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    fitted = objective()
    torch.manual_seed(5)
    train(fitted, 2, path=tmp_path / "a.pt", **OPTIONS)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_are_data(tmp_path):
    first, second = (train(objective(), 2, path=None, **OPTIONS | {"seed": seed}) for seed in (0, 1))
    assert first != second


def test_it_learns():
    losses = train(objective(), 150, path=None, learning_rate=0.03, seed=0, settings={})
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    train(objective(), 2, path=path, **OPTIONS)
    message = r"a\.pt: expected a checkpoint of this run, got one with n=5 in place of 6, steps=2 in place of 3"
    with pytest.raises(ValueError, match=message):
        train(objective(), 3, path=path, **OPTIONS | {"settings": {"n": 6, "method": "ours"}})


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named(keep, tmp_path):
    path = tmp_path / "a.pt"
    train(objective(), 2, path=path, **OPTIONS)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))] if keep != 1 else b"no checkpoint")
    with pytest.raises(ValueError, match=r"a\.pt: expected a checkpoint, got"):
        train(objective(), 2, path=path, **OPTIONS)


def test_a_checkpoint_with_a_flipped_bit_is_named(tmp_path):
    path = tmp_path / "a.pt"
    train(objective(), 2, path=path, **OPTIONS)
    content = bytearray(path.read_bytes())
    weights = next(iter(objective().state_dict()))
    saved = torch.load(path, weights_only=True)["objective"][weights].numpy().tobytes()
    content[content.index(saved)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt: expected a checkpoint, got ValueError: .* is damaged"):
        train(objective(), 2, path=path, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["processes"][0][0].append(float("nan")), "losses are not finite"),
        (lambda content: content["objective"].clear(), "Missing key"),
        (lambda content: content.update(objective=[]), "objective is of type list"),
        (lambda content: content.update(processes=[]), "IndexError"),
        (lambda content: content.pop("optimizer"), "KeyError"),
    ],
)
def test_a_checkpoint_with_other_content_is_named(change, message, tmp_path):
    path = tmp_path / "a.pt"
    train(objective(), 2, path=path, **OPTIONS)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"(?s)a\.pt: expected a checkpoint, got .*{message}"):
        train(objective(), 2, path=path, **OPTIONS)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "a.pt"
    torch.save({"settings": Evil()}, path)
    with pytest.raises(ValueError, match="expected a checkpoint, got"):
        train(objective(), 2, path=path, **OPTIONS)
    assert not (tmp_path / "made").exists()


def test_a_loss_that_is_not_finite_ends_it():
    fitted = objective()
    fitted.forward = lambda generator, share: torch.tensor(torch.nan, requires_grad=True)
    with pytest.raises(FloatingPointError, match="sorting: the loss is nan at step 1 of 2"):
        train(fitted, 2, path=None, title="sorting", **OPTIONS)


def test_steps_are_checked():
    with pytest.raises(ValueError, match=r"steps=0: expected an integer of at least 1"):
        train(objective(), 0, path=None, **OPTIONS)


SCRIPT = textwrap.dedent(
    """
    import os
    import signal
    import sys
    from pathlib import Path

    import torch
    from torch import nn

    from tutorials.processes import from_first, joined, rank, world_size
    from tutorials.training import train


    path, steps, every, killed_at = Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:])


    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, generator, share):
            if share == killed_at / steps:
                os.kill(os.getpid(), signal.SIGKILL)
            y = torch.randn(50, 3, generator=generator, dtype=torch.float64) + 1.0
            self.seen = y
            return ((self.x - y) ** 2).mean()


    with joined("cpu"):
        mean = Mean()
        losses = train(mean, steps, path=path, seed=1, settings={}, learning_rate=0.1, every=every)
        assert from_first(rank()) == 0
        torch.save({"x": mean.x.data, "losses": losses, "rank": rank(), "seen": mean.seen}, f"{path}.{rank()}")
    """
)


def torchrun(folder, name, *, every=1000, killed_at=-1):
    """Two processes on twenty steps; returns the exit status."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    return subprocess.run(
        [*command, str(folder / name), "20", str(every), str(killed_at)],
        cwd=TOP,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=200,
    ).returncode


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    assert torchrun(tmp_path, "a.pt") == 0
    first, second = (torch.load(tmp_path / f"a.pt.{i}", weights_only=True) for i in range(2))
    assert (first["rank"], second["rank"]) == (0, 1)
    assert torch.equal(first["x"], second["x"])
    assert not torch.equal(first["seen"], second["seen"])
    # the same by hand: one process with the batches of both, whose generators have the seeds 1 and 1 + 1,000,003
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1 + 1_000_003)]
    for _ in range(20):
        y = torch.cat([torch.randn(50, 3, generator=g, dtype=torch.float64) + 1.0 for g in generators])
        optimizer.zero_grad()
        ((x - y) ** 2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(first["x"], x.detach(), rtol=1e-12, atol=1e-12)  # rounding of one sum and of two


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill(tmp_path):
    path = tmp_path / "a.pt"
    assert torchrun(tmp_path, "a.pt", every=0, killed_at=12) != 0
    assert [len(losses) for losses, *_ in torch.load(path, weights_only=True)["processes"]] == [12, 12]
    assert torchrun(tmp_path, "a.pt") == 0
    assert torchrun(tmp_path, "b.pt") == 0
    for i in range(2):
        resumed, whole = (torch.load(tmp_path / f"{name}.pt.{i}", weights_only=True) for name in "ab")
        assert len(whole["losses"]) == 20
        assert resumed["losses"] == whole["losses"]
        assert torch.equal(resumed["x"], whole["x"])
    with pytest.raises(ValueError, match="processes=2 in place of 1"):
        train(nn.Linear(1, 1), 20, path=path, seed=1, settings={})
