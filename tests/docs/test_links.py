"""Which links of a built site lead nowhere."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("sphinx")
FILE = pathlib.Path(__file__).parents[2] / "docs" / "_ext" / "links.py"
spec = importlib.util.spec_from_file_location("links", FILE)
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)

KNOWN = {"https://docs.example.org/en/": {"https://docs.example.org/en/api.html#f"}}


@pytest.fixture
def broken(tmp_path):
    """What is wrong with a page of a small site that holds an element."""
    (tmp_path / "site" / "sub").mkdir(parents=True)
    (tmp_path / "outside.html").write_text("<p></p>")
    (tmp_path / "site" / "a picture.png").write_bytes(b"")
    (tmp_path / "site" / "other.html").write_text('<h1 id="one"></h1><a name="two"></a><h2 id="größe"></h2>')

    def answer(element):
        page = tmp_path / "site" / "sub" / "page.html"
        page.write_text(f'<html><body id="here">{element}</body></html>', encoding="utf-8")
        found = links.broken(tmp_path / "site", KNOWN)
        assert {file for file, _, _ in found} <= {page}
        return [wrong for _, _, wrong in found]

    return answer


@pytest.mark.parametrize(
    "element",
    [
        '<a href="../other.html">',
        '<a href="../other.html#one">',
        '<a href="../other.html#two">',
        '<a href="../other.html#gr%C3%B6%C3%9Fe">',
        '<a href="../other.html?q=1#one">',
        '<a href="#">',
        '<a href="#here">',
        '<img src="../a%20picture.png">',
        '<img srcset="../a%20picture.png 2x">',
        '<img src="data:image/png;base64,//8=">',
        '<a href="https://example.org/anything#at-all">',
        '<a href="mailto:someone@example.org">',
        '<a href="https://docs.example.org/en/">',
        '<a href="https://docs.example.org/en/api.html#f">',
        '<meta http-equiv="refresh" content="0; url=../other.html">',
    ],
)
def test_leads_somewhere(broken, element):
    assert broken(element) == []


@pytest.mark.parametrize(
    ("element", "wrong"),
    [
        ('<a href="other.html">', "is no file of the site"),
        ('<a href="../sub">', "is no file of the site"),  # a folder
        ('<a href="../../outside.html">', "is no file of the site"),
        ('<a href="../other.html#three">', "names no anchor of other.html"),
        ('<a href="#there">', "names no anchor of sub/page.html"),
        ('<img src="../missing.png">', "is no file of the site"),
        ('<img srcset="../a%20picture.png 1x, ../large.png 2x">', "is no file of the site"),
        ('<script src="a.js"></script>', "is no file of the site"),
        ('<meta http-equiv="refresh" content="0; url=other.html">', "is no file of the site"),
        ('<a href="https://exampleorg/">', "is no web address"),
        ('<a href="https://example.org/a b">', "is no web address"),
        ('<a href="//example">', "is neither http, https nor mailto"),
        ('<a href="mailto:someone">', "is no mail address"),
        ('<a href="file:///etc/hosts">', "is neither http, https nor mailto"),
        ('<a href="https://docs.example.org/en/api.html#g">', "is not in the inventory of https://docs.example.org/en/"),
    ],
)
def test_leads_nowhere(broken, element, wrong):
    assert broken(element) == [wrong]


CONF = """
extensions = ["links"]
intersphinx_mapping = {"other": ("https://docs.example.org/en/", "other.txt")}
"""
PAGE = """
Title
=====

.. raw:: html

   <a href="missing.html">a</a> <a href="https://docs.example.org/en/api.html#f">b</a>
   <a href="https://docs.example.org/en/api.html#g">c</a>
"""
INVENTORY = """# Sphinx inventory version 1
# Project: other
# Version: 1
f function api.html
"""


def test_a_site_with_a_broken_link_is_not_built(tmp_path):
    (tmp_path / "conf.py").write_text(CONF)
    (tmp_path / "index.rst").write_text(PAGE)
    (tmp_path / "other.txt").write_text(
        "# Sphinx inventory version 1\n# Project: other\n# Version: 1\nf function api.html\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "--fail-on-warning",
            "--keep-going",
            "--quiet",
            "--no-color",
            tmp_path,
            tmp_path / "site",
        ],
        env={**os.environ, "PYTHONPATH": str(FILE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    warnings = [line.partition("index.html: ")[2] for line in done.stderr.splitlines() if "index.html" in line]
    assert warnings == [
        "'missing.html' is no file of the site",
        "'https://docs.example.org/en/api.html#g' is not in the inventory of https://docs.example.org/en/",
    ]
