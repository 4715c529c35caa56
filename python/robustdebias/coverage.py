"""How much text each group gets, and which groups share it. N texts, G groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

__all__ = ["Coverage", "membership"]

_CHUNK = 1 << 16  # texts whose membership is held at a time
_WIDEST_MATRIX = 12  # groups whose overlaps still fit a terminal as a matrix
_PAIRS = 20  # the largest overlaps that are listed where they do not


@dataclass(frozen=True)
class Coverage:
    """How much of a corpus each group gets. The rows of a text that is in several groups count in each."""

    names: list[str]
    texts: int
    words: int
    group_texts: list[int]  # texts in the group
    group_words: list[int]  # words in those texts
    mentions: list[int]  # terms found; 0 for groups that no lexicon found
    overlap: list[list[int]]  # [G, G] texts in both groups
    tokens: int | None = None  # of a tokenizer, without special tokens; None: nobody counted
    group_tokens: list[int] | None = None

    @staticmethod
    def of(
        texts: Sequence[str],
        groups: Sequence[Iterable[str]],
        names: Sequence[str],
        mentions: Counter[str] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Coverage:
        """Count for texts whose groups, and perhaps whose numbers of tokens, are known.

        Raises ValueError for a group that is not in `names`.
        """
        measured = np.ones(
            (len(texts), 2 if tokens is None else 3)
        )  # each text's ones, words and perhaps tokens
        measured[:, 1] = [len(text.split()) for text in texts]
        if tokens is not None:
            measured[:, 2] = tokens
        sums = np.zeros((measured.shape[1], len(names)))
        overlap = np.zeros((len(names), len(names)))
        for start in range(0, max(len(texts), 1), _CHUNK):
            part = slice(start, start + _CHUNK)
            # float64 is exact up to 2^53, and its products are many times faster than those of int64.
            member = membership(groups[part], names).astype(np.float64)
            sums += measured[part].T @ member
            overlap += member.T @ member
        totals = _whole(measured.sum(0))
        return Coverage(
            names=list(names),
            texts=len(texts),
            words=totals[1],
            group_texts=_whole(sums[0]),
            group_words=_whole(sums[1]),
            mentions=[(mentions or Counter())[name] for name in names],
            overlap=[_whole(row) for row in overlap],
            tokens=None if tokens is None else totals[2],
            group_tokens=None if tokens is None else _whole(sums[2]),
        )

    def absent(self) -> list[str]:
        """The groups that no text is in."""
        return [name for name, texts in zip(self.names, self.group_texts, strict=True) if not texts]

    def rows(self) -> list[dict[str, str | int | float]]:
        """A group each: its name, texts and words with their shares, tokens where they were counted, mentions."""
        columns: dict[str, Sequence[str | int | float]] = {
            "group": self.names,
            "texts": self.group_texts,
            "text_share": _shares(self.group_texts, self.texts),
            "words": self.group_words,
            "word_share": _shares(self.group_words, self.words),
        }
        if self.group_tokens is not None:
            columns |= {
                "tokens": self.group_tokens,
                "token_share": _shares(self.group_tokens, self.tokens or 0),
            }
        columns["mentions"] = self.mentions
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
        lines = [f"{self.texts:,} texts, {self.words:,} words{tokens}"]
        width = max(map(len, ["group", *self.names]))
        rows = self.rows()
        if rows:
            lines.append("".join(_cell(key, key.rpartition("_")[2], width) for key in rows[0]))
        lines += ["".join(_cell(key, value, width) for key, value in row.items()) for row in rows]
        return "\n".join([*lines, "", *self._overlaps(width)])

    def _overlaps(self, width: int) -> list[str]:
        pairs = [
            (self.overlap[one][two], one, two)
            for one, two in combinations(range(len(self.names)), 2)
            if self.overlap[one][two]
        ]
        if not pairs:
            return ["no text is in two groups"]
        if len(self.names) <= _WIDEST_MATRIX:
            return self._matrix(width)
        pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
        lines = [f"texts in both groups, the {min(_PAIRS, len(pairs))} largest of {len(pairs):,} overlaps"]
        for texts, one, two in pairs[:_PAIRS]:
            shares = [f"{texts / self.group_texts[group]:.1%} of {self.names[group]}" for group in (one, two)]
            lines.append(f"{texts:>9,}  {', '.join(shares)}")
        return lines

    def _matrix(self, width: int) -> list[str]:
        numbers = [str(column) for column in range(1, len(self.names) + 1)]
        cell = max(3, *(len(str(count)) for row in self.overlap for count in row)) + 1
        lines = ["texts in both groups"]
        lines.append(" " * (width + 4) + "".join(f"{number:>{cell}}" for number in numbers))
        for number, name, row in zip(numbers, self.names, self.overlap, strict=True):
            lines.append(f"{number:>3} {name:<{width}}" + "".join(f"{count:>{cell}}" for count in row))
        return lines


def membership(groups: Sequence[Iterable[str]], names: Sequence[str]) -> np.ndarray:
    """Bool [N, G]: row n is True at the groups that `groups[n]` lists.

    Raises ValueError for names that repeat and for a group that is not among them.
    """
    column = {name: number for number, name in enumerate(names)}
    if len(column) != len(names):
        raise ValueError(f"names: expected distinct groups, got {list(names)}")
    member = np.zeros((len(groups), len(names)), dtype=bool)
    for row, listed in enumerate(groups):
        for group in listed:
            if group not in column:
                raise ValueError(f"groups: {group!r} is not one of {list(names)}")
            member[row, column[group]] = True
    return member


def _whole(values: np.ndarray) -> list[int]:
    return values.astype(np.int64).tolist()


def _shares(counts: Sequence[int], total: int) -> list[float]:
    return [count / max(total, 1) for count in counts]


def _cell(key: str, value: str | int | float, width: int) -> str:
    """Of the printed table; the heading is a value too."""
    if key == "group":
        return f"{value:<{width}}"
    if key.endswith("_share"):
        return f"{value:>8.1%}" if isinstance(value, float) else f"{value:>8}"
    cell = 10 if key in ("texts", "mentions") else 11
    return f"{value:>{cell}}" if isinstance(value, str) else f"{value:>{cell},}"
