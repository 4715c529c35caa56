"""Objectives: how group losses become group weights. Each is a small frozen dataclass.

Every objective has the shape  loss = sum_g c_g S_g  with the coefficients c_g held constant in the
gradient (Danskin's theorem): S_g is the sum of the group's row losses. The rules themselves are in
:mod:`rd_kernels.reference`; the kernels compute the same in their epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ERM", "GroupDRO", "Objective"]


@dataclass(frozen=True)
class Objective:
    """What every objective offers to the op: the name of its rule, a step size, an optional adjustment."""

    @property
    def rule(self) -> str:
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """Step size of the weight update; 0 for an objective without state."""
        return 0.0

    def adjustment_for(self, num_groups: int) -> Tensor | None:
        """What is added to each group's mean loss before the update: [G] float32, or None for nothing."""
        return None


@dataclass(frozen=True)
class ERM(Objective):
    """Empirical risk minimisation: the mean over rows, c_g = 1 / sum(n).

    A row in several groups counts once for each; a row in no group does not count.
    """

    @property
    def rule(self) -> str:
        return "erm"


@dataclass(frozen=True)
class GroupDRO(Objective):
    """Group DRO by online exponentiated gradient (Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1).

    q_g <- q_g exp(step_size (m_g + adjustment / sqrt(N_g))), normalised; c_g = q_g / n_g, where m_g and n_g
    are the batch's mean loss and row count of group g and N_g its size in the data set. q is updated with
    detached losses before it weights this batch. Computed in log space and in float64: neither the exponential nor
    step_size times a mean loss overflows.

    Args:
        step_size: finite, >= 0. The reference code's default is 0.01.
        adjustment: C of the size adjustment, finite, >= 0; needs ``group_counts`` unless it is 0.
        group_counts: N_g, one positive number per group.
        absent_groups: what becomes of the weight of a group that a batch has no rows of. "decay", the
            published rule: it loses weight whenever the normalisation takes it, so that a rare group ends near
            0 however large its loss is; meant for sampling that shows every group in every batch. "hold": its q
            stays as it is, and the groups that are present share the rest by the published proportions.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    step_size: float = 0.01
    adjustment: float = 0.0
    group_counts: Sequence[int] | None = None
    absent_groups: Literal["decay", "hold"] = "decay"

    def __post_init__(self) -> None:
        for name in ("step_size", "adjustment"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.absent_groups not in ("decay", "hold"):
            raise ValueError(f"absent_groups must be 'decay' or 'hold', got {self.absent_groups!r}")
        if self.group_counts is not None:
            # A tuple, whatever was given: the dataclass stays hashable, the caller's list stays theirs.
            counts = tuple(float(count) for count in self.group_counts)
            if not all(math.isfinite(count) and count > 0 for count in counts):
                raise ValueError(f"group_counts must be positive and finite, got {list(self.group_counts)}")
            object.__setattr__(self, "group_counts", counts)
        elif self.adjustment > 0:
            raise ValueError("adjustment > 0 needs group_counts, the size of each group in the data set")

    @property
    def rule(self) -> str:
        return "group_dro" if self.absent_groups == "decay" else "group_dro_hold"

    @property
    def rate(self) -> float:
        return float(self.step_size)

    def adjustment_for(self, num_groups: int) -> Tensor | None:
        if self.group_counts is not None and len(self.group_counts) != num_groups:
            raise ValueError(
                f"group_counts has {len(self.group_counts)} entries, but there are {num_groups} groups"
            )
        if self.adjustment == 0 or self.group_counts is None:
            return None
        return self.adjustment / torch.tensor(self.group_counts, dtype=torch.float64).sqrt().to(torch.float32)
