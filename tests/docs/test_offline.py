"""What counts as loaded from another server."""

import importlib.util
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[2] / "docs" / "_ext" / "offline.py"
spec = importlib.util.spec_from_file_location("offline", FILE)
offline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(offline)


@pytest.mark.parametrize(
    "element",
    [
        '<script async src="https://cdn.example/a.js"></script>',
        '<img src="//cdn.example/a.png" alt="a">',
        '<img srcset="small.png 1x, http://cdn.example/a.png 2x" src="small.png">',
        '<link rel="stylesheet" href="https://cdn.example/a.css">',
        '<LINK REL="preload" HREF="HTTPS://cdn.example/a.woff2">',
        "<style>@import 'https://cdn.example/a.css';</style>",
        '<div style="background: url(https://cdn.example/a.png)"></div>',
        '<object data="https://cdn.example/a.svg"></object>',
    ],
)
def test_loaded(element):
    assert len(offline.remote_in_html(f"<html><body>{element}</body></html>")) == 1


@pytest.mark.parametrize(
    "element",
    [
        '<a href="https://pyro.ai">a link to follow</a>',
        '<link rel="canonical" href="https://example.org/page.html">',
        '<script src="_static/a.js"></script>',
        '<img src="data:image/png;base64,//8=">',
        "<code>url(https: //example.org)</code>",
    ],
)
def test_not_loaded(element):
    assert offline.remote_in_html(f"<html><body>{element}</body></html>") == []


def test_style_sheets():
    css = '@import url("https://cdn.example/a.css"); a { background: url(b.png) } b { src: url( //cdn.example/c.woff ) }'
    assert offline.remote_in_css(css) == ["https://cdn.example/a.css", "//cdn.example/c.woff"]
