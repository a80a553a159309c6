"""The package as built: an sdist, a wheel from it, an environment that has nothing else of this checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def attempt(*command, cwd):
    """Run a command in a folder and an environment without this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    words = [str(part) for part in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def run(*command, cwd):
    """Output of a command that succeeds."""
    done = attempt(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Python of an environment with the wheel; what it depends on is borrowed from the environment of the tests."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, built[1], cwd=folder)
    # .pth files of that folder, an editable install among them, are not read; it comes after the environment's own
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_the_package_and_no_more(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pyro_gs"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_gs").rglob("*.py")}
    assert sources | {"pyro_gs/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Python: >=3.10" in metadata
    assert re.search(r"^Project-URL: ", metadata, re.MULTILINE) is None  # no address until there is one


def test_the_sdist_can_be_tested(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"conftest.py", "constraints.txt", "Makefile", "pyproject.toml", "CITATION.cff", "CONTRIBUTING.md"} <= names
    assert {"tests/packaging/smoke.py", "tutorials/first_permutation.py", "docs/conf.py", "benchmarks/README.md"} <= names


@pytest.mark.usefixtures("float64_only")
def test_it_works_where_only_the_wheel_is_installed(installed, tmp_path):
    assert run(installed, HERE / "smoke.py", cwd=tmp_path).startswith("pyro_gs ")


@pytest.mark.slow
@pytest.mark.usefixtures("float64_only")
def test_users_get_its_types(installed, tmp_path):
    """What is right passes under ``mypy --strict``, what is wrong is found."""
    program = (HERE / "downstream.py").read_text()
    wrong = [number for number, line in enumerate(program.splitlines(), 1) if "# error" in line]
    (tmp_path / "user.py").write_text(program)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n")
    options = ["--python-executable", installed, "--cache-dir", ROOT / ".mypy_cache"]
    done = attempt(sys.executable, "-m", "mypy", *options, "user.py", cwd=tmp_path)
    assert [int(line) for line in re.findall(r"^user.py:(\d+): error", done.stdout, re.MULTILINE)] == wrong, done.stdout
