"""Which demographic groups a text speaks of: readable lexicons, and an annotator.

A text may belong to several groups; one in which nothing is found belongs to "other". Letters: B texts, G groups.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from robustdebias.corpus import OTHER, Example, read_lines
from robustdebias.coverage import Coverage, membership
from robustdebias.sentences import starts_sentence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LEXICON_DIR", "Coverage", "GroupAnnotator", "Lexicon", "Mention", "builtin_lexicons", "collect_names",
    "group_mask", "load_lexicon",
]  # fmt: skip

LEXICON_DIR = Path(__file__).parent / "lexicons"
"""The lexicons that come with the package; `lexicons/gender.txt` says how the files are read and extended."""

_IGNORE = "ignore"
WORD = re.compile(r"[\w\u0300-\u036f]+")  # a letter keeps its combining accents
_GAP = re.compile(r"\s+|[-‐‑–'’]")  # what may stand between the words of a term


@dataclass(frozen=True)
class Lexicon:
    """Terms of one demographic: `terms` maps a term's words to its class, or to None where it is to be ignored."""

    name: str
    classes: tuple[str, ...]
    terms: dict[tuple[str, ...], str | None]

    def merged(self, value: str = "any") -> Lexicon:
        """The same terms as one class, for a corpus that has too little text of each: "religion:any".

        With an empty value the group has the lexicon's name alone: "religion".
        """
        return Lexicon(
            self.name, (value,), {term: None if old is None else value for term, old in self.terms.items()}
        )


class Mention(NamedTuple):
    """Characters `start` to `end` of a text name `group`."""

    start: int
    end: int
    group: str


def builtin_lexicons() -> list[str]:
    """Names of the lexicons that come with the package."""
    return sorted(path.stem for path in LEXICON_DIR.glob("*.txt"))


def load_lexicon(path_or_name: str | Path) -> Lexicon:
    """Read a lexicon: one of `builtin_lexicons()` by its name, or a file; the file's stem is the lexicon's name.

    Raises ValueError, naming file and line, for a term that is listed twice, a class that is empty or opened twice, a
    term outside any class, a term without words, or text that is not UTF-8; and for a name that is unknown.
    """
    path = (
        LEXICON_DIR / f"{path_or_name}.txt" if str(path_or_name) in builtin_lexicons() else Path(path_or_name)
    )
    if not path.is_file():
        raise ValueError(
            f"lexicon {str(path_or_name)!r}: neither a file nor one of those that come with the package: "
            + ", ".join(builtin_lexicons())
        )
    classes, terms = _parse(path)
    for term, value in list(terms.items()):
        terms.setdefault((*term[:-1], plural(term[-1])), value)  # what is listed goes before what is derived
    return Lexicon(path.stem, classes, terms)


class GroupAnnotator:
    """Finds the groups of a text: whole words, case-aware, the longest term of a lexicon first.

    Lexicons are independent: "black women" is a mention in both race and gender. How capitals are treated stands in
    `lexicons/gender.txt`; with `cased=False`, for text without capitals, they are ignored (and false friends such as
    the verb "miss" come back).
    """

    names: list[str]
    """The groups, `lexicon:class` (`lexicon` for an empty class) in the order of the lexicons, "other" last."""

    def __init__(self, lexicons: Iterable[Lexicon | str | Path], *, cased: bool = True) -> None:
        loaded = [lexicon if isinstance(lexicon, Lexicon) else load_lexicon(lexicon) for lexicon in lexicons]
        repeated = [name for name, count in Counter(lexicon.name for lexicon in loaded).items() if count > 1]
        if repeated or not loaded:
            raise ValueError(
                f"lexicons: expected at least one, of distinct names, got {[x.name for x in loaded]}"
            )
        self.cased = cased
        self.names = [_group(lexicon, value) for lexicon in loaded for value in lexicon.classes] + [OTHER]
        self._lexicons = len(loaded)
        # First word in lower case -> the terms that begin with it, longest first: (words, lexicon, group).
        self._index: dict[str, list[tuple[tuple[str, ...], int, str | None]]] = {}
        for number, lexicon in enumerate(loaded):
            for term, value in lexicon.terms.items():
                words = term if cased else tuple(word.lower() for word in term)
                entry = (words, number, None if value is None else _group(lexicon, value))
                self._index.setdefault(words[0].lower(), []).append(entry)
        for entries in self._index.values():
            entries.sort(key=lambda entry: -len(entry[0]))

    def spans(self, text: str) -> list[Mention]:
        """The mentions in `text`, in order; those of one lexicon do not overlap."""
        tokens = [(match.start(), match.end()) for match in WORD.finditer(text)]
        words = [normalise(text[start:end]) for start, end in tokens]
        keys = [word.lower() for word in words]
        if not self.cased:
            words = keys
        free = [0] * self._lexicons  # the first token that a lexicon has not used up
        mentions = []
        for first, key in enumerate(keys):
            for term, lexicon, group in self._index.get(key, ()):
                if first < free[lexicon] or not self._stands_at(term, first, words, tokens, text):
                    continue
                free[lexicon] = first + len(term)
                if group is not None:
                    mentions.append(Mention(tokens[first][0], tokens[first + len(term) - 1][1], group))
        return mentions

    def annotate(self, text: str) -> tuple[str, ...]:
        """The groups that `text` mentions, in the order of `names`; ("other",) if it mentions none."""
        mentioned = {mention.group for mention in self.spans(text)}
        return tuple(name for name in self.names if name in mentioned) or (OTHER,)

    def label(self, examples: Iterable[Example]) -> list[Example]:
        """The examples with the groups of those that have none filled in; ready-made labels stay as they are."""
        return [
            example if example.groups is not None else replace(example, groups=self.annotate(example.text))
            for example in examples
        ]

    def coverage(self, texts: Iterable[str]) -> Coverage:
        """How many of `texts`, and of their words, each group gets. `print` shows it as a table."""
        texts = list(texts)
        found = [self.spans(text) for text in texts]
        groups = [{mention.group for mention in mentions} or {OTHER} for mentions in found]
        mentions = Counter(mention.group for mentions in found for mention in mentions)
        return Coverage.of(texts, groups, self.names, mentions)

    def _stands_at(
        self, term: tuple[str, ...], first: int, words: list[str], tokens: list[tuple[int, int]], text: str
    ) -> bool:
        if tuple(words[first + 1 : first + len(term)]) != term[1:]:
            return False
        head = words[first]
        if head != term[0] and not (
            head == term[0][0].upper() + term[0][1:] and starts_sentence(text, tokens[first][0])
        ):
            return False
        pairs = zip(tokens[first:], tokens[first + 1 : first + len(term)], strict=False)
        return all(_GAP.fullmatch(text, left[1], right[0]) for left, right in pairs)


def collect_names(examples: Iterable[Example]) -> list[str]:
    """The groups that occur in `examples`, in alphabetical order whatever the order of the texts, "other" last."""
    names = {group for example in examples for group in example.groups or ()}
    return sorted(names - {OTHER}) + [OTHER] * (OTHER in names)


def group_mask(groups: Sequence[Iterable[str]], names: Sequence[str]) -> Tensor:
    """Membership as bool [B, G]: row b is True at the groups that `groups[b]` lists.

    Raises ValueError for names that repeat and for a group that is not among them.
    """
    import torch

    return torch.from_numpy(membership(groups, names))


def _group(lexicon: Lexicon, value: str) -> str:
    return f"{lexicon.name}:{value}" if value else lexicon.name


def _parse(path: Path) -> tuple[tuple[str, ...], dict[tuple[str, ...], str | None]]:
    """The classes and listed terms of a lexicon file."""
    opened: dict[str, int] = {}  # class -> its line
    listed: dict[tuple[str, ...], int] = {}  # term -> its line
    terms: dict[tuple[str, ...], str | None] = {}
    section = ""
    for number, raw in read_lines(path):
        line, where = raw.strip(), f"{path}:{number}"
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]").strip()
            if not section or line != f"[{section}]":
                raise ValueError(f"{where}: expected a class such as [female], got {line!r}")
            if section in opened:
                raise ValueError(f"{where}: class {section!r} was opened before, at line {opened[section]}")
            opened[section] = number
            continue
        if not section:
            raise ValueError(f"{where}: term {line!r} stands before the first [class]")
        for term in _expand(line, where):
            if term in listed:
                raise ValueError(
                    f"{where}: duplicate term {' '.join(term)!r}, listed before at line {listed[term]}"
                )
            listed[term] = number
            terms[term] = None if section == _IGNORE else section
    filled = {value or _IGNORE for value in terms.values()}
    for value, number in opened.items():
        if value not in filled:
            raise ValueError(f"{path}:{number}: class {value!r} has no terms")
    classes = tuple(value for value in opened if value != _IGNORE)
    if not classes:
        raise ValueError(f"{path}: no [class] in this lexicon")
    return classes, terms


def _expand(line: str, where: str) -> Iterator[tuple[str, ...]]:
    """The terms that a line with alternatives stands for, each as its words."""
    for choice in product(*(word.split("|") for word in line.split())):
        words = tuple(normalise(word) for word in WORD.findall(" ".join(choice)))
        if not words or not all(choice):
            raise ValueError(f"{where}: no word in {line!r}, or an empty alternative")
        yield words


def plural(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def normalise(word: str) -> str:
    return word if word.isascii() else unicodedata.normalize("NFC", word)
