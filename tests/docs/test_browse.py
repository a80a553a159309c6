"""What is found on small pages that are wrong in one way each, opened in the browser that opens the site."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("playwright")
FILE = pathlib.Path(__file__).parents[2] / "docs" / "browse.py"
spec = importlib.util.spec_from_file_location("browse", FILE)
browse = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browse)

STYLE = """
body { margin: 0; color: black; background: white }
main { padding: 8px } pre, mjx-container, .scrolls { display: block; width: 100% } .scrolls { overflow-x: auto }
pre { overflow-x: auto }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #111 } .grey { color: #444 } }
"""
WIDE = '<span style="display: inline-block; width: 700px">E = mc^2</span>'
PAGES = {
    "right": (
        f'<pre>{"x = 1; " * 60}</pre><div class="scrolls"><table><tr><td>{WIDE}</td></tr></table></div>'
        '<p style="margin: 0">text</p><img src="opaque.png" alt="a picture">'
        '<section><h2 style="margin: 0 -8px">head</h2></section>'
    ),
    "equation": f'<div style="overflow-x: hidden"><mjx-container>{WIDE}</mjx-container></div>',
    "code": '<pre style="overflow-x: visible"><span style="display: inline-block; width: 700px">x = 1; y = 2</span></pre>',
    "table": f"<section><table><tr><td>{WIDE}</td></tr></table></section>",
    "tex": "<mjx-merror>Undefined control sequence</mjx-merror>",
    "missing": '<img src="missing.png" alt="a picture">',
    "silent": '<img src="opaque.png">',
    "transparent": '<img src="transparent.png" alt="a picture">',
    "faint": '<p class="grey">hard to read</p>',
    "elsewhere": '<img src="https://cdn.example/a.png" alt="a picture">',
    "script": "<script>undefinedFunction()</script>",
    "switch": (
        '<button class="theme-toggle" onclick="document.body.dataset.theme = \'dark\'">dark</button>'
        '<style>body[data-theme="dark"] { background: rgb(0, 0, 0) }</style>'
    ),
}
EVERYWHERE, NARROW, DARK = "(1280 light, 1280 dark, 390 light, 390 dark)", "(390 light, 390 dark)", "(1280 dark, 390 dark)"
EXPECTED = {
    "right": [],
    "equation": [f'<mjx-container> "E = mc^2" holds something 326 px wider than itself and does not scroll {NARROW}'],
    "code": [
        f"the page is 318 px wider than the window {NARROW}",
        f'<pre> "x = 1; y = 2" holds something 326 px wider than itself and does not scroll {NARROW}',
    ],
    "table": [
        f"the page is 324 px wider than the window {NARROW}",
        f'<section> "E = mc^2" holds something 332 px wider than itself and does not scroll {NARROW}',
    ],
    "tex": [f'<mjx-merror> "Undefined control sequence" is no TeX {EVERYWHERE}'],
    "missing": ["/missing.png is not there", f"the picture missing.png did not load {EVERYWHERE}"],
    "silent": [f"the picture opaque.png has no alternative text {EVERYWHERE}"],
    "transparent": [f"the picture transparent.png is transparent before a dark page {DARK}"],
    "faint": [f'<p.grey> "hard to read" has a contrast of 1.94: rgb(68, 68, 68) on rgb(17, 17, 17) {DARK}'],
    "elsewhere": [
        "asks for https://cdn.example/a.png",
        f"the picture https://cdn.example/a.png did not load {EVERYWHERE}",
    ],
    "script": ["undefinedFunction is not defined"],
    "switch": ["the switch to dark makes the page rgb(0, 0, 0), a dark preference rgb(17, 17, 17)"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Lines of one run over all pages."""
    if browse.CHROMIUM is None:
        pytest.skip("no Chromium here")
    folder = tmp_path_factory.mktemp("site")
    Image.new("RGB", (20, 20), "white").save(folder / "opaque.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "transparent.png")
    for name, body in PAGES.items():
        (folder / f"{name}.html").write_text(
            f"<html lang='en'><style>{STYLE}</style><body><main>{body}</main></body></html>"
        )
    (folder / "index.html").write_text('<meta http-equiv="refresh" content="0; url=right.html">')
    pictures = folder / "pictures"
    lines = browse.look(folder, pictures)
    assert len(list(pictures.glob("*.png"))) == 4 * len(PAGES)
    assert (pictures / "right-390-dark.png").exists()
    return lines


@pytest.mark.parametrize("name", PAGES)
def test_all_that_is_wrong_is_found_and_nothing_else(found, name):
    assert [line for line in found if line.startswith(f"{name}.html")] == [f"{name}.html: {line}" for line in EXPECTED[name]]


def test_a_page_that_only_leads_to_another_is_left_out(found):
    assert not [line for line in found if line.startswith("index")]


def test_a_folder_without_pages_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.html"):
        browse.look(tmp_path)


def test_without_a_browser_the_command_says_that_it_looked_at_nothing(tmp_path):
    done = subprocess.run([sys.executable, FILE, tmp_path], env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "no Chromium here: no page was looked at\n")
