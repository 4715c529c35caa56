"""The losses as modules: the drop-in cross-entropy and the group-robust losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from rd_kernels import functional, grouped
from rd_kernels.group_loss import GroupLoss
from rd_kernels.objectives import Objective

__all__ = ["CrossEntropyLoss", "GroupDROLoss", "LinearGroupDROLoss"]


class CrossEntropyLoss(nn.Module):
    """Drop-in for :class:`torch.nn.CrossEntropyLoss` on class indices; see :func:`functional.cross_entropy`."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        backend: str = "auto",
        inplace_backward: bool = False,
    ):
        super().__init__()
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.inplace_backward = inplace_backward
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            inplace_backward=self.inplace_backward, backend=self.backend,
        )  # fmt: skip


class GroupDROLoss(GroupLoss):
    """Cross-entropy, group reduction and the objective's weight update as one op on logits.

    ``loss = GroupDROLoss(G)(logits, labels, groups)`` with logits [..., V], labels [...], and groups as ids [...] or
    [B], a bool mask [..., G] or [B, G], or lists of ids [..., K]; ``groups`` may be left out where G = 1. See
    :func:`functional.group_dro_cross_entropy` for shapes, dtypes, levels and what is raised. ``reference_losses``
    [...] is for :class:`DoReMi`.

    ``group_weights`` is q, a float32 buffer [G] that starts uniform; it changes only in training mode, so
    evaluating with the same object does not. It is saved in ``state_dict`` and moves with ``.to(device)``, as does
    ``memory``, what some objectives remember beside it.

    Args:
        num_groups: G >= 1.
        objective: ``rd.GroupDRO()`` (default), or another of docs/objectives.md, or one of your own.
        ignore_index: label of rows that do not count.
        group_names: G different names for the report; default "0", "1", ...
        process_group: for training on several ranks; needed there. A checkpoint of another number of ranks is refused.
        backend: "auto", or the name of one backend, which then must serve.
        inplace_backward: write the gradient over the logits; see there.
        level: "token" or "sequence", what a group's mean loss is the mean of; see there.
        entropy: also report the mean entropy of the predictions, in nats, from the same read of the logits.
        top_k: also report in how many rows the label is among the k largest logits, from the same read.
    """

    def __init__(
        self,
        num_groups: int,
        objective: Objective | None = None,
        ignore_index: int = -100,
        group_names: Sequence[str] | None = None,
        process_group: Any = None,
        backend: str = "auto",
        inplace_backward: bool = False,
        level: Literal["token", "sequence"] = "token",
        entropy: bool = False,
        top_k: int | None = None,
    ):
        super().__init__(
            num_groups, objective, ignore_index, group_names, process_group, backend, level, entropy, top_k
        )
        self.inplace_backward = inplace_backward

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None = None,
        reference_losses: Tensor | None = None,
    ) -> Tensor:
        return self._loss(labels, groups, logits, labels, groups, reference_losses)

    def _grouped(self, state, given, logits, labels, groups=None, reference_losses=None):
        return grouped.grouped_loss(
            logits, labels, groups, reference_losses, state, self.settings, self.inplace_backward, self.backend, given
        )  # fmt: skip


class LinearGroupDROLoss(GroupLoss):
    """:class:`GroupDROLoss` of ``hidden @ weight.T + bias`` without keeping the logits: exact, 3 GEMMs.

    ``loss = LinearGroupDROLoss(G)(hidden, weight, labels, groups, bias=None)`` with hidden [..., D], weight
    [V, D], bias [V]. Args as there, and ``memory_budget`` in bytes, ``filter_eps``, the share of the gradient that
    the backward may leave out, and ``capacity``, the places for labelled rows where these are few; see
    :func:`functional.linear_group_dro_cross_entropy`. ``entropy`` and ``top_k`` are not served together with
    ``capacity``, or with ``filter_eps`` on a GPU.
    """

    def __init__(
        self,
        num_groups: int,
        objective: Objective | None = None,
        ignore_index: int = -100,
        group_names: Sequence[str] | None = None,
        process_group: Any = None,
        backend: str = "auto",
        memory_budget: int | None = None,
        filter_eps: float | None = None,
        capacity: int | float | None = None,
        level: Literal["token", "sequence"] = "token",
        entropy: bool = False,
        top_k: int | None = None,
    ):
        super().__init__(
            num_groups, objective, ignore_index, group_names, process_group, backend, level, entropy, top_k
        )
        if memory_budget is not None and (
            isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 1
        ):
            raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
        self.memory_budget = memory_budget
        self.capacity = grouped.check_capacity(capacity)
        self.filter_eps = grouped.check_filter_eps(filter_eps)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        groups: Tensor | None = None,
        bias: Tensor | None = None,
        reference_losses: Tensor | None = None,
    ) -> Tensor:
        return self._loss(labels, groups, hidden, weight, labels, groups, bias, reference_losses)

    def _grouped(self, state, given, hidden, weight, labels, groups=None, bias=None, reference_losses=None):
        return grouped.linear_grouped_loss(
            hidden, weight, bias, labels, groups, reference_losses, state, self.settings, self.memory_budget,
            self.backend, self.filter_eps, self.capacity, given,
        )  # fmt: skip
