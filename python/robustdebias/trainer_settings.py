"""Settings under which :class:`robustdebias.trainer.RobustDebiasTrainer` would ignore something, or have another loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from robustdebias.config import TrainConfig

__all__ = ["check_groups", "check_settings"]


_OF_ARGUMENTS = {
    "lr": "learning_rate", "warmup": "warmup_steps", "weight_decay": "weight_decay", "clip": "max_grad_norm",
    "batch_size": "per_device_train_batch_size", "accumulate": "gradient_accumulation_steps",
    "epochs": "num_train_epochs", "max_steps": "max_steps", "bf16": "bf16", "eval_every": "eval_steps",
    "save_every": "save_steps", "seed": "seed",
}  # fmt: skip
"""Settings of TrainConfig that TrainingArguments decides."""


def check_settings(args: TrainingArguments, config: TrainConfig, options: Mapping[str, Any]) -> None:
    """Raises ValueError, with what to do instead."""
    for field in fields(config):
        if getattr(config, field.name) == field.default:
            continue
        if field.name in _OF_ARGUMENTS:
            instead = f"set args.{_OF_ARGUMENTS[field.name]}"
        elif field.name in ("cda", "cda_keep", "dropout", "attention_dropout"):
            instead = "change the data, or the model, beforehand"
        else:
            continue
        raise ValueError(f"config: {field.name} plays no part in a Trainer; {instead}")
    for name in ("model_init", "compute_loss_func"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name}: not supported; the loss and its state belong to this trainer and one model"
            )
    if args.remove_unused_columns:
        raise ValueError("args: remove_unused_columns must be False, else the batches lose their groups")
    if args.label_smoothing_factor:
        raise ValueError("args: label_smoothing_factor must be 0; the objectives are over plain losses")
    if args.torch_compile:
        raise ValueError("args: torch_compile must be False; it compiles a forward that is not used here")
    if args.n_gpu > 1:
        raise ValueError(
            f"args: {args.n_gpu} GPUs in one process, so each would have its own group weights; start a process for "
            "each (accelerate launch), or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
        )
    if args.dataloader_persistent_workers and args.dataloader_num_workers:
        raise ValueError(
            "args: dataloader_persistent_workers must be False, else the masks stay those of epoch 0"
        )


def check_groups(
    names: Sequence[str], counts: Sequence[int] | None, config: TrainConfig, data_collator: Any
) -> list[int]:
    """The number of examples in each group; 1 where nobody asks. Raises ValueError for what does not fit together."""
    known = list(getattr(data_collator, "group_names", names))
    if known != list(names):
        raise ValueError(f"group_names: {list(names)}, but the data_collator's are {known}")
    if counts is None:
        if config.objective == "reweight" or config.adjustment:
            raise ValueError("group_counts: reweight and adjustment need the size of each group")
        return [1] * len(names)
    if len(counts) != len(names):
        raise ValueError(f"group_counts: {len(counts)} counts for {len(names)} groups")
    return list(counts)
