"""Table, picture and report of an answer."""

import csv
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tutorials.celegans.connectome import Connectome, load_connectome
from tutorials.celegans.html_report import write_report
from tutorials.celegans.identification import Identification
from tutorials.celegans.identities import Identity, best_matching, identity_table, write_identities
from tutorials.celegans.portrait import CONFIDENCE, PANEL, confidence, draw_worm
from tutorials.celegans.preparation import to_worms
from tutorials.celegans.recordings import Recording, known_identity
from tutorials.celegans.worms import Worms

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def connectome(n: int = 5) -> Connectome:
    return load_connectome().thin(n, torch.Generator().manual_seed(0))


def recording(labels: list[str], name: str = "worm", places: torch.Tensor | None = None) -> Recording:
    traces = torch.randn(9, len(labels), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Recording(name, traces, tuple(labels), tuple(map(known_identity, labels)), places)


def answer() -> tuple[Identification, Worms, list[Recording], Connectome]:
    """Two worms of three and five neurons, and an answer about them."""
    network = connectome()
    recordings = [recording(["?1", network.names[1], "?3"]), recording([f"?{i}" for i in range(5)], "<b>&other</b>")]
    marginals = torch.zeros(2, 5, 5, dtype=torch.float64)
    marginals[0] = torch.tensor(
        [[0.6, 0, 0.3, 0.1, 0], [0, 1, 0, 0, 0], [0, 0, 0.4, 0.6, 0], [0.4, 0, 0, 0.3, 0.3], [0, 0, 0.3, 0, 0.7]]
    )
    marginals[1] = torch.eye(5)[[4, 3, 2, 1, 0]]
    index = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    return Identification("test", marginals, index, [], 1.0), to_worms(recordings, network), recordings, network


def test_the_table_lists_the_neurons_that_were_seen() -> None:
    result, worms, recordings, network = answer()
    rows = identity_table(result, worms, recordings, network)
    a, b, c, d, e = network.names
    assert rows[:3] == [
        Identity("worm", "?1", a, 0.6, c, 0.3, d, 0.1, False),
        Identity("worm", b, b, 1.0, "", 0.0, "", 0.0, True),
        Identity("worm", "?3", d, 0.6, c, 0.4, "", 0.0, False),
    ]
    assert [row.identity for row in rows[3:]] == [e, d, c, b, a]
    assert len(rows) == 8


def test_the_answer_has_the_most_right_names_that_can_be_expected() -> None:
    """Two neurons want one name; a third is not where the mode has it; rows that show no neuron do not count."""
    result, worms, recordings, network = answer()
    a, _, c, d, _ = network.names
    marginals = result.marginals.clone()
    marginals[0, 0] = torch.tensor([0.1, 0, 0.3, 0.6, 0])
    marginals[0, 2] = torch.tensor([0, 0, 0.1, 0.9, 0])
    rows = identity_table(dataclasses.replace(result, marginals=marginals), worms, recordings, network)
    assert rows[0] == Identity("worm", "?1", c, pytest.approx(0.3), d, pytest.approx(0.6), a, pytest.approx(0.1), False)  # type: ignore[arg-type]
    assert rows[2].identity == d
    even = dataclasses.replace(result, marginals=torch.full_like(marginals, 0.2))
    assert best_matching(even, worms)[1].tolist() == result.index[1].tolist()


def test_the_table_as_a_file(tmp_path: Path) -> None:
    rows = identity_table(*answer())
    write_identities(tmp_path / "identities.csv", rows)
    with (tmp_path / "identities.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in dataclasses.fields(Identity)]
    assert [row["known"] for row in read] == ["0", "1", *"000000"]
    assert (read[0]["identity"], read[0]["probability"], read[0]["second_probability"]) == (
        rows[0].identity,
        "0.6000",
        "0.3000",
    )
    assert read[3]["worm"] == "<b>&other</b>"


def test_the_table_refuses_what_does_not_belong_together() -> None:
    result, worms, recordings, network = answer()
    with pytest.raises(ValueError, match=r"worms of \[3, 5\] neurons of 5, recordings of \[5, 3\]"):
        identity_table(result, worms, recordings[::-1], network)
    with pytest.raises(ValueError, match="a connectome of 4"):
        identity_table(result, worms, recordings, connectome(4))
    short = dataclasses.replace(result, index=result.index[:1])
    with pytest.raises(ValueError, match=r"result of shape \(1, 5\), expected \(2, 5\)"):
        identity_table(short, worms, recordings, network)


@pytest.mark.parametrize(
    ("probability", "place"), [(1.0, 1), (0.95, 1), (0.94, 2), (0.8, 2), (0.79, 3), (0.5, 3), (0.49, 4)]
)
def test_classes_of_confidence(probability: float, place: int) -> None:
    row = Identity("worm", "?1", "AVAL", probability, "", 0.0, "", 0.0, False)
    assert confidence(row) == place
    assert confidence(dataclasses.replace(row, known=True)) == 0


def whole(n: int, *, places: bool) -> tuple[Recording, list[Identity], Connectome]:
    """A worm that shows n of 279 neurons with all kinds of probabilities, upside down and from tail to head."""
    network = load_connectome()
    names = network.thin(n, torch.Generator().manual_seed(1)).names if n > 1 else network.names[:1]
    turned = network.position[[network.index(name) for name in names]] * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    worm = recording([f"?{i}" for i in range(n)], places=turned if places else None)
    sure = np.random.default_rng(0).uniform(0.2, 1, n)
    rows = [Identity("worm", f"?{i}", name, float(sure[i]), "", 0.0, "", 0.0, i % 7 == 0) for i, name in enumerate(names)]
    return worm, rows, network


@pytest.mark.parametrize("places", [True, False])
@pytest.mark.parametrize("n", [1, 4, 150])
def test_no_name_covers_another(n: int, places: bool) -> None:
    worm, rows, network = whole(n, places=places)
    figure = draw_worm(worm, rows, network)
    figure.canvas.draw()
    panels = figure.axes[1:]
    assert len(panels) == -(-n // PANEL)
    shown = []
    for ax in panels:
        boxes = [text.get_window_extent() for text in ax.texts]
        shown += [text.get_text().rstrip("?") for text in ax.texts]
        for i, box in enumerate(boxes):
            assert ax.bbox.x0 - 8 <= box.x0
            assert box.x1 <= ax.bbox.x1 + 8
            assert ax.bbox.y0 <= box.y0
            assert box.y1 <= ax.bbox.y1
            assert not any(box.overlaps(other) for other in boxes[:i])
    assert sorted(shown) == sorted(row.identity for row in rows)


def test_head_left_and_dorsal_up() -> None:
    worm, rows, network = whole(150, places=True)
    offsets = draw_worm(worm, rows, network).axes[0].collections[0].get_offsets()
    true = network.position[[network.index(row.identity) for row in rows]].numpy()
    true = true - true.mean(0)
    axis = np.linalg.svd(true, full_matrices=False)[2][0]
    assert np.corrcoef(offsets[:, 0], true[:, 1])[0, 1] > 0.99
    assert np.corrcoef(offsets[:, 1], (true - np.outer(true @ axis, axis))[:, 2])[0, 1] > 0.99


def test_names_have_the_colour_of_their_confidence() -> None:
    worm, rows, network = whole(30, places=True)
    colors = {text.get_text(): text.get_color() for text in draw_worm(worm, rows, network).axes[1].texts}
    for row in rows:
        doubtful = "?" if row.probability < 0.5 and not row.known else ""
        assert colors[row.identity + doubtful] == CONFIDENCE[confidence(row)][1]


def test_the_picture_refuses_rows_of_another_worm() -> None:
    worm, rows, network = whole(5, places=True)
    with pytest.raises(ValueError, match="not those of 'worm'"):
        draw_worm(worm, rows[::-1], network)


def report(folder: Path) -> str:
    result, worms, recordings, network = answer()
    rows = identity_table(result, worms, recordings, network)
    write_report(folder / "report.html", rows, recordings, network, settings={"method": "a <test>"})
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_needs_nothing_else_and_escapes_names(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert "http" not in page
    assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) == {"data:"}
    assert page.count("<img ") == 2
    assert page.count("<tr data-worm=") == 8
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;other&lt;/b&gt;" in page
    assert "a &lt;test&gt;" in page
    result, worms, recordings, network = answer()
    rows = identity_table(result, worms, recordings, network)
    with pytest.raises(ValueError, match="rows: 1, expected one for each neuron"):
        write_report(tmp_path / "x.html", rows[:1], recordings, network)


def browse(page: Path, folder: Path) -> tuple[str, str]:
    """The document after its scripts ran, and what the console said."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet = "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = [CHROMIUM, *flags.split(), *quiet.split(), f"--user-data-dir={folder}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_report_in_a_browser(tmp_path: Path) -> None:
    page = report(tmp_path)
    dom, console = browse(tmp_path / "report.html", tmp_path / "one")
    assert console == ""
    assert "8 of 8 neurons" in dom
    # A user sorts by probability, then wants one worm alone.
    acts = """<script>
    document.querySelectorAll("th button")[3].click();
    get("worm").value = "worm"; get("worm").dispatchEvent(new Event("input"));
    const img = document.images[0]; document.title = "picture " + (img.complete && img.naturalWidth > 500);
    </script></body>"""
    (tmp_path / "used.html").write_text(page.replace("</body>", acts), encoding="utf-8")
    dom, console = browse(tmp_path / "used.html", tmp_path / "two")
    assert console == ""
    assert "<title>picture true</title>" in dom
    assert "3 of 8 neurons" in dom
    rows = re.findall(r'<tr data-worm="([^"]*)" data-p="([^"]*)"( hidden="")?>', dom)
    probabilities = [float(p) for _, p, _ in rows]
    assert probabilities == sorted(probabilities)
    assert [worm == "worm" for worm, _, _ in rows] == [not hidden for _, _, hidden in rows]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_browser_test_sees_console_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<!doctype html><script>nothing()</script>")
    assert "nothing is not defined" in browse(tmp_path / "bad.html", tmp_path / "user")[1]
