"""Reading StereoSet: the authors' ``dev.json``, or its flattened form, a JSON object a line.

The flattened form has no ids; no score depends on them.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustdebias.corpus import read_lines

__all__ = ["BLANK", "LABELS", "TASKS", "Item", "read_items"]

TASKS = ("intrasentence", "intersentence")
LABELS = ("stereotype", "anti-stereotype", "unrelated")
BLANK = "BLANK"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Item:
    """A context and three choices for it, in the order of LABELS: words for its BLANKs (intrasentence), or
    sentences that follow it (intersentence)."""

    domain: str
    term: str
    context: str
    choices: tuple[str, ...]


def read_items(path: str | Path, task: str = "intrasentence") -> list[Item]:
    """The items of a task, of a ``.json`` file (the original form) or of any other file (JSON lines).

    Raises: ValueError that names the file and line (the item's id in the original form) of what is malformed;
    for a file without items of the task; for a task not in TASKS.
    """
    if task not in TASKS:
        raise ValueError(f"task: must be one of {TASKS}, got {task!r}")
    path = Path(path)
    items = list(_read_original(path, task) if path.suffix == ".json" else _read_flattened(path, task))
    if not items:
        raise ValueError(f"{path}: no {task} items in it")
    return items


def _read_flattened(path: Path, task: str) -> Iterator[Item]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        kind = _text(row, "type", where)
        if kind not in TASKS:
            raise ValueError(f"{where}: type must be {' or '.join(TASKS)}, got {kind!r}")
        if kind == task:
            yield _item(row, {label: _text(row, label, where) for label in LABELS}, task, where)


def _read_original(path: Path, task: str) -> Iterator[Item]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["data"][task]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); JSON lines are named .jsonl"
        ) from error
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected StereoSet's dev.json with data.{task} ({error!r})") from error
    for row in rows:
        where = f"{path}: item {row.get('id') if isinstance(row, dict) else row!r}"
        sentences = row.get("sentences") if isinstance(row, dict) else None
        if not isinstance(sentences, list):
            raise ValueError(f"{where}: no list of sentences")
        filled = {_text(s, "gold_label", where): _text(s, "sentence", where) for s in sentences}
        if len(sentences) != 3 or set(filled) != set(LABELS):
            raise ValueError(
                f"{where}: expected one sentence for each of {', '.join(LABELS)}, got {sorted(filled)}"
            )
        yield _item(row, filled, task, where)


def _item(row: dict[str, Any], sentences: dict[str, str], task: str, where: str) -> Item:
    context = _text(row, "context", where)
    choices = tuple(sentences[label] for label in LABELS)
    if task == "intrasentence":
        choices = tuple(_words(context, sentences, where))
    return Item(_text(row, "bias_type", where), _text(row, "target", where), context, choices)


def _words(context: str, sentences: dict[str, str], where: str) -> Iterator[str]:
    """What stands at the place of the (last) BLANK in each sentence, without punctuation."""
    places = [place for place, word in enumerate(context.split(" ")) if BLANK in word]
    if not places:
        raise ValueError(f"{where}: no {BLANK} in the context {context!r}")
    for label in LABELS:
        sentence = sentences[label].split(" ")
        word = sentence[places[-1]].translate(_NO_PUNCTUATION) if places[-1] < len(sentence) else ""
        if not word:
            raise ValueError(
                f"{where}: {label} {sentences[label]!r} has no word at the place of {BLANK} in {context!r}"
            )
        yield word


def _text(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {field!r} must be a text, got {value!r}")
    return value
