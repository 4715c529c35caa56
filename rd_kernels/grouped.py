"""The grouped losses with their statistics: checks, the choice of backend and of the linear op's form, ops.

What :mod:`rd_kernels.functional` and :mod:`rd_kernels.losses` share. Letters: N rows, V vocabulary, D hidden, G groups.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rd_kernels import distributed, ops, vocabulary
from rd_kernels.autograd import DecoderRows, LinearRowsLoss, RowsLoss
from rd_kernels.backends.registry import linear_form, select
from rd_kernels.gemm import leading_dimension
from rd_kernels.groups import canonical_groups, canonical_labels, check_same_device
from rd_kernels.linear import default_memory_budget, mean_logit_order, plan
from rd_kernels.reduction import Given, Keys, Reduced, Settings, State, reduce_rows

__all__ = [
    "Grouped",
    "check_capacity",
    "check_filter_eps",
    "check_group_weights",
    "check_inplace",
    "flat_rows",
    "grouped_loss",
    "linear_grouped_loss",
]


class Grouped(NamedTuple):
    """A grouped loss and what the report needs: V, and the linear op's places for labelled rows where there are fewer
    of them than rows."""

    loss: Tensor
    reduced: Reduced
    num_classes: int
    places: int | None = None


def grouped_loss(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor | None,
    reference_losses: Tensor | None,
    state: State,
    settings: Settings,
    inplace_backward: bool,
    backend: str,
    given: Given | None = None,
) -> Grouped:
    """The logits op with its statistics; arguments as in :func:`rd_kernels.functional.group_dro_cross_entropy`."""
    refused = {"inplace_backward": inplace_backward}
    part = _part({"logits": logits}, labels, groups, reference_losses, state, settings, refused)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits must have shape [..., V], got a scalar")
    _check_state(state, settings)
    check_same_device(
        "logits", logits.device, labels=labels, groups=groups, reference_losses=reference_losses,
        group_weights=state.q, memory=state.memory,
    )  # fmt: skip
    leading = logits.shape[:-1]
    flat_labels = canonical_labels(labels, leading)
    rows = flat_rows(logits, "logits")
    check_inplace(inplace_backward, rows, "logits")
    name = select(backend, rows, state.q.shape[0])
    keys = _keys(groups, reference_losses, labels, state, settings, name)
    if part is not None:
        result = vocabulary.grouped_loss(part, rows, None, flat_labels, keys, state, settings, name, given)
        return Grouped(*result, part.total)
    if given is None and settings.plain and distributed.world_size(settings.process_group) is None:
        rule = (settings.objective.rule, settings.objective.rate, state.adjustment)
        loss, stats, status, scale, normaliser = ops.grouped_forward(
            rows.detach(), flat_labels, keys.groups, state.q, *rule, settings.ignore_index, name
        )
        reduced = Reduced(loss, stats, status, scale)
    else:
        row_loss, normaliser, outcome, details = ops.row_forward(
            rows.detach(), flat_labels, None, 0.0, settings.ignore_index, name, settings.detailed
        )
        reduced = reduce_rows(row_loss, outcome, details, keys, rows.shape[1], state, settings, name, given)
    loss = RowsLoss.apply(
        rows, reduced.loss, reduced.row_scale, None, flat_labels, normaliser, None, 0.0, settings.ignore_index, name,
        inplace_backward,
    )  # fmt: skip
    return Grouped(loss, reduced, rows.shape[1])


def linear_grouped_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    groups: Tensor | None,
    reference_losses: Tensor | None,
    state: State,
    settings: Settings,
    memory_budget: int | None,
    backend: str,
    filter_eps: float | None = None,
    capacity: int | float | None = None,
    given: Given | None = None,
) -> Grouped:
    """The linear op with its statistics; arguments as in :func:`rd_kernels.functional.linear_group_dro_cross_entropy`."""
    device = hidden.device
    epsilon = check_filter_eps(filter_eps)
    refused = {"memory_budget": memory_budget, "filter_eps": epsilon, "capacity": capacity}
    decoder = {"hidden": hidden, "weight": weight, "bias": bias}
    part = _part(decoder, labels, groups, reference_losses, state, settings, refused)
    _check_state(state, settings)
    check_same_device(
        "hidden", device, weight=weight, bias=bias, labels=labels, groups=groups, reference_losses=reference_losses,
        group_weights=state.q, memory=state.memory,
    )  # fmt: skip
    if cast := torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    _check_linear(hidden, weight, bias, cast)
    num_classes, ignore_index = weight.shape[0], settings.ignore_index
    flat_labels = canonical_labels(labels, hidden.shape[:-1])
    rows = hidden.reshape(-1, hidden.shape[-1])
    name = select(backend, rows, state.q.shape[0])
    keys = _keys(groups, reference_losses, labels, state, settings, name)
    if part is not None:
        both = (weight, bias)
        result = vocabulary.grouped_loss(part, rows, both, flat_labels, keys, state, settings, name, given)
        return Grouped(*result, num_classes)
    on_gpu, fusable, preferred = linear_form(name, rows.dtype)
    if epsilon > 0 and not (fusable if on_gpu else device.type == "cpu"):
        raise ValueError(
            f"filter_eps = {filter_eps} is served on a CPU, and on a GPU for bfloat16 and float16 where triton is "
            f"installed, not by {name!r} for {rows.dtype} on {device}"
        )
    filtered_tiles, order = on_gpu and epsilon > 0, None
    if settings.detailed and (filtered_tiles or capacity is not None):
        raise ValueError(
            "entropy and top_k are not served together with capacity, or with filter_eps on a GPU: there logits are "
            "never seen whole"
        )
    if filtered_tiles:
        order = mean_logit_order(rows.detach(), weight.detach(), bias)
        flat_labels, ignore_index = _labels_in_order(flat_labels, order, ignore_index), -100
    height = leading_dimension(num_classes, rows.element_size()) if on_gpu else num_classes
    weight = _decoder_rows(weight, height, rows.dtype, order)
    bias = None if bias is None else _decoder_rows(bias, height, rows.dtype, order)
    index = position = None
    if device.type == "cpu" and not on_gpu and not torch.compiler.is_compiling():
        # Shapes that depend on values cost nothing here: no capacity is needed.
        labelled = (flat_labels != ignore_index).nonzero()[:, 0]
        if len(labelled) < len(flat_labels):
            rows, flat_labels = rows.index_select(0, labelled), flat_labels.index_select(0, labelled)
            keys = keys.of_rows(labelled)
        places = rows.shape[0]
    elif (places := _places(capacity, rows.shape[0])) < rows.shape[0]:
        index, position = ops.compact(flat_labels, ignore_index, name)
        picked = index.clamp(min=0)
        flat_labels = torch.where(index < 0, ignore_index, flat_labels.index_select(0, picked))
        keys = keys.of_rows(picked)
    budget = default_memory_budget(device) if memory_budget is None else memory_budget
    stored, block = plan(places, num_classes, rows.shape[1], rows.element_size(), budget)
    fused = filtered_tiles or (fusable and preferred and not settings.detailed)
    layout = (num_classes, ignore_index, places, stored, block, fused)
    row_loss, normaliser, outcome, details, *kept = ops.linear_forward(
        rows.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        flat_labels,
        index,
        *layout,
        name,
        settings.detailed,
    )
    reduced = reduce_rows(row_loss, outcome, details, keys, num_classes, state, settings, name, given)
    loss = LinearRowsLoss.apply(
        rows,
        weight,
        bias,
        reduced.loss,
        reduced.row_scale,
        *kept,
        normaliser,
        flat_labels,
        index,
        position,
        name,
        epsilon,
        *layout,
    )
    return Grouped(loss, reduced, num_classes, None if index is None else places)


def _part(
    sharded: dict[str, Tensor | None],
    labels: Tensor,
    groups: Tensor | None,
    reference_losses: Tensor | None,
    state: State,
    settings: Settings,
    refused: dict[str, Any],
) -> vocabulary.Part | None:
    """This rank's part of the vocabulary; None where it is not sharded."""
    if not vocabulary.any_dtensor(*sharded.values(), labels, groups, reference_losses, state.q, state.memory):
        return None
    plain = {"labels": labels, "groups": groups, "reference_losses": reference_losses}
    plain |= {"group_weights": state.q, "memory": state.memory}
    refused |= {"entropy": settings.entropy, "top_k": settings.top_k}
    return vocabulary.part_of(sharded, plain, refused)


def _keys(
    groups: Tensor | None,
    reference_losses: Tensor | None,
    labels: Tensor,
    state: State,
    settings: Settings,
    backend: str,
) -> Keys:
    """Groups and reference losses as users have them -> what belongs to the rows."""
    leading, num_groups, sequence = labels.shape, state.q.shape[0], None
    if settings.level == "sequence":
        if labels.dim() < 2:
            raise ValueError(f"level 'sequence' needs labels [B, T], got {list(labels.shape)}")
        sequences, length = labels.shape[0], labels.shape[1:].numel()
        sequence = torch.arange(sequences, device=labels.device).repeat_interleave(length)
        leading = labels.shape[:1]
    if groups is None:
        if num_groups > 1:
            raise ValueError(f"groups may only be left out for one group, not for {num_groups}")
        flat_groups = labels.new_zeros(leading.numel(), dtype=torch.int64)
    else:
        flat_groups = canonical_groups(groups, leading, num_groups, lambda mask: ops.pack_mask(mask, backend))
    needed, name = settings.objective.needs_reference, type(settings.objective).__name__
    if reference_losses is None:
        if needed:
            raise ValueError(f"{name} needs reference_losses, the reference model's losses, of labels' shape")
        return Keys(flat_groups, sequence, None)
    if not needed:
        raise ValueError(f"reference_losses were given, but {name} does not use them")
    if not reference_losses.is_floating_point():
        raise TypeError(f"reference_losses must be floating point, got {reference_losses.dtype}")
    if reference_losses.shape != labels.shape:
        raise ValueError(
            f"reference_losses must have labels' shape {list(labels.shape)}, got {list(reference_losses.shape)}"
        )
    return Keys(flat_groups, sequence, reference_losses.detach().reshape(-1))


def flat_rows(logits: Tensor, argument: str) -> Tensor:
    """[..., V] -> [N, V] with unit stride along V."""
    if logits.shape[-1] == 0:
        raise ValueError(f"{argument} must have at least one class, got shape {list(logits.shape)}")
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or (rows.shape[1] == 1 and rows.is_contiguous()) else rows.contiguous()


def check_inplace(inplace_backward: bool, rows: Tensor, argument: str) -> None:
    if not inplace_backward:
        return
    owner = rows if rows._base is None else rows._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"inplace_backward would write the gradient over {argument}, which is a leaf: a parameter or an input "
            "of yours and not the result of an operation"
        )
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"inplace_backward needs {argument} whose rows do not share memory")


def check_group_weights(q: Tensor) -> None:
    if q.dim() != 1 or q.shape[0] < 1 or q.dtype != torch.float32 or not q.is_contiguous():
        raise ValueError(
            f"group_weights must be a contiguous float32 tensor [G] with G >= 1, "
            f"got {q.dtype} {list(q.shape)}"
        )


def _check_state(state: State, settings: Settings) -> None:
    q, memory, objective = state.q, state.memory, settings.objective
    check_group_weights(q)
    if memory.shape != (len(objective.memory), q.shape[0]) or memory.dtype != torch.float64:
        raise ValueError(
            f"memory must be {type(objective).__name__}'s initial_memory, float64 "
            f"[{len(objective.memory)}, {q.shape[0]}], got {memory.dtype} {list(memory.shape)}"
        )


def _decoder_rows(x: Tensor, rows: int, dtype: torch.dtype, order: Tensor | None) -> Tensor:
    """``x`` [V, ...] as ``dtype`` in this order, with zeros up to ``rows``."""
    if x.shape[0] == rows and order is None:
        return x.to(dtype)
    return DecoderRows.apply(x, rows, dtype, order)


def _labels_in_order(labels: Tensor, order: Tensor, ignore_index: int) -> Tensor:
    """Labels [N] as places in ``order`` [V]; -100 where they were ignored, -1 where they were out of range."""
    vocabulary = order.shape[0]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(vocabulary, device=order.device))
    inside = (labels >= 0) & (labels < vocabulary)
    moved = torch.where(inside, place.index_select(0, labels.clamp(0, vocabulary - 1)), -1)
    return torch.where(labels == ignore_index, -100, moved)


def _places(capacity: int | float | None, rows: int) -> int:
    """How many of the rows get a place in the linear op's buffer."""
    if capacity is None:
        return rows
    return min(rows, math.ceil(capacity * rows) if isinstance(capacity, float) else capacity)


def check_capacity(capacity: int | float | None) -> int | float | None:
    """As given. ValueError unless it is None, a number of rows, or a share of them in (0, 1] as a float."""
    share = isinstance(capacity, float) and 0 < capacity <= 1
    rows = isinstance(capacity, int) and not isinstance(capacity, bool) and capacity >= 1
    if capacity is not None and not share and not rows:
        raise ValueError(
            f"capacity must be None, a number of rows >= 1, or a share of the rows as a float in (0, 1], got {capacity!r}"
        )
    return capacity


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, cast: bool) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    if hidden.dim() == 0:
        raise ValueError("hidden must have shape [..., D], got a scalar")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [V, {hidden.shape[-1]}] with V >= 1, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not cast and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but hidden is {hidden.dtype}: they must agree")


def check_filter_eps(filter_eps: float | None) -> float:
    """0.0 for None. ValueError unless it is a number in [0, 1)."""
    if filter_eps is None:
        return 0.0
    if isinstance(filter_eps, bool) or not isinstance(filter_eps, (int, float)) or not 0 <= filter_eps < 1:
        raise ValueError(f"filter_eps must be None or a number in [0, 1), got {filter_eps!r}")
    return float(filter_eps)
