"""Sphinx configuration. The sources are rooted at the repository's root, so that a link between files works in both places.

``sphinx-build -c docs . build/docs``. Tutorials are executed; ``PYRO_GS_TUTORIAL_SIZE=quick`` makes that fast.
"""

import hashlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import pyro_gs  # noqa: E402

project = "pyro_gs"
author = copyright = "The pyro_gs developers"
version = release = pyro_gs.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "links",
    "offline",
    "reference",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "tutorials/first_permutation.py",
    "tutorials/tracking.py",
    "tutorials/linkage.py",
    "tutorials/ranking.py",
    "tutorials/ordering.py",
    "tutorials/celegans/identify.py",
    "tutorials/celegans/README.md",
    "tutorials/sorting/README.md",
    "tutorials/jigsaw/README.md",
    "tutorials/assemble/README.md",
    "tutorials/celegans/data/SOURCES.md",
    "benchmarks/README.md",
    "benchmarks/results/celegans_sweep/tables.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "dist", "results", "site"]
templates_path = ["_templates"]

_SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "matplotlib": "https://matplotlib.org/stable/",
}
# names that pages link to, listed here, since nothing is fetched while the site is built
intersphinx_mapping = {name: (site, f"docs/inventories/{name}.txt") for name, site in _SITES.items()}

nitpicky = True
# names of unions and of callables in annotations
_ALIASES = [
    "Balance",
    "Bound",
    "Capacities",
    "Chain",
    "Diagnostic",
    "Gradient",
    "InitLogits",
    "Law",
    "LogEvidence",
    "LogJoint",
    "_Relaxed",
]
_ALIASES += ["Logits", "Method", "Network", "Objective", "Pool", "PosteriorDict", "Score", "SiteTemperature", "SwapDelta"]
nitpick_ignore_regex = [("py:class", rf"(.*\.)?({'|'.join(_ALIASES)})")]

autodoc_member_order = "bysource"
autodoc_default_options = {"inherited-members": True}  # but those of other packages, see _ext/reference.py
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # what returns says before a colon is mostly no type
napoleon_custom_sections = [("Shapes", "notes_style")]

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"pyro_gs {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}  # the site's root leads to root_doc

nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"
nb_execution_timeout = 900  # seconds of a cell
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove-warn"

# for the kernels: they start in folders of their own; tqdm complains where there are no widgets to draw bars with; and two
# threads wait for each other wherever another program has one of two cores: a page of 20 seconds took eight minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"]))


def _digest() -> str:
    """Of all code that an executed page depends on; the cache itself sees only the page's own."""
    files = sorted([*ROOT.glob("pyro_gs/**/*.py"), *ROOT.glob("tutorials/**/*.py"), *ROOT.glob("tutorials/**/data/*.csv")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


_size = os.environ.get("PYRO_GS_TUTORIAL_SIZE", "default")
nb_execution_cache_path = str(ROOT / "build" / "executed" / f"{_size}-{_digest()}")
