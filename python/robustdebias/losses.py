"""The two objectives of a run, over the labelled positions that an adapter hands out. G groups.

ERM here is the mean over labelled tokens, as a plain fine-tuning has it: a token counts once however many
groups it is in, and also if it is in none; groups are only reported. (``rd.ERM`` counts a row once for each of
its groups. So the rows are cut into the disjoint cells of equal membership, over which both are the same.)

Group DRO is the op of :mod:`rd_kernels` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import rd_kernels as rd
from robustdebias.modeling import HeadInputs

__all__ = ["GroupDROObjective", "TokenMean", "build_loss"]


def build_loss(
    objective: str,
    group_names: Sequence[str],
    group_counts: Sequence[int],
    *,
    step_size: float,
    adjustment: float,
    absent_groups: str,
    linear: bool,
    backend: str = "auto",
) -> TokenMean | GroupDROObjective:
    """The loss of a run: "erm" or "group_dro".

    Args:
        group_counts: number of training examples in each group, for the size adjustment.
        linear: whether the inputs are decoder inputs (the linear op) or full logits (the logits op).

    Raises: ValueError for another objective, and what ``rd.GroupDRO``, the losses and ``rd.use_backend`` raise.
    """
    if backend != "auto":
        try:
            with rd.use_backend(backend):  # an unknown or missing one is an error now, not at the first batch
                pass
        except ValueError as error:
            raise ValueError(f"backend: {error}") from None
    op_class = rd.LinearGroupDROLoss if linear else rd.GroupDROLoss
    if objective == "erm":
        return TokenMean(op_class, group_names, backend)
    if objective == "group_dro":
        counts = [max(count, 1) for count in group_counts]
        policy = cast(Literal["decay", "hold"], absent_groups)
        rule = rd.GroupDRO(step_size, adjustment, counts if adjustment else None, policy)
        return GroupDROObjective(
            op_class(len(group_names), objective=rule, group_names=group_names, backend=backend)
        )
    raise ValueError(f"objective must be 'erm' or 'group_dro', got {objective!r}")


class GroupDROObjective(nn.Module):
    """Group DRO; its ``group_weights`` q [G] are updated before they weight the batch."""

    def __init__(self, op: Any):
        super().__init__()
        self.op = op

    @property
    def group_weights(self) -> Tensor:
        return self.op.group_weights

    def forward(self, inputs: HeadInputs) -> Tensor:
        return _call(self.op, inputs, inputs.groups)

    def report(self) -> rd.GroupReport:
        return self.op.report()


class TokenMean(nn.Module):
    """The mean loss over labelled tokens, reported by group. Has no state."""

    def __init__(self, op_class: Any, group_names: Sequence[str], backend: str):
        super().__init__()
        self._op_class, self._names, self._backend = op_class, tuple(group_names), backend
        self._last: tuple[rd.GroupReport, list[list[bool]]] | None = None

    def forward(self, inputs: HeadInputs) -> Tensor:
        cells, cell_of_row = _cells(inputs.groups)
        op = self._op_class(max(len(cells), 1), objective=rd.ERM(), backend=self._backend)
        loss = _call(op, inputs, cell_of_row)
        self._last = op.report(), cells
        return loss

    def report(self) -> rd.GroupReport:
        """As the op's own; a group's weight is its share of the labelled tokens, so shares may sum to more than 1."""
        if self._last is None:
            raise RuntimeError("report() needs a call of the loss first")
        report, cells = self._last
        members = list(zip(cells, report.by_group.values(), strict=False))
        total = report.overall.count
        return rd.GroupReport(
            report.overall,
            _merged([stats for cell, stats in members if not any(cell)], total),
            {
                name: _merged([stats for cell, stats in members if cell[group]], total)
                for group, name in enumerate(self._names)
            },
        )


def _call(op: nn.Module, inputs: HeadInputs, groups: Tensor) -> Tensor:
    if inputs.weight is None:
        return op(inputs.hidden, inputs.labels, groups)
    return op(inputs.hidden, inputs.weight, inputs.labels, groups, bias=inputs.bias)


def _cells(groups: Tensor) -> tuple[list[list[bool]], Tensor]:
    """Membership [M, G] -> the different memberships, and the number of each row's [M]."""
    if not len(groups):
        return [], torch.zeros(0, dtype=torch.int64, device=groups.device)
    cells, cell_of_row = groups.unique(dim=0, return_inverse=True)
    return cells.tolist(), cell_of_row


def _merged(parts: Sequence[rd.GroupStats], total: int) -> rd.GroupStats:
    parts = [part for part in parts if part.count]
    count = sum(part.count for part in parts)
    if not count:
        return rd.GroupStats(float("nan"), 0, 0.0, float("nan"))
    loss = sum(part.loss * part.count for part in parts) / count
    accuracy = sum(part.accuracy * part.count for part in parts) / count
    return rd.GroupStats(loss, count, count / total, accuracy)
