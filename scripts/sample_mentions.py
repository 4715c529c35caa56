#!/usr/bin/env python
"""Draw mentions, or sentences without one, from real text, to read and judge how precise a lexicon is.

    python scripts/sample_mentions.py DATA gender race --part tuning
    python scripts/sample_mentions.py DATA --part evaluation --unmatched 40 --triggers
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
import re
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
TRIGGERS = {
    "gender": r"(?i)\b(\w+(man|men|ess|girl|boy)s?|queens?|kings?|lords?|ladies|lad[sy]?|guys?|maid\w*|parents?|twins?)\b",
    "race": r"(?i)\b(black|white|asian|africans?|natives?|indians?|indigenous|trib\w+|ethnic\w*|rac(e|ial)|slaves?)\b",
    "religion": r"(?i)\b(christ\w*|god|faith|religio\w+|temples?|saints?|st|monks?|holy|pray\w*|priest\w*|theolog\w+)\b",
    "nationality": r"\b[A-Z][a-z]+(ians?|ans|ese|ish|ch|is?|ers)\b",
    "age": r"(?i)\b(old\w*|aged?|young\w*|boys?|girls?|youths?|junior|senior|years?|born|grand\w+|pupils?|kids?)\b",
    "disability": r"(?i)\b(\w*blind\w*|deaf\w*|disab\w+|handicap\w*|paraly\w+|crippl\w+|mental\w*|insan\w+|depress\w+"
    r"|lame|ill|illness\w*|impair\w*|injur\w+|syndrome|disorder|asylum|psych\w+|stroke|disease)\b",
    "orientation": r"(?i)\b(gays?|queer\w*|straight|\w*sexual\w*|sex|lesb\w+|lovers?|drag|partners?|pride|romanc\w+|affair)\b",
    "profession": r"(?i)\b(director|producer|players?|manager|officers?|staff|workers?|crew|host|editor|captain|drivers?"
    r"|model|pilots?|general|chief|star|leader|assistant|agent|operator|presenter|cook|\w+ers|\w+ists?)\b",
}
"""For each lexicon, words that may be a mention: where to look for what it misses."""


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


def sample_sentences(
    items: dict[str, list[Item]], lexicon: str, count: int, seed: int, trigger: str = ""
) -> Iterator[tuple[Item, int, int]]:
    """`count` sentences, with start and end, in which `lexicon` finds nothing: at least six words, evenly over corpora.

    With `trigger`, a regular expression, only those that hold one of its words. Every lexicon goes through the
    sentences in the same order, so that one reader's work serves several.
    """
    rng = random.Random(f"{seed} sentences")
    shuffled = []
    for listed in items.values():
        sentences = [(item, *span) for item in listed for span in _sentences(item.text)]
        shuffled.append(rng.sample(sentences, len(sentences)))
    annotator = GroupAnnotator([lexicon])
    for item, start, end in (entry for turn in zip_longest(*shuffled) for entry in turn if entry is not None):
        sentence = item.text[start:end]
        if count and re.search(trigger, sentence) and not annotator.spans(sentence):
            yield item, start, end
            count -= 1


def fingerprint(text: str, start: int, end: int) -> str:
    """A hash of a mention with 20 characters on either side, by which a changed corpus is noticed."""
    return hashlib.sha256(text[max(0, start - 20) : end + 20].encode()).hexdigest()[:12]


def context(text: str, start: int, end: int, width: int) -> str:
    """The mention in brackets with `width` characters on either side, on one line."""
    left, right = text[max(0, start - width) : start], text[end : end + width]
    return " ".join(f"{left}[{text[start:end]}]{right}".split())


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    end = 0
    for sentence in split_sentences(text):
        start = text.index(sentence, end)
        end = start + len(sentence)
        if len(sentence.split()) >= 6:
            yield start, end


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


app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[
        Path, typer.Argument(help="Folder with bold/, wikitext2/ and gap/.", exists=True, file_okay=False)
    ],
    lexicons: Annotated[
        list[str] | None, typer.Argument(help="Names or files; by default all that come along.")
    ] = None,
    part: Annotated[
        Literal["tuning", "evaluation"], typer.Option(help="Which half of the texts.")
    ] = "tuning",
    per_class: Annotated[int, typer.Option(min=1, help="Mentions of each class.")] = 10,
    seed: Annotated[int, typer.Option(help="Another seed draws another sample.")] = 0,
    width: Annotated[int, typer.Option(min=0, help="Characters shown on either side.")] = 60,
    unmatched: Annotated[
        int, typer.Option(min=0, help="Draw this many sentences without a mention instead.")
    ] = 0,
    triggers: Annotated[
        bool, typer.Option(help="Of these, only sentences with a word that may be one.")
    ] = False,
    references: Annotated[bool, typer.Option(help="Print a hash in the place of the text.")] = False,
) -> None:
    """Print one line for each mention: file, item, start, end, class, then the text around it or a hash."""
    try:
        items = read_items(data, part)
        names = lexicons or builtin_lexicons()
        unknown = [name for name in names if triggers and name not in TRIGGERS]
        if unknown:
            raise ValueError(f"triggers: there are none for {unknown[0]}, only for {', '.join(TRIGGERS)}")
        for name in names if unmatched else ():
            trigger = TRIGGERS[name] if triggers else ""
            for item, start, end in sample_sentences(items, name, unmatched, seed, trigger):
                shown = (
                    fingerprint(item.text, start, end) if references else context(item.text, start, end, 0)
                )
                print(item.file, item.key, start, end, name, shown, sep="\t")
        for name in names if not unmatched else ():
            for group, (item, mention) in sample_mentions(items, name, per_class, seed):
                shown = (
                    fingerprint(item.text, *mention[:2])
                    if references
                    else context(item.text, *mention[:2], width)
                )
                print(item.file, item.key, mention.start, mention.end, group, shown, sep="\t")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    app()
