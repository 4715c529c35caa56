"""Tasks in the form of GLUE (Wang et al. 2019): a folder with ``train.tsv`` and ``dev.tsv``, texts with labels.

Columns are separated by tabs and nothing else: quotes are literal, as in GLUE's files. N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustdebias.corpus import read_lines

__all__ = ["KINDS", "Row", "Split", "Task", "read_task"]

KINDS = ("classification", "regression")
_TEXTS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"), ("#1 String", "#2 String"),
    ("sentence",),
)  # fmt: skip
_LABELS = ("label", "gold_label", "is_duplicate", "Quality", "score")


class Row(NamedTuple):
    """A line of a task's file."""

    line: int
    texts: tuple[str, ...]  # one, or two
    label: str
    groups: tuple[str, ...]


class Split(NamedTuple):
    rows: list[Row]
    targets: np.ndarray  # [N]: places in the task's classes, int64; of a regression numbers, float64


@dataclass(frozen=True)
class Task:
    train: Split
    dev: Split
    classes: list[str]  # in sorted order; of a regression none


def read_task(path: str | Path, kind: str) -> Task:
    """The task in a folder; ``kind`` is one of KINDS.

    The first line of a file names the columns: ``label`` and ``sentence``, or ``sentence1`` and ``sentence2`` (or what
    GLUE's other tasks call them); ``groups``, names separated by commas, where there are any.

    Raises: ValueError that names file and line of what is missing, empty or no label of this kind.
    """
    files = Path(path) / "train.tsv", Path(path) / "dev.tsv"
    train, dev = map(_read_rows, files)
    if len(train[0].texts) != len(dev[0].texts):
        raise ValueError(
            f"{files[1]}:1: texts in {len(dev[0].texts)} columns, but in {len(train[0].texts)} of train.tsv"
        )
    if kind == "regression":
        return Task(Split(train, _numbers(train, files[0])), Split(dev, _numbers(dev, files[1])), [])
    classes = _classes(train, files[0])
    return Task(
        Split(train, _places(train, classes, files[0])), Split(dev, _places(dev, classes, files[1])), classes
    )


def _read_rows(file: Path) -> list[Row]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a task is a folder with train.tsv and dev.tsv")
    lines = ((number, line.split("\t")) for number, line in read_lines(file) if line)
    header = next(lines, (1, []))[1]
    texts = next((names for names in _TEXTS if set(names) <= set(header)), None)
    label = next((name for name in _LABELS if name in header), None)
    if texts is None or label is None:
        wanted = "sentence, or sentence1 and sentence2" if texts is None else "label"
        raise ValueError(
            f"{file}:1: no column {wanted} in {header}; the first line must name the columns, separated by tabs "
            "(CoLA's files have no such line: put one before theirs, source, label, mark, sentence)"
        )
    columns = [header.index(name) for name in texts]
    rows = []
    for number, fields in lines:
        where = f"{file}:{number}"
        if len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} columns, but line 1 names {len(header)}")
        row = dict(zip(header, fields, strict=True))
        for name in (*texts, label):
            if not row[name].strip():
                raise ValueError(f"{where}: column {name} is empty")
        groups = [name.strip() for name in row.get("groups", "").split(",")]
        rows.append(
            Row(
                number, tuple(fields[c] for c in columns), row[label].strip(), tuple(sorted({*groups} - {""}))
            )
        )
    if not rows:
        raise ValueError(f"{file}: no rows in it")
    return rows


def _classes(train: Sequence[Row], file: Path) -> list[str]:
    classes = sorted({row.label for row in train})
    if len(classes) < 2:
        raise ValueError(f"{file}: every label is {classes[0]!r}; there is nothing to tell apart")
    numbers = [_number(label) for label in classes]
    fraction = next(
        (label for label, number in zip(classes, numbers, strict=True) if number and number % 1), None
    )
    if fraction is not None and None not in numbers:
        raise ValueError(
            f"{file}: labels such as {fraction} are numbers, not classes; task: use 'regression'"
        )
    return classes


def _places(rows: Sequence[Row], classes: Sequence[str], file: Path) -> np.ndarray:
    """Of the labels in ``classes``, int64 [N]."""
    place = {name: number for number, name in enumerate(classes)}
    for row in rows:
        if row.label not in place:
            raise ValueError(
                f"{file}:{row.line}: label {row.label!r} does not occur in train.tsv, which has {', '.join(classes)}"
            )
    return np.array([place[row.label] for row in rows])


def _numbers(rows: Sequence[Row], file: Path) -> np.ndarray:
    """What the labels say, float64 [N]."""
    numbers = []
    for row in rows:
        number = _number(row.label)
        if number is None:
            raise ValueError(f"{file}:{row.line}: label {row.label!r} is not a finite number")
        numbers.append(number)
    return np.array(numbers)


def _number(label: str) -> float | None:
    """None if the label is not a finite number."""
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
