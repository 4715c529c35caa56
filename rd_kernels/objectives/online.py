"""Objectives with a state: weights that are learned from batch to batch.

Letters: G groups; m_g mean loss of a group in the batch, N_g its size in the data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rd_kernels.objectives.base import Objective, check_choice, check_number

__all__ = ["GroupDRO"]


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
            check_number(name, getattr(self, name), 0)
        check_choice("absent_groups", self.absent_groups, ("decay", "hold"))
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
