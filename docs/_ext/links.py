"""Sphinx extension: warns of every link of the built site that leads nowhere.

A link within the site must find its file and, in a page, its anchor. Nothing is fetched: of an address on another server the
form is checked, and of one on a site in ``intersphinx_mapping`` that the site's inventory has it.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.util import logging

_logger = logging.getLogger(__name__)

_REFRESH = re.compile(r"\s*\d+\s*;\s*url=(.*)", re.IGNORECASE)
_HOST = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}", re.IGNORECASE)
_MAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")


class _Page(HTMLParser):
    """Collects the anchors of a page, and the addresses that it loads or links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {"", "top"}  # both mean the page's beginning
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.addresses += [values[name] for name in ("href", "src", "poster", "data", "action") if name in values]
        self.addresses += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if values.get("http-equiv", "").lower() == "refresh" and (match := _REFRESH.match(values.get("content", ""))):
            self.addresses.append(match[1])


def _wrong_elsewhere(address: str, inventories: dict[str, set[str]]) -> str | None:
    """What is wrong with an address that has a scheme or a host."""
    parts = urlsplit(address)
    if parts.scheme == "data":
        return None
    if parts.scheme == "mailto":
        return None if _MAIL.fullmatch(parts.path) else "is no mail address"
    if parts.scheme not in ("http", "https"):
        return "is neither http, https nor mailto"
    if re.search(r"\s", address) or not _HOST.fullmatch(parts.hostname or ""):
        return "is no web address"
    for site, known in inventories.items():
        if address.startswith(site) and address != site and address not in known:
            return f"is not in the inventory of {site}"
    return None


def broken(folder: Path, inventories: dict[str, set[str]]) -> list[tuple[Path, str, str]]:
    """Links that lead nowhere.

    Args:
        folder: A built site.
        inventories: Addresses that are known, by the beginning that they share.

    Returns:
        Page, address and what is wrong with it, once each.
    """
    folder = folder.resolve()
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        for address in dict.fromkeys(page.addresses):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                wrong = _wrong_elsewhere(address, inventories)
            else:
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                if folder not in target.parents or not target.is_file():
                    wrong = "is no file of the site"
                elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                    wrong = f"names no anchor of {target.relative_to(folder)}"
                else:
                    wrong = None
            if wrong is not None:
                found.append((file, address, wrong))
    return found


def _check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    named = InventoryAdapter(app.env).named_inventory
    inventories = {
        site: {item.uri for kind in named.get(name, {}).values() for item in kind.values()}
        for name, (site, _) in app.config.intersphinx_mapping.values()
    }
    for file, address, wrong in broken(Path(app.outdir), inventories):
        _logger.warning("%s: %r %s", file, address, wrong)


def setup(app: Sphinx) -> dict[str, bool]:
    """For Sphinx."""
    app.setup_extension("sphinx.ext.intersphinx")
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
