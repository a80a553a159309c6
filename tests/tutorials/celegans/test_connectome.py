"""The connectome's tables, their convention, and what is cut out of them."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import re
from pathlib import Path

import pytest
import torch

from tutorials.celegans import build_data
from tutorials.celegans.connectome import DATA, REGIONS, Connectome, Graph, load_connectome, normalize_name

GRAPHS: tuple[Graph, ...] = ("directed", "symmetric", "chemical")


@pytest.fixture(scope="module")
def directed() -> Connectome:
    return load_connectome()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DA01", "DA1"),
        ("DA1", "DA1"),
        ("VB10", "VB10"),
        ("VD010", "VD10"),
        ("avfl", "AVFL"),
        (" AVAL ", "AVAL"),
        ("IL1DL", "IL1DL"),
        ("AS00", "AS0"),
    ],
)
def test_normalize_name(name: str, expected: str) -> None:
    assert normalize_name(name) == expected
    assert normalize_name(expected) == expected


@pytest.mark.parametrize(("graph", "pairs"), [("directed", 2993), ("symmetric", 4577), ("chemical", 2194)])
def test_counts(graph: Graph, pairs: int) -> None:
    connectome = load_connectome(graph)
    assert connectome.graph == graph
    assert len(connectome) == len(connectome.names) == len(set(connectome.names)) == 279
    assert list(connectome.names) == sorted(map(normalize_name, connectome.names))
    assert connectome.adjacency.shape == (279, 279)
    assert connectome.adjacency.dtype == torch.bool
    assert connectome.position.shape == (279, 3)
    assert connectome.position.dtype == torch.float64
    assert int(connectome.adjacency.sum()) == pairs
    assert repr(connectome) == f"Connectome(graph='{graph}', neurons=279, connections={pairs})"


def test_in_degree_of_the_directed_graph(directed: Connectome) -> None:
    in_degree = directed.adjacency.sum(1)
    assert in_degree.double().mean().item() == pytest.approx(10.7, abs=0.05)
    assert int(in_degree.max()) == 83
    assert directed.names[int(in_degree.argmax())] == "AVAL"
    orphans = [directed.names[i] for i in (in_degree == 0).nonzero().flatten().tolist()]
    assert orphans == ["IL2DL", "IL2DR", "PLNR", "PVDR"]


def test_graphs_contain_one_another() -> None:
    chemical, directed, symmetric = (load_connectome(g).adjacency for g in ("chemical", "directed", "symmetric"))
    assert (directed | chemical).equal(directed)
    assert symmetric.equal(directed | directed.T)
    assert symmetric.equal(symmetric.T)
    assert not directed.equal(directed.T)


@pytest.mark.parametrize("graph", GRAPHS)
def test_diagonal(graph: Graph) -> None:
    connectome = load_connectome(graph)
    loops = [connectome.names[i] for i in connectome.adjacency.diagonal().nonzero().flatten().tolist()]
    assert loops == ([] if graph == "chemical" else ["RIBL", "RIBR", "VA8"])


def test_adjacency_points_from_column_to_row(directed: Connectome) -> None:
    with (DATA / "connections.csv").open(newline="", encoding="utf-8") as file:
        pairs = {(row["source"], row["target"]) for row in csv.DictReader(file)}
    assert ("ASHL", "AVAL") in pairs
    assert ("AVAL", "ASHL") not in pairs
    sender, receiver = directed.index("ASHL"), directed.index("AVAL")
    assert directed.adjacency[receiver, sender]
    assert not directed.adjacency[sender, receiver]
    # One step of the model moves activity along the synapse.
    activity = torch.zeros(279, dtype=torch.float64)
    activity[sender] = 1.0
    after = directed.adjacency.double() @ activity
    assert after[receiver] == 1.0
    assert after[sender] == 0.0


def test_gap_junctions_go_both_ways_and_weights_count_synapses() -> None:
    with (DATA / "connections.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["source"], row["target"], row["type"], int(row["weight"])) for row in csv.DictReader(file)]
    assert rows == sorted(rows)
    assert min(weight for *_, weight in rows) == 1
    electrical = {(source, target): weight for source, target, kind, weight in rows if kind == "electrical"}
    assert len(electrical) == 1031
    assert electrical == {(target, source): weight for (source, target), weight in electrical.items()}
    assert sum(weight for _, _, kind, weight in rows if kind == "chemical") == 6394
    assert {kind for _, _, kind, _ in rows} == {"chemical", "electrical"}


def test_body_runs_from_head_to_tail(directed: Connectome) -> None:
    body = directed.body
    assert body.shape == (279,)
    assert body.dtype == torch.float64
    assert body.min() == 0.0
    assert body.max() == 1.0
    place = {name: body[directed.index(name)].item() for name in ("IL2DL", "AVAL", "VD6", "PVR", "PLML")}
    assert place["IL2DL"] < 0.02
    assert place["AVAL"] < 0.05
    assert 0.3 < place["VD6"] < 0.7
    assert place["PVR"] > 0.99
    assert place["PLML"] == 1.0


def test_body_of_neurons_at_one_place(directed: Connectome) -> None:
    assert directed.subset(["PLML", "PLMR"]).body.tolist() == [0.0, 0.0]


def test_unknown_graph() -> None:
    with pytest.raises(ValueError, match=r"graph='electric'.*'directed', 'symmetric', 'chemical'"):
        load_connectome("electric")  # type: ignore[arg-type]


def test_every_load_is_a_new_connectome(directed: Connectome) -> None:
    other = load_connectome()
    other.adjacency.zero_()
    assert int(directed.adjacency.sum()) == int(load_connectome().adjacency.sum()) == 2993


def test_subset_is_induced_in_the_order_asked_for(directed: Connectome) -> None:
    part = directed.subset(["aval", "ASHL", "DA01"])
    assert part.names == ("AVAL", "ASHL", "DA1")
    assert part.graph == "directed"
    index = torch.tensor([directed.index(name) for name in part.names])
    assert part.adjacency.equal(directed.adjacency[index[:, None], index])
    assert part.position.equal(directed.position[index])
    assert part.adjacency[0, 1]
    for same in (
        directed.subset(index),
        directed.subset(index.tolist()),
        directed.subset(tuple(index.numpy())),
    ):
        assert same.names == part.names
        assert same.adjacency.equal(part.adjacency)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["ASHL", "AVAX"], r"name 'AVAX' matches no neuron.*279.*did you mean AVAR or AVAL"),
        (["###"], r"name '###' matches no neuron.*such as ADAL"),
        (["DA1", "AVAL", "DA01"], r"names_or_index holds DA1 more than once"),
        ([3, 4, 3], r"names_or_index holds ADER more than once"),
        ([0, 279], r"names_or_index holds 279, expected names or integers within \[0, 278\]"),
        ([-1], r"names_or_index holds -1, expected"),
        ([1.0], r"names_or_index holds 1\.0, expected"),
        (torch.ones(279, dtype=torch.bool), r"names_or_index holds True, expected"),
        (torch.zeros(2, 2, dtype=torch.long), r"names_or_index has shape \(2, 2\), expected \(k,\)"),
        ([], r"names_or_index is empty"),
        ("AVAL", r"names_or_index='AVAL': expected a sequence of names"),
    ],
)
def test_subset_refuses(directed: Connectome, chosen: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        directed.subset(chosen)


@pytest.mark.parametrize("n", [2, 50, 139, 278, 279])
def test_thin_keeps_one_neuron_of_each_block(directed: Connectome, generator: torch.Generator, n: int) -> None:
    part = directed.thin(n, generator)
    assert len(part) == n
    assert list(part.names) == sorted(part.names)
    assert part.adjacency.equal(directed.subset(part.names).adjacency)
    order = torch.argsort(directed.position[:, 1], stable=True).tolist()
    rank = {directed.names[i]: r for r, i in enumerate(order)}
    # Rank r lies in block b where b * 279 // n <= r < (b + 1) * 279 // n.
    blocks = sorted(((rank[name] + 1) * n - 1) // 279 for name in part.names)
    assert blocks == list(range(n))


def test_thin_follows_its_generator(directed: Connectome, generator: torch.Generator) -> None:
    first, second = directed.thin(100, generator), directed.thin(100, generator)
    assert first.names != second.names
    assert directed.thin(100, generator.manual_seed(0)).names == first.names


def test_thin_gives_every_neuron_of_a_block_a_chance(directed: Connectome, generator: torch.Generator) -> None:
    small = directed.subset(list(range(6)))
    kept = {name for _ in range(100) for name in small.thin(2, generator).names}
    assert kept == set(small.names)  # fails with probability below 1e-16


@pytest.mark.parametrize("n", [1, 0, -5, 280, 2.0, True, "139"])
def test_thin_refuses(directed: Connectome, generator: torch.Generator, n: int) -> None:
    with pytest.raises(ValueError, match=rf"n={re.escape(repr(n))}: expected an integer within \[2, 279\]"):
        directed.thin(n, generator)


def test_connectome_refuses_fields_that_do_not_fit(directed: Connectome) -> None:
    with pytest.raises(ValueError, match=r"names: \['A'\] occur more than once"):
        Connectome(("A", "A"), directed.adjacency[:2, :2], directed.position[:2], "directed")
    with pytest.raises(ValueError, match=r"adjacency has shape \(3, 3\).*expected \(2, 2\)"):
        Connectome(("A", "B"), directed.adjacency[:3, :3], directed.position[:2], "directed")
    with pytest.raises(ValueError, match=r"position .*float32, expected \(2, 3\) and torch.float64"):
        Connectome(("A", "B"), directed.adjacency[:2, :2], directed.position[:2].float(), "directed")


def test_build_names_the_missing_wheel(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wheels: 0 files in .* match cect-0\.3\.5-\*\.whl"):
        build_data.main(["--wheels", str(tmp_path), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("PYRO_GS_WHEELS" not in os.environ, reason="PYRO_GS_WHEELS names no folder with the wheels")
def test_tables_are_rebuilt_from_the_wheels(tmp_path: Path) -> None:
    shipped = (DATA / "SOURCES.md").read_text(encoding="utf-8")
    built_on = re.search(r"On (\d{4}-\d{2}-\d{2}), by", shipped)
    assert built_on is not None
    build_data.build(Path(os.environ["PYRO_GS_WHEELS"]), tmp_path, datetime.date.fromisoformat(built_on[1]))
    for name in ("neurons.csv", "connections.csv", "SOURCES.md"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_thin_at_random_keeps_any_neurons(directed: Connectome, generator: torch.Generator) -> None:
    small = directed.subset(list(range(6)))
    kept = {small.thin(2, generator, "random").names for _ in range(400)}
    assert len(kept) == 15  # all pairs; one stays away with probability below 1e-10
    part = directed.thin(139, generator, "random")
    assert list(part.names) == sorted(part.names)
    assert part.adjacency.equal(directed.subset(part.names).adjacency)


@pytest.mark.parametrize("n", [2, 84, 139, 195, 279])
def test_thin_by_regions_keeps_the_same_share_of_each(directed: Connectome, generator: torch.Generator, n: int) -> None:
    region = torch.bucketize(directed.body, torch.tensor(REGIONS, dtype=torch.float64))
    sizes = region.bincount()
    assert sizes.tolist() == [180, 59, 40]
    parts = [directed.thin(n, generator, "regions") for _ in range(2)]
    assert (parts[0].names != parts[1].names) == (n < 279)
    for part in parts:
        assert len(part) == n
        kept = region[[directed.index(name) for name in part.names]].bincount(minlength=3)
        assert ((kept - sizes * n / 279).abs() < 1).all()


def test_thin_refuses_other_rules(directed: Connectome, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"rule='odd': expected one of 'even', 'random', 'regions'"):
        directed.thin(10, generator, "odd")  # type: ignore[arg-type]


@pytest.mark.parametrize(("dropped", "added"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.05, 0.05), (1.0, 1.0)])
def test_rewire_drops_and_adds_so_many(
    directed: Connectome, generator: torch.Generator, dropped: float, added: float
) -> None:
    wrong = directed.rewire(dropped=dropped, added=added, generator=generator)
    assert wrong.names == directed.names
    assert wrong.position is directed.position
    assert int((directed.adjacency & ~wrong.adjacency).sum()) == round(dropped * 2993)
    new = wrong.adjacency & ~directed.adjacency
    assert int(new.sum()) == round(added * 2993)
    assert not new.diagonal().any()
    assert int(directed.adjacency.sum()) == 2993  # untouched
    if added:
        assert not new.equal(
            directed.rewire(dropped=dropped, added=added, generator=generator).adjacency & ~directed.adjacency
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropped": 1.5}, r"dropped=1\.5: expected a share within \[0, 1\]"),
        ({"added": float("nan")}, "added=nan: expected a share"),
    ],
)
def test_rewire_refuses(directed: Connectome, generator: torch.Generator, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        directed.rewire(generator=generator, **options)


def test_rewire_refuses_more_than_there_is_room_for(directed: Connectome, generator: torch.Generator) -> None:
    full = dataclasses.replace(directed, adjacency=torch.ones(279, 279, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"added=0\.1: 7784 new connections, but only 0 pairs have none"):
        full.rewire(added=0.1, generator=generator)
