"""A run's directory: what is in it, how it is claimed, and writing that survives a kill at any moment.

config.json      the configuration and a fingerprint of the data, written first
history.jsonl    one line a step
checkpoint.pt    everything needed to go on; gone once the run is finished
model/           the fine-tuned model and its tokenizer
result.json      written after the model: a run that has it is finished
metrics.json     the finished model's evaluation
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["RunDirectory", "read_json", "write_json", "write_text"]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` in one step: a reader sees the old file or the new one, never half of it.

    Raises ValueError for a number that JSON has no word for (NaN, infinity).
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As :func:`write_json`, of any text."""
    _replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The value in ``path``. Raises ValueError that names the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


class RunDirectory:
    """One run on disk. Nothing is written before :meth:`claim`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.history = self.path / "history.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.model = self.path / "model"
        self.result = self.path / "result.json"
        self.metrics = self.path / "metrics.json"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Whether the directory can be taken. Writes nothing.

        Raises ValueError: it holds something and neither ``resume`` nor ``overwrite`` is set; there is nothing
        to resume; ``overwrite`` of a directory that is not a run's.
        """
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if resume:
            if not self.config.is_file():
                raise ValueError(f"out: nothing to resume, {self.path} holds no run")
            return
        occupied = self.path.exists() and (
            not self.path.is_dir() or any(file.suffix != ".partial" for file in self.path.iterdir())
        )
        if occupied and not overwrite:
            raise ValueError(
                f"out: {self.path} is not empty; choose another directory, resume the run or overwrite it"
            )
        if occupied and not self.config.is_file():
            raise ValueError(f"out: {self.path} holds no run, so it is not overwritten")

    def claim(self, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the directory this run's own, or go on in it.

        Raises ValueError as :meth:`check`, or if the settings differ from those the run was started with.
        """
        self.check(resume=resume, overwrite=overwrite)
        settings = json.loads(json.dumps(settings))  # as it will be read back: lists for tuples
        if resume:
            differences = _differences(read_json(self.config), settings)
            if differences:
                raise ValueError(
                    f"out: {self.path} was started with other settings: {'; '.join(differences)}"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # The configuration goes last: a kill in between leaves a directory that can be overwritten again.
        for leftover in (self.metrics, self.result, self.checkpoint, self.history):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.model, ignore_errors=True)
        write_json(self.config, settings)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        if self.history.exists():
            _flush(self.history)  # a checkpoint without the history before it would be of no use
        _replace(self.checkpoint, lambda part: torch.save(state, part))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint on the CPU, or None. Read as plain tensors: a file can't run code."""
        if not self.checkpoint.is_file():
            return None
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{self.checkpoint}: not a readable checkpoint ({error})") from error

    def save_model(self, model: Any, tokenizer: Any) -> None:
        part = self.model.with_name("model.partial")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.rmtree(self.model, ignore_errors=True)
        os.replace(part, self.model)

    def read_result(self) -> dict[str, Any] | None:
        """What :meth:`write_result` was given, or None if the run is not finished."""
        if not self.result.is_file():
            return None
        return {**read_json(self.result), "history": self.read_history()}

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Finish the run. The history is in its file already."""
        write_json(self.result, {key: value for key, value in result.items() if key != "history"})
        self.checkpoint.unlink(missing_ok=True)

    def append_history(self, record: Mapping[str, Any]) -> None:
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def read_history(self) -> list[dict[str, Any]]:
        """The complete lines; a last line cut off by a kill is left out."""
        if not self.history.is_file():
            return []
        records = []
        for line in self.history.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind_history(self, step: int) -> list[dict[str, Any]]:
        """Keep the steps up to ``step``; those after the checkpoint are made again."""
        kept = [record for record in self.read_history() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        _replace(self.history, lambda part: part.write_text(text, encoding="utf-8"))
        return kept


def _replace(path: Path, write: Any) -> None:
    """``write`` a file beside ``path``, flush it to the disk, then put it in ``path``'s place."""
    part = path.with_name(path.name + ".partial")
    write(part)
    _flush(part)
    os.replace(part, path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key} was {before!r}, now {after!r}")
    return lines
