"""Sphinx extension: warns of everything in the built site that a browser would fetch from another server."""

import re
from html.parser import HTMLParser
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

_logger = logging.getLogger(__name__)

_REMOTE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
_CSS = re.compile(r"""(?:url\(\s*|@import\s+)["']?\s*((?:https?:)?//[^"')\s;]+)""", re.IGNORECASE)
_FETCHED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}


class _Fetched(HTMLParser):
    """Collects the addresses that a page loads; links that a reader may follow are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.addresses += [values[name] for name in ("src", "poster", "data") if name in values]
        self.addresses += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if tag == "link" and _FETCHED_LINKS & set(values.get("rel", "").lower().split()):
            self.addresses.append(values.get("href", ""))


def remote_in_html(text: str) -> list[str]:
    """Addresses on other servers that a page loads through elements or its inline styles."""
    page = _Fetched()
    page.feed(text)
    return [address for address in page.addresses if _REMOTE.match(address)] + remote_in_css(text)


def remote_in_css(text: str) -> list[str]:
    """Addresses on other servers that a style sheet loads."""
    return _CSS.findall(text)


def _check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    for suffix, find in (("html", remote_in_html), ("css", remote_in_css)):
        for file in sorted(Path(app.outdir).rglob(f"*.{suffix}")):
            for address in find(file.read_text(encoding="utf-8")):
                _logger.warning("%s loads %s from another server", file, address)


def setup(app: Sphinx) -> dict[str, bool]:
    """For Sphinx."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
