"""Counterfactual data augmentation: texts beside their twins, in which every demographic word has become another's.

Two-sided CDA as Zmigrod et al. 2019, Webster et al. 2020 and bias-bench (Meade et al. 2022) train with it.
`docs/augmentation.md` says what is theirs, what is decided here, and how often a counterfactual goes wrong.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from robustdebias.corpus import Example
from robustdebias.counterparts import WORD, Counterparts, Term, load_counterparts, words_of
from robustdebias.groups import GroupAnnotator, Mention
from robustdebias.possessives import stands_before_noun
from robustdebias.sentences import starts_sentence

__all__ = ["Augmentation", "Counterfactual", "Swapper", "augment"]

_INITIAL = re.compile(r"(?<![\w'’])\w")
_GAP = re.compile(r"[\s‐‑–-]+")
_ARTICLE = re.compile(r"(?<![\w'’-])([Aa])n?(?=\s+$)")
_VOWEL = re.compile(r"(?!eu|uni)[aeiou]|heir", re.IGNORECASE)  # the first sound of the words in the files
_LONGEST_LEAD = 10  # characters looked at before a word for its article


@dataclass(frozen=True)
class Counterfactual:
    """A text's counterfactual. Without swaps, `text` is the original."""

    text: str
    swaps: dict[str, int]  # lexicon -> mentions swapped; lexicons without any are left out
    left: int  # mentions that have no counterpart and stay

    def __bool__(self) -> bool:
        return bool(self.swaps)


class Swapper:
    """Makes counterfactuals: `swapper("She met her uncle.").text` is "He met his aunt."

    A mention, as `GroupAnnotator` finds it, is swapped if each of its words that alone is a mention has a counterpart.
    All classes of a lexicon move on by one and the same number of columns in a text, so that what was said of one
    group is said of one other, and two groups stay two: the number that swaps most of the text's mentions; among
    equals, one by a hash of text, lexicon and `seed`. Two classes are just exchanged.

    Args:
        lexicons: names of `builtin_counterparts()`, or what `load_counterparts` returned, at least one. Where words
            of two would both be swapped, the earlier has its way.
        seed: chooses between classes where there are more than two.
        cased: as for `GroupAnnotator`.

    Raises ValueError for a name that is unknown, and for lexicons that are none or repeat.
    """

    def __init__(
        self, lexicons: Iterable[str | Path | Counterparts], *, seed: int = 0, cased: bool = True
    ) -> None:
        pairs = [item if isinstance(item, Counterparts) else load_counterparts(item) for item in lexicons]
        self.annotator = GroupAnnotator([item.lexicon for item in pairs], cased=cased)
        self.seed = seed
        self._counterparts = pairs

    @property
    def names(self) -> list[str]:
        """The lexicons whose words are swapped."""
        return [counterparts.lexicon.name for counterparts in self._counterparts]

    def __call__(self, text: str) -> Counterfactual:
        """The counterfactual of `text`. Nothing else changes but an article: "an uncle", "a niece"."""
        words = [match.span() for match in WORD.finditer(text)]
        mentions = self.annotator.spans(text)
        taken: list[_Edit] = []
        swaps: dict[str, int] = {}
        for counterparts in self._counterparts:
            name = counterparts.lexicon.name
            found = []
            for mention in mentions:
                lexicon, _, value = mention.group.partition(":")
                if lexicon == name and value in counterparts.classes:
                    found.append(self._terms(counterparts, value, text, words, mention))
            for edits in self._rotate(counterparts, found, text):
                if not any(edit.overlaps(other) for edit in edits for other in taken):
                    swaps[name] = swaps.get(name, 0) + 1
                    taken += edits
        for edit in sorted(taken, reverse=True):  # from the end, so that offsets before it stay
            text = _apply(text, edit, self.annotator.cased)
        return Counterfactual(text, swaps, len(mentions) - sum(swaps.values()))

    def _terms(
        self,
        counterparts: Counterparts,
        value: str,
        text: str,
        words: list[tuple[int, int]],
        mention: Mention,
    ) -> list[_Found]:
        """The terms that reach into a mention, longest first; none if a word that alone is a mention is left over."""
        column = counterparts.classes.index(value)
        first = bisect_left(words, (mention.start, 0))
        number = max(0, first - counterparts.longest + 1)
        found = []
        while number < len(words) and words[number][0] < mention.end:
            start, end = words[number]
            for length in range(min(counterparts.longest, len(words) - number), max(0, first - number), -1):
                last = words[number + length - 1][1]
                term = counterparts.find(value, words_of(text[start:last]), stands_before_noun(text, last))
                if term is not None:
                    found.append(_Found(start, last, column, term))
                    number += length
                    break
            else:
                alone = self.annotator.spans(text[start:end]) if number >= first else []
                if any(other.group.startswith(f"{counterparts.lexicon.name}:") for other in alone):
                    return []
                number += 1
        return found

    def _rotate(self, counterparts: Counterparts, found: list[list[_Found]], text: str) -> list[list[_Edit]]:
        """The edits of the mentions that can be swapped, by the rotation that swaps most of them."""
        size = len(counterparts.classes)
        options = []
        for shift in range(1, size):
            moved = [
                [
                    _Edit(start, end, term.listed, term.row[(column + shift) % size])
                    for start, end, column, term in group
                ]
                for group in found
            ]
            options.append([group for group in moved if group and all(edit.written for edit in group)])
        most = max(map(len, options))
        best = [option for option in options if len(option) == most]
        key = f"{self.seed}\0{counterparts.lexicon.name}\0{text}".encode()
        return best[int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % len(best)]


@dataclass(frozen=True)
class Augmentation:
    """Texts with their counterfactuals, and how many there are. `print` shows the counts."""

    examples: list[Example]
    texts: int  # originals that were given
    augmented: int  # originals that have a counterfactual
    swaps: dict[str, int]  # lexicon -> mentions swapped
    left: int  # mentions in augmented texts that have no counterpart

    def __str__(self) -> str:
        swaps = ", ".join(f"{name} {count:,}" for name, count in self.swaps.items())
        return (
            f"{self.augmented:,} of {self.texts:,} texts ({self.augmented / max(self.texts, 1):.1%}) have a counterfactual; "
            f"mentions swapped: {swaps}; left without a counterpart: {self.left:,}; {len(self.examples):,} texts in all"
        )


def augment(
    examples: Sequence[Example],
    swapper: Swapper,
    *,
    annotator: GroupAnnotator | None = None,
    keep: Literal["augmented", "all"] = "augmented",
) -> Augmentation:
    """Two-sided counterfactual augmentation: each original directly followed by its counterfactual.

    A counterfactual has its original's document, so that a later split by document keeps both on one side. To measure
    on text as it was written, split first and augment the training part alone.

    Args:
        annotator: what the originals' groups came from. Where it finds just these groups in the original, it labels
            the counterfactual too. Labels of another origin are kept: they say what a document is about, and a swap
            cannot tell which label stands for the other group. None: every counterfactual keeps its original's groups.
        keep: "augmented" leaves out texts without counterfactual, as bias-bench does; "all" keeps them, once.

    Raises ValueError if no text has a counterfactual, and for another `keep`.
    """
    if keep not in ("augmented", "all"):
        raise ValueError(f"keep: expected 'augmented' or 'all', got {keep!r}")
    kept: list[Example] = []
    augmented = left = 0
    swaps = Counter(dict.fromkeys(swapper.names, 0))
    for example in examples:
        counterfactual = swapper(example.text)
        if counterfactual or keep == "all":
            kept.append(example)
        if not counterfactual:
            continue
        groups = example.groups
        if annotator is not None and groups is not None and groups == annotator.annotate(example.text):
            groups = annotator.annotate(counterfactual.text)
        kept.append(replace(example, text=counterfactual.text, groups=groups))
        augmented += 1
        left += counterfactual.left
        swaps.update(counterfactual.swaps)
    if not augmented:
        raise ValueError(
            f"examples: none of {len(examples)} texts has a word with a counterpart in {', '.join(swapper.names)}"
        )
    return Augmentation(kept, len(examples), augmented, dict(swaps), left)


class _Found(NamedTuple):
    """Characters `start` to `end` of a text are `term`, of the class in column `column`."""

    start: int
    end: int
    column: int
    term: Term


class _Edit(NamedTuple):
    """Characters `start` to `end` of a text, which the file lists as `listed`, become `written`."""

    start: int
    end: int
    listed: str
    written: str

    def overlaps(self, other: _Edit) -> bool:
        return self.start < other.end and other.start < self.end


def _apply(text: str, edit: _Edit, cased: bool) -> str:
    """`text` with one edit made: in the same case, with the same hyphens, behind the article that fits."""
    old, new = text[edit.start : edit.end], edit.written
    if len(old) > 1 and old.isupper():
        new = new.upper()
    elif not cased and old.islower():
        new = new.lower()
    elif old[0].isupper() and edit.listed[0].islower() and not starts_sentence(text, edit.start):
        new = _INITIAL.sub(lambda initial: initial[0].upper(), new)  # in a name or a heading
    elif old[0].isupper() and starts_sentence(text, edit.start):
        new = new[0].upper() + new[1:]
    words, gaps = _GAP.split(new), _GAP.findall(old)
    if len(words) == len(gaps) + 1:  # as many words: what stands between them stays
        new = "".join(word + gap for word, gap in zip(words, [*gaps, ""], strict=True))
    before = text[: edit.start]
    article = _ARTICLE.search(before, max(0, edit.start - _LONGEST_LEAD))
    if article is not None and bool(_VOWEL.match(old)) != bool(_VOWEL.match(new)):
        fitting = article[1] + "n" * bool(_VOWEL.match(new))
        before = before[: article.start()] + fitting + before[article.end() :]
    return before + new + text[edit.end :]
