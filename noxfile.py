"""The compatibility matrix: ``nox`` runs it all, ``nox -s 'tests-3.11(lowest)'`` one entry, ``nox --list`` names them.

Interpreters that are not there are skipped, unless ``--error-on-missing-interpreters`` says otherwise. ``lowest`` are the
versions of `constraints-lowest.txt`, ``pinned`` those of `constraints.txt`, ``newest`` what pip takes. The library is tested
with its doctests, without tutorials and benchmarks. Words after ``--`` go to pytest.
"""

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
CONSTRAINTS = {"lowest": "constraints-lowest.txt", "pinned": "constraints.txt", "newest": None}
LIBRARY = ["tests/ops", "tests/distributions", "tests/infer", "tests/nn", "tests/packaging", "tests/test_import.py"]
LIBRARY += ["tests/test_calibration.py", "tests/test_plotting.py", "tests/test_summary.py", "pyro_gs"]
TOOLS = ["arviz-base", "build", "hatchling", "hypothesis", "mpmath", "mypy", "pytest", "pytest-timeout"]
TOOLS += ["pytest-xdist", "tqdm"]

nox.options.default_venv_backend = "venv"


@nox.session(python=PYTHONS)
@nox.parametrize("versions", [nox.param(name, id=name) for name in CONSTRAINTS])
def tests(session: nox.Session, versions: str) -> None:
    """The library's tests with one set of versions."""
    constraints = CONSTRAINTS[versions]
    limits = [] if constraints is None else ["--constraint", constraints]
    session.install(*limits, "--editable", ".", *TOOLS)
    session.run("python", "-m", "pip", "list")
    # old torch with new everything else warns of itself
    lenient = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"] if versions == "lowest" else []
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *lenient, *(session.posargs or LIBRARY))


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """A wheel from an sdist, in an environment with nothing but what it asks for."""
    session.install("build")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", folder, silent=True)
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "build")
    session.install("--find-links", folder, "--pre", "pyro-gs")
    session.chdir(folder)
    session.run("python", session.invoked_from + "/tests/packaging/smoke.py")
