"""What the last call saw, group by group: from sums that the kernels made anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rd_kernels.ops import raise_if_bad

__all__ = ["GroupReport", "GroupStats"]


@dataclass(frozen=True)
class GroupStats:
    """Mean loss in nats (NaN without rows), number of labelled rows, weight in the loss, top-1 accuracy.

    A row is a hit where its label's logit is the largest of the row; ties count as a hit.
    """

    loss: float
    count: int
    weight: float
    accuracy: float


@dataclass(frozen=True)
class GroupReport:
    """Statistics of all labelled rows, of those in no group, and of each group by its name.

    With overlapping groups a row counts in each of its groups and once in ``overall``.
    """

    overall: GroupStats
    ungrouped: GroupStats
    by_group: dict[str, GroupStats]

    @property
    def worst_group(self) -> str | None:
        """The name of the group with the largest mean loss; None if no group has rows."""
        present = {name: group.loss for name, group in self.by_group.items() if group.count}
        return max(present, key=present.__getitem__) if present else None

    @classmethod
    def from_tensors(
        cls, stats: Tensor, status: Tensor, names: Sequence[str], num_classes: int
    ) -> GroupReport:
        """From ``stats`` [4, G+2] and ``status`` [2] of the op. Copies them to the host.

        Raises ValueError if the batch held labels or group ids out of range.
        """
        raise_if_bad(status, num_classes, len(names))
        columns = [_stats(*column) for column in stats.t().tolist()]
        return cls(columns[-1], columns[-2], dict(zip(names, columns, strict=False)))

    def __str__(self) -> str:
        rows = [("overall", self.overall), *self.by_group.items()]
        if self.ungrouped.count:
            rows.append(("(in no group)", self.ungrouped))
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':{width}}  {'loss':>9}  {'count':>8}  {'weight':>7}  {'accuracy':>8}"]
        lines += [
            f"{name:{width}}  {s.loss:9.4f}  {s.count:8d}  {s.weight:7.4f}  {s.accuracy:8.4f}"
            for name, s in rows
        ]
        return "\n".join(lines)


def _stats(loss_sum: float, count: float, hits: float, weight: float) -> GroupStats:
    if count == 0:
        return GroupStats(float("nan"), 0, weight, float("nan"))
    return GroupStats(loss_sum / count, round(count), weight, hits / count)
