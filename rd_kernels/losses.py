"""The losses as modules: the drop-in cross-entropy and the group-robust losses with their state."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rd_kernels import functional, grouped
from rd_kernels.accumulation import Window
from rd_kernels.distributed import world_size
from rd_kernels.objectives import GroupDRO, Objective
from rd_kernels.reduction import Given, Settings, State
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
    """A call that activation checkpointing may run again in the backward, and the state as it was before."""

    state: State
    labels: Tensor
    groups: Tensor | None
    repeated: (
        bool  # a call for the same labels and groups waits for its backward too: which is meant is not known
    )
    run_again: bool = False

    def was_of(self, labels: Tensor, groups: Tensor | None) -> bool:
        """Whether it had these very tensors, or views of them as reentrant checkpointing makes; never waits."""
        return _same(self.labels, labels) and _same(self.groups, groups)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


class _GroupLoss(nn.Module):
    """The state of an objective, the groups' names, and the statistics of the last call and of all calls."""

    group_weights: Tensor
    memory: Tensor
    _total_stats: Tensor
    _total_status: Tensor
    _calls: Tensor
    adjustment: Tensor | None

    def __init__(
        self,
        num_groups: int,
        objective: Objective | None = None,
        ignore_index: int = -100,
        group_names: Sequence[str] | None = None,
        process_group: Any = None,
        backend: str = "auto",
        level: Literal["token", "sequence"] = "token",
        entropy: bool = False,
        top_k: int | None = None,
    ):
        super().__init__()
        if isinstance(num_groups, bool) or not isinstance(num_groups, int):
            raise TypeError(f"num_groups must be an integer, got {type(num_groups).__name__}")
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        objective = GroupDRO() if objective is None else objective
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be an Objective such as rd.GroupDRO(), got {objective!r}")
        objective.check(num_groups)
        names = [str(group) for group in range(num_groups)] if group_names is None else list(group_names)
        if len(names) != num_groups or len(set(names)) != num_groups:
            raise ValueError(f"group_names must be {num_groups} different names, got {names}")
        self.num_groups = num_groups
        self.settings = Settings(objective, ignore_index, level, entropy, top_k, process_group)
        self.group_names = names
        self.backend = backend
        uniform = torch.full(
            (num_groups,), 1 / num_groups, dtype=torch.float32
        )  # whatever torch's default is
        self.register_buffer("group_weights", uniform)
        # Saved where there is one, so that nothing stands in a checkpoint that says nothing.
        self.register_buffer(
            "memory", objective.initial_memory(num_groups), persistent=bool(objective.memory)
        )
        self.register_buffer("adjustment", objective.adjustment_for(num_groups), persistent=False)
        self._adjusted = False  # by hand: then it is saved
        # Sums over calls, for total_report().
        sums = torch.zeros((4 + len(self.settings.extras), num_groups + 2), dtype=torch.float64)
        self.register_buffer("_total_stats", sums, persistent=False)
        self.register_buffer("_total_status", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.register_buffer("_calls", torch.zeros((), dtype=torch.int64), persistent=False)
        # Of the last call: stats, status, V, places.
        self._last: tuple[Tensor, Tensor, int, int | None] | None = None
        self._first_run: _FirstRun | None = None
        self._window: Window | None = None

    @property
    def objective(self) -> Objective:
        return self.settings.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        """One that remembers as much; q stays."""
        objective.check(self.num_groups)
        if objective.memory != self.objective.memory:
            raise ValueError(
                f"objective must remember {self.objective.memory}, as {type(self.objective).__name__} does, "
                f"got {type(objective).__name__} with {objective.memory}"
            )
        self.settings = dataclasses.replace(self.settings, objective=objective)
        if not self._adjusted:
            adjustment = objective.adjustment_for(self.num_groups)
            self.adjustment = None if adjustment is None else adjustment.to(self.group_weights.device)

    @property
    def ignore_index(self) -> int:
        return self.settings.ignore_index

    @property
    def process_group(self) -> Any:
        return self.settings.process_group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self.settings = dataclasses.replace(self.settings, process_group=process_group)

    def set_adjustment(self, adjustment: Tensor | Sequence[float]) -> None:
        """What Group DRO adds to each group's mean loss from now on, [G], finite, in place of the size adjustment.

        For Sagawa et al.'s automatic adjustment give, after each epoch, the generalisation gap that was measured: each
        group's held-out loss minus its training loss. Saved in ``state_dict``.

        Raises: ValueError for another objective, another shape, or values that are not finite.
        """
        if not isinstance(self.objective, GroupDRO):
            raise ValueError(f"set_adjustment is for GroupDRO, not for {type(self.objective).__name__}")
        values = torch.as_tensor(adjustment, dtype=torch.float32, device=self.group_weights.device).detach()
        if values.shape != self.group_weights.shape or not bool(torch.isfinite(values).all()):
            raise ValueError(f"adjustment must be {self.num_groups} finite numbers, got {values.tolist()}")
        self.adjustment = values.clone()
        self._adjusted = True

    def _state_now(self) -> State:
        return State(self.group_weights, self.memory, self.adjustment)

    def _copied_state(self) -> State:
        return State(self.group_weights.clone(), self.memory.clone(), self.adjustment)

    def _state(self, labels: Tensor, groups: Tensor | None) -> tuple[State, bool]:
        """The state for this call: the buffers themselves while training, a copy that is thrown away in eval mode, and
        in what activation checkpointing runs again a copy of what was at first: the same coefficients, and no second
        step. And whether it is such a second run.
        """
        if not self.training:
            return self._copied_state(), False
        if torch.compiler.is_compiling():
            return self._state_now(), False
        first = self._first_run
        if first is not None and torch._C._current_graph_task_id() != -1:  # a backward is running
            if first.repeated or not first.was_of(labels, groups):
                raise RuntimeError(
                    f"activation checkpointing runs this {type(self).__name__} again, and the group weights that it "
                    "had for this batch are gone: it was called again before the backward, or labels or groups are "
                    "made inside the checkpointed function. Call the loss outside of that function"
                )
            first.run_again = True
            q, memory, adjustment = first.state
            return State(q.clone(), memory.clone(), adjustment), True
        # Checkpointing's first run is without gradients (reentrant) or has hooks on what autograd saves.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if hooked or not torch.is_grad_enabled():
            repeated = first is not None and not first.run_again and first.was_of(labels, groups)
            self._first_run = _FirstRun(self._copied_state(), labels, groups, repeated)
        return self._state_now(), False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_first_run": None}  # what is copied or saved is not in mid-backward

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._adjusted and self.adjustment is not None:
            destination[prefix + "adjustment"] = self.adjustment
        if self.process_group is not None:
            destination[prefix + "ranks"] = torch.tensor(world_size(self.process_group))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        *_, errors = others
        given = state_dict.pop(prefix + "ranks", None)
        ranks = None if self.process_group is None else world_size(self.process_group)
        if given is not None and ranks is not None and int(given) != ranks:
            errors.append(
                f"{type(self).__name__} was saved by {int(given)} ranks, but its process_group has {ranks}: another "
                "number of ranks makes other batches. To go on all the same, delete the entry "
                f"{prefix + 'ranks'!r} from the state_dict"
            )
        adjustment = state_dict.pop(prefix + "adjustment", None)
        super()._load_from_state_dict(state_dict, prefix, *others)
        if adjustment is not None:
            try:
                self.set_adjustment(adjustment)
            except ValueError as error:
                errors.append(f"{prefix}adjustment: {error}")

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
        if (whole := window.finish()) is not None:
            self._keep(whole)

    def _grouped(self, state: State, given: Given | None, *call: Any, **named: Any) -> grouped.Grouped:
        """The op for a call's arguments."""
        raise NotImplementedError

    def _loss(self, labels: Tensor, groups: Tensor | None, *call: Any) -> Tensor:
        if self._window is not None:
            result = self._window.loss(*call)
            self._last = _statistics(result)
            return result.loss
        state, again = self._state(labels, groups)
        result = self._grouped(state, None, *call)
        self._keep(result, counts=not again)
        return result.loss

    def _keep(self, result: grouped.Grouped, counts: bool = True) -> None:
        self._last = stats, status, *_ = _statistics(result)
        if counts:
            self._total_stats += stats
            self._total_status += status
            self._calls += 1

    def report(self) -> GroupReport:
        """Loss, count, weight and accuracy of the last call, overall and by group. Waits for the device.

        Raises: RuntimeError before the first call; ValueError if the last batch held labels or group ids out
        of range (a GPU finds them without stopping; the group weights were left as they were). Warns if a ``capacity``
        had no place for some of the labelled rows, which were computed the slower way.
        """
        if self._last is None:
            raise RuntimeError("report() needs a call of the loss first")
        stats, status, num_classes, places = self._last
        report = self._report(stats, status, num_classes)
        # On several ranks the count is of all of them, and which of them overflowed is not known.
        if places is not None and self.process_group is None and report.overall.count > places:
            warnings.warn(
                f"capacity had {places} places for {report.overall.count} labelled rows; the others were computed "
                "exactly, but slower: a larger capacity is faster",
                stacklevel=2,
            )
        return report

    def total_report(self, reset: bool = False) -> GroupReport:
        """The same of all calls, in training and in eval mode, since the last reset: means over all their rows, weights
        as the mean over the calls. They were added up on the device, in float64; this waits for it.

        Not saved in ``state_dict``. Raises: RuntimeError where there was no call; ValueError as ``report()``.
        """
        calls = int(self._calls)
        if calls == 0 or self._last is None:
            raise RuntimeError("total_report() needs a call of the loss since the last reset")
        stats = self._total_stats.clone()
        stats[3] /= calls
        report = self._report(stats, self._total_status, self._last[2])
        if reset:
            self.reset_totals()
        return report

    def reset_totals(self) -> None:
        """Forget the calls so far for ``total_report()``."""
        for each in (self._total_stats, self._total_status, self._calls):
            each.zero_()

    def _report(self, stats: Tensor, status: Tensor, num_classes: int) -> GroupReport:
        return GroupReport.from_tensors(stats, status, self.group_names, num_classes, self.settings.extras)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.objective}, ignore_index={self.ignore_index}, backend={self.backend!r}"
        )


def _statistics(result: grouped.Grouped) -> tuple[Tensor, Tensor, int, int | None]:
    """What is kept of a call: nothing that holds its graph."""
    return result.reduced.stats, result.reduced.status, result.num_classes, result.places


class GroupDROLoss(_GroupLoss):
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


class LinearGroupDROLoss(_GroupLoss):
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
