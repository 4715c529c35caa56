"""StereoSet, intersentence task (Nadeem et al. 2021): which of three sentences follows a context?

The sentences are a stereotype, an anti-stereotype and an unrelated one; SS, LMS and ICAT are computed from their
ranks as in the intrasentence task. What ranks them is the result's ``variant``:

* ``nsp``, the original's, for a model with BERT's next-sentence head: the probability "is next" of the pair. A tie
  counts as the anti-stereotype, and the probabilities are float32 as in the authors' code, so saturated ones tie.
* ``pll``, for a model without one: the mean log-probability of the sentence's tokens, masked one at a time, where
  context and sentence stand one behind the other as running text. A choice of this package: its numbers can't be
  compared with published ones, nor with those of ``nsp``.

A masked language model as it is fine-tuned has no next-sentence head any more, even if its checkpoint had one;
:func:`with_next_sentence_head` reads it from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from robustdebias.evaluation import stereoset
from robustdebias.evaluation.bootstrap import Resampler
from robustdebias.evaluation.metric import Metric
from robustdebias.evaluation.scoring import (
    Query,
    check_length,
    evaluating,
    fingerprint,
    log_probabilities,
    mask_each,
    progress_bar,
    special_tokens_around,
    tokenize,
)
from robustdebias.evaluation.stereoset_items import Item, read_items

__all__ = ["DEFINITION", "VARIANTS", "draws", "evaluate", "metric", "scores", "with_next_sentence_head"]

DEFINITION = (
    "StereoSet intersentence (Nadeem et al. 2021), ties count as anti-stereotype, macro average over target terms, "
    "ICAT = LMS * min(SS, 100 - SS) / 50"
)
VARIANTS = {
    "nsp": "original variant: ranked by the next-sentence head's probability",
    "pll": (
        "pll variant: ranked by the mean log-probability of the sentence's tokens, masked one at a time, behind the "
        "context; not comparable with published numbers, which come from a next-sentence head"
    ),
}
_LABEL = "StereoSet intersentence"


def evaluate(
    model: nn.Module, tokenizer: Any, path: str | Path, *, batch_size: int = 128, progress: bool = True
) -> dict[str, Any]:
    """LMS, SS and ICAT of the intersentence task, in per cent, overall and by domain.

    Args:
        path: the original ``dev.json`` or its flattened form, as for the intrasentence task.

    Returns: ``variant``, one of VARIANTS; and as :func:`robustdebias.evaluation.stereoset.evaluate`.

    Raises: ValueError as there.
    """
    items = read_items(path, "intersentence")
    variant = "nsp" if _has_next_sentence_head(model) else "pll"
    rank = {"nsp": _next_sentence, "pll": _pseudo_log_likelihood}[variant]
    return {
        "variant": variant,
        **stereoset.summary(items, rank(model, tokenizer, items, batch_size, progress)),
        "definition": f"{DEFINITION}; {VARIANTS[variant]}",
        "items": fingerprint(items),
    }


def scores(result: Mapping[str, Any]) -> dict[str, float | None]:
    """As StereoSet's, behind the variant: ``nsp.overall.ss``. So numbers of two variants are never compared."""
    return {f"{result['variant']}.{name}": value for name, value in stereoset.scores(result).items()}


def draws(result: Mapping[str, Any], weights: Resampler) -> dict[str, np.ndarray]:
    return {
        f"{result['variant']}.{name}": sample for name, sample in stereoset.draws(result, weights).items()
    }


def metric(name: str) -> Metric:
    variant, _, rest = name.partition(".")
    found = stereoset.metric(rest)
    label = found.label.replace("StereoSet", f"{_LABEL} ({variant})", 1)
    return replace(found, name=name, label=label)


def with_next_sentence_head(name_or_path: str | Path, model: Any) -> Any:
    """``model`` with the next-sentence head that its checkpoint holds; ``model`` itself where there is none.

    Args:
        name_or_path: where ``model`` was loaded from.
    """
    from transformers import BertForPreTraining

    if getattr(model.config, "model_type", "") != "bert":
        return model
    of_both: Any = BertForPreTraining
    try:
        both, info = of_both.from_pretrained(
            str(name_or_path), output_loading_info=True, weights_only=True, dtype=torch.float32,
            local_files_only=Path(name_or_path).is_dir(),
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"model: cannot load {name_or_path}: {error}") from error
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    return model if missing else both.to(model.device)


def _has_next_sentence_head(model: nn.Module) -> bool:
    return hasattr(getattr(model, "cls", None), "seq_relationship")


def _next_sentence(
    model: Any, tokenizer: Any, items: Sequence[Item], batch_size: int, progress: bool
) -> np.ndarray:
    """Probability that the choice follows the context, float32 as float64 [items, 3]."""
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    encoded = tokenizer(
        [context for context, _ in pairs], [choice for _, choice in pairs],
        padding=False, truncation=False, return_token_type_ids=True,
    )  # fmt: skip
    order = sorted(range(len(pairs)), key=lambda pair: len(encoded["input_ids"][pair]), reverse=True)
    check_length(model, len(encoded["input_ids"][order[0]]))
    answers = np.empty(len(pairs))
    with evaluating(model), progress_bar(len(pairs), f"{_LABEL}, next sentence", "pair", progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = {
                name: pad_sequence([torch.tensor(encoded[name][pair]) for pair in batch], True, padding)
                for name, padding in (
                    ("input_ids", tokenizer.pad_token_id or 0), ("token_type_ids", 0), ("attention_mask", 0),
                )
            }  # fmt: skip
            pooled = model.base_model(**{k: v.to(model.device) for k, v in inputs.items()}).pooler_output
            logits = model.cls.seq_relationship(pooled).float()  # [B, 2]: is next, is not
            answers[batch] = logits.softmax(-1)[:, 0].double().cpu().numpy()
            bar.update(len(batch))
    undefined = int(np.isnan(answers).sum())
    if undefined:
        raise RuntimeError(f"{_LABEL}: the model gives NaN for {undefined} of {len(answers)} pairs")
    return answers.reshape(-1, 3)


def _pseudo_log_likelihood(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], batch_size: int, progress: bool
) -> np.ndarray:
    """Mean log-probability of each choice's tokens behind its context [items, 3]."""
    before, after = special_tokens_around(tokenizer)
    contexts = tokenize(tokenizer, [item.context.strip() for item in items], special_tokens=False)
    texts = [f"{item.context.strip()} {choice.strip()}" for item in items for choice in item.choices]
    queries: list[Query] = []
    owners: list[int] = []
    for number, ids in enumerate(tokenize(tokenizer, texts)):
        context = contexts[number // 3]
        start, end = before + len(context), len(ids) - after
        if ids[before:start] != context or start >= end:
            raise ValueError(
                f"the tokenizer sees no second sentence in {texts[number]!r} behind {items[number // 3].context!r}"
            )
        queries += mask_each(ids, range(start, end), tokenizer.mask_token_id)
        owners += [number] * (end - start)
    log_p = log_probabilities(
        model, tokenizer, queries, batch_size=batch_size, progress=progress, label=f"{_LABEL} (pll)"
    )
    total = np.bincount(owners, log_p, minlength=len(texts))
    return (total / np.bincount(owners, minlength=len(texts))).reshape(-1, 3)
