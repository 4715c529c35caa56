"""Reads a bias card back, as a browser or a Markdown reader would."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """A page's tables, list items and headings as text, and its tags; fails if they are not balanced."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.items: list[str] = []
        self.outline: list[str] = []  # headings, and "." for what else has text
        self.titles: dict[int, str] = {}  # list item -> the finding that it belongs to
        self._open: list[str] = []
        self._title = ""
        self.feed(html)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "li":
            self.items.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1:] == [tag], f"</{tag}> in {self._open}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if not text:
            return
        heading = next((tag for tag in self._open if re.fullmatch("h[1-6]", tag)), None)
        self.outline.append(f"{heading} {text}" if heading else ".")
        if "td" in self._open or "th" in self._open:
            row = self.tables[-1][-1]
            row[-1] = f"{row[-1]} {text}".strip()
        elif "li" in self._open:
            self.titles[len(self.items) - 1] = self._title
            self.items[-1] = f"{self.items[-1]} {text}".strip()
        elif (heading == "h3" or "strong" in self._open) and " against " in text:
            self._title = text

    def has(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def pages(out: Path) -> list[Page]:
    """The Markdown, as a Markdown reader shows it, and the HTML."""
    return [Page(rendered(out)), Page((out / "card.html").read_text(encoding="utf-8"))]


def rendered(out: Path) -> str:
    return MarkdownIt("commonmark").enable("table").render((out / "card.md").read_text(encoding="utf-8"))


def trimmed(tables: list[list[list[str]]]) -> list[list[list[str]]]:
    """A row that is a label has empty cells in Markdown, and a single one in HTML."""
    return [[list(strip_last(row)) for row in table] for table in tables]


def strip_last(row: list[str]) -> list[str]:
    while len(row) > 1 and not row[-1]:
        row = row[:-1]
    return row


def rows_below(page: Page, table_head: list[str], label: str) -> list[list[str]]:
    """The rows below a metric's label in the table that has it."""
    for table in trimmed(page.tables):
        if table[0] == table_head and [label] in table:
            start = table.index([label]) + 1
            below = table[start:]
            end = next((i for i, row in enumerate(below) if len(row) == 1), len(below))
            return below[:end]
    raise AssertionError(f"no row {label!r}")
