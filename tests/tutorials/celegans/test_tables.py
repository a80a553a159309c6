import json
import statistics

import pytest
from matplotlib import image

from tutorials.celegans.__main__ import METHODS
from tutorials.celegans.cells import TABLES
from tutorials.celegans.jobs import expand
from tutorials.celegans.report import COLORS
from tutorials.celegans.results import Results
from tutorials.celegans.summaries import load, published, show
from tutorials.celegans.tables import main
from tutorials.provenance import Provenance

SOFTWARE = Provenance("1.0", "abc", "2.0")
SEEDS = (0, 1, 2)


def accuracy(job):
    """Made up: known of each job, and different for each method and seed."""
    place = 0.05 * list(METHODS).index(job.method) if job.method in METHODS else 0.3
    return 0.9 - place - 0.01 * job.seed - 0.1 * (job.objective == "density")


def fill(folder, names, *, quick=False, software=SOFTWARE, skip=(), **options):
    tables = [TABLES[name].quick() if quick else TABLES[name] for name in names]
    with (folder / "jobs.jsonl").open("a") as log:
        for job in expand(tables, SEEDS, **({"methods": ("gumbel-sinkhorn", "map")} | options)):
            record = {"key": job.key(software), **job.settings, **vars(software)}
            record |= {"status": "done", "accuracy": accuracy(job)}
            if job.method != "chance":
                record |= {"calibration_error": 0.05, "log_evidence": -90.0 - job.seed, "log_evidence_truth": -90.0}
                record["bins"] = [[0, 0.0, 0]] * 7 + [[10, 7.5, 6], [0, 0.0, 0], [20, 19.0, 18]]
            if job.seed not in skip:
                log.write(json.dumps(record) + "\n")
    with Results(folder) as results:
        results.write_tables()


def test_the_paper_is_beside_ours(tmp_path, capsys):
    fill(tmp_path, ["table2"])
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text() in printed
    table = printed.split("| accuracy")[1].split("\n\n")[0].splitlines()
    assert table[0] == " | 40 %, 0.1 | 40 %, 0.2 | 30 %, 0.1 | 30 %, 0.2 | 20 %, 0.1 | 20 %, 0.2 | 10 %, 0.1 | 10 %, 0.2 |"
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| chance",
        "| Gumbel-Sinkhorn VI, published",
        "| Gumbel-Sinkhorn VI",
        "| MAP (FAQ), published",
        "| MAP (FAQ)",
        "| ceiling",
    ]
    assert table[3] == "| Gumbel-Sinkhorn VI, published | 0.97 | 0.96 | 0.92 | 0.84 | 0.74 | 0.58 | 0.44 | 0.23 |"
    assert set(table[4].split(" | ")[1:]) <= {"0.890 (0.880 to 0.900)", "0.890 (0.880 to 0.900) |"}
    assert "No method is above Gumbel-Sinkhorn VI in any cell." in printed
    assert "above the published figure in 5 of 8 cells, not in 40 %, 0.1; 40 %, 0.2; 30 %, 0.1." in printed
    assert "20 or 40 seconds (cpu clock) for each method; median, lowest and highest over 3 seeds; code of abc." in printed
    assert "| -1 (-2 to 0) |" in printed


def test_probabilities_are_corrected_by_the_other_seeds(tmp_path, capsys):
    fill(tmp_path, ["table2"])
    frame, _ = load(tmp_path)
    fits = frame[frame["method"] != "chance"]
    # all seeds have the same curve, which rises: each is corrected to its own accuracies, but for the answer that each bin
    # of the two others counts more: (12 + .75) / 21 for .6, and (36 + .95) / 41 for .9
    left = (10 * abs(12.75 / 21 - 0.6) + 20 * abs(36.95 / 41 - 0.9)) / 30
    assert fits["calibration_error_corrected"].to_numpy() == pytest.approx(left, abs=1e-9)
    assert frame[frame["method"] == "chance"]["calibration_error_corrected"].isna().all()
    assert main([str(tmp_path)]) == 0
    assert "| the same, probabilities corrected by the other seeds | 40 %, 0.1 |" in capsys.readouterr().out
    short = tmp_path / "short"
    short.mkdir()
    fill(short, ["table2"], skip=(2,))
    assert load(short)[0]["calibration_error_corrected"].isna().all()


def test_a_method_that_beats_the_guide_is_named(tmp_path, monkeypatch, capsys):
    better = ("map", 0.2)
    monkeypatch.setitem(globals(), "accuracy", lambda job: 0.95 if (job.method, job.cell.eta) == better else 0.9)
    fill(tmp_path, ["table2"])
    assert main([str(tmp_path)]) == 0
    shown = "; ".join(f"{known} %, 0.2 (0.900): MAP (FAQ) 0.950" for known in (40, 30, 20, 10))
    assert f"Above Gumbel-Sinkhorn VI (its median): {shown}." in capsys.readouterr().out


def test_every_method_has_a_color_of_its_own():
    titles = [title for title, _ in METHODS.values()]
    assert len({COLORS[title] for title in titles}) == len(titles)


def test_published_figures_are_those_of_the_paper():
    first, second = published("table1"), published("table2")
    assert len(first) == len(second) == 32
    assert set(first["method"]) | set(second["method"]) == {"naive-vi", "map", "mcmc", "gumbel-sinkhorn"}
    value = first.set_index(["method", "candidates", "worms"])["accuracy"]
    assert value["gumbel-sinkhorn", 60, 4] == 0.44
    assert value["mcmc", 10, 4] == 0.65
    assert second.set_index(["method", "known", "eta"])["accuracy"]["map", 0.3, 0.2] == 0.32


def test_every_table_and_picture_is_drawn(tmp_path, capsys):
    sweeps = [name for name in TABLES if name != "objectives"]
    fill(tmp_path, sweeps, quick=True, methods=("gumbel-sinkhorn", "naive-vi", "map"))
    fill(tmp_path, ["objectives"], quick=True, methods=())
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("## ")] == [n for n in TABLES if n != "base"]
    assert "published" not in printed  # small cells are no match for it
    panels = ["table1", "table2", "protocol", "sigma", "all", "objectives"]
    for name in ("curves", *panels, *(f"reliability_{name}" for name in TABLES if name not in ("base", "objectives"))):
        picture = image.imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 150
        assert picture[..., :3].std() > 0.01  # something is drawn


def test_objectives_are_lines_of_their_own_table_only(tmp_path):
    fill(tmp_path, ["table2", "objectives"], methods=())
    frame, _ = load(tmp_path)
    objectives, table = show("objectives", frame), show("table2", frame)
    assert [line.title for line in objectives.lines] == ["chance", "density", "tightened_kl", "noise_kl", "ceiling"]
    line = next(x for x in table.lines if x.method == "gumbel-sinkhorn")
    assert len([x for x in table.lines if x.method == "gumbel-sinkhorn"]) == 1
    cell = table.table.cells[0]
    assert statistics.median(table.values(cell, line)) == pytest.approx(0.89)
    assert statistics.median(objectives.values(cell, objectives.lines[1])) == pytest.approx(0.79)


def test_a_sweep_that_has_not_run_is_not_shown_for_the_cell_it_shares(tmp_path):
    fill(tmp_path, ["table2"], methods=())
    frame, _ = load(tmp_path)
    assert show("worms", frame) is None
    assert show("table1", frame) is None
    assert show("objectives", frame) is None
    fill(tmp_path, ["worms"], methods=("gumbel-sinkhorn",))
    frame, _ = load(tmp_path)
    worms = show("worms", frame)
    assert {line.method for line in worms.methods} == set(TABLES["worms"].methods)  # the shared cell has all
    assert worms.labels == ["1", "2", "3", "4", "5", "6", "8"]
    assert worms.seeds == "3 seeds"


def test_several_budgets_need_a_choice(tmp_path, capsys):
    fill(tmp_path, ["base"])
    fill(tmp_path, ["base"], budget=5.0, methods=("map",))
    assert main([str(tmp_path)]) == 2
    assert "has results of 20 s (cpu), 5 s (cpu); choose with --budget" in capsys.readouterr().err
    assert main([str(tmp_path), "--budget", "5"]) == 0
    printed = capsys.readouterr().out
    assert "5 seconds (cpu clock)" in printed
    assert "Gumbel" not in printed
    assert "chance" in printed


def test_the_last_version_of_the_code_counts(tmp_path, capsys):
    fill(tmp_path, ["base"])
    fill(tmp_path, ["base"], software=Provenance("1.0", "later", "2.0"), skip=(2,))
    frame, _ = load(tmp_path)
    assert len(frame) == 4 * len(SEEDS)
    assert frame.groupby("seed")["commit"].unique().map(list).to_dict() == {0: ["later"], 1: ["later"], 2: ["abc"]}
    main([str(tmp_path)])
    assert "code of abc, later" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "old", "new", "text"),
    [
        ("results.csv", None, "", "results.csv: expected a CSV that the sweep wrote"),
        ("results.csv", ",139,", ",many,", "results.csv, line 2: neurons is 'many', expected int"),
        ("results.csv", ",done,", ",,", "results.csv, line 2: status is nan, expected done or failed"),
        ("results.csv", ",-90,", ",low,", "results.csv, line 3: log_evidence is 'low', expected a number"),
        ("reliability.csv", ",7,10,7.5,", ",7,,7.5,", "reliability.csv, line 9: count is missing, expected a number"),
    ],
)
def test_damaged_files_are_told_with_their_line(name, old, new, text, tmp_path, capsys):
    fill(tmp_path, ["base"])
    path = tmp_path / name
    path.write_text("" if old is None else path.read_text().replace(old, new, 1))
    assert main([str(tmp_path)]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["nan", "-1", "7"])
def test_a_budget_that_nothing_has_is_refused(budget, tmp_path, capsys):
    fill(tmp_path, ["base"])
    assert main([str(tmp_path), "--budget", budget]) == 2
    assert f"budget {budget}" in capsys.readouterr().err.replace("=", " ")


def test_bad_folders_are_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "results.csv: no such file, expected the results of python -m tutorials.celegans.sweep" in capsys.readouterr().err
    (tmp_path / "results.csv").write_text("key,seed\n1,2\n")
    assert main([str(tmp_path)]) == 2
    assert "columns tables, worms" in capsys.readouterr().err
    with Results(tmp_path) as results:
        results.write_tables()
    assert main([str(tmp_path)]) == 2
    assert "no job is done" in capsys.readouterr().err
