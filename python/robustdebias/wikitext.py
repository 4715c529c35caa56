"""WikiText (Merity et al. 2016) as natural text: its files hold words and marks parted by spaces."""

from __future__ import annotations

import re
from pathlib import Path

from robustdebias.readers import Example, read_lines

__all__ = ["detokenize", "wikitext_lines"]

_HEADING = re.compile(r"(?:= )+.+?(?: =)+")
_QUOTED = re.compile(r'"\s([^"]*?)\s"')
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-.,])@ ", r"\1"),  # co @-@ star, 0 @.@ 7, 10 @,@ 000
        (r" ([,.;:!?%)\]]|\.\.\.)(?= |$|[\"'])", r"\1"),
        (r"([(\[$£]) (?=\S)", r"\1"),
        (r"([\w>]) '(s|re|ve|ll|d|m|t)\b", r"\1'\2"),  # Lester 's, don 't
        (r"(s) '(?= )", r"\1'"),  # the ships ' guns
    )
]


def detokenize(text: str) -> str:
    """The text as it would be printed: "co @-@ star ( 1 @,@ 500 ) , he 's" -> "co-star (1,500), he's".

    What the tokens do not tell (whether an apostrophe opens a quotation) stays as it is, and so does "<unk>".
    """
    text = _QUOTED.sub(r'"\1"', text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def wikitext_lines(path: str | Path) -> list[Example]:
    """The paragraphs of a WikiText file, detokenized; each article is a document. Headings are left out.

    Nine paragraphs in ten of WikiText-2 hold "<unk>", a word its makers took away: cut them into sentences (`passages`)
    and leave those out where a score must not depend on it. Raises ValueError naming file and line as `read_lines`
    does, and for a file without text.
    """
    name = Path(path).name
    document, found = f"{name}:1", []
    lines = ["", *(line.strip() for _, line in read_lines(path)), ""]
    for number, (before, line, after) in enumerate(zip(lines, lines[1:], lines[2:], strict=False), start=1):
        # Formulas have these marks too, but stand without blank lines around them.
        if line and not (_HEADING.fullmatch(line) and not before and not after):
            found.append(Example(detokenize(line), document))
        elif line and not line.startswith("= ="):  # an article's title; its sections have more marks
            document = f"{name}:{number}"
    if not found:
        raise ValueError(f"{path}: no text in this corpus")
    return found
