"""A fine-tuning run with its measures: train, save, measure; read again what an earlier call has done."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import rd_kernels as rd
from robustdebias.checkpoint import RunDirectory, read_json, write_json
from robustdebias.config import TrainConfig
from robustdebias.corpus import OTHER
from robustdebias.groups import GroupAnnotator
from robustdebias.modeling import load
from robustdebias.preparation import PreparedCorpus
from robustdebias.suite import Suite
from robustdebias.training import train

if TYPE_CHECKING:
    from robustdebias.augmentation import Swapper

__all__ = ["as_results", "environment", "fine_tune", "read_run", "swapper_for"]


def fine_tune(
    config: TrainConfig,
    load_start: Callable[[], tuple[Any, Any]],
    corpus: PreparedCorpus,
    suite: Suite,
    out_dir: str | Path,
    *,
    annotator: GroupAnnotator | None = None,
    swapper: Swapper | None = None,
    start: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, then measure the saved model; with ``resume``, whatever is done already is read instead.

    Args:
        load_start: gives the model and tokenizer to start from.
        annotator, swapper: as in :func:`robustdebias.training.train`. Counterfactuals are made of the training passages
            alone: what is held out, and so what is measured, is the same for every method.
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
        config, model.to(device), tokenizer, corpus.train, names, out_dir,
        annotator=annotator, swapper=swapper, evaluate=lambda model: suite.held_out(model, tokenizer, detailed=False),
        resume=resume, overwrite=overwrite, notes=notes,
    )  # fmt: skip
    saved = read_json(run.metrics) if run.metrics.is_file() else {}
    around = {"start": saved.get("start"), "groups": asdict(corpus.coverage), "environment": environment()}

    def save(measures: Mapping[str, Any]) -> None:
        write_json(run.metrics, {**measures, **around})

    if start is not None:
        around["start"] = {"suite": suite.describe(), "evaluation": start}
    elif (saved.get("start") or {}).get("suite") != suite.describe():
        model, tokenizer = load_start()
        start = suite.measure(model.to(device), tokenizer, known=saved.get("start"))
        around["start"] = {"suite": suite.describe(), "evaluation": start}
    if saved.get("suite") != suite.describe():
        model, tokenizer = load(run.model)  # as others will load it
        # Part by part: what an interruption or an earlier, smaller suite left is not measured again.
        evaluation = suite.measure(model.to(device), tokenizer, known=saved, save=save)
        save({"suite": suite.describe(), "evaluation": evaluation})
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


def swapper_for(names: Sequence[str], seed: int = 0) -> Swapper:
    """Makes counterfactuals by those of the lexicons ("gender", "race:any", ...) that the package has counterparts for.

    Raises ValueError if there is none of these.
    """
    from robustdebias.augmentation import Swapper
    from robustdebias.counterparts import builtin_counterparts

    known = builtin_counterparts()
    lexicons = [name for part in names if (name := part.removesuffix(":any")) in known]
    if not lexicons:
        raise ValueError(
            f"cda: none of the lexicons {', '.join(names)} has counterparts; those that have: {', '.join(known)}"
        )
    return Swapper(dict.fromkeys(lexicons), seed=seed)


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
