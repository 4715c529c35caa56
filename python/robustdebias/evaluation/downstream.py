"""A downstream task: a copy of the encoder, fine-tuned on it with a fresh head, and how well it does.

Debiasing should not cost what a model is used for, so this measures use itself: single sentences or pairs of them,
classified or given a number, from a folder in the form of GLUE (Wang et al. 2019) with ``train.tsv`` and ``dev.tsv``.
The choices that the numbers depend on:

* The recipe is BERT's (Devlin et al. 2019) as Hugging Face's GLUE script has it: AdamW without weight decay, a rate
  that falls linearly to 0 without warm-up, gradients clipped to norm 1, ``epochs`` over reshuffled training rows, the
  last model taken. What the masked language model doesn't have (head, pooler) starts at random from ``seed``.
* F1 is that of the second class in sorted order (GLUE's "1") where there are two classes, else the macro average.
* A column ``groups`` of dev.tsv, names separated by commas, gives the accuracy by group and the gap: best minus worst.

All scores are in per cent (correlations times 100, as GLUE prints them). One seed is one fine-tuning: another one moves
the scores of small tasks by points, and the bootstrap, which draws dev rows anew, doesn't see that.

B rows of a batch, N dev rows, K classes, G groups, R draws.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from robustdebias.evaluation.bootstrap import Resampler
from robustdebias.evaluation.glue import KINDS, Row, Task, read_task
from robustdebias.evaluation.metric import Metric
from robustdebias.evaluation.scoring import fingerprint, progress_bar
from robustdebias.modeling import check_length

__all__ = ["DEFINITION", "draws", "evaluate", "metric", "scores"]

DEFINITION = (
    "downstream task (GLUE's form): a copy of the encoder fine-tuned on train.tsv with a fresh head, measured on "
    "dev.tsv in per cent: accuracy, F1 (second class of two, else macro) and Matthews correlation, or Pearson's and "
    "Spearman's correlation; by group accuracy, and the gap between the best and the worst group"
)
_NAMES = {
    "accuracy": "accuracy", "f1": "F1", "mcc": "Matthews correlation", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}  # fmt: skip


@dataclass(frozen=True)
class _Recipe:
    task: str
    epochs: int
    batch_size: int
    max_length: int
    lr: float
    seed: int

    def __post_init__(self) -> None:
        if self.task not in KINDS:
            raise ValueError(f"task: expected one of {', '.join(KINDS)}, got {self.task!r}")
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    task: str = "classification",
    epochs: int = 3,
    batch_size: int = 32,
    max_length: int = 128,
    lr: float = 2e-5,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune a copy of the model's encoder on a task and measure it.

    The model itself (weights, gradients, training mode) and torch's random state stay as they were. The same
    arguments give the same result on the same CPU; on a GPU torch's own kernels may round differently each time.

    Args:
        model: a transformers model of a type that has a sequence classifier; the copy goes to the same device.
        path: a folder with ``train.tsv`` and ``dev.tsv``: a line of column names, among them ``label`` and
            ``sentence``, or ``sentence1`` and ``sentence2`` (or what GLUE's other tasks call them).
        task: "classification", any strings as labels; or "regression", where labels are numbers.
        batch_size: rows of a training step.
        max_length: tokens, special ones included, from which on a text (the longer one of a pair) is cut.

    Returns: ``scores`` (per cent; None where not defined) with ``accuracy``, ``f1``, ``mcc`` or ``pearson``,
    ``spearman``; ``majority``, the accuracy of always answering train.tsv's most frequent label (None in regression);
    ``by_group[name]`` with ``accuracy`` and ``count``, and ``gap`` (None with fewer than two groups); ``counts`` of
    ``train`` and ``dev`` rows; ``classes``; ``per_item`` with ``true`` and ``predicted`` (places in ``classes``, or
    numbers) and ``groups`` (places in ``by_group``); ``recipe``; ``seconds`` that it took; ``definition``; ``items``,
    the fingerprint of rows and recipe.

    Raises:
        ValueError: naming the argument, or file and line, of what can't be used.
        RuntimeError: the loss or a prediction is not finite.
    """
    start = time.perf_counter()
    recipe = _Recipe(task, epochs, batch_size, max_length, lr, seed)
    check_length(model, max_length)
    read = read_task(path, task)
    (train, targets), (dev, true), classes = read.train, read.dev, read.classes
    predicted = _answers(model, tokenizer, read, recipe, progress)
    names = sorted({name for row in dev for name in row.groups}) if classes else []
    majority = Counter(targets.tolist()).most_common(1)[0][0]
    return {
        "scores": _scores(true, predicted, len(classes)),
        "majority": float(100 * np.mean(true == majority)) if classes else None,
        **_by_group(true == predicted, dev, names),
        "counts": {"train": len(train), "dev": len(dev)},
        "classes": classes,
        "per_item": {
            "true": true.tolist(),
            "predicted": predicted.tolist(),
            "groups": [[names.index(name) for name in row.groups] for row in dev] if names else [],
        },
        "recipe": asdict(recipe),
        "seconds": time.perf_counter() - start,
        "definition": DEFINITION,
        "items": fingerprint([recipe, *train, "dev", *dev]),
    }


def scores(result: Mapping[str, Any]) -> dict[str, float | None]:
    """``accuracy``, ``f1``, ``mcc`` or ``pearson``, ``spearman``; where there are groups ``gap``, ``group.NAME``."""
    groups = {f"group.{name}": own["accuracy"] for name, own in result["by_group"].items()}
    return {**result["scores"], **({"gap": result["gap"], **groups} if groups else {})}


def draws(result: Mapping[str, Any], weights: Resampler) -> dict[str, np.ndarray]:
    """Draws [R] of the scores, from dev rows drawn anew; none of Spearman's correlation, whose ranks would change.

    A group needs enough rows, and the gap needs them in the best and the worst group.
    """
    items = result.get("per_item")
    if items is None or not weights.enough(len(items["true"])):
        return {}
    true, predicted = np.array(items["true"]), np.array(items["predicted"])
    if not result["classes"]:
        return {"pearson": _drawn_pearson(true, predicted, weights)}
    kinds, names = len(result["classes"]), list(result["by_group"])
    member = np.zeros((len(true), len(names)))  # [N, G]
    for row, groups in enumerate(items["groups"]):
        member[row, groups] = 1
    cell = np.eye(kinds * kinds)[true * kinds + predicted]  # [N, K K]
    sums = weights.apply(np.concatenate([cell, member, member * (true == predicted)[:, None]], axis=1))
    confusion, members, hits = np.split(sums, [kinds * kinds, kinds * kinds + len(names)], axis=1)
    drawn = _of_confusion(confusion.reshape(-1, kinds, kinds))
    with np.errstate(invalid="ignore"):  # 0 / 0: no row of the group was drawn
        accuracy = 100 * hits / members  # [R, G]
    groups = result["by_group"]
    for column, name in enumerate(names):
        if weights.enough(groups[name]["count"]):
            drawn[f"group.{name}"] = accuracy[:, column]
    if result["gap"] is not None:
        best, worst = (pick(names, key=lambda name: groups[name]["accuracy"]) for pick in (max, min))
        if weights.enough(min(groups[best]["count"], groups[worst]["count"])):
            # fmax and fmin pass over what is not defined.
            drawn["gap"] = np.fmax.reduce(accuracy, axis=1) - np.fmin.reduce(accuracy, axis=1)
    return drawn


def metric(name: str) -> Metric:
    """How the score ``name`` of :func:`scores` is called and read."""
    if name == "gap":
        return Metric(name, "downstream accuracy, gap between groups", "0")
    if name.startswith("group."):
        return Metric(name, f"downstream accuracy, {name.removeprefix('group.')}", "100")
    return Metric(name, f"downstream {_NAMES[name]}", "100", headline=name in ("accuracy", "pearson"))


def _answers(model: Any, tokenizer: Any, task: Task, recipe: _Recipe, progress: bool) -> np.ndarray:
    """Those of the fine-tuned copy to the dev rows: a class, int64 [N], or without classes a number, float64 [N]."""
    device = next(model.parameters()).device
    train, dev = (
        _Inputs(tokenizer, split.rows, model.config, recipe.max_length, device)
        for split in (task.train, task.dev)
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        classifier = _classifier(model, max(len(task.classes), 1)).to(device)
        _fit(classifier, train, torch.from_numpy(task.train.targets).to(device), recipe, progress)
    classifier.eval()
    with torch.inference_mode():
        batches = torch.arange(len(task.dev.rows)).split(recipe.batch_size)
        answers = torch.cat([classifier(**dev.batch(rows)).logits.double().cpu() for rows in batches])
    if not answers.isfinite().all():
        raise RuntimeError("downstream task: the fine-tuned model answers with NaN or infinity")
    return (answers.argmax(1) if task.classes else answers[:, 0]).numpy()


def _fit(classifier: Any, inputs: _Inputs, targets: Tensor, recipe: _Recipe, progress: bool) -> None:
    from transformers import get_linear_schedule_with_warmup

    steps = recipe.epochs * math.ceil(len(targets) / recipe.batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.lr, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    classifier.train()
    with progress_bar(steps, "downstream task", "step", progress) as bar:
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(targets)).split(recipe.batch_size):
                logits = classifier(**inputs.batch(rows)).logits  # [B, K], of a regression [B, 1]
                own = targets[rows.to(targets.device)]
                if own.is_floating_point():
                    loss = F.mse_loss(logits[:, 0], own.float())
                else:
                    loss = F.cross_entropy(logits, own)
                if not loss.isfinite():
                    raise RuntimeError(f"downstream task: the loss is {loss.item()}; lr may be too large")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()


def _classifier(model: Any, outputs: int) -> Any:
    """A sequence classifier in float32 with a copy of the model's encoder; the rest is drawn at random."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels, config.dtype = outputs, torch.float32
    try:
        classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"model: transformers has no sequence classifier of type {config.model_type!r}"
        ) from error
    missing, unknown = classifier.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    missing = [key for key in missing if not key.startswith("pooler.")]  # masked language models have none
    if missing or unknown:
        raise ValueError(
            f"model: its encoder is not that of {type(classifier).__name__}: weights {[*missing, *unknown][:3]}"
        )
    return classifier


class _Inputs:
    """What the model takes of each row: ids, mask and, where it tells two texts apart by them, types."""

    def __init__(
        self, tokenizer: Any, rows: Sequence[Row], config: Any, max_length: int, device: torch.device
    ):
        texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
        # Asked for, as not every tokenizer that knows them returns them unasked.
        types = getattr(config, "type_vocab_size", 0) > 1
        encoded = tokenizer(
            *texts, padding=False, truncation=True, max_length=max_length, return_token_type_ids=types
        )
        padding = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0}
        if types:
            padding["token_type_ids"] = 0
        self._columns = {name: [torch.tensor(ids) for ids in encoded[name]] for name in padding}
        self._padding, self._device = padding, device

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Of ``rows`` [B], padded on the right: int64 [B, T]."""
        return {
            name: pad_sequence([column[row] for row in rows], True, self._padding[name]).to(self._device)
            for name, column in self._columns.items()
        }


def _scores(true: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float | None]:
    """Of answers [N], in per cent."""
    if classes:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        average = "binary" if classes == 2 else "macro"
        found = {
            "accuracy": accuracy_score(true, predicted),
            "f1": f1_score(true, predicted, average=average, zero_division=0),
            "mcc": matthews_corrcoef(true, predicted),
        }
    else:
        from scipy.stats import pearsonr, spearmanr

        # Without spread, in one row for instance, there is no correlation.
        if min(np.ptp(true), np.ptp(predicted)) == 0:
            return {"pearson": None, "spearman": None}
        found = {"pearson": pearsonr(true, predicted)[0], "spearman": spearmanr(true, predicted)[0]}
    return {name: 100 * float(value) for name, value in found.items()}


def _by_group(hits: np.ndarray, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    by_group = {}
    for name in names:
        own = hits[[name in row.groups for row in rows]]
        by_group[name] = {"accuracy": float(100 * own.mean()), "count": len(own)}
    accuracies = [own["accuracy"] for own in by_group.values()]
    return {"by_group": by_group, "gap": max(accuracies) - min(accuracies) if len(names) > 1 else None}


def _of_confusion(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, F1 and Matthews correlation (Gorodkin 2004) in per cent, each [R], of counts [R, true K, predicted K]."""
    right = np.diagonal(confusion, axis1=1, axis2=2)  # [R, K]
    true, predicted = confusion.sum(2), confusion.sum(1)
    count, hits = true.sum(1), right.sum(1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        f1 = 2 * right / (true + predicted)
        spread = np.sqrt((count**2 - (true**2).sum(1)) * (count**2 - (predicted**2).sum(1)))
        mcc = (hits * count - (true * predicted).sum(1)) / spread
    return {
        "accuracy": 100 * hits / count,
        # Of two classes the second, 0 where it is not there; else of those that are there.
        "f1": 100 * (np.nan_to_num(f1[:, 1]) if confusion.shape[1] == 2 else np.nanmean(f1, axis=1)),
        "mcc": 100 * np.nan_to_num(mcc),
    }


def _drawn_pearson(true: np.ndarray, predicted: np.ndarray, weights: Resampler) -> np.ndarray:
    """Pearson's correlation of each draw [R] in per cent, from sums of products; NaN without spread."""
    x, y = true - true.mean(), predicted - predicted.mean()  # so that the differences below lose nothing
    sums = weights.apply(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1))
    sum_x, sum_y, xx, yy, xy = (sums[:, 1:] / sums[:, :1]).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * (xy - sum_x * sum_y) / np.sqrt((xx - sum_x**2) * (yy - sum_y**2))
