"""Objectives with a state: weights that are learned from batch to batch.

Letters: G groups; n_g rows and m_g mean loss of a group in the batch, N_g its size in the data set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rd_kernels.objectives.base import Batch, Objective, Update, check_choice, check_number

__all__ = ["DoReMi", "GroupDRO"]

# Times a float32 loss, which is at most 3.4e38, this is far from overflow in float64.
_LARGEST_STEP = 1e200


@dataclass(frozen=True)
class GroupDRO(Objective):
    """Group DRO by online exponentiated gradient (Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1).

    q_g <- q_g exp(step_size (m_g + adjustment / sqrt(N_g))), normalised; c_g = q_g / n_g, where m_g and n_g
    are the batch's mean loss and row count of group g and N_g its size in the data set. q is updated with
    detached losses before it weights this batch. Computed in log space and in float64: neither the exponential nor
    step_size times a mean loss overflows. ``step_size`` = 0 leaves q uniform, as it starts: the mean of the group means.

    A batch without rows, or with a mean loss that is not finite, changes no state.

    Args:
        step_size: 0 to 1e200 (times a float32 loss it must not overflow float64). The reference code's default is 0.01.
        adjustment: C of the size adjustment, 0 to 1e38, one number or one for each group; needs ``group_counts`` unless
            it is 0. What the reference code measures instead, the gap between held-out and training loss, is set
            while training: ``set_adjustment`` of the loss.
        group_counts: N_g, one positive number per group.
        absent_groups: what becomes of the weight of a group that a batch has no rows of. "decay", the
            published rule: it loses weight whenever the normalisation takes it, so that a rare group ends near
            0 however large its loss is; meant for sampling that shows every group in every batch. "hold": its q
            stays as it is, and the groups that are present share the rest by the published proportions.
        loss_ema: gamma in (0, 1]: a moving average e_g takes the place of m_g in the exponent, against the noise of small
            batches. e_g <- (1 - gamma) e_g + gamma m_g for the groups present; the first sighting sets it. The
            reference code keeps such an average, with gamma 0.1. None: no average.
        floor: lower bound of every q_g, 0 to 1 / G: the normalised q becomes floor + (1 - G floor) q, so that no group is
            lost for good. With "hold" that is done among the k groups present and with what they share:
            q_g <- floor + (shared - k floor) q_g / shared. Exact in float64; q is then rounded to float32.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    step_size: float = 0.01
    adjustment: float | Sequence[float] = 0.0
    group_counts: Sequence[int] | None = None
    absent_groups: Literal["decay", "hold"] = "decay"
    loss_ema: float | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_number("step_size", self.step_size, 0, _LARGEST_STEP)
        check_choice("absent_groups", self.absent_groups, ("decay", "hold"))
        check_number("floor", self.floor, 0, 1)
        if self.loss_ema is not None:
            check_number("loss_ema", self.loss_ema)
            if not 0 < self.loss_ema <= 1:
                raise ValueError(f"loss_ema must be in (0, 1], or None, got {self.loss_ema}")
        # Tuples, whatever was given: the dataclass stays hashable, the caller's list stays theirs.
        if isinstance(self.adjustment, Iterable) and not isinstance(self.adjustment, str):
            object.__setattr__(self, "adjustment", _numbers("adjustment", self.adjustment))
        for value in self.adjustment if isinstance(self.adjustment, tuple) else (self.adjustment,):
            check_number("adjustment", value, 0, 1e38)
        if self.group_counts is not None:
            counts = _numbers("group_counts", self.group_counts)
            if not all(math.isfinite(count) and count > 0 for count in counts):
                raise ValueError(f"group_counts must be positive and finite, got {list(self.group_counts)}")
            object.__setattr__(self, "group_counts", counts)
        elif self._adjusts:
            raise ValueError("adjustment > 0 needs group_counts, the size of each group in the data set")

    @property
    def memory(self) -> tuple[str, ...]:  # type: ignore[override] # here it depends on the parameters
        return () if self.loss_ema is None else ("loss",)

    @property
    def rule(self) -> str | None:
        if self.loss_ema is not None or self.floor > 0:
            return None
        return "group_dro" if self.absent_groups == "decay" else "group_dro_hold"

    @property
    def rate(self) -> float:
        return float(self.step_size)

    @property
    def _adjusts(self) -> bool:
        return any(self.adjustment) if isinstance(self.adjustment, tuple) else self.adjustment != 0

    def check(self, num_groups: int) -> None:
        for name in ("adjustment", "group_counts"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_groups:
                raise ValueError(f"{name} has {len(value)} entries, but there are {num_groups} groups")
        if self.floor > 1 / num_groups:
            raise ValueError(f"floor must be <= 1 / {num_groups}, the number of groups, got {self.floor}")

    def adjustment_for(self, num_groups: int) -> Tensor | None:
        self.check(num_groups)
        if not self._adjusts:
            return None
        counts = torch.tensor(self.group_counts, dtype=torch.float64)
        return (torch.tensor(self.adjustment, dtype=torch.float64) / counts.sqrt()).to(torch.float32)

    def initial_memory(self, num_groups: int) -> Tensor:
        """[M, G] float64: NaN for the loss of a group that was not seen yet."""
        return torch.full((len(self.memory), num_groups), torch.nan, dtype=torch.float64)

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        if self.rule is not None:
            return super().update(batch, q, memory)
        present = batch.present
        usable = present.any() & torch.isfinite(batch.means).all()
        loss = batch.means
        if self.loss_ema is not None:
            average = memory[0]
            mixed = (1 - self.loss_ema) * average + self.loss_ema * loss
            loss = torch.where(average.isnan(), loss, mixed)
            memory = torch.where(usable & present, loss, average)[None]
        gain = loss if batch.adjustment is None else loss + batch.adjustment
        log_q = q.log() + torch.where(present, self.rate * gain, 0)
        if self.absent_groups == "hold":
            log_q = log_q.masked_fill(~present, -torch.inf)
            shared, sharing = torch.where(present, q, 0).sum(), present.sum()
        else:
            shared, sharing = torch.ones_like(q[0]), torch.full_like(q[0], len(q))
        # A q from elsewhere may have left the groups present less than their floors.
        floor = (shared / sharing).clamp(max=self.floor)
        updated = floor + (shared - sharing * floor) * torch.softmax(log_q, dim=0)
        if self.absent_groups == "hold":
            updated = torch.where(present, updated, q)
        q = torch.where(usable & (shared > 0), updated, q)  # a share of nothing has no proportions
        return Update(q, q, memory)


@dataclass(frozen=True)
class DoReMi(Objective):
    """Weights that grow with the excess loss over a reference model (Xie et al. 2023, arXiv 2305.10429, Algorithm 1).

    s_g = mean over the group's rows of max(loss - reference loss, 0)
    q <- (1 - smoothing) softmax(log q + step_size s) + smoothing / G
    loss = sum_g q_g S_g / sum_g q_g n_g, with S_g and n_g loss sum and rows of g in the batch: w_g = q_g n_g / sum q n.

    A group absent from the batch has no part in the loss; its s stays what it was when last seen, so that its q moves
    on, and is 0 before the first sighting. (The released code starts at the log of the vocabulary's size instead.)
    ``step_size`` = 0 draws q to uniform, by ``smoothing``; ``smoothing`` = 1 sets it there. The result of a run is the
    mean of q over all updates, :meth:`average_weights`. A batch without rows, or with a loss that is not finite, changes
    no state. The loss must be called with ``reference_losses``.

    Args:
        step_size: 0 to 1e200 (times a float32 loss it must not overflow float64).
        smoothing: in (0, 1]; every q_g is at least smoothing / G, so that the loss has a normaliser in every batch.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
    """

    memory: ClassVar[tuple[str, ...]] = ("excess", "average", "updates")
    needs_reference: ClassVar[bool] = True

    step_size: float = 1.0
    smoothing: float = 1e-4

    def __post_init__(self) -> None:
        check_number("step_size", self.step_size, 0, _LARGEST_STEP)
        check_number("smoothing", self.smoothing)
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"smoothing must be in (0, 1], got {self.smoothing}")

    def update(self, batch: Batch, q: Tensor, memory: Tensor) -> Update:
        if batch.excess is None:
            raise ValueError(
                "DoReMi.update needs batch.excess, sums of max(loss - reference loss, 0), got None"
            )
        last, average, updates = memory
        scores = torch.where(batch.present, batch.excess / batch.counts.clamp(min=1), last)
        tilted = torch.softmax(q.log() + self.step_size * scores, dim=0)
        updated = (1 - self.smoothing) * tilted + self.smoothing / len(q)
        mass = updated * batch.counts
        weights = mass / torch.where(batch.present.any(), mass.sum(), 1)
        updates = updates + 1
        learned = torch.stack([scores, average + (updated - average) / updates, updates])
        usable = batch.present.any() & torch.isfinite(batch.means).all() & torch.isfinite(scores).all()
        return Update(weights, torch.where(usable, updated, q), torch.where(usable, learned, memory))

    @staticmethod
    def average_weights(memory: Tensor) -> Tensor:
        """[G]: the mean of q over all updates, the domain weights that the method is run for; 0 before the first.

        Args: memory [3, G], the state of the loss. Raises: ValueError for another shape.
        """
        if memory.dim() != 2 or len(memory) != len(DoReMi.memory):
            raise ValueError(
                f"memory must be [3, G], the memory of a DoReMi objective, got {list(memory.shape)}"
            )
        return memory[1]


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__}")
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers only, got {values!r}") from None
