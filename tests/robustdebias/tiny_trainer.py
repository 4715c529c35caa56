"""What the tests of the Trainer integration share: texts, batches and trainers so small that a step takes milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments

from robustdebias.collate import Encoded, MLMCollator
from robustdebias.config import TrainConfig
from robustdebias.trainer import RobustDebiasTrainer

NAMES = ["a", "b", "c"]
COUNTS = [30, 9, 12]


def texts(count: int, vocabulary: int, seed: int = 0) -> list[Encoded]:
    """Random tokens; a text is in one or two groups, "b" is rare."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        length = draw.randint(6, 14)
        ids = np.array([2, *(draw.randrange(5, vocabulary) for _ in range(length)), 3])
        words = np.array([-1, *range(length), -1])
        groups = ("a", "b") if index % 5 == 3 else ("c",) if index % 3 == 1 else ("a",)
        made.append(Encoded(index, ids, words, groups, None))
    return made


def quiet_model(
    make_tiny_model: Callable, vocabulary: int, dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    """In float64 without dropout, unless told otherwise."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return make_tiny_model(vocabulary, **{**dropout, **changes}).to(dtype)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **close: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **close, msg=lambda text, name=name: f"{name}: {text}")


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    """Plain SGD at a constant rate: rounding stays rounding, where Adam makes steps of it."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 6, "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "remove_unused_columns": False,
        "train_sampling_strategy": "sequential", "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(out), **{**settings, **changes})


def config(objective: str = "group_dro", **changes: Any) -> TrainConfig:
    return TrainConfig(**{"objective": objective, "step_size": 0.5, **changes})


def make_trainer(
    model: Any,
    tokenizer: Any,
    out: Path,
    objective: str = "group_dro",
    *,
    train: Sequence[Encoded] | None = None,
    config_changes: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **argument_changes: Any,
) -> RobustDebiasTrainer:
    return RobustDebiasTrainer(
        model,
        arguments(out, **argument_changes),
        **{
            "data_collator": MLMCollator(tokenizer, NAMES, mask_probability=0.3),
            "group_names": NAMES,
            "group_counts": COUNTS,
            "config": config(objective, **(config_changes or {})),
            "train_dataset": texts(24, len(tokenizer)) if train is None else train,
            **(options or {}),
        },
    )


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def row_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses [M] of the labelled tokens by the model's own forward, and their groups [M, G] bool."""
    encoder = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
    logits = model(**encoder).logits
    labelled = batch["labels"] != -100
    groups = batch["groups"][:, None].expand(*labelled.shape, -1)[labelled]
    return functional.cross_entropy(logits[labelled], batch["labels"][labelled], reduction="none"), groups


def published_step(
    q: Tensor, losses: Tensor, groups: Tensor, step_size: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Group DRO with the weight of absent groups held, written from its definition: the loss, and the new q."""
    present = groups.any(0)
    counts = groups.sum(0).clamp(min=1)
    means = (groups.to(losses.dtype).t() @ losses) / counts
    raised = torch.where(present, q * torch.exp(step_size * means.detach()), 0)
    new = torch.where(present, raised / raised.sum() * q[present].sum(), q)
    return (new * means)[present].sum(), new
