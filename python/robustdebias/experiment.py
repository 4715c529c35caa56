"""What ``finetune`` and ``demo`` share: what a model is measured on, and a fine-tuning run with its measures."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import rd_kernels as rd
from robustdebias.checkpoint import RunDirectory, read_json, write_json
from robustdebias.collate import MLMCollator, encode
from robustdebias.config import TrainConfig
from robustdebias.corpus import OTHER, Example
from robustdebias.evaluation import crows_pairs, mlm, stereoset
from robustdebias.groups import GroupAnnotator
from robustdebias.modeling import check_length, load
from robustdebias.preparation import PreparedCorpus
from robustdebias.training import train

__all__ = ["Suite", "as_results", "benchmark_files", "environment", "fine_tune", "headline", "read_run"]

_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Suite:
    """What a model is measured on; each part may be absent.

    Args:
        texts: loss by group on these, held out from training. Masks are the same for every model.
        group_names: the groups of ``texts``.
        stereoset: StereoSet's development set, original or flattened.
        crows_pairs: the published ``crows_pairs_anonymized.csv``.
        max_length: tokens a text is cut at.

    Raises: ValueError for a file that isn't there.
    """

    texts: list[Example]
    group_names: list[str]
    stereoset: Path | None = None
    crows_pairs: Path | None = None
    max_length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("stereoset", "crows_pairs"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"{name}: there is no file {path}")

    def held_out(self, model: Any, tokenizer: Any, *, detailed: bool = True) -> dict[str, Any]:
        """The quick part: {"mlm": ...}, empty without texts."""
        if not self.texts:
            return {}
        check_length(model, self.max_length)
        encoded = encode(self.texts, tokenizer, self.max_length)
        collator = MLMCollator(tokenizer, self.group_names, seed=self.seed)
        batches = [
            collator(encoded[start : start + _EVALUATION_BATCH])
            for start in range(0, len(encoded), _EVALUATION_BATCH)
        ]
        return {"mlm": mlm.evaluate(model, batches, self.group_names, per_text=detailed, progress=detailed)}

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Everything that is asked for: {"mlm": ..., "stereoset": ..., "crows_pairs": ...}."""
        measures = self.held_out(model, tokenizer)
        if self.stereoset is not None:
            measures["stereoset"] = stereoset.evaluate(model, tokenizer, self.stereoset)
        if self.crows_pairs is not None:
            measures["crows_pairs"] = crows_pairs.evaluate(model, tokenizer, self.crows_pairs)
        return measures

    def describe(self) -> dict[str, Any]:
        """What was measured, as far as it can be told from the outside."""
        files = {name: str(path) for name in ("stereoset", "crows_pairs") if (path := getattr(self, name))}
        return {"texts": len(self.texts), "max_length": self.max_length, "seed": self.seed, **files}


def benchmark_files(
    stereoset: Path | None, crows_pairs: Path | None, data_dir: Path | None
) -> tuple[Path | None, Path | None]:
    """The files of the two benchmarks: those named, else those that the data directory has."""
    if data_dir is not None:
        if not data_dir.is_dir():
            raise ValueError(f"data_dir: there is no folder {data_dir}")
        in_folder = (
            data_dir / "stereoset" / "dev.jsonl",
            data_dir / "crows_pairs" / "crows_pairs_anonymized.csv",
        )
        stereoset = stereoset or (in_folder[0] if in_folder[0].is_file() else None)
        crows_pairs = crows_pairs or (in_folder[1] if in_folder[1].is_file() else None)
    return stereoset, crows_pairs


def headline(measures: Mapping[str, Any]) -> str:
    """The main numbers of an evaluation, a line each."""
    lines = []
    if "mlm" in measures:
        overall, worst = measures["mlm"]["overall"], measures["mlm"]["worst_group"]
        lines.append(
            f"held-out text   loss {overall['loss']:.3f} nats, accuracy {overall['accuracy']:.1%}, worst group "
            f"{worst} {measures['mlm']['by_group'][worst]['loss']:.3f}"
        )
    if "stereoset" in measures:
        scores = measures["stereoset"]["overall"]
        lines.append(
            f"StereoSet       LMS {scores['lms']:.2f}, SS {scores['ss']:.2f}, ICAT {scores['icat']:.2f}"
        )
    if "crows_pairs" in measures:
        lines.append(f"CrowS-Pairs     {measures['crows_pairs']['overall']['score']:.2f}")
        lines.append(measures["crows_pairs"]["reliability_warning"])
    return "\n".join(lines)


def fine_tune(
    config: TrainConfig,
    load_start: Callable[[], tuple[Any, Any]],
    corpus: PreparedCorpus,
    suite: Suite,
    out_dir: str | Path,
    *,
    annotator: GroupAnnotator | None = None,
    start: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, then measure the saved model; with ``resume``, whatever is done already is read instead.

    Args:
        load_start: gives the model and tokenizer to start from.
        start: the start's evaluation, where it is known; else it is measured too.

    Returns the run's entry in a report: config, history, evaluation, train_seconds, tokens_per_second, and
    start, groups, environment. Raises as :func:`robustdebias.training.train`.
    """
    run = RunDirectory(out_dir)
    run.check(resume=resume, overwrite=overwrite)  # before the work of loading
    names = list(corpus.group_names)
    if config.group_level == "token" and OTHER not in names:
        names.append(OTHER)
    model, tokenizer = load_start()
    train(
        config, model.to(device), tokenizer, corpus.train, names, out_dir, annotator=annotator,
        evaluate=lambda model: suite.held_out(model, tokenizer, detailed=False),
        resume=resume, overwrite=overwrite, notes=notes,
    )  # fmt: skip
    if not (run.metrics.is_file() and read_json(run.metrics)["suite"] == suite.describe()):
        model, tokenizer = load(run.model)  # as others will load it
        evaluation = suite.measure(model.to(device), tokenizer)
        if start is None:
            model, tokenizer = load_start()
            start = suite.measure(model.to(device), tokenizer)
        write_json(run.metrics, {
            "suite": suite.describe(), "evaluation": evaluation, "start": {"evaluation": start},
            "groups": asdict(corpus.coverage), "environment": environment(),
        })  # fmt: skip
    return read_run(out_dir)


def read_run(directory: str | Path) -> dict[str, Any]:
    """A finished run's entry in a report. Raises ValueError if there is none in ``directory``."""
    run = RunDirectory(directory)
    entry = run.read_result()
    if entry is None:
        state = "is not finished; go on with --resume" if run.config.is_file() else "holds no run"
        raise ValueError(f"{directory} {state}")
    if run.metrics.is_file():
        entry.update(read_json(run.metrics))
    return entry


def as_results(runs: Mapping[str, dict[str, Any]], title: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Runs by name -> what :mod:`robustdebias.report` takes. They share start, groups and environment."""
    first = next(iter(runs.values()))
    shared = {key: first.get(key, {}) for key in ("start", "groups", "environment")}
    return {"title": title, "runs": dict(runs), **shared, "notes": list(notes)}


def environment() -> dict[str, Any]:
    """What the numbers were made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rd_kernels": rd.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
