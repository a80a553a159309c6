"""Open every page of the built site in headless Chromium, wide and narrow, light and dark, and report what looks wrong.

``python docs/browse.py build/docs``, or ``make docs-browser``; ``--pictures FOLDER`` keeps what was seen. Reported are
pictures that did not load, have no alternative text or are black on black; pages wider than the window; equations, code and
tables that leave their box; wrong TeX; text of too little contrast; messages of the browser's console; requests to other
servers. Where there is no Chromium nothing is looked at, which one line says.
"""

import argparse
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from playwright.sync_api import ConsoleMessage, Page, Route, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
_SITE = "http://site.test/"  # a name that is nowhere: the files of the folder answer for it
_LOOK = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def _switch(page: Page) -> list[str]:
    """Does the theme's own switch lead to the colours that a reader's preference leads to?"""
    colour = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    preferred = page.evaluate(colour)
    page.emulate_media(color_scheme="light")
    button = page.locator("button.theme-toggle:visible")
    if not button.count():
        return []
    for _ in range(3):
        button.first.click()
        if page.evaluate("document.body.dataset.theme") == "dark":
            break
    switched = page.evaluate(colour)
    page.evaluate("document.body.dataset.theme = 'auto'; localStorage.clear()")
    return [] if switched == preferred else [f"the switch to dark makes the page {switched}, a dark preference {preferred}"]


def look(folder: Path, pictures: Path | None = None) -> list[str]:
    """Open every page of a site.

    Args:
        folder: The built site; pages are its ``*.html``.
        pictures: Folder for a picture of each page as it was seen.

    Returns:
        A line for everything that is wrong, with the page, and the widths and colours at which it is.

    Raises:
        FileNotFoundError: If the folder has no page.
        RuntimeError: If there is no Chromium.
    """
    # a page that only leads to another is none
    files = [
        file for file in sorted(folder.rglob("*.html")) if 'http-equiv="refresh"' not in file.read_text(encoding="utf-8")
    ]
    if not files:
        raise FileNotFoundError(f"folder is {str(folder)!r}, where there is no *.html")
    if CHROMIUM is None:
        raise RuntimeError("there is no chromium, chromium-browser or google-chrome on the path")
    found: list[str] = []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
        page = browser.new_page()
        name = ""

        def answer(route: Route) -> None:
            url = urlsplit(route.request.url)
            file = folder / unquote(url.path.lstrip("/"))
            if not route.request.url.startswith(_SITE):
                found.append(f"{name}: asks for {route.request.url}")
                route.abort()
            elif not file.is_file():
                found.append(f"{name}: {url.path} is not there")
                route.fulfill(status=404)
            else:
                route.fulfill(path=file)

        def hear(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and "Failed to load resource" not in message.text:  # which answer says
                found.append(f"{name}: {message.text}")

        page.route("**/*", answer)
        page.on("console", hear)
        page.on("pageerror", lambda error: found.append(f"{name}: {error}"))
        for file in files:
            name = file.relative_to(folder).as_posix()
            page.set_viewport_size({"width": WIDTHS[0], "height": 900})
            page.emulate_media(color_scheme="light")
            page.goto(_SITE + name, wait_until="load")
            page.evaluate("window.MathJax?.startup?.promise")
            seen: dict[str, list[str]] = {}
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                for scheme in SCHEMES:
                    page.emulate_media(color_scheme=scheme)
                    for line in page.evaluate(_LOOK):
                        seen.setdefault(line, []).append(f"{width} {scheme}")
                    if pictures is not None:
                        shot = pictures / f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                        page.screenshot(path=shot, full_page=True)
            found += [f"{name}: {line} ({', '.join(where)})" for line, where in seen.items()]
            page.set_viewport_size({"width": WIDTHS[0], "height": 900})
            found += [f"{name}: {line}" for line in _switch(page)]
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the built site")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each page as it was seen")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        print("no Chromium here: no page was looked at")
        return 0
    found = look(arguments.folder, arguments.pictures)
    for line in found:
        print(line)
    print(f"{len(found)} things are wrong" if found else "nothing is wrong")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
