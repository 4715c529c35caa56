"""The losses as modules: the drop-in cross-entropy and the group-robust losses with their state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rd_kernels import functional, grouped
from rd_kernels.accumulation import Window
from rd_kernels.objectives import GroupDRO, Objective
from rd_kernels.report import GroupReport

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


@dataclass(eq=False)
class _FirstRun:
    """A call that activation checkpointing may run again in the backward, and q as it was before."""

    q: Tensor  # [G]
    labels: Tensor
    groups: Tensor
    repeated: (
        bool  # a call for the same labels and groups waits for its backward too: which is meant is not known
    )
    run_again: bool = False

    def was_of(self, labels: Tensor, groups: Tensor) -> bool:
        """Whether it had these very tensors, or views of them as reentrant checkpointing makes; never waits."""
        pairs = (self.labels, labels), (self.groups, groups)
        return all(
            a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
            for a, b in pairs
        )


class _GroupLoss(nn.Module):
    """The group weights q, their names, and the statistics of the last call."""

    group_weights: Tensor
    _adjustment: Tensor | None

    def __init__(
        self,
        num_groups: int,
        objective: Objective | None = None,
        ignore_index: int = -100,
        group_names: Sequence[str] | None = None,
        process_group: Any = None,
        backend: str = "auto",
    ):
        super().__init__()
        if isinstance(num_groups, bool) or not isinstance(num_groups, int):
            raise TypeError(f"num_groups must be an integer, got {type(num_groups).__name__}")
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        objective = GroupDRO() if objective is None else objective
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be an Objective such as rd.GroupDRO(), got {objective!r}")
        names = [str(group) for group in range(num_groups)] if group_names is None else list(group_names)
        if len(names) != num_groups or len(set(names)) != num_groups:
            raise ValueError(f"group_names must be {num_groups} different names, got {names}")
        self.num_groups = num_groups
        self.objective = objective
        self.ignore_index = ignore_index
        self.group_names = names
        self.process_group = process_group
        self.backend = backend
        uniform = torch.full(
            (num_groups,), 1 / num_groups, dtype=torch.float32
        )  # whatever torch's default is
        self.register_buffer("group_weights", uniform)
        self.register_buffer("_adjustment", objective.adjustment_for(num_groups), persistent=False)
        # Of the last call: stats, status, V, places.
        self._last: tuple[Tensor, Tensor, int, int | None] | None = None
        self._first_run: _FirstRun | None = None
        self._window: Window | None = None

    def _state(self, labels: Tensor, groups: Tensor) -> Tensor:
        """q for this call: the buffer itself while training, a copy that is thrown away in eval mode, and in what
        activation checkpointing runs again a copy of what q was at first: the same coefficients, and no second step.
        """
        if not self.training:
            return self.group_weights.clone()
        if torch.compiler.is_compiling():
            return self.group_weights
        first = self._first_run
        if first is not None and torch._C._current_graph_task_id() != -1:  # a backward is running
            if first.repeated or not first.was_of(labels, groups):
                raise RuntimeError(
                    f"activation checkpointing runs this {type(self).__name__} again, and the group weights that it "
                    "had for this batch are gone: it was called again before the backward, or labels or groups are "
                    "made inside the checkpointed function. Call the loss outside of that function"
                )
            first.run_again = True
            return first.q.clone()
        # Checkpointing's first run is without gradients (reentrant) or has hooks on what autograd saves.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if hooked or not torch.is_grad_enabled():
            repeated = first is not None and not first.run_again and first.was_of(labels, groups)
            self._first_run = _FirstRun(self.group_weights.clone(), labels, groups, repeated)
        return self.group_weights

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_first_run": None}  # what is copied or saved is not in mid-backward

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _GroupLoss:
        """The buffers move with ``.to(device)`` but stay float32 whatever ``.half()`` or ``.to(dtype)`` asks: a step
        of q is often smaller than what 16 bits can hold."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @contextmanager
    def accumulate(self) -> Iterator[Window]:
        """Gradient accumulation with the numbers of one large batch: statistics first, then the gradients.

        The weights of a batch depend on the losses of all of it, so every micro-batch is seen twice::

            with loss_fn.accumulate() as window:
                with torch.no_grad():
                    for batch in micro_batches:
                        window.observe(*batch)        # what loss_fn takes; adds up sums and counts
                for batch in micro_batches:
                    loss_fn(*batch).backward()        # the losses add up to the large batch's, and so do the gradients

        q is updated once, from the statistics of all. With one micro-batch, or where the extra forward is too dear, call
        the loss without this: q is then updated, and means are taken, in every micro-batch. Dropout must draw the same
        both times for the statistics to be those of the gradients. Afterwards ``report()`` is of the whole window.

        Raises: RuntimeError for a loss before anything was observed, for another number of losses than of observed
        micro-batches, for a window inside a window.
        """
        if self._window is not None:
            raise RuntimeError("accumulate() inside accumulate(): finish the one window first")
        self._window = window = Window(self)
        try:
            yield window
        finally:
            self._window = None
        window.finish()

    def _grouped(
        self, q: Tensor, objective: Objective, adjustment: Tensor | None, *call: Any, **named: Any
    ) -> grouped.Grouped:
        """The op for a call's arguments."""
        raise NotImplementedError

    def _loss(self, labels: Tensor, groups: Tensor, *call: Any) -> Tensor:
        if self._window is not None:
            return self._keep(self._grouped(self.group_weights, self._window.weighting(), None, *call))
        return self._keep(self._grouped(self._state(labels, groups), self.objective, self._adjustment, *call))

    def _keep(self, result: grouped.Grouped) -> Tensor:
        self._last = (result.stats, result.status, result.num_classes, result.places)
        return result.loss

    def report(self) -> GroupReport:
        """Loss, count, weight and accuracy of the last call, overall and by group. Waits for the device.

        Raises: RuntimeError before the first call; ValueError if the last batch held labels or group ids out
        of range (a GPU finds them without stopping; the group weights were left as they were). Warns if a ``capacity``
        had no place for some of the labelled rows, which were computed the slower way.
        """
        if self._last is None:
            raise RuntimeError("report() needs a call of the loss first")
        stats, status, num_classes, places = self._last
        report = GroupReport.from_tensors(stats, status, self.group_names, num_classes)
        # On several ranks the count is of all of them, and which of them overflowed is not known.
        if places is not None and self.process_group is None and report.overall.count > places:
            warnings.warn(
                f"capacity had {places} places for {report.overall.count} labelled rows; the others were computed "
                "exactly, but slower: a larger capacity is faster",
                stacklevel=2,
            )
        return report

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.objective}, ignore_index={self.ignore_index}, backend={self.backend!r}"
        )


class GroupDROLoss(_GroupLoss):
    """Cross-entropy, group reduction and the objective's weight update as one op on logits.

    ``loss = GroupDROLoss(G)(logits, labels, groups)`` with logits [..., V], labels [...], and groups as ids
    [...] or [B], or a bool mask [..., G] or [B, G]; see :func:`functional.group_dro_cross_entropy` for
    shapes, dtypes and what is raised.

    ``group_weights`` is q, a float32 buffer [G] that starts uniform; it changes only in training mode, so
    evaluating with the same object does not. It is saved in ``state_dict`` and moves with ``.to(device)``.

    Args:
        num_groups: G >= 1.
        objective: ``rd.GroupDRO(step_size)`` (default), ``rd.ERM()``.
        ignore_index: label of rows that do not count.
        group_names: G different names for the report; default "0", "1", ...
        process_group: for training on several ranks; needed there.
        backend: "auto", or the name of one backend, which then must serve.
        inplace_backward: write the gradient over the logits; see there.
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
    ):
        super().__init__(num_groups, objective, ignore_index, group_names, process_group, backend)
        self.inplace_backward = inplace_backward

    def forward(self, logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        return self._loss(labels, groups, logits, labels, groups)

    def _grouped(self, q, objective, adjustment, logits, labels, groups):
        return grouped.grouped_loss(
            logits, labels, groups, q, objective, adjustment, self.ignore_index, self.process_group,
            self.inplace_backward, self.backend,
        )  # fmt: skip


class LinearGroupDROLoss(_GroupLoss):
    """:class:`GroupDROLoss` of ``hidden @ weight.T + bias`` without keeping the logits: exact, 3 GEMMs.

    ``loss = LinearGroupDROLoss(G)(hidden, weight, labels, groups, bias=None)`` with hidden [..., D], weight
    [V, D], bias [V]. Args as there, and ``memory_budget`` in bytes, ``filter_eps``, the share of the gradient that
    the backward may leave out, and ``capacity``, the places for labelled rows where these are few; see :func:`functional.linear_group_dro_cross_entropy`.
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
    ):
        super().__init__(num_groups, objective, ignore_index, group_names, process_group, backend)
        if memory_budget is not None and (
            isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 1
        ):
            raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
        self.memory_budget = memory_budget
        self.capacity = grouped.check_capacity(capacity)
        self.filter_eps = grouped.check_filter_eps(filter_eps)

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, groups: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self._loss(labels, groups, hidden, weight, labels, groups, bias)

    def _grouped(self, q, objective, adjustment, hidden, weight, labels, groups, bias=None):
        return grouped.linear_grouped_loss(
            hidden, weight, bias, labels, groups, q, objective, adjustment, self.ignore_index, self.memory_budget,
            self.process_group, self.backend, self.filter_eps, self.capacity,
        )  # fmt: skip
