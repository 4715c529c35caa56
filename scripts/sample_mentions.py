#!/usr/bin/env python
"""Draw mentions, or sentences without one, from real text, to read and judge how precise a lexicon is.

    python scripts/sample_mentions.py DATA gender race --part tuning
    python scripts/sample_mentions.py DATA --part evaluation --unmatched 60
    python scripts/sample_mentions.py DATA --part evaluation --references    # hashes in the place of the text

DATA holds `bold/*_wiki.json` (BOLD), `wikitext2/*.txt` (WikiText-2) and `gap/*.tsv` (GAP). Half of the texts, by a
hash, are there to tune the lexicons on, the other half to evaluate them: no text is in both. `docs/lexicons.md` says
how the answers are kept and counted.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]  # runs from a checkout, installed or not

from robustdebias.groups import GroupAnnotator, Mention, builtin_lexicons  # noqa: E402
from robustdebias.sentences import split_sentences  # noqa: E402

PARTS = ("tuning", "evaluation")
CORPORA = ("bold/*_wiki.json", "wikitext2/*.txt", "gap/*.tsv")


class Item(NamedTuple):
    """A text of a corpus: `file` below the data folder and, in it, `key`, by which it is found again."""

    file: str
    key: str
    text: str


class Found(NamedTuple):
    """A mention in an item."""

    item: Item
    mention: Mention


def read_items(data: Path, part: str | None = None) -> dict[str, list[Item]]:
    """The texts of every corpus, by the corpus's folder; all of them, or those of one of `PARTS`.

    The key is `subgroup/entity/number` in BOLD, the line's number (from 1) in WikiText, the ID in GAP.
    Raises ValueError if a corpus is not there.
    """
    items: dict[str, list[Item]] = {}
    for pattern in CORPORA:
        paths = sorted(data.glob(pattern))
        if not paths:
            raise ValueError(f"data: no {pattern} under {data}")
        items[pattern.split("/")[0]] = [
            item
            for path in paths
            for item in _read(data, path)
            if item.text.strip() and part in (None, PARTS[zlib.crc32(f"{item.file} {item.key}".encode()) % 2])
        ]
    return items


def sample_mentions(
    items: dict[str, list[Item]], lexicon: str, per_class: int, seed: int
) -> Iterator[tuple[str, Found]]:
    """`per_class` mentions of each class of `lexicon`, as far as there are so many, evenly over the corpora."""
    annotator = GroupAnnotator([lexicon])
    found: dict[str, dict[str, list[Found]]] = defaultdict(lambda: defaultdict(list))
    for corpus, listed in items.items():
        for item in listed:
            for mention in annotator.spans(item.text):
                found[mention.group][corpus].append(Found(item, mention))
    for group in annotator.names[:-1]:
        rng = random.Random(f"{seed} {group}")
        shuffled = [rng.sample(entries, len(entries)) for entries in found[group].values()]
        turns = [entry for turn in zip_longest(*shuffled) for entry in turn if entry is not None]
        for entry in turns[:per_class]:
            yield group, entry


def sample_sentences(items: dict[str, list[Item]], count: int, seed: int) -> list[tuple[Item, int, int]]:
    """`count` random sentences of at least six words, as items with start and end, evenly over the corpora."""
    rng = random.Random(f"{seed} sentences")
    drawn: list[tuple[Item, int, int]] = []
    while len(drawn) < count:
        for listed in items.values():
            item = rng.choice(listed)
            sentence = rng.choice(split_sentences(item.text))
            start = item.text.find(sentence)
            entry = (item, start, start + len(sentence))
            if len(sentence.split()) >= 6 and entry not in drawn:
                drawn.append(entry)
    return drawn[:count]


def fingerprint(text: str, start: int, end: int) -> str:
    """A hash of a mention with 20 characters on either side, by which a changed corpus is noticed."""
    return hashlib.sha256(text[max(0, start - 20) : end + 20].encode()).hexdigest()[:12]


def context(text: str, start: int, end: int, width: int) -> str:
    """The mention in brackets with `width` characters on either side, on one line."""
    left, right = text[max(0, start - width) : start], text[end : end + width]
    return " ".join(f"{left}[{text[start:end]}]{right}".split())


def _read(data: Path, path: Path) -> Iterator[Item]:
    name = path.relative_to(data).as_posix()
    if path.suffix == ".json":
        for subgroup, entities in json.loads(path.read_text(encoding="utf-8")).items():
            for entity, sentences in entities.items():
                for number, sentence in enumerate(sentences):
                    yield Item(name, f"{subgroup}/{entity}/{number}", sentence)
    elif path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield Item(name, row["ID"], row["Text"])
    else:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield Item(name, str(number), line)


def main(
    data: Annotated[Path, typer.Argument(help="Folder with bold/, wikitext2/ and gap/.", exists=True, file_okay=False)],
    lexicons: Annotated[list[str] | None, typer.Argument(help="Names or files; by default all that come along.")] = None,
    part: Annotated[Literal["tuning", "evaluation"], typer.Option(help="Which half of the texts.")] = "tuning",
    per_class: Annotated[int, typer.Option(min=1, help="Mentions of each class.")] = 10,
    seed: Annotated[int, typer.Option(help="Another seed draws another sample.")] = 0,
    width: Annotated[int, typer.Option(min=0, help="Characters shown on either side.")] = 60,
    unmatched: Annotated[int, typer.Option(min=0, help="Draw this many random sentences instead.")] = 0,
    references: Annotated[bool, typer.Option(help="Print a hash in the place of the text.")] = False,
) -> None:
    """Print one line for each mention: file, item, start, end, class, then the text around it or a hash."""
    try:
        items = read_items(data, part)
        names = lexicons or builtin_lexicons()
        if unmatched:
            annotators = {name: GroupAnnotator([name]) for name in names}
            for item, start, end in sample_sentences(items, unmatched, seed):
                sentence = item.text[start:end]
                silent = [name for name, annotator in annotators.items() if not annotator.spans(sentence)]
                tail = fingerprint(item.text, start, end) if references else " ".join(sentence.split())
                print(item.file, item.key, start, end, ",".join(silent), tail, sep="\t")
            return
        for name in names:
            for group, (item, mention) in sample_mentions(items, name, per_class, seed):
                shown = fingerprint(item.text, *mention[:2]) if references else context(item.text, *mention[:2], width)
                print(item.file, item.key, mention.start, mention.end, group, shown, sep="\t")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
