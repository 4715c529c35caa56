"""What a model is measured on: held-out text by group, the public benchmarks, neutral text, a downstream task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from robustdebias.collate import MLMCollator, encode
from robustdebias.corpus import Example
from robustdebias.evaluation import metric_of, mlm, module_of
from robustdebias.evaluation.bootstrap import values
from robustdebias.evaluation.scoring import fingerprint
from robustdebias.groups import collect_names
from robustdebias.modeling import check_length

__all__ = ["FORMS", "TASKS", "Suite", "benchmark_files", "find_benchmarks", "headline"]

TASKS = {"intrasentence": "stereoset", "intersentence": "stereoset_inter"}
"""Each of StereoSet's tasks, and the part of an evaluation that it is."""
FORMS = {"original": "crows_pairs", "differing": "crows_pairs_differing"}
"""Each way to score CrowS-Pairs, and its part."""
_IN_DATA_DIR = {
    "stereoset": "stereoset/dev.jsonl",
    "crows_pairs": "crows_pairs/crows_pairs_anonymized.csv",
    "seat": "seat",
    "neutral": "neutral.txt",
    "downstream": "downstream",
}
_FOLDERS = ("seat", "downstream")
_EVALUATION_BATCH = 64


class _Part(NamedTuple):
    """One part of an evaluation: what it depends on beside the model, and how it is made."""

    settings: dict[str, Any]
    run: Callable[[Any, Any], dict[str, Any]]


@dataclass(frozen=True)
class Suite:
    """What a model is measured on; each part may be absent.

    Args:
        texts: loss by group on these, held out from training. Masks are the same for every model.
        group_names: the groups of ``texts``.
        stereoset: StereoSet's development set, original or flattened.
        crows_pairs: the published ``crows_pairs_anonymized.csv``.
        max_length: tokens a text is cut at.
        seed: of the masks of ``texts`` and ``text_sets``, and of the downstream training.
        stereoset_tasks: of TASKS, those to run.
        crows_pairs_forms: of FORMS, those to run.
        text_sets: further texts with their groups by a name; their losses are the parts ``mlm:NAME``.
        seat: a folder with SEAT's tests.
        neutral: texts for the pseudo-perplexity, or a file with them.
        downstream: a folder with a task in GLUE's format.

    Raises: ValueError for a file or folder that isn't there, and for unknown tasks and forms, and bad names.
    """

    texts: list[Example]
    group_names: list[str]
    stereoset: Path | None = None
    crows_pairs: Path | None = None
    max_length: int = 64
    seed: int = 0
    stereoset_tasks: Sequence[str] = ("intrasentence",)
    crows_pairs_forms: Sequence[str] = ("original",)
    text_sets: Mapping[str, list[Example]] = field(default_factory=dict)
    seat: Path | None = None
    neutral: Path | Sequence[str] | None = None
    downstream: Path | None = None

    def __post_init__(self) -> None:
        for name in _IN_DATA_DIR:
            path = getattr(self, name)
            if isinstance(path, (str, Path)):
                kind, there = (
                    ("folder", Path(path).is_dir()) if name in _FOLDERS else ("file", Path(path).is_file())
                )
                if not there:
                    raise ValueError(f"{name}: there is no {kind} {path}")
        for name, known in (("stereoset_tasks", TASKS), ("crows_pairs_forms", FORMS)):
            if strangers := set(getattr(self, name)) - set(known):
                raise ValueError(
                    f"{name}: must be among {', '.join(known)}, got {', '.join(sorted(strangers))}"
                )
        for name in self.text_sets:
            if not name or set(name) & set(".:"):
                raise ValueError(f"text_sets: a name needs a letter and neither '.' nor ':', got {name!r}")

    def held_out(self, model: Any, tokenizer: Any, *, detailed: bool = True) -> dict[str, Any]:
        """The quick part: {"mlm": ...}, empty without texts."""
        if not self.texts:
            return {}
        return {"mlm": self._loss(self.texts, self.group_names, model, tokenizer, detailed)}

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        parts: Sequence[str] | None = None,
        known: Mapping[str, Any] | None = None,
        save: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """An evaluation: the results by part, in the order of :meth:`describe`.

        Args:
            parts: those to measure; None: all.
            known: an earlier ``{"suite": describe(), "evaluation": measure(...)}`` of the same model. What it holds
                of parts that are described alike is taken from there.
            save: called with such a record whenever a part is done, for an evaluation that may be interrupted.

        Raises: ValueError for a part that the suite does not have; and what the parts raise.
        """
        plan = dict(self._plan())
        if strangers := set(parts or ()) - set(plan):
            raise ValueError(f"parts: must be among {', '.join(plan)}, got {', '.join(sorted(strangers))}")
        described, done = ((known or {}).get(key, {}) for key in ("suite", "evaluation"))
        measures = {
            name: done[name]
            for name, part in plan.items()
            if name in done and described.get(name) == part.settings
        }
        for name in plan if parts is None else parts:
            if name not in measures:
                measures[name] = plan[name].run(model, tokenizer)
                if save is not None:
                    save({"suite": {part: plan[part].settings for part in measures}, "evaluation": measures})
        return {name: measures[name] for name in plan if name in measures}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Of each part what its result depends on beside the model: the data, by fingerprints, and the definition."""
        return {name: part.settings for name, part in self._plan()}

    def _plan(self) -> Iterator[tuple[str, _Part]]:
        sets = {"mlm": (self.texts, self.group_names)}
        sets |= {f"mlm:{name}": (texts, collect_names(texts)) for name, texts in self.text_sets.items()}
        for name, (texts, groups) in sets.items():
            if texts:
                yield name, self._texts_part(texts, list(groups))
        if self.stereoset is not None:
            for task in self.stereoset_tasks:
                yield TASKS[task], _file_part(TASKS[task], self.stereoset)
        if self.crows_pairs is not None:
            for form in self.crows_pairs_forms:
                yield FORMS[form], _file_part(FORMS[form], self.crows_pairs)
        if self.neutral is not None:
            yield (
                "pseudo_perplexity",
                _file_part("pseudo_perplexity", self.neutral, max_length=self.max_length),
            )
        if self.seat is not None:
            yield "seat", _file_part("seat", self.seat)
        if self.downstream is not None:
            yield (
                "downstream",
                _file_part("downstream", self.downstream, max_length=self.max_length, seed=self.seed),
            )

    def _texts_part(self, texts: list[Example], groups: list[str]) -> _Part:
        settings = {
            "texts": len(texts), "groups": groups, "items": fingerprint((text.text, text.groups) for text in texts),
            "max_length": self.max_length, "seed": self.seed, "definition": mlm.DEFINITION,
        }  # fmt: skip
        return _Part(settings, lambda model, tokenizer: self._loss(texts, groups, model, tokenizer, True))

    def _loss(
        self, texts: list[Example], groups: list[str], model: Any, tokenizer: Any, detailed: bool
    ) -> dict[str, Any]:
        check_length(model, self.max_length)
        encoded = encode(texts, tokenizer, self.max_length)
        collator = MLMCollator(tokenizer, groups, seed=self.seed)
        batches = [
            collator(encoded[start : start + _EVALUATION_BATCH])
            for start in range(0, len(encoded), _EVALUATION_BATCH)
        ]
        return mlm.evaluate(model, batches, groups, per_text=detailed, progress=detailed)


def _file_part(name: str, source: Path | Sequence[str], **options: Any) -> _Part:
    """A part that is measured on a file, a folder, or texts at hand."""
    settings: dict[str, Any]
    if isinstance(source, (str, Path)):
        path = Path(source)
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        contents = (item for file in files for item in (str(file.relative_to(path)), file.read_bytes()))
        settings = {"file": path.name, "items": fingerprint(contents)}
    else:
        settings = {"texts": len(source), "items": fingerprint(source)}
    return _Part(
        {**settings, **options, "definition": module_of(name).DEFINITION},
        lambda model, tokenizer: module_of(name).evaluate(model, tokenizer, source, **options),
    )


def find_benchmarks(data_dir: Path | None, **named: Path | None) -> dict[str, Any]:
    """The suite's files and folders by their argument's name: those named, else those that the data directory has."""
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(f"data_dir: there is no folder {data_dir}")
    found: dict[str, Any] = {}
    for name, path in named.items():
        default = None if data_dir is None else data_dir / _IN_DATA_DIR[name]
        found[name] = path or (default if default is not None and default.exists() else None)
    return found


def benchmark_files(
    stereoset: Path | None, crows_pairs: Path | None, data_dir: Path | None
) -> tuple[Path | None, Path | None]:
    """The files of these two benchmarks, as :func:`find_benchmarks`."""
    found = find_benchmarks(data_dir, stereoset=stereoset, crows_pairs=crows_pairs)
    return found["stereoset"], found["crows_pairs"]


def headline(measures: Mapping[str, Any]) -> str:
    """The main numbers of an evaluation, a line each."""
    lines = []
    for name, value in values(measures).items():
        metric = metric_of(name)
        if metric.headline:
            lines.append(f"{metric.label:<44} {value:.{metric.digits}f} {metric.unit}".rstrip())
    if (held_out := measures.get("mlm")) and held_out["worst_group"]:
        lines.append(f"{'accuracy of all tokens':<44} {held_out['overall']['accuracy']:.1%}")
        lines.append(f"{'the worst group':<44} {held_out['worst_group']}")
    warnings = (result.get("reliability_warning") for result in measures.values())
    return "\n".join([*lines, *dict.fromkeys(filter(None, warnings))])
