"""Words that are each other's counterpart: readable files of them, a column a class of a lexicon.

`counterfactuals/gender.txt` says how a file is read and extended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from robustdebias.corpus import read_lines
from robustdebias.groups import WORD, Lexicon, load_lexicon, normalise
from robustdebias.groups import plural as plural_of

__all__ = ["WORD", "Counterparts", "Term", "builtin_counterparts", "load_counterparts", "words_of"]

_FOLDER = Path(__file__).parent / "counterfactuals"  # the counterparts that come with the package

_BEFORE_NOUN = "NOUN"
_NONE = "-"

Words = tuple[str, ...]
_Key = tuple[str, bool, Words]  # class, only before a noun, words


class Term(NamedTuple):
    """What a term of one class was listed as, and the row of counterparts that it is in: one text a class, "" for none."""

    listed: str
    row: Words


@dataclass(frozen=True)
class Counterparts:
    """Words of a lexicon that are each other's counterpart. Made by `load_counterparts`."""

    lexicon: Lexicon
    classes: tuple[str, ...]  # in the order of a row's columns
    terms: dict[_Key, Term]
    longest: int  # words of the longest term

    def find(self, value: str, words: Words, before_noun: bool) -> Term | None:
        """The term of class `value` with exactly these words; a capital counts where the file lists it."""
        folded = tuple(word.lower() for word in words)
        for noun in (True, False) if before_noun else (False,):
            for key in (words, folded):
                if (term := self.terms.get((value, noun, key))) is not None:
                    return term
        return None


def words_of(text: str) -> Words:
    """The words of `text` as terms are compared: hyphens and apostrophes part words."""
    return tuple(normalise(word) for word in WORD.findall(text))


def builtin_counterparts() -> list[str]:
    """Names of the lexicons for which the package has counterparts."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def load_counterparts(path_or_name: str | Path, lexicon: Lexicon | str | Path | None = None) -> Counterparts:
    """Read counterparts: those of one of `builtin_counterparts()` by its name, or a file.

    Args:
        lexicon: whose classes the columns are; None: the lexicon that comes with the package and has the file's stem.

    Raises ValueError, naming file and line, for a class that the lexicon does not have or that is named twice, a line
    with a wrong number of columns or fewer than one word, a term that is listed twice in a class, so that its
    counterpart is ambiguous, or text that is not UTF-8; for a name that is unknown; and what `load_lexicon` raises.
    """
    builtin = str(path_or_name) in builtin_counterparts()
    path = _FOLDER / f"{path_or_name}.txt" if builtin else Path(path_or_name)
    if not path.is_file():
        raise ValueError(
            f"counterparts {str(path_or_name)!r}: neither a file nor of a lexicon that has some in the package: "
            + ", ".join(builtin_counterparts())
        )
    if not isinstance(lexicon, Lexicon):
        lexicon = load_lexicon(path.stem if lexicon is None else lexicon)
    lines = ((number, raw.strip()) for number, raw in read_lines(path))
    filled = ((f"{path}:{number}", line) for number, line in lines if line and not line.startswith("#"))
    where, header = next(filled, (str(path), ""))
    classes = _columns(header[1:-1])
    if header != f"[{header[1:-1]}]" or len(classes) < 2:
        raise ValueError(f"{where}: expected the classes first, such as [female / male], got {header!r}")
    for value in classes:
        if value not in lexicon.classes or classes.count(value) > 1:
            allowed = ", ".join(lexicon.classes)
            raise ValueError(
                f"{where}: class {value!r}: expected each at most once, of lexicon {lexicon.name!r}: {allowed}"
            )
    listed: dict[_Key, str] = {}  # a term -> where it stands
    terms: dict[_Key, Term] = {}
    rows = [(where, line, list(_row(line, classes, where))) for where, line in filled]
    for where, line, row in rows:
        written = tuple(choices[0][1] for choices in row)
        if not any(text for choices in row for _, text in choices):
            raise ValueError(f"{where}: no word in {line!r}")
        for value, choices in zip(classes, row, strict=True):
            for noun, text in (choice for choice in choices if choice[1]):
                key = (value, noun, words_of(text))
                if key in listed:
                    raise ValueError(
                        f"{where}: {text!r} of class {value!r} is ambiguous: listed before, at {listed[key]}"
                    )
                listed[key] = where
                terms[key] = Term(text, written)
    if not terms:
        raise ValueError(f"{path}: no line with counterparts")
    # What is listed goes before what is derived: plurals, then terms in small letters.
    for (value, noun, words), term in list(terms.items()):
        if not noun:
            plural = Term(plural_of(term.listed), tuple(text and plural_of(text) for text in term.row))
            terms.setdefault((value, noun, (*words[:-1], plural_of(words[-1]))), plural)
    for (value, noun, words), term in list(terms.items()):
        terms.setdefault((value, noun, tuple(word.lower() for word in words)), term)
    return Counterparts(lexicon, classes, terms, max(len(words) for _, _, words in terms))


def _row(line: str, classes: Sequence[str], where: str) -> Iterator[list[tuple[bool, str]]]:
    """For each column of a line its terms, the one that is written first: (only before a noun, text or "")."""
    columns = _columns(line)
    if len(columns) != len(classes):
        raise ValueError(f"{where}: expected {len(classes)} columns ({' / '.join(classes)}), got {line!r}")
    for column in columns:
        choices = []
        for choice in map(str.strip, column.split("|")):
            text = choice.removesuffix(f" {_BEFORE_NOUN}")
            if choice != _NONE and not words_of(text):
                raise ValueError(f"{where}: no word in {column!r}, or an empty alternative")
            choices.append((text != choice, "" if choice == _NONE else text))
        yield choices


def _columns(line: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in line.split("/"))
