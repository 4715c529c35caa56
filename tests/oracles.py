"""Independent sources of truth: plain loops and torch's own losses, written without looking at the package."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def row_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """[N] losses in float64 by torch's own cross-entropy."""
    return F.cross_entropy(logits.double(), labels, ignore_index=ignore_index, reduction="none")


@dataclass
class PublishedGroupDRO:
    """The update of Sagawa et al. 2020 as their released training loop states it, one group at a time.

    No log space, no vector operations: probabilities are multiplied by exp(step size times adjusted loss) and
    divided by their sum, and the loss is their inner product with the group means.
    """

    num_groups: int
    step_size: float
    adjustment: float | list[float] = 0.0
    group_counts: list[int] | None = None
    probabilities: list[float] = field(default_factory=list)
    hold_absent: bool = False  # not published: only the groups present are normalised, to what they had
    loss_ema: float | None = None  # the weight of a batch in the moving averages that step in for its losses
    floor: float = 0.0  # not published
    averages: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.probabilities:
            self.probabilities = [1 / self.num_groups] * self.num_groups

    def step(self, losses: Tensor, members: list[list[int]]) -> float:
        """``losses`` [N] of the labelled rows, ``members`` the groups of each; returns the robust loss."""
        means, counts = [0.0] * self.num_groups, [0] * self.num_groups
        for loss, groups in zip(losses.tolist(), members, strict=True):
            for group in groups:
                means[group] += loss
                counts[group] += 1
        target = 1.0
        if self.hold_absent:
            target = sum(p for p, n in zip(self.probabilities, counts, strict=True) if n)
        for group in range(self.num_groups):
            if counts[group]:
                means[group] /= counts[group]
                bonus = 0.0
                if self.adjustment:
                    assert self.group_counts is not None
                    constant = (
                        self.adjustment[group] if isinstance(self.adjustment, list) else self.adjustment
                    )
                    bonus = constant / math.sqrt(self.group_counts[group])
                loss = means[group]
                if self.loss_ema is not None:
                    if group in self.averages:
                        loss = (1 - self.loss_ema) * self.averages[group] + self.loss_ema * loss
                    self.averages[group] = loss
                self.probabilities[group] *= math.exp(self.step_size * (loss + bonus))
        normalised = [g for g in range(self.num_groups) if counts[g] or not self.hold_absent]
        total = sum(self.probabilities[g] for g in normalised)
        for group in normalised:
            self.probabilities[group] *= target / total
            above = target - len(normalised) * self.floor
            self.probabilities[group] = self.floor + above * self.probabilities[group] / target
        return sum(p * m for p, m, n in zip(self.probabilities, means, counts, strict=True) if n)


@dataclass
class PublishedDoReMi:
    """Algorithm 1 of Xie et al. 2023, one row at a time. Before a group's first sighting its excess loss counts as 0."""

    weights: list[float]
    step_size: float = 1.0
    smoothing: float = 1e-4
    excess: list[float] = field(default_factory=list)
    history: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.excess = self.excess or [0.0] * len(self.weights)

    def step(self, losses: list[float], references: list[float], groups: list[int]) -> float:
        """Row losses of the model and of the reference, and the rows' groups; returns the loss of the model."""
        for group in range(len(self.weights)):
            seen = [max(a - b, 0.0) for a, b, g in zip(losses, references, groups, strict=True) if g == group]
            if seen:
                self.excess[group] = sum(seen) / len(seen)
        raised = [w * math.exp(self.step_size * e) for w, e in zip(self.weights, self.excess, strict=True)]
        uniform = 1 / len(raised)
        self.weights = [(1 - self.smoothing) * w / sum(raised) + self.smoothing * uniform for w in raised]
        self.history.append(self.weights)
        of_rows = [self.weights[group] for group in groups]
        return sum(w * loss for w, loss in zip(of_rows, losses, strict=True)) / sum(of_rows)

    def average(self) -> list[float]:
        return [sum(column) / len(self.history) for column in zip(*self.history, strict=True)]


def members_of(groups: Tensor, rows: list[int]) -> list[list[int]]:
    """Group lists of the given rows, from ids [N] or a bool mask [N, G]."""
    if groups.dtype == torch.bool:
        return [groups[row].nonzero()[:, 0].tolist() for row in rows]
    return [[int(groups[row])] if groups[row] >= 0 else [] for row in rows]


def eager_group_dro(
    logits: Tensor, labels: Tensor, member: Tensor, q: Tensor, step_size: float, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """What people write today, in logits' own dtype for the row losses: -> loss (differentiable), new q.

    ``member`` [N, G] 0/1. The yardstick for errors: kernels may not be worse than this at the same dtype.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none").float()
    member = member.float() * (labels != ignore_index)[:, None]
    counts = member.sum(0)
    means = (member.t() @ losses) / counts.clamp(min=1)
    new_q = q * torch.exp(step_size * means.detach() * (counts > 0))
    new_q = new_q / new_q.sum()
    return (new_q * means).sum(), new_q
