"""The bias card: what an experiment did and what it changed, for people, as Markdown and as one HTML file.

The words and numbers are put together here, once; the templates lay them out. Nothing in a card depends on the day
or the machine it is written on: the same summary gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from robustdebias.experiments import card_text
from robustdebias.experiments.card_input import read

__all__ = ["write_card"]

_TEMPLATES = Path(__file__).parent / "templates"


def write_card(out_dir: str | Path, summary: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``card.md``, ``card.html`` and ``plots/*.png`` and ``*.svg`` into ``out_dir``.

    ``card.html`` holds its pictures and style: it can be sent alone and read offline. A file is replaced in one step,
    and the cards go last, so they never name a picture that isn't there.

    Args:
        summary: the experiment's, as ``card_input.Summary`` describes it. What has no data is left out of the card.

    Returns: the paths of ``card.md`` and ``card.html``.
    Raises: ValueError naming the key, if one is missing or has a value that it can't have; nothing is written then.
    """
    from robustdebias.experiments import card_plots  # matplotlib takes a second to import

    checked = read(summary)
    pictures = card_plots.draw_all(checked)
    images = {picture.stem: _image(picture.figure, "png") for picture in pictures}
    content = {"card": card_text.content(checked), "pictures": pictures}
    html = _environment(autoescape=True)
    html.filters["data_uri"] = lambda stem: "data:image/png;base64," + base64.b64encode(images[stem]).decode()
    # Whatever a template prints is escaped, unless it says that it is Markdown.
    markdown = _environment(autoescape=False, finalize=_escaped)
    markdown.filters |= {"fenced": _fenced, "table": _table}
    card_html = html.get_template("card.html.j2").render(content)
    card_md = markdown.get_template("card.md.j2").render(content)

    plots = Path(out_dir) / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        _write(plots / f"{picture.stem}.png", images[picture.stem])
        _write(plots / f"{picture.stem}.svg", _image(picture.figure, "svg"))
    paths = Path(out_dir) / "card.md", Path(out_dir) / "card.html"
    for path, text in zip(paths, (card_md, card_html), strict=True):
        _write(path, text.encode())
    return paths


class Markdown(str):
    """Text that is not to be escaped."""

    __slots__ = ()


def _escaped(value: Any) -> str:
    """On one line, so that it shows as written wherever it stands: in a paragraph, a list or a table."""
    if isinstance(value, Markdown):
        return value
    if isinstance(value, card_text.Cell):
        return str(value)  # numbers and verdicts
    text = re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", " ".join(str(value).split()))
    # What would make a heading, a rule or a list at the start of a line.
    return re.sub(r"^(?=[-+=#]+(\s|$))|(?<=^)(\d+)(?=[.)](\s|$))", lambda found: f"{found[2] or ''}\\", text)


def _table(table: card_text.Table) -> Markdown:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rules = ["---" if column < table.words else "---:" for column in range(len(table.head))]
    lines = [line(map(_escaped, table.head)), line(rules)]
    for block in table.blocks:
        if block.label:
            lines.append(line([f"**{_escaped(block.label)}**", *[""] * (len(table.head) - 1)]))
        lines += [line(map(_escaped, row)) for row in block.rows]
    return Markdown("\n".join(lines))


def _fenced(text: str) -> Markdown:
    """A block of code; its fence is longer than any within."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}\n{text.strip()}\n{fence}")


def _environment(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, **options,
    )  # fmt: skip


def _image(figure: Any, kind: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # Without a date and with ids that are not random the same summary gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "card", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".partial")
    part.write_bytes(content)
    os.replace(part, path)
