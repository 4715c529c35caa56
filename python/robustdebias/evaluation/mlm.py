"""Masked-language-model loss on held-out text, by group. B sequences, T tokens, M labelled positions, G groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustdebias.evaluation.bootstrap import Resampler
from robustdebias.evaluation.metric import Metric
from robustdebias.evaluation.scoring import evaluating, fingerprint, logits_at, progress_bar

__all__ = ["DEFINITION", "draws", "evaluate", "metric", "scores"]

DEFINITION = (
    "mean cross-entropy in nats over masked tokens; a token counts in each of its groups and once overall; "
    "perplexity = exp(loss); accuracy: the right token has the largest logit"
)
_LABELS = {
    "overall": "loss of all tokens",
    "worst": "loss of the worst group",
    "gap": "gap between worst and best group",
}
_ITEMS = ("input_ids", "labels", "groups")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    group_names: Sequence[str],
    *,
    per_text: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Loss, perplexity, accuracy and count, overall and by group; the worst group, and how far it is behind.

    Args:
        batches: dictionaries with ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, T] (-100: not masked),
            where the model has them ``token_type_ids``, and bool ``groups`` [B, G] or [B, T, G]. Models are
            comparable if they see the same masks, so give each of them the same batches.
        per_text: also return every text's sums, which confidence intervals need.

    Returns: ``overall`` and ``by_group[name]`` with ``loss``, ``perplexity``, ``accuracy`` (None without tokens)
    and ``count``; ``worst_group``; ``gap`` with ``worst_minus_best`` and ``worst_minus_overall`` (of groups with enough
    texts, :func:`_judged`);
    ``definition``; ``items``, the fingerprint of the masked text; and ``per_text``: ``[loss sum, count]`` of each text
    under ``overall``, ``[text, group, loss sum, count]`` of its groups under ``by_group``.

    Raises:
        ValueError: groups that don't fit ``group_names``.
        RuntimeError: the loss of a token is not finite.
    """
    groups_total = len(group_names)
    device = next(model.parameters()).device
    # Rows: loss, count, hits; columns: the groups, and last all tokens.
    totals = torch.zeros(3, groups_total + 1, dtype=torch.float64)
    seen: list[bytes] = [repr(list(group_names)).encode()]
    texts = _Texts(groups_total) if per_text else None
    batch_count = len(batches) if isinstance(batches, Sized) else None
    with evaluating(model), progress_bar(batch_count, "held-out loss", "batch", progress) as bar:
        for batch in batches:
            loss, hits, text, member = _rows(model, batch, groups_total, device)
            for row, values in zip(totals, (loss, torch.ones_like(loss), hits), strict=True):
                row += _sums(values, member)
            if texts is not None:
                texts.add(loss, text, member, batch["labels"].shape[0])
            seen += [batch[name].cpu().contiguous().numpy().tobytes() for name in _ITEMS]
            bar.update()
    *by_group, overall = [_stats(*column) for column in totals.t().tolist()]
    result: dict[str, Any] = {
        "overall": overall,
        "by_group": dict(zip(group_names, by_group, strict=True)),
        "definition": DEFINITION,
        "items": fingerprint(seen),
    }
    if texts is not None:
        result["per_text"] = {"overall": texts.overall, "by_group": texts.by_group}
    return {**result, **_worst(result)}


def scores(result: Mapping[str, Any]) -> dict[str, float | None]:
    """``overall``, ``worst``, ``gap`` (worst minus best), ``group.NAME``: losses in nats."""
    losses = {name: stats["loss"] for name, stats in result["by_group"].items()}
    extremes = _worst(result)
    return {
        "overall": result["overall"]["loss"],
        "worst": losses.get(extremes["worst_group"]),
        "gap": extremes["gap"]["worst_minus_best"],
        **{f"group.{name}": loss for name, loss in losses.items()},
    }


def draws(result: Mapping[str, Any], weights: Resampler) -> dict[str, np.ndarray]:
    """Texts are drawn. The worst group is looked for in each draw, among the groups that have enough texts."""
    if "per_text" not in result:
        return {}
    names = list(result["by_group"])
    overall = np.array(result["per_text"]["overall"], dtype=float).reshape(-1, 2)
    # Of each text: loss sum and token count, by group and, last, of all its tokens; both [N, G + 1].
    sums, counts = np.zeros((2, len(overall), len(names) + 1))
    sums[:, -1], counts[:, -1] = overall.T
    for text, group, total, tokens in result["per_text"]["by_group"]:
        sums[text, group], counts[text, group] = total, tokens
    texts = (counts > 0).sum(0)  # [G + 1]
    judged = [names.index(name) for name in _judged(result)]
    if not judged:
        return {}
    fewest = int(texts[judged].min())
    sums, counts = np.split(weights.apply(np.concatenate([sums, counts], axis=1)), 2, axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0: no token of the group was drawn
        losses = sums / counts  # [R, G + 1]
    # fmax and fmin pass over what is not defined.
    highest, lowest = (extreme.reduce(losses[:, judged], axis=1) for extreme in (np.fmax, np.fmin))
    found = {
        "overall": (texts[-1], losses[:, -1]),
        "worst": (fewest, highest),
        "gap": (fewest if len(judged) > 1 else 0, highest - lowest),
        **{f"group.{name}": (texts[group], losses[:, group]) for group, name in enumerate(names)},
    }
    return {name: sample for name, (items, sample) in found.items() if weights.enough(items)}


def metric(name: str) -> Metric:
    label = _LABELS.get(name) or f"loss of {name.removeprefix('group.')}"
    return Metric(name, label, "low", unit="nats", digits=3, headline=name in _LABELS)


def _rows(
    model: nn.Module, batch: Mapping[str, Tensor], groups_total: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each labelled position: loss, hit (both float64 [M]), the text it is in [M], its groups bool [M, G]."""
    labels, groups = batch["labels"], batch["groups"]
    length = labels.shape[1]
    if groups.shape not in ((*labels.shape, groups_total), (labels.shape[0], groups_total)):
        raise ValueError(
            f"groups: expected [B, G] or [B, T, G] with B, T = {tuple(labels.shape)} and G = {groups_total} names, "
            f"got {tuple(groups.shape)}"
        )
    positions = (labels.flatten() != -100).nonzero()[:, 0]
    text = positions // length
    member = groups.flatten(0, 1)[positions] if groups.dim() == 3 else groups[text]
    targets = labels.flatten()[positions].to(device)
    inputs = {name: batch[name].to(device) for name in _INPUTS if name in batch}
    logits = logits_at(model, inputs, positions.to(device)).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    undefined = int((~loss.isfinite()).sum())
    if undefined:
        raise RuntimeError(
            f"held-out loss: the loss of {undefined} of {len(loss)} tokens of a batch is not finite"
        )
    hits = logits.gather(1, targets[:, None])[:, 0] >= logits.amax(1) if len(logits) else loss
    return loss.double().cpu(), hits.double().cpu(), text.cpu(), member.cpu()


def _sums(values: Tensor, member: Tensor) -> Tensor:
    """Sums of values [M] over each group and, last, over all: [G + 1]."""
    return torch.cat([values @ member.to(values.dtype), values.sum()[None]])


class _Texts:
    """Sums of each text, over all its labelled tokens and over those of each group."""

    def __init__(self, groups_total: int):
        self.overall: list[list[float]] = []
        self.by_group: list[list[float]] = []
        self._groups_total = groups_total

    def add(self, loss: Tensor, text: Tensor, member: Tensor, texts: int) -> None:
        rows, groups = member.nonzero(as_tuple=True)
        first = len(self.overall)
        for total, count in _pairs(loss, text, texts):
            self.overall.append([total, count])
        cells = _pairs(loss[rows], text[rows] * self._groups_total + groups, texts * self._groups_total)
        for cell, (total, count) in enumerate(cells):
            if count:
                line, group = divmod(cell, self._groups_total)
                self.by_group.append([first + line, group, total, count])


def _pairs(loss: Tensor, cell: Tensor, cells: int) -> list[tuple[float, int]]:
    totals = loss.new_zeros(cells).index_add(0, cell, loss).tolist()
    counts = torch.bincount(cell, minlength=cells).tolist()
    return [(round(total, 6), count) for total, count in zip(totals, counts, strict=True)]


def _stats(loss: float, count: float, hits: float) -> dict[str, float | int | None]:
    if not count:
        return {"loss": None, "perplexity": None, "accuracy": None, "count": 0}
    mean = loss / count
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),  # a float ends at exp(709)
        "accuracy": hits / count,
        "count": round(count),
    }


def _judged(result: Mapping[str, Any]) -> list[str]:
    """The groups among which the worst and the best are looked for: those that have enough texts for an interval, so that a handful of
    sentences does not stand for all; where no group has so many, or nobody counted, those with any."""
    present = [name for name, stats in result["by_group"].items() if stats["loss"] is not None]
    if "per_text" not in result:
        return present
    names = list(result["by_group"])
    texts = Counter(names[group] for _, group, _, _ in result["per_text"]["by_group"])
    return [name for name in present if Resampler.enough(texts[name])] or present


def _worst(result: Mapping[str, Any]) -> dict[str, Any]:
    losses = {name: result["by_group"][name]["loss"] for name in _judged(result)}
    if not losses:
        return {"worst_group": None, "gap": {"worst_minus_best": None, "worst_minus_overall": None}}
    worst = max(losses, key=losses.__getitem__)
    gap = {
        "worst_minus_best": losses[worst] - min(losses.values()),
        "worst_minus_overall": losses[worst] - result["overall"]["loss"],
    }
    return {"worst_group": worst, "gap": gap}
