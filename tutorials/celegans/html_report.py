"""One self-contained HTML page of a run: pictures and a table to sort and filter."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.identities import Identity
from tutorials.celegans.portrait import CONFIDENCE, confidence, draw_worm
from tutorials.celegans.recordings import Recording

__all__ = ["confident", "write_report"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; --line: light-dark(#d5d5d5, #444); --soft: light-dark(#f3f3f3, #262626); }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 1rem;
  background: light-dark(#fff, #181818); color: light-dark(#1a1a1a, #e6e6e6); }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; }}
.wide {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }}
.wide img {{ display: block; min-width: 1000px; width: 100%; background: #fff; }}
form {{ display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin: .5rem 0; }}
input, select {{ font: inherit; padding: .2rem .4rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th button {{ font: inherit; font-weight: 600; border: 0; background: none; color: inherit; padding: 0; cursor: pointer; }}
th[aria-sort=ascending] button::after {{ content: " \\2191"; }}
th[aria-sort=descending] button::after {{ content: " \\2193"; }}
tbody tr:hover {{ background: var(--soft); }}
.dot {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .4em; border: 1px solid var(--line); }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; overflow-wrap: anywhere; }}
dt {{ opacity: .75; }} dd {{ margin: 0; }}
</style></head><body>
<h1>{title}</h1>
{summary}
{pictures}
<h2 id="table">All neurons</h2>
<form onsubmit="return false">
<label>worm <select id="worm"><option value="">all</option>{options}</select></label>
<label>name or label <input id="text" type="search" size="10"></label>
<label>probability at most <input id="most" type="number" min="0" max="1" step="0.05" value="1"></label>
<span id="count" role="status"></span></form>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<script>
const body = document.querySelector("tbody"), rows = [...body.rows];
const get = id => document.getElementById(id);
function filter() {{
  let shown = 0; const text = get("text").value.trim().toUpperCase(), most = parseFloat(get("most").value);
  for (const r of rows) {{
    const hit = (!get("worm").value || r.dataset.worm === get("worm").value) && !(Number(r.dataset.p) > most) &&
      [1, 2, 4, 6].some(i => r.cells[i].textContent.toUpperCase().includes(text));
    r.hidden = !hit; shown += hit;
  }}
  get("count").textContent = shown + " of " + rows.length + " neurons";
}}
document.querySelectorAll("th button").forEach((button, column) => button.onclick = () => {{
  const th = button.parentElement, up = th.getAttribute("aria-sort") !== "ascending";
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = r => r.cells[column].textContent;
  rows.sort((a, b) => (up ? 1 : -1) * key(a).localeCompare(key(b), "en", {{numeric: true}}));
  body.append(...rows);
}});
for (const id of ["worm", "text", "most"]) get(id).oninput = filter;
filter();
</script></body></html>
"""

_COLUMNS = (
    "worm",
    "label",
    "identity",
    "probability",
    "second choice",
    "probability",
    "third choice",
    "probability",
    "given",
)


def write_report(
    path: str | Path,
    rows: Sequence[Identity],
    recordings: Sequence[Recording],
    connectome: Connectome,
    *,
    title: str = "Neurons of C. elegans",
    settings: Mapping[str, object] | None = None,
) -> None:
    """Write one HTML file that needs nothing else: a summary, a picture a worm and the table of `identity_table`.

    The table can be sorted by a click on a column and filtered by worm, name and probability. Without scripts it
    is a plain table.

    Args:
        path: The file.
        rows: Of `identity_table`.
        recordings: The ones that the rows are of, in the same order.
        connectome: Has the places of the identities.
        title: Of the page.
        settings: What the summary names beside the counts, such as method and budget.

    Raises:
        ValueError: If the rows are not those of the recordings.
    """
    if sum(len(recording.labels) for recording in recordings) != len(rows):
        raise ValueError(f"rows: {len(rows)}, expected one for each neuron of the recordings")
    start, sections = 0, []
    for recording in recordings:
        mine = rows[start : start + len(recording.labels)]
        start += len(mine)
        picture = _svg(draw_worm(recording, mine, connectome))
        name = html.escape(recording.name)
        sections.append(
            f'<h2>{name}</h2><div class="wide" tabindex="0"><img alt="The {len(mine)} neurons of {name} with their names; '
            f'the table below holds the same" src="{picture}"></div>'
        )
    page = _PAGE.format(
        title=html.escape(title),
        summary=_summary(rows, recordings, connectome, settings or {}),
        pictures="\n".join(sections),
        options="".join(f"<option>{html.escape(recording.name)}</option>" for recording in recordings),
        head="".join(f'<th><button type="button">{column}</button></th>' for column in _COLUMNS),
        body="\n".join(map(_row, rows)),
    )
    Path(path).write_text(page, encoding="utf-8")


def _svg(figure: Figure) -> str:
    """A picture as a data URI; vectors stay sharp when a phone zooms in."""
    data = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "worm", "font.family": "sans-serif"}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue().encode()).decode()


def _row(row: Identity) -> str:
    text, color = CONFIDENCE[confidence(row)]
    cells = [
        html.escape(row.worm),
        html.escape(row.label),
        f'<span class="dot" style="background:{color}" title="{text}"></span>{html.escape(row.identity)}',
        f"{row.probability:.3f}",
        html.escape(row.second),
        f"{row.second_probability:.3f}" if row.second else "",
        html.escape(row.third),
        f"{row.third_probability:.3f}" if row.third else "",
        "yes" if row.known else "",
    ]
    inner = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr data-worm="{html.escape(row.worm)}" data-p="{row.probability:.6f}">{inner}</tr>'


def confident(rows: Sequence[Identity]) -> str:
    """How many of the neurons that were not given are named with .95 or more, in words.

    Args:
        rows: Of `identity_table`. Where the method gives no probabilities but 0 and 1, the words say that.
    """
    unknown = [row.probability for row in rows if not row.known]
    if unknown and all(p in (0.0, 1.0) for p in unknown):
        return f"{len(unknown)} named without doubt, by probabilities of 0 and 1 that tell nothing"
    return f"{sum(p >= 0.95 for p in unknown)} of {len(unknown)} named with .95 or more"


def _summary(
    rows: Sequence[Identity], recordings: Sequence[Recording], connectome: Connectome, settings: Mapping[str, object]
) -> str:
    unknown = [row.probability for row in rows if not row.known]
    doubt = any(0 < p < 1 for p in unknown)
    expected = f"{sum(unknown):.0f} of {len(unknown)} others, if the probabilities are calibrated"
    items: dict[str, object] = {
        "recordings": ", ".join(f"{r.name} ({len(r.labels)} neurons, {len(r.traces)} time steps)" for r in recordings),
        "connectome": f"{len(connectome)} neurons, {connectome.graph}",
        "given identities": f"{len(rows) - len(unknown)} of {len(rows)}",
        "the others": confident(rows),
        **({"expected to be right": expected} if doubt else {}),
        **settings,
    }
    pairs = "".join(f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>" for key, value in items.items())
    return f"<dl>{pairs}</dl>"
