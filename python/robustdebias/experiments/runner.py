"""Runs an experiment: every method with every seed under every grouping, in one process, resumable at any moment.

OUT/experiment.toml            the configuration, as it was given
OUT/GROUPING/start/            evaluation of the untouched model
OUT/GROUPING/METHOD/seed-N/    a run's directory (see :mod:`robustdebias.checkpoint`)
OUT/results.csv, differences.csv, summary.json, card.md, card.html, plots/

What is finished is read, not repeated; a run that was interrupted goes on at its last checkpoint. A metric that is added
to the configuration later is measured on the models that are there. Training settings cannot be changed under way.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustdebias.checkpoint import RunDirectory, read_json, write_json, write_text
from robustdebias.corpus import Example, load_corpora
from robustdebias.experiments.settings import DEMO_MODEL, Corpus, ExperimentSettings, TextSet, load_settings
from robustdebias.finetuning import fine_tune, swapper_for
from robustdebias.modeling import check_length, fingerprint, load
from robustdebias.preparation import PreparedCorpus, prepare, spread, words_within
from robustdebias.sentences import split_sentences
from robustdebias.suite import Suite
from robustdebias.wikitext import wikitext_lines

__all__ = ["Cell", "Experiment", "open_experiment"]


@dataclass(frozen=True)
class Cell:
    """One run of an experiment."""

    grouping: str
    method: str
    seed: int

    def directory(self, out: Path) -> Path:
        return out / self.grouping / self.method / f"seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.grouping} · {self.method} · seed {self.seed}"


@dataclass
class Experiment:
    """An experiment with its text read and its models found; nothing has been written yet."""

    settings: ExperimentSettings
    text: str  # of the configuration's file
    out: Path
    device: torch.device
    load_start: Callable[[], tuple[Any, Any]]
    start_weights: str  # their fingerprint
    texts: list[tuple[int, int]]  # of each corpus: texts and their words
    prepared: dict[str, PreparedCorpus]  # by grouping
    suites: dict[str, Suite]

    def cells(self) -> list[Cell]:
        """All runs, seed by seed: what is there of an interrupted experiment covers every method."""
        return [
            Cell(grouping, method, seed)
            for grouping in self.settings.groupings
            for seed in self.settings.seeds
            for method in self.settings.methods
        ]

    def plan(self) -> str:
        """What will be run, on which text, with which groups."""
        lines = []
        for name, prepared in self.prepared.items():
            lines += [f"== groups: {name}", prepared.describe(), ""]
        cells = self.cells()
        done = sum(cell.directory(self.out).joinpath("metrics.json").is_file() for cell in cells)
        lines.append(
            f"{len(cells)} runs: {len(self.settings.groupings)} groupings x {len(self.settings.seeds)} seeds x "
            f"{len(self.settings.methods)} methods ({', '.join(self.settings.methods)}); {done} done"
        )
        return "\n".join(lines)

    def run(self, say: Callable[[str], None] = print) -> None:
        """Train and measure what is not there yet. Raises what ``fine_tune`` raises; what is done stays done."""
        self._claim()
        starts: dict[str, dict[str, Any]] = {}
        for grouping in self.settings.groupings:
            say(f"\n== {grouping}: the start")
            known = next(iter(starts.values()), None)
            starts[grouping] = self._start(grouping, known)
        cells, began, ran = self.cells(), time.monotonic(), 0
        for number, cell in enumerate(cells, 1):
            already = RunDirectory(cell.directory(self.out)).result.is_file()
            left = ""
            if ran:  # what is only read says nothing of how long a run takes
                seconds = (time.monotonic() - began) / ran * (len(cells) - number + 1)
                left = f", about {seconds / 60:.0f} min left"
            say(f"\n== {number} of {len(cells)}: {cell}{' (trained before)' if already else left}")
            if ran == 0:
                began = time.monotonic()
            self._run(cell, starts[cell.grouping])
            ran += not already

    def start(self, grouping: str) -> dict[str, Any]:
        """The start's evaluation. Raises ValueError if it was not measured yet."""
        path = self.out / grouping / "start" / "metrics.json"
        if not path.is_file():
            raise ValueError(f"out: {self.out} holds no evaluation of the start for {grouping}")
        return read_json(path)["evaluation"]

    def _claim(self) -> None:
        """Raises ValueError if ``out`` holds something else than this experiment."""
        mine = self.out / "experiment.toml"
        if self.out.exists() and (not self.out.is_dir() or (any(self.out.iterdir()) and not mine.is_file())):
            raise ValueError(
                f"out: {self.out} holds something else than an experiment; choose another directory"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(mine, self.text)  # a run's own config.json says whether its settings are still the same

    def _start(self, grouping: str, known: dict[str, Any] | None) -> dict[str, Any]:
        path = self.out / grouping / "start" / "metrics.json"
        suite = self.suites[grouping]
        if path.is_file():
            saved = read_json(path)
            if saved["weights"] != self.start_weights:
                raise ValueError(f"out: {self.out} was started from another model; choose another directory")
            known = saved
        model, tokenizer = self.load_start()
        evaluation = suite.measure(model.to(self.device), tokenizer, known=known)
        record = {"weights": self.start_weights, "suite": suite.describe(), "evaluation": evaluation}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        return record

    def _run(self, cell: Cell, start: dict[str, Any]) -> None:
        settings, directory = self.settings, cell.directory(self.out)
        suite, run = self.suites[cell.grouping], RunDirectory(directory)
        if (
            run.result.is_file()
            and not run.model.is_dir()
            and (not run.metrics.is_file() or read_json(run.metrics)["suite"] != suite.describe())
        ):
            raise ValueError(
                f"evaluation: it differs from that of {directory}, whose model was not kept and cannot be measured again; "
                "delete that folder to train it anew"
            )
        config = settings.train_config(cell.method, cell.seed)
        lexicons = settings.groupings[cell.grouping].lexicons
        fine_tune(
            config, self.load_start, self.prepared[cell.grouping], suite, directory,
            annotator=settings.groupings[cell.grouping].grouping().annotator(),
            swapper=swapper_for(lexicons, cell.seed) if config.cda else None,
            start=start["evaluation"], device=self.device, resume=(directory / "config.json").is_file(),
            notes={"model": settings.model.name, "head": settings.model.head, "grouping": settings.groupings[cell.grouping].model_dump()},
        )  # fmt: skip
        if not settings.keep_models:
            shutil.rmtree(directory / "model", ignore_errors=True)


def open_experiment(
    config: str | Path, out: str | Path, *, data_dir: Path | None = None, device: torch.device | str = "cpu"
) -> Experiment:
    """Read the configuration, the text and the model of an experiment.

    Args:
        data_dir: where relative paths of the configuration are looked up; without it, beside the configuration's file.

    Raises ValueError, naming file and key, for whatever does not fit, before anything is written.
    """
    config = Path(config)
    settings = load_settings(config)
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(f"data_dir: there is no folder {data_dir}")
    folder = data_dir if data_dir is not None else config.parent
    name, head = _model(settings, folder)
    load_start = lambda: load(name, head)  # noqa: E731 - each run starts from a fresh copy
    model, tokenizer = load_start()
    lengths = {settings.train_config(method, settings.seeds[0]).max_length for method in settings.methods}
    if len(lengths) > 1:
        raise ValueError(f"{config}: max_length differs between methods, so they could not be measured alike")
    words = words_within(max_length := lengths.pop())
    check_length(model, max_length)
    corpora = [_read(corpus, folder) for corpus in settings.data.corpora]
    examples = [example for corpus in corpora for example in corpus]
    sizes = [(len(corpus), sum(len(example.text.split()) for example in corpus)) for corpus in corpora]
    prepared = {}
    for key, grouping in settings.groupings.items():
        try:
            prepared[key] = prepare(
                examples, grouping.grouping(), max_words=words, held_out=settings.data.held_out,
                seed=settings.data.split_seed, model=model.to(device), tokenizer=tokenizer,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{config}: groupings.{key}: {error}") from None
    sets = {name: _text_set(each, folder, words) for name, each in settings.evaluation.sets.items()}
    suites = {key: _suite(settings, prepared[key], sets, folder, max_length) for key in settings.groupings}
    return Experiment(
        settings, config.read_text(encoding="utf-8"), Path(out), torch.device(device), load_start, fingerprint(model),
        sizes, prepared, suites,
    )  # fmt: skip


def _model(settings: ExperimentSettings, folder: Path) -> tuple[str, Path | None]:
    name, head = settings.model.name, settings.model.head
    if name == DEMO_MODEL:
        from robustdebias.demo import HEAD_FILE
        from robustdebias.demo_assets import fetch

        return str(fetch().model_dir), HEAD_FILE if head is None else Path(head)
    found = folder / name
    return str(found if found.is_dir() else name), None if head is None else folder / head


def _read(corpus: Corpus, folder: Path) -> list[Example]:
    sources = [corpus.source] if isinstance(corpus.source, str) else list(corpus.source)
    found = [folder / source if (folder / source).exists() else source for source in sources]
    if corpus.format == "wikitext":
        return [example for source in found for example in wikitext_lines(source)][: corpus.limit]
    return load_corpora(
        found, text_field=corpus.text_field, label_field=corpus.label_field, document_field=corpus.document_field,
        label_axis=corpus.label_axis, split=corpus.split, limit=corpus.limit,
    )  # fmt: skip


def _text_set(chosen: TextSet, folder: Path, words: int) -> list[Example]:
    """Of another corpus, cut into passages: nothing of it was trained on, so nothing is held out."""
    prepared = prepare(
        _read(chosen.corpus, folder), chosen.grouping.grouping(), max_words=words, held_out=0.0
    )
    return spread(prepared.train, chosen.texts)


def _suite(
    settings: ExperimentSettings,
    prepared: PreparedCorpus,
    sets: dict[str, list[Example]],
    folder: Path,
    max_length: int,
) -> Suite:
    chosen = settings.evaluation
    neutral = None
    if chosen.neutral is not None:
        texts = (
            text for piece in _read(chosen.neutral.corpus, folder) for text in split_sentences(piece.text)
        )
        whole = [
            text for text in texts if "<unk>" not in text and len(text.split()) <= words_within(max_length)
        ]
        neutral = spread(whole, chosen.neutral.texts)
    return Suite(
        spread(prepared.held_out, chosen.texts), prepared.group_names,
        _path(chosen.stereoset, folder), _path(chosen.crows_pairs, folder),
        stereoset_tasks=chosen.stereoset_tasks, crows_pairs_forms=chosen.crows_pairs_forms,
        seat=_path(chosen.seat, folder), neutral=neutral, downstream=_path(chosen.downstream, folder),
        text_sets=sets, max_length=max_length, seed=settings.data.split_seed,
    )  # fmt: skip


def _path(name: str | None, folder: Path) -> Path | None:
    return None if name is None else folder / name
