"""Steps 2 and 3 of the op: from row losses to statistics, weights, and the loss.

A kernel does all of it at once where it can (``plain``). What more is asked for is done here in small steps on the device,
from the same row losses and without another look at the logits. A unit is what the groups count: a row (a token), or a
sequence. Letters: N rows, U units, G groups, M rows of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rd_kernels import distributed, ops
from rd_kernels.backends.interface import IGNORED, MISS
from rd_kernels.objectives import Batch, Objective

__all__ = ["EXTRAS", "Given", "Keys", "Reduced", "Settings", "State", "reduce_rows", "update", "weigh"]

#: Statistics that are taken only when asked for: rows of ``stats`` from the fifth on, in this order.
EXTRAS = ("excess", "entropy", "top_k_accuracy")


@dataclass(frozen=True)
class Settings:
    """How row losses are reduced."""

    objective: Objective
    ignore_index: int = -100
    level: Literal["token", "sequence"] = "token"
    entropy: bool = False
    top_k: int | None = None
    process_group: Any = None

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level must be 'token' or 'sequence', got {self.level!r}")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k must be None or an integer >= 1, got {self.top_k!r}")
        if not isinstance(self.entropy, bool):
            raise TypeError(f"entropy must be True or False, got {self.entropy!r}")

    @property
    def detailed(self) -> bool:
        """Whether the row pass has to tell more than losses."""
        return self.entropy or self.top_k is not None

    @property
    def extras(self) -> tuple[str, ...]:
        wanted = self.objective.needs_reference, self.entropy, self.top_k is not None
        return tuple(name for name, want in zip(EXTRAS, wanted, strict=True) if want)

    @property
    def plain(self) -> bool:
        """Whether a kernel can do steps 2 and 3 at once."""
        objective = self.objective
        more = self.detailed or objective.needs_reference or objective.over_rows
        return self.level == "token" and objective.rule is not None and not more


class State(NamedTuple):
    """What goes on from batch to batch; q and memory are updated in place."""

    q: Tensor  # [G] float32
    memory: Tensor  # [M, G] float64
    adjustment: Tensor | None  # [G] float32


class Keys(NamedTuple):
    """What belongs to the rows beside their losses."""

    groups: Tensor  # of the units: ids [U], lists [U, K] or bits [U, W]
    sequence: Tensor | None  # [N] int64: the unit of each row; None: rows are the units
    reference: Tensor | None  # [N] losses of a reference model

    def of_rows(self, index: Tensor) -> Keys:
        """Those of some rows [K]."""
        groups, sequence, reference = self
        if sequence is None:
            groups = groups.index_select(0, index)
        else:
            sequence = sequence.index_select(0, index)
        return Keys(groups, sequence, None if reference is None else reference.index_select(0, index))


class Given(NamedTuple):
    """Weights that are known already, in place of an objective's; 0 while they are not."""

    coefficients: Tensor | None = None  # [G]
    reported: Tensor | None = None  # [G+2], row 3 of stats
    weights: Tensor | None = None  # [U], of an objective over rows


class Reduced(NamedTuple):
    loss: Tensor  # [] acc
    stats: Tensor  # [4 + extras, G+2] acc
    status: Tensor  # [2]
    row_scale: Tensor  # [N] acc: what multiplies a row's gradient
    units: Tensor | None = None  # [2, U] float64: losses, and 1 where they count; for an objective over rows
    process_group: Any = None  # over which it was done


def reduce_rows(
    row_loss: Tensor,  # [N] acc
    outcome: Tensor,  # [N] uint8
    details: Tensor,  # [2, N] acc, or [2, 0]
    keys: Keys,
    num_classes: int,
    state: State,
    settings: Settings,
    backend: str,
    given: Given | None = None,
) -> Reduced:
    """Steps 2 and 3, over all ranks.

    On several ranks the loss is that of the joined batch, and the row scales are its own times their number, because
    DDP divides the gradients by it.
    """
    objective, group, num_groups = settings.objective, settings.process_group, state.q.shape[0]
    ranks = distributed.world_size(group)
    if ranks is None and given is None and settings.plain:
        rule = (objective.rule, objective.rate, state.adjustment)
        return Reduced(
            *ops.reduce_and_update(row_loss, outcome, keys.groups, state.q, *rule, num_classes, backend)
        )

    def sums(values: Tensor, outcomes: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return ops.group_reduce(values, outcomes, groups, num_classes, count, backend)

    more = _more_values(row_loss, details, keys, settings)
    units, unit_loss, unit_outcome, share, bad_labels = keys.groups.shape[0], row_loss, outcome, None, None
    if keys.sequence is not None and units > 0:
        first, bad_labels = sums(row_loss, outcome, keys.sequence, units)
        share = 1 / first[1, :units].clamp(min=1)
        unit_loss, accuracy = first[0, :units] * share, first[2, :units] * share
        more = [accuracy] + [
            sums(value, outcome, keys.sequence, units)[0][0, :units] * share for value in more
        ]
        unit_outcome = torch.where(first[1, :units] > 0, MISS, IGNORED).to(torch.uint8)
    stats, status = sums(unit_loss, unit_outcome, keys.groups, num_groups)
    added = [sums(value, unit_outcome, keys.groups, num_groups)[0][0] for value in more]
    if bad_labels is not None:
        status = status + bad_labels
        stats = torch.cat([stats[:2], added.pop(0)[None], stats[3:]])
    if added:
        stats = torch.cat([stats, torch.stack(added)])
    if ranks is not None:
        stats, status = distributed.add_up([stats, status], group)

    joined = None
    if objective.over_rows:
        inside = ops.row_scale(torch.ones_like(stats[0, :num_groups]), unit_outcome, keys.groups, backend) > 0
        joined = torch.stack([torch.where(inside, unit_loss, 0).double(), inside.double()])
        weights = weigh(joined, objective, group) if given is None else given.weights
        scale, loss = _weighted_units(joined, weights, status)
        scale = scale.to(row_loss.dtype)
        by_group = sums(scale, unit_outcome, keys.groups, num_groups)[0][0]
        if ranks is not None:
            loss, by_group = distributed.add_up([loss, by_group], group)
        loss = loss.to(row_loss.dtype)
        stats = torch.cat([stats[:3], by_group[None], stats[4:]])
    else:
        if given is None:
            loss, coefficients = update(stats, status, state, settings, backend)
        else:
            loss, coefficients = _with_coefficients(stats, status, given.coefficients)
            if given.reported is not None:
                stats[3] = given.reported
        scale = ops.row_scale(coefficients, unit_outcome, keys.groups, backend)
    if share is not None and keys.sequence is not None:
        scale = ops.row_scale(scale * share, outcome, keys.sequence, backend)
    return Reduced(loss, stats, status, scale if ranks is None else scale * ranks, joined, group)


def _more_values(row_loss: Tensor, details: Tensor, keys: Keys, settings: Settings) -> list[Tensor]:
    """What is added up by group beside losses, counts and hits, each [N]."""
    values = []
    if settings.objective.needs_reference:
        if keys.reference is None:
            raise ValueError(f"{type(settings.objective).__name__} needs reference_losses")
        values.append((row_loss - keys.reference.to(row_loss.dtype)).clamp(min=0))
    if settings.entropy:
        values.append(details[0])
    if settings.top_k is not None:
        values.append((details[1] < settings.top_k).to(row_loss.dtype))
    return values


def update(
    stats: Tensor,  # [4 + extras, G+2] acc, its row 3 is written
    status: Tensor,  # [2]
    state: State,
    settings: Settings,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Step 3 -> ``loss`` [], ``coefficients`` [G]: by the backend where it has the rule, else by the objective itself.

    A bad batch (``status``) has loss NaN and coefficients 0, and changes no state; nor does one that would make it
    infinite or NaN where it was not.
    """
    objective, q, memory = settings.objective, state.q, state.memory
    if objective.rule is not None:
        return ops.group_update(stats, status, q, objective.rule, objective.rate, state.adjustment, backend)
    num_groups = q.shape[0]
    sums, counts = stats[0, :num_groups], stats[1, :num_groups]
    excess = stats[4, :num_groups].double() if objective.needs_reference else None
    adjustment = None if state.adjustment is None else state.adjustment.double()
    with torch.no_grad():
        weights, new_q, new_memory = objective.update(
            Batch(sums.double(), counts.double(), excess, adjustment), q.double(), memory.clone()
        )
    _check_update(objective, weights, q.shape, new_q, q, new_memory, memory)
    valid = (status == 0).all()
    usable = valid
    for new, old in ((new_q, q), (new_memory, memory)):
        if new is not None:
            usable = usable & (torch.isfinite(new) | ~torch.isfinite(old)).all()
    for new, old in ((new_q, q), (new_memory, memory)):
        if new is not None:
            old.copy_(torch.where(usable, new.to(old.dtype), old))
    stats[3, :num_groups] = torch.where(valid, weights.to(stats.dtype), 0)
    stats[3, num_groups] = 0
    stats[3, num_groups + 1] = stats[3, :num_groups].sum()
    return _with_coefficients(stats, status, weights / counts.double().clamp(min=1))


def _with_coefficients(stats: Tensor, status: Tensor, coefficients: Tensor | None) -> tuple[Tensor, Tensor]:
    """Coefficients [G] float64, None: zeros -> ``loss`` [], ``coefficients`` [G], both acc."""
    sums, counts = stats[:2, :-2]
    valid = (status == 0).all()
    if coefficients is None:
        coefficients = torch.zeros_like(counts)
    coefficients = torch.where(valid & (counts > 0), coefficients.to(stats.dtype), 0)
    parts = torch.where(counts > 0, coefficients * sums, 0)
    return torch.where(valid, parts.sum(), torch.nan), coefficients


def weigh(units: Tensor, objective: Objective, process_group: Any) -> Tensor:
    """An objective over rows: losses and counts [2, U] -> the weights [U] float64, with those of the other ranks' units
    in view."""
    everyone, own = units, slice(None)
    if distributed.world_size(process_group) is not None:
        everyone, own = distributed.join(units, process_group)
    if everyone.shape[1] == 0:  # nothing to look for a maximum in
        return everyone[1]
    nothing = everyone.new_zeros((0, everyone.shape[1]))
    with torch.no_grad():
        weights, *_ = objective.update(Batch(everyone[0], everyone[1]), nothing.sum(0), nothing)
    _check_update(objective, weights, everyone.shape[1:])
    return weights[own]


def _weighted_units(units: Tensor, weights: Tensor | None, status: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and counts [2, U] -> what multiplies a unit's loss [U], and this rank's share of the loss []."""
    losses, counts = units
    if weights is None:
        weights = torch.zeros_like(losses)
    valid = (status == 0).all()
    weights = torch.where(valid & (counts > 0), weights, 0)
    loss = torch.where(weights == 0, 0, weights * losses).sum()
    return weights, torch.where(valid, loss, torch.nan)


def _check_update(objective: Objective, weights: Tensor, shape: torch.Size, *pairs: Tensor | None) -> None:
    """ValueError unless ``weights`` has this shape, and each further tensor that of the one behind it."""
    results = [("weights", weights, shape)]
    for name, new, old in zip(("q", "memory"), pairs[::2], pairs[1::2], strict=False):
        if new is not None and old is not None:
            results.append((name, new, old.shape))
    for name, result, expected in results:
        if result.shape != expected:
            raise ValueError(
                f"{type(objective).__name__}.update must return {name} {list(expected)}, got {list(result.shape)}"
            )
