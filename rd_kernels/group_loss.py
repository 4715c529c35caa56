"""What the group-robust losses have in common: the state of the objective, checkpoints of it, accumulation, reports."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rd_kernels import grouped
from rd_kernels.accumulation import Window
from rd_kernels.distributed import world_size
from rd_kernels.objectives import GroupDRO, Objective
from rd_kernels.reduction import Given, Settings, State
from rd_kernels.report import GroupReport

__all__ = ["GroupLoss"]

_AT_ONCE = 64  # calls whose statistics are added up together


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


class GroupLoss(nn.Module):
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
        self._uncounted: list[tuple[Tensor, Tensor]] = []  # of calls that are not in these sums yet
        # Of the last call: stats, status, V, places.
        self._last: tuple[Tensor, Tensor, int, int | None] | None = None
        self._first_run: _FirstRun | None = None
        self._window: Window | None = None

    @property
    def objective(self) -> Objective:
        return self.settings.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        """One that remembers and asks for as much; q stays."""
        objective.check(self.num_groups)
        for name in ("memory", "needs_reference"):
            new, old = getattr(objective, name), getattr(self.objective, name)
            if new != old:
                raise ValueError(
                    f"objective must have {name} {old}, as {type(self.objective).__name__} has, "
                    f"got {type(objective).__name__} with {new}"
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupLoss:
        """The buffers move with ``.to(device)`` but stay float32 whatever ``.half()`` or ``.to(dtype)`` asks: a step
        of q is often smaller than what 16 bits can hold."""
        self._count()
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
        if not counts:
            return
        if torch.compiler.is_compiling() or (stats.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._add(stats[None], status[None])
            return
        self._uncounted.append((stats, status))
        if len(self._uncounted) >= _AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Add up what calls have left: at once for many, because each launch takes microseconds of a small call."""
        if self._uncounted:
            stats, status = zip(*self._uncounted, strict=True)
            self._uncounted.clear()
            self._add(torch.stack(stats), torch.stack(status))

    def _add(self, stats: Tensor, status: Tensor) -> None:
        self._total_stats.add_(stats.sum(0, dtype=torch.float64))
        self._total_status.add_(status.sum(0))
        self._calls.add_(stats.shape[0])

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
        self._count()
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
        self._uncounted.clear()
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
