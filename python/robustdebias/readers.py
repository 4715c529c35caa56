"""From a file to `Example`s: plain text, JSON lines, tables, and BOLD's JSON."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OTHER", "READERS", "Example", "Fields", "read_file", "read_lines"]

OTHER = "other"
"""The group of every text that no label and no lexicon places elsewhere, so that no text is thrown away."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """A text, the document it was taken from, and its groups (None: still to be annotated)."""

    text: str
    document: str
    groups: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Fields:
    """Which columns of a record hold what, and whether a label says of which axis it is: "gender:female"."""

    text: str = "text"
    labels: tuple[str, ...] = ()
    document: str | None = None
    axis: bool = False

    def names(self) -> list[str]:
        """The columns that a record must have."""
        return [self.text, *self.labels, *([] if self.document is None else [self.document])]

    def example(self, record: Any, where: str, default_document: str) -> Example:
        """Raises ValueError, beginning with `where`, for a field that is absent or holds the wrong thing."""
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object with fields, got {type(record).__name__}")
        for field in self.names():
            if field not in record:
                raise ValueError(
                    f"{where}: no field {field!r}; this record has {', '.join(map(repr, record))}"
                )
        text = record[self.text]
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {self.text!r} should hold a text, got {type(text).__name__}")
        _refuse_surrogates(text, f"{where}: field {self.text!r}")
        document = default_document if self.document is None else str(record[self.document])
        if not self.labels:
            return Example(text.strip(), document)
        groups = dict.fromkeys(label for field in self.labels for label in self._of(field, record, where))
        return Example(text.strip(), document, tuple(groups) or (OTHER,))

    def _of(self, field: str, record: dict[str, Any], where: str) -> list[str]:
        value = record[field]
        labels = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(
                f"{where}: field {field!r} should hold a string or a list of strings, got {value!r}"
            )
        return [self.label(field, label) for label in labels if label]

    def label(self, axis: str, value: str) -> str:
        """The label as it is to be called. One that names an axis itself keeps it."""
        return f"{axis}:{value}" if self.axis and value != OTHER and ":" not in value else value


def read_file(path: Path, fields: Fields) -> Iterator[Example]:
    """The examples of a file, read as its suffix says; one of another suffix is plain text. Blank texts included."""
    return READERS.get(path.suffix.lower(), _read_text)(path, fields)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, without line ends.

    Raises ValueError naming file and line for what would be read as something else than it is: bytes that are not
    UTF-8, NUL characters (UTF-16, or no text at all), and carriage returns as the only line ends.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                utf16 = number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
                raise ValueError(
                    f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                    f"{': the file is UTF-16' if utf16 else ''}); convert the file to UTF-8"
                ) from None
            if "\0" in line:
                raise ValueError(
                    f"{where}: NUL character at column {line.index(chr(0)) + 1}: UTF-16, or no text file; "
                    "convert the file to UTF-8"
                )
            if "\r" in line:
                raise ValueError(
                    f"{where}: carriage return without line feed at column {line.index(chr(13)) + 1}; "
                    "convert the line ends to line feeds"
                )
            yield number, line


def _read_text(path: Path, fields: Fields) -> Iterator[Example]:
    lines = list(read_lines(path))
    while lines and not lines[-1][1].strip():
        lines.pop()
    one_per_line = all(line.strip() for _, line in lines)
    document = 1
    for number, line in lines:
        if line.strip():
            yield Example(line.strip(), f"{path.name}:{number if one_per_line else document}")
        else:
            document = number + 1


def _read_jsonl(path: Path, fields: Fields) -> Iterator[Example]:
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not a JSON object: {error}") from None
            yield fields.example(record, where, default_document=f"{path.name}:{number}")


def _read_csv(path: Path, fields: Fields) -> Iterator[Example]:
    return _read_table(path, fields, csv.reader(_with_line_ends(path), strict=True))


def _read_tsv(path: Path, fields: Fields) -> Iterator[Example]:
    # As registered (text/tab-separated-values): no quoting, so that a quotation mark in a text is one.
    reader = csv.reader(_with_line_ends(path), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    return _read_table(path, fields, reader)


def _with_line_ends(path: Path) -> Iterator[str]:
    return (f"{line}\n" for _, line in read_lines(path))


def _read_table(path: Path, fields: Fields, reader: Any) -> Iterator[Example]:
    csv.field_size_limit(2**31 - 1)  # else a text of more than 131,072 characters is refused
    header: list[str] = []
    while True:
        first = reader.line_num + 1  # a quoted field may go on over several lines
        where = f"{path}:{first}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}: not a row of the table: {error}") from None
        if row is None:
            return
        if not row:
            continue
        if not header:
            header = row
            repeated = [name for name, count in Counter(header).items() if count > 1]
            if repeated:
                raise ValueError(f"{where}: column {repeated[0]!r} occurs more than once")
            missing = [name for name in fields.names() if name not in header]
            if missing:
                raise ValueError(
                    f"{where}: no column {missing[0]!r}; the header has {', '.join(map(repr, header))}"
                )
        elif len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} fields, but the header has {len(header)} columns")
        else:
            record = dict(zip(header, row, strict=True))
            yield fields.example(record, where, default_document=f"{path.name}:{first}")


def _read_bold(path: Path, fields: Fields) -> Iterator[Example]:
    try:
        subgroups = json.loads("\n".join(line for _, line in read_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    form = "expected BOLD's form {subgroup: {entity: [sentences]}}; other records go into a .jsonl file, one a line"
    if not isinstance(subgroups, dict):
        raise ValueError(f"{path}: {form}")
    axis = path.stem.removesuffix("_wiki")
    for subgroup, entities in subgroups.items():
        if not isinstance(entities, dict):
            raise ValueError(f"{path}: {subgroup!r}: {form}")
        for entity, sentences in entities.items():
            if not isinstance(sentences, list) or not all(
                isinstance(sentence, str) for sentence in sentences
            ):
                raise ValueError(f"{path}: {subgroup!r}, {entity!r}: {form}")
            for sentence in sentences:
                _refuse_surrogates(sentence, f"{path}: {subgroup!r}, {entity!r}")
                yield Example(sentence.strip(), entity, (fields.label(axis, subgroup),))


def _refuse_surrogates(text: str, where: str) -> None:
    if _SURROGATE.search(text):  # JSON can write them; no file and no tokenizer can take them
        raise ValueError(f"{where} holds half a surrogate pair, which is no character")


READERS: dict[str, Callable[[Path, Fields], Iterator[Example]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_bold,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
"""By suffix, in lower case."""
