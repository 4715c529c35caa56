"""What the last call saw, group by group: from sums that the kernels made anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rd_kernels.ops import raise_if_bad
from rd_kernels.reduction import EXTRAS

__all__ = ["GroupReport", "GroupStats"]


@dataclass(frozen=True)
class GroupStats:
    """Mean loss in nats (NaN without rows), number of labelled rows, weight in the loss, top-1 accuracy.

    A row is a hit where its label's logit is the largest of the row; ties count as a hit. At the sequence level the
    count is of sequences, and the others are means over sequences of the means over their labelled rows. Only where
    asked for: ``excess``, the mean of max(loss - reference loss, 0); ``entropy`` of the predictions, in nats;
    ``top_k_accuracy``, the share of rows in which fewer than k logits are larger than the label's.
    """

    loss: float
    count: int
    weight: float
    accuracy: float
    excess: float | None = None
    entropy: float | None = None
    top_k_accuracy: float | None = None


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
        cls, stats: Tensor, status: Tensor, names: Sequence[str], num_classes: int, extras: Sequence[str] = ()
    ) -> GroupReport:
        """From ``stats`` [4 + E, G+2] and ``status`` [2] of the op, and the names of the E rows beyond the fourth.
        Copies them to the host.

        Raises ValueError if the batch held labels or group ids out of range.
        """
        raise_if_bad(status, num_classes, len(names))
        columns = [_stats(extras, *column) for column in stats.t().tolist()]
        return cls(columns[-1], columns[-2], dict(zip(names, columns, strict=False)))

    def __str__(self) -> str:
        rows = [("overall", self.overall), *self.by_group.items()]
        if self.ungrouped.count:
            rows.append(("(in no group)", self.ungrouped))
        width = max(len(name) for name, _ in rows)
        fields = {"loss": ".4f", "count": "d", "weight": ".4f", "accuracy": ".4f"}
        fields |= {name: ".4f" for name in EXTRAS if getattr(self.overall, name) is not None}
        lines = [f"{'':{width}}" + "".join(f"  {field:>{len(field) + 4}}" for field in fields)]
        for name, stats in rows:
            cells = (f"{getattr(stats, field):{len(field) + 4}{form}}" for field, form in fields.items())
            lines.append(f"{name:{width}}  " + "  ".join(cells))
        return "\n".join(lines)


def _stats(
    extras: Sequence[str], loss_sum: float, count: float, hits: float, weight: float, *more: float
) -> GroupStats:
    nothing = float("nan")
    others = {name: total / count if count else nothing for name, total in zip(extras, more, strict=True)}
    if count == 0:
        return GroupStats(nothing, 0, weight, nothing, **others)
    return GroupStats(loss_sum / count, round(count), weight, hits / count, **others)
