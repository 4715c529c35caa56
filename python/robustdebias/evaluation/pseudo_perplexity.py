"""Pseudo-perplexity of neutral text (Salazar et al. 2020): has debiasing cost the model its language?

exp of minus the mean over all tokens of log p(token | the rest of the text), each token masked by itself. The
choices that the number depends on:

* Tokens are the tokenizer's pieces, so models with other vocabularies can't be compared. A piece is predicted from
  the other pieces of its word, which often give it away: the number is flattered by long words (Kauf and Ivanova 2023).
* The mean is over the tokens of all texts together; special tokens are not scored.
* A longer text is cut at ``max_length`` tokens; of more than ``limit`` texts an even spread is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from robustdebias.corpus import Example, load_corpus
from robustdebias.evaluation.bootstrap import Resampler
from robustdebias.evaluation.metric import Metric
from robustdebias.evaluation.scoring import (
    Query,
    fingerprint,
    log_probabilities,
    mask_each,
    special_tokens_around,
    tokenize,
)
from robustdebias.preparation import spread

__all__ = ["DEFINITION", "draws", "evaluate", "metric", "scores"]

DEFINITION = (
    "pseudo-perplexity (Salazar et al. 2020): exp of minus the mean log-probability of a token given the rest of its "
    "text, tokens masked one at a time, the mean over all tokens"
)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path | Sequence[str],
    *,
    batch_size: int = 128,
    progress: bool = True,
    limit: int = 500,
    max_length: int = 128,
) -> dict[str, Any]:
    """Pseudo-perplexity of a masked language model.

    Args:
        path: the texts themselves, or a corpus as :func:`robustdebias.corpus.load_corpus` reads it: a text file with
            a text on each line, JSON lines with ``text``.
        limit: texts, at most: a forward pass is needed for every token.
        max_length: tokens a text is cut at, the special ones included.

    Returns: ``overall`` with ``perplexity``, ``loss`` (its logarithm, nats a token), ``count`` (tokens), ``texts``;
    ``cut``, how many texts were cut; ``unknown``, how many tokens are [UNK], which are easy to predict; ``per_text``,
    ``[sum of log p, tokens]`` of each text; ``definition``; ``items``.

    Raises: ValueError for texts without tokens, or what the corpus' reader raises.
    """
    if limit < 1:
        raise ValueError(f"limit: expected a positive number of texts, got {limit}")
    examples = load_corpus(path) if isinstance(path, (str, Path)) else [Example(text, "") for text in path]
    texts = [example.text for example in spread(examples, limit)]
    before, after = special_tokens_around(tokenizer)
    if max_length <= before + after:
        raise ValueError(f"max_length: {max_length} tokens leave no room for text")
    queries: list[Query] = []
    owners: list[int] = []
    cut = unknown = 0
    for number, ids in enumerate(tokenize(tokenizer, texts)):
        if len(ids) > max_length:
            ids = ids[: max_length - after] + ids[len(ids) - after :]
            cut += 1
        positions = range(before, len(ids) - after)
        unknown += sum(ids[position] == tokenizer.unk_token_id for position in positions)
        queries += mask_each(ids, positions, tokenizer.mask_token_id)
        owners += [number] * len(positions)
    if not queries:
        raise ValueError(f"neutral texts: no token in the {len(texts)} texts")
    log_p = log_probabilities(
        model, tokenizer, queries, batch_size=batch_size, progress=progress, label="pseudo-perplexity"
    )
    loss = -float(log_p.mean())
    sums, counts = np.bincount(owners, log_p, len(texts)), np.bincount(owners, minlength=len(texts))
    return {
        "overall": {"perplexity": _exp(loss), "loss": loss, "count": len(queries), "texts": len(texts)},
        "cut": cut,
        "unknown": unknown,
        "per_text": [[round(total, 6), count] for total, count in zip(sums.tolist(), counts.tolist(), strict=True)],
        "definition": DEFINITION,
        "items": fingerprint([max_length, *texts]),
    }  # fmt: skip


def scores(result: Mapping[str, Any]) -> dict[str, float | None]:
    """``overall``."""
    return {"overall": result["overall"]["perplexity"]}


def draws(result: Mapping[str, Any], weights: Resampler) -> dict[str, np.ndarray]:
    """Texts are drawn."""
    texts = np.array(result.get("per_text", ()), dtype=float).reshape(-1, 2)
    if not weights.enough((texts[:, 1] > 0).sum()):
        return {}
    total, count = weights.apply(texts).T
    with np.errstate(invalid="ignore"):  # 0 / 0: only texts without tokens were drawn
        return {"overall": np.exp(np.minimum(-total / count, _LARGEST))}


def metric(name: str) -> Metric:
    return Metric(name, "pseudo-perplexity of neutral text", "low", unit="", digits=2, headline=True)


_LARGEST = 700.0  # a float ends at exp(709)


def _exp(loss: float) -> float:
    return math.exp(min(loss, _LARGEST))
