"""The paragraphs of HTML pages, without navigation."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "div", "dl", "dt", "figcaption", "figure",
    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section",
    "table", "tr", "ul",
}  # fmt: skip
_SKIPPED = {"head", "nav", "noscript", "script", "style", "template"}
# Classes of DocBook, Publican and Sphinx: bars with links to other pages, tables of contents, indexes, heading marks.
_NAVIGATION = {
    "docnav", "footer", "headerlink", "index", "list-of-examples", "list-of-figures", "list-of-tables", "navfooter",
    "navheader", "related", "sphinxsidebar", "toc", "toctree-wrapper",
}  # fmt: skip
_BREAK = "\0"  # a <br>, which outlives the collapsing of space
_space = re.compile(r"[ \t\r\n\f]+")  # not the spaces that HTML keeps, such as U+3000


def paragraphs(page: str) -> list[str]:
    """Returns the paragraphs, headings, items, rows of tables and listings of a page, in order.

    Space is collapsed, except in listings (``pre``). Navigation, scripts and styles are dropped.
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    reader.end_block()
    return reader.blocks


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._pieces: list[str] = []
        self._listings = 0  # open elements <pre>
        self._skipped = ""  # the element whose content is skipped, and how many of its name are open
        self._depth = 0

    def end_block(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        if self._listings:
            lines = text.replace(_BREAK, "\n").split("\n")
        else:
            lines = [_space.sub(" ", line).strip() for line in text.split(_BREAK)]
        block = "\n".join(line.rstrip() for line in lines).strip("\n")
        if block:
            self.blocks.append(block)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
        elif tag in _SKIPPED or _is_navigation(dict(attrs)):
            self._skipped = tag
            self._depth = 1
        elif tag in _BLOCKS:
            self.end_block()
            self._listings += tag == "pre"
        elif tag == "br":
            self._pieces.append(_BREAK)
        elif tag in ("td", "th"):
            self._pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            self._skipped = self._skipped if self._depth else ""
        elif tag in _BLOCKS:
            self.end_block()
            self._listings -= tag == "pre" and self._listings > 0

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._pieces.append(data)


def _is_navigation(attributes: dict[str, str | None]) -> bool:
    classes = set((attributes.get("class") or "").split())
    return bool(classes & _NAVIGATION) or attributes.get("role") == "navigation" or attributes.get("id") == "banner"
