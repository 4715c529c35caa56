"""What a model is measured on: held-out text by group and the public benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustdebias.collate import MLMCollator, encode
from robustdebias.corpus import Example
from robustdebias.evaluation import crows_pairs, mlm, stereoset
from robustdebias.modeling import check_length

__all__ = ["Suite", "benchmark_files", "headline"]

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
