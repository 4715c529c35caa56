"""Everything that decides a run's numbers, besides the model and the data."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["OBJECTIVES", "RAISED_DROPOUT", "TrainConfig"]

OBJECTIVES = ("erm", "reweight", "group_dro", "cvar", "chi_square")

RAISED_DROPOUT: dict[str, Any] = {"dropout": 0.20, "attention_dropout": 0.15}
"""The dropout baseline for BERT in Meade et al. 2022, arXiv 2110.08527 (Webster et al. 2020, arXiv 2010.06032)."""


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a fine-tuning run.

    objective: what is minimised; :mod:`robustdebias.losses` has the formulas.
        "erm": the plain mean over masked tokens.
        "reweight": the mean weighted by the inverse size of the tokens' groups.
        "group_dro": Group DRO over the demographic groups; with size adjustment where ``adjustment`` is above 0.
        "cvar", "chi_square": DRO over texts, for which groups are only reported.
    step_size: eta of the group weights (group_dro). Two groups whose losses differ by d nats throughout end up
        with weights in the ratio exp(eta d steps). The default, None, is 5 / steps: a fifth of a nat makes a
        factor e, however long the run is. The published 0.01 is that of 500 steps; over tens of thousands it
        puts all weight on one group.
    adjustment: C of the size adjustment C / sqrt(N_g), N_g the training examples of group g (group_dro).
    absent_groups: what happens to the weight of a group that a batch has nothing of (group_dro): "hold" leaves
        it, "decay" is the published update; see :class:`rd_kernels.GroupDRO`.
    alpha: the worst share of a step's texts that counts (cvar), in (0, 1].
    radius: rho of the chi-square ball around the uniform weights of a step's texts (chi_square).
    cda: train on counterfactual pairs of the training texts, for as many steps as without;
        :mod:`robustdebias.augmentation`.
    cda_keep: "augmented" drops the texts that have no counterfactual, "all" keeps them.
    dropout, attention_dropout: probabilities while training; None leaves the model's own. The saved model has its own
        again; :mod:`robustdebias.dropout`.
    lr, warmup, weight_decay, clip: AdamW without decay on biases and LayerNorms; the rate rises linearly over
        the first share ``warmup`` of the steps and falls linearly to 0; gradients are clipped to this norm.
    batch_size, accumulate: a step runs ``accumulate`` batches of ``batch_size`` texts.
    accumulation: what these batches amount to.
        "exact": one batch of ``accumulate`` times the size. Loss, gradients and q are those of the large batch up to
        rounding. Group DRO, cvar and chi_square need the statistics of all of it first: one more forward, about
        1.4 times the time. Where the model has dropout, its masks are drawn batch by batch (the same in both forwards),
        so they are not those that one large batch would draw.
        "streaming": each batch by itself, the mean of their losses. Group DRO updates q in each of them and compares
        groups within a batch, cvar and chi_square look for the worst texts of each batch, the means of erm and
        reweight are taken over each batch: other numbers than a large batch's, but no second forward.
    max_length, mask_probability, whole_word: tokens a sequence, share of them masked, whole words at a time.
    group_level: "sequence": all tokens of a text carry its groups; "token": only tokens of demographic words.
        cvar and chi_square weight whole texts at either level; it then decides what is reported.
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
    alpha: float = 0.2
    radius: float = 1.0
    cda: bool = False
    cda_keep: str = "augmented"
    dropout: float | None = None
    attention_dropout: float | None = None
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    batch_size: int = 32
    accumulate: int = 1
    accumulation: str = "exact"
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
        self._one_of("cda_keep", ("augmented", "all"))
        self._one_of("accumulation", ("exact", "streaming"))
        self._one_of("group_level", ("sequence", "token"))
        for name in ("cda", "whole_word", "bf16"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a name, got {self.backend!r}")
        for name in ("step_size", "adjustment", "radius", "weight_decay"):
            if getattr(self, name) is not None or name != "step_size":
                self._number(name, 0, math.inf)
        for name in ("dropout", "attention_dropout"):
            if getattr(self, name) is not None:
                self._number(name, 0, 1, open_high=True)
        for name in ("lr", "clip", "epochs"):
            self._number(name, 0, math.inf, open_low=True)
        self._number("warmup", 0, 1)
        for name in ("alpha", "mask_probability"):
            self._number(name, 0, 1, open_low=True)
        for name, least in (
            ("batch_size", 1), ("accumulate", 1), ("max_length", 3), ("eval_every", 0), ("save_every", 0), ("seed", 0)
        ):  # fmt: skip
            self._integer(name, least)
        if self.max_steps is not None:
            self._integer("max_steps", 1)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "train") -> TrainConfig:
        """From a table of settings, as a file has it; what it lacks is the default.

        Args:
            where: names the table in errors, for instance "experiment.toml: train".

        Raises: ValueError for a key that is no field, naming the nearest that is one; ValueError or TypeError as
        above, with ``where`` in front.
        """
        names = [field.name for field in fields(cls)]
        for key in settings:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(names)}"
                raise ValueError(f"{where}: unknown key {key!r}; {hint}")
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None

    def resolved(self, batches_per_epoch: int) -> TrainConfig:
        """The same with numbers for what depends on the data: ``max_steps`` and ``step_size``."""
        steps = self.max_steps or math.ceil(self.epochs * batches_per_epoch / self.accumulate)
        return replace(
            self, max_steps=steps, step_size=5 / steps if self.step_size is None else self.step_size
        )

    def _one_of(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def _number(
        self, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
    ) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        outside = not low <= value <= high or (open_low and value == low) or (open_high and value == high)
        if not math.isfinite(value) or outside:
            least = f"> {low}" if open_low else f">= {low}"
            most = "" if high == math.inf else f" and {'<' if open_high else '<='} {high}"
            raise ValueError(f"{name} must be {least}{most}, got {value}")

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
