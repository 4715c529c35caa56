"""Everything that decides a run's numbers, besides the model and the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["OBJECTIVES", "TrainConfig"]

OBJECTIVES = ("erm", "group_dro")


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a fine-tuning run.

    objective: "group_dro", or "erm": the plain mean over masked tokens.
    step_size: eta of the group weights (group_dro). Two groups whose losses differ by d nats throughout end up
        with weights in the ratio exp(eta d steps). The default, None, is 5 / steps: a fifth of a nat makes a
        factor e, however long the run is. The published 0.01 is that of 500 steps; over tens of thousands it
        puts all weight on one group.
    adjustment: C of the size adjustment C / sqrt(N_g), N_g the training examples of group g (group_dro).
    absent_groups: what happens to the weight of a group that a batch has nothing of (group_dro): "hold" leaves
        it, "decay" is the published update; see :class:`rd_kernels.GroupDRO`.
    lr, warmup, weight_decay, clip: AdamW without decay on biases and LayerNorms; the rate rises linearly over
        the first share ``warmup`` of the steps and falls linearly to 0; gradients are clipped to this norm.
    batch_size, accumulate: a step runs ``accumulate`` batches and averages their losses. q is updated in each
        of them: a group's loss is then compared within each batch, not over the union, so a rare group wants
        a larger batch_size rather than more accumulation.
    max_length, mask_probability, whole_word: tokens a sequence, share of them masked, whole words at a time.
    group_level: "sequence": all tokens of a text carry its groups; "token": only tokens of demographic words.
    epochs, max_steps: length of the run; ``max_steps``, where given, wins.
    bf16: autocast to bfloat16.
    eval_every: evaluate on the held-out text every so many steps (0: not during training).
    save_every: write a checkpoint every so many steps (0: only on an interruption).
    backend: of rd_kernels.

    Raises ValueError or TypeError that names the field, what was given and what is allowed.
    """

    objective: str = "group_dro"
    step_size: float | None = None
    adjustment: float = 0.0
    absent_groups: str = "hold"
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    batch_size: int = 32
    accumulate: int = 1
    max_length: int = 64
    mask_probability: float = 0.15
    whole_word: bool = False
    group_level: str = "sequence"
    epochs: float = 1.0
    max_steps: int | None = None
    bf16: bool = False
    eval_every: int = 0
    save_every: int = 100
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        self._one_of("objective", OBJECTIVES)
        self._one_of("absent_groups", ("hold", "decay"))
        self._one_of("group_level", ("sequence", "token"))
        for name in ("step_size", "adjustment", "weight_decay"):
            if getattr(self, name) is not None or name != "step_size":
                self._number(name, 0, math.inf)
        for name in ("lr", "clip", "epochs"):
            self._number(name, 0, math.inf, open_low=True)
        self._number("warmup", 0, 1)
        self._number("mask_probability", 0, 1, open_low=True)
        for name, least in (
            ("batch_size", 1), ("accumulate", 1), ("max_length", 3), ("eval_every", 0), ("save_every", 0), ("seed", 0)
        ):  # fmt: skip
            self._integer(name, least)
        if self.max_steps is not None:
            self._integer("max_steps", 1)

    def resolved(self, batches_per_epoch: int) -> TrainConfig:
        """The same with numbers for what depends on the data: ``max_steps`` and ``step_size``."""
        steps = self.max_steps or math.ceil(self.epochs * batches_per_epoch / self.accumulate)
        return replace(
            self, max_steps=steps, step_size=5 / steps if self.step_size is None else self.step_size
        )

    def _one_of(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            bounds = f"> {low}" if open_low else f">= {low}"
            raise ValueError(
                f"{name} must be {bounds}{'' if high == math.inf else f' and <= {high}'}, got {value}"
            )

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
