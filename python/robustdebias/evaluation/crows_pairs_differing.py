"""CrowS-Pairs as bias-bench scores it (Meade et al. 2022): by the tokens in which the two sentences DIFFER.

The pairs are those of ``crows_pairs``, the score is another one: numbers of the two can't be compared, nor can a
published number be compared with both. The choices:

* A sentence's score is the mean log-probability of those of its tokens that the other sentence does not have,
  masked one at a time (not all at once), rounded to 3 decimals.
* Sentences are read as they are. A pair in which one sentence has no token of its own (the other inserts a word, or
  an uncased model sees no difference) is left out, of the pair count too.
* Ties are neutral and count in the pair count.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from robustdebias.evaluation import crows_pairs
from robustdebias.evaluation.bootstrap import Resampler
from robustdebias.evaluation.metric import Metric
from robustdebias.evaluation.scoring import fingerprint

__all__ = ["DEFINITION", "draws", "evaluate", "metric", "scores"]

DEFINITION = (
    "CrowS-Pairs, differing-tokens variant (bias-bench, Meade et al. 2022): mean log-probability of the differing "
    "tokens, masked one at a time, rounded to 3 decimals; pairs without differing tokens on both sides are left out; "
    "not comparable with the original variant"
)


def evaluate(
    model: nn.Module, tokenizer: Any, path: str | Path, *, batch_size: int = 128, progress: bool = True
) -> dict[str, Any]:
    """The score (50 is ideal) of a masked language model, in per cent, overall and by bias type.

    Args:
        path: the published ``crows_pairs_anonymized.csv``.

    Returns: as :func:`robustdebias.evaluation.crows_pairs.evaluate`, with ``variant`` "differing", and ``skipped``:
    how many pairs were left out.

    Raises: ValueError as there, and if no pair is left.
    """
    pairs = crows_pairs.read_pairs(path)
    outcomes = crows_pairs.preferences(
        model, tokenizer, pairs, [text for pair in pairs for text in (pair.more, pair.less)], _differing, np.mean,
        batch_size=batch_size, progress=progress, label="CrowS-Pairs, differing tokens",
    )  # fmt: skip
    decided = [(pair, won) for pair, won in zip(pairs, outcomes, strict=True) if won is not None]
    if not decided:
        raise ValueError(
            f"{path}: the tokenizer sees no pair in which both sentences have tokens of their own"
        )
    return {
        "variant": "differing",
        **crows_pairs.summary(*zip(*decided, strict=True)),
        "skipped": len(pairs) - len(decided),
        "reliability_warning": crows_pairs.RELIABILITY_WARNING,
        "definition": DEFINITION,
        "items": fingerprint(pairs),
    }


def scores(result: Mapping[str, Any]) -> dict[str, float | None]:
    """``overall`` and each bias type, in per cent."""
    return crows_pairs.scores(result)


def draws(result: Mapping[str, Any], weights: Resampler) -> dict[str, np.ndarray]:
    """Pairs are drawn within their bias type."""
    return crows_pairs.draws(result, weights)


def metric(name: str) -> Metric:
    found = crows_pairs.metric(name)
    return replace(found, label=found.label.replace("score", "(differing tokens) score", 1))


def _differing(first: Sequence[int], second: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions of the tokens that the other sequence does not have."""
    operations = [op for op in difflib.SequenceMatcher(None, first, second).get_opcodes() if op[0] != "equal"]
    of_first = [position for _, start, end, _, _ in operations for position in range(start, end)]
    of_second = [position for _, _, _, start, end in operations for position in range(start, end)]
    return of_first, of_second
