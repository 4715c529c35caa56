"""The losses as stateless functions. Letters: N rows, V vocabulary, D hidden, G groups."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rd_kernels import distributed, ops
from rd_kernels.backends.registry import linear_form, select
from rd_kernels.gemm import leading_dimension
from rd_kernels.groups import canonical_groups, canonical_labels, check_same_device
from rd_kernels.linear import default_memory_budget, mean_logit_order, plan
from rd_kernels.objectives import GroupDRO, Objective

__all__ = ["cross_entropy", "group_dro_cross_entropy", "linear_group_dro_cross_entropy"]

_REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy` on class indices: the same numbers, shapes and dtypes.

    Args:
        input: logits [V], [N, V] or [N, V, d1, ...], floating point. Accumulated in float32 (float64 for
            float64) whatever their dtype.
        target: class indices [], [N] or [N, d1, ...], an integer dtype.
        weight: [V], one factor per class.
        ignore_index: targets with this value count neither in the loss nor in its mean.
        reduction: "mean" (weighted mean over the targets that count; NaN if none does, as in torch), "sum",
            "none".
        label_smoothing: in [0, 1].
        inplace_backward: as in :func:`group_dro_cross_entropy`.
        backend: "auto" or the name of a backend.

    Returns: a scalar, or the losses in target's shape; in input's dtype (float32 under autocast).

    Raises:
        ValueError: a shape, device, reduction or label_smoothing outside the above; on the CPU also a target
            outside [0, V). On a GPU such a row's loss is NaN, its gradient zero: no synchronisation.
        TypeError: input is not floating point, or target not integer (class probabilities are not supported).
        RuntimeError: a backend named explicitly cannot serve the call.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have shape [V], [N, V] or [N, V, d1, ...], got a scalar")
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices of an integer dtype, got {target.dtype}; "
            "class probabilities are not supported"
        )
    logits = input if input.dim() <= 2 else input.movedim(1, -1)
    labels = canonical_labels(target, logits.shape[:-1], "target")
    check_same_device("input", input.device, target=target, weight=weight)
    rows = _rows(logits, "input")
    _check_inplace(inplace_backward, rows, "input")
    acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if weight is not None:
        if weight.shape != rows.shape[1:]:
            raise ValueError(f"weight must have shape [{rows.shape[1]}], got {list(weight.shape)}")
        weight = weight.detach().to(acc).contiguous()
    name = select(backend, rows)
    row_loss, normaliser, _ = ops.row_forward(
        rows.detach(), labels, weight, label_smoothing, ignore_index, name
    )
    value, divisor = row_loss, None
    if reduction != "none":
        value = row_loss.sum()
    if reduction == "mean":
        counted = labels != ignore_index
        divisor = counted.sum() if weight is None else _total_weight(weight, labels, counted)
        value = value / divisor
    result = ops.RowsLoss.apply(
        rows, value, None, divisor, labels, normaliser, weight, label_smoothing, ignore_index, name,
        inplace_backward,
    )  # fmt: skip
    if reduction == "none":
        result = result.reshape(target.shape)
    # torch computes this loss in float32 under autocast and in the input's dtype elsewhere.
    return result if torch.is_autocast_enabled(input.device.type) else result.to(input.dtype)


class Grouped(NamedTuple):
    """A grouped loss and what the report needs: ``stats`` [4, G+2], ``status`` [2], V, and the linear op's places for
    labelled rows where there are fewer of them than rows."""

    loss: Tensor
    stats: Tensor
    status: Tensor
    num_classes: int
    places: int | None = None


def group_dro_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor,
    group_weights: Tensor,
    objective: Objective = GroupDRO(),  # noqa: B008 - frozen
    *,
    ignore_index: int = -100,
    process_group: Any = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy reduced by groups and weighted by the objective, in one differentiable op.

    loss = sum_g c_g S_g, where S_g sums the row losses of group g and c_g is the objective's coefficient,
    held constant in the gradient (Sagawa et al. 2020, arXiv 1911.08731, for :class:`GroupDRO`).

    Args:
        logits: [..., V], floating point.
        labels: [...], class indices of an integer dtype; ``ignore_index`` marks rows without a label.
        groups: ids [...], or ids [B] with B = labels.shape[0] for all tokens of a sequence, or a bool mask
            [..., G] or [B, G] where groups overlap. Id -1: in no group; such a row gets coefficient 0.
        group_weights: q [G], float32, on the simplex; UPDATED IN PLACE before it weights this batch.
        objective: :class:`ERM`, :class:`GroupDRO`.
        process_group: sums and counts are all-reduced over it before the objective, and the loss is
            multiplied by its size, to undo DDP's mean.
        inplace_backward: the backward writes the gradient over the logits, which saves their size in memory.
            For logits that nothing reads after the backward: autograd raises RuntimeError if another
            operation's backward still needs them, but cannot know what your own code reads.
        backend: "auto" or the name of a backend.

    Returns: a scalar, float32 (float64 for float64 logits). If no labelled row is in any group it is 0 with
    zero gradient, and q stays. If a group's mean loss is not finite the loss is not finite, and q stays.

    Raises:
        ValueError: shapes that do not fit, V = 0, tensors on different devices; inplace_backward with logits
            that are a leaf or share memory between rows; on the CPU also labels or group ids out of range. On a
            GPU these give loss NaN, zero gradient and an unchanged q without a synchronisation; ``report()`` of
            the module raises.
        TypeError: a dtype that is not what is said above (fractional ids, for instance).
        RuntimeError: a backend named explicitly cannot serve the call; several ranks without a process group.
    """
    adjustment = _adjustment(objective, group_weights)
    return grouped_loss(
        logits, labels, groups, group_weights, objective, adjustment, ignore_index, process_group,
        inplace_backward, backend,
    ).loss  # fmt: skip


def linear_group_dro_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    groups: Tensor,
    group_weights: Tensor,
    objective: Objective = GroupDRO(),  # noqa: B008 - frozen
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    process_group: Any = None,
    backend: str = "auto",
    filter_eps: float | None = None,
    capacity: int | float | None = None,
) -> Tensor:
    """:func:`group_dro_cross_entropy` of ``hidden @ weight.T + bias``, exact with 3 GEMMs.

    On a CPU rows without a label take no part in the GEMMs; elsewhere ``capacity`` leaves them out.

    Args:
        hidden: [..., D]. weight: [V, D]. bias: [V] or None. One floating dtype (autocast casts all three).
        labels, groups, group_weights, objective, ignore_index, process_group, backend: as there.
        memory_budget: bytes for what grows with the rows beside inputs and gradients. Rows that do not fit
            are computed again in the backward: 4 - f GEMMs where a fraction f fits. None: 1 GiB on a CPU, an
            eighth of a GPU's memory and at least 1 GiB.
        capacity: for batches of which few rows have a label, on a GPU or under torch.compile: only labelled rows
            take part in the GEMMs, in a buffer of so many rows (an int), or of this share of the rows (a float).
            The host never learns how many there are. More of them than places are no error and lose nothing:
            those beyond are computed by kernels of their own, without a buffer and slower, which end at once where
            there are none; the module's ``report()`` warns of them. None: a place for every row. On a CPU, elsewhere, the labelled rows are simply picked.
        filter_eps: None or 0: exact gradients. Above 0 the backward leaves out what is lightest in
            C = sum_ij |r_i U_ij|, with U = softmax - onehot and r_i the row's weight in the gradient, and holds at
            most this share of it: rows and vocabulary entries on a CPU; on a GPU tiles of the two, the vocabulary
            sorted by mean logit (bfloat16 and float16; needs triton; nothing waits for the device). Then the
            errors' norms, added up over the rows of hidden's gradient, are at most filter_eps C max_j |weight_j|,
            and over the rows of weight's gradient at most filter_eps C max_i |hidden_i|; C <= 2 sum_i |r_i|, which
            is at most 2 |grad_out| where no row is in two groups. The loss, the group weights and bias's gradient
            stay exact. Rows that are recomputed, and those beyond a capacity, stay whole on a GPU.

    Raises: as there, and ValueError for shapes of hidden, weight and bias that do not fit, a budget below
    one row, a capacity below one row, a filter_eps outside [0, 1), or one above 0 on a GPU
    for another dtype or without triton.
    """
    adjustment = _adjustment(objective, group_weights)
    return linear_grouped_loss(
        hidden, weight, bias, labels, groups, group_weights, objective, adjustment, ignore_index,
        memory_budget, process_group, backend, filter_eps, check_capacity(capacity),
    ).loss  # fmt: skip


def grouped_loss(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor,
    q: Tensor,
    objective: Objective,
    adjustment: Tensor | None,
    ignore_index: int,
    process_group: Any,
    inplace_backward: bool,
    backend: str,
) -> Grouped:
    """The logits op with its statistics; arguments as in :func:`group_dro_cross_entropy`."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits must have shape [..., V], got a scalar")
    _check_group_weights(q)
    check_same_device("logits", logits.device, labels=labels, groups=groups, group_weights=q)
    leading = logits.shape[:-1]
    flat_labels = canonical_labels(labels, leading)
    flat_groups = canonical_groups(groups, leading, q.shape[0])
    rows = _rows(logits, "logits")
    _check_inplace(inplace_backward, rows, "logits")
    name = select(backend, rows, q.shape[0])
    rule = (objective.rule, objective.rate, adjustment)
    ranks = distributed.world_size(process_group)
    if ranks is None:
        loss, stats, status, scale, normaliser = ops.grouped_forward(
            rows.detach(), flat_labels, flat_groups, q, *rule, ignore_index, name
        )
    else:
        row_loss, normaliser, outcome = ops.row_forward(
            rows.detach(), flat_labels, None, 0.0, ignore_index, name
        )
        loss, stats, status, scale = distributed.reduce_and_update(
            row_loss, outcome, flat_groups, q, rule, rows.shape[1], process_group, ranks, name
        )
    loss = ops.RowsLoss.apply(
        rows, loss, scale, None, flat_labels, normaliser, None, 0.0, ignore_index, name, inplace_backward
    )
    return Grouped(loss, stats, status, rows.shape[1])


def linear_grouped_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    groups: Tensor,
    q: Tensor,
    objective: Objective,
    adjustment: Tensor | None,
    ignore_index: int,
    memory_budget: int | None,
    process_group: Any,
    backend: str,
    filter_eps: float | None = None,
    capacity: int | float | None = None,
) -> Grouped:
    """The linear op with its statistics; arguments as in :func:`linear_group_dro_cross_entropy`."""
    device = hidden.device
    epsilon = check_filter_eps(filter_eps)
    _check_group_weights(q)
    check_same_device(
        "hidden", device, weight=weight, bias=bias, labels=labels, groups=groups, group_weights=q
    )
    if cast := torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    _check_linear(hidden, weight, bias, cast)
    num_classes = weight.shape[0]
    leading = hidden.shape[:-1]
    flat_labels = canonical_labels(labels, leading)
    flat_groups = canonical_groups(groups, leading, q.shape[0])
    rows = hidden.reshape(-1, hidden.shape[-1])
    name = select(backend, rows, q.shape[0])
    on_gpu, fusable, preferred = linear_form(name, rows.dtype)
    if epsilon > 0 and not (fusable if on_gpu else device.type == "cpu"):
        raise ValueError(
            f"filter_eps = {filter_eps} is served on a CPU, and on a GPU for bfloat16 and float16 where triton is "
            f"installed, not by {name!r} for {rows.dtype} on {device}"
        )
    filtered_tiles, order = on_gpu and epsilon > 0, None
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
            rows, flat_labels, flat_groups = (
                tensor.index_select(0, labelled) for tensor in (rows, flat_labels, flat_groups)
            )
        places = rows.shape[0]
    elif (places := _places(capacity, rows.shape[0])) < rows.shape[0]:
        index, position = ops.compact(flat_labels, ignore_index, name)
        picked = index.clamp(min=0)
        flat_labels = torch.where(index < 0, ignore_index, flat_labels.index_select(0, picked))
        flat_groups = flat_groups.index_select(0, picked)
    budget = default_memory_budget(device) if memory_budget is None else memory_budget
    stored, block = plan(places, num_classes, rows.shape[1], rows.element_size(), budget)
    layout = (num_classes, ignore_index, places, stored, block, filtered_tiles or (fusable and preferred))
    row_loss, normaliser, outcome, *kept = ops.linear_forward(
        rows.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        flat_labels,
        index,
        *layout,
        name,
    )
    rule = (objective.rule, objective.rate, adjustment)
    ranks = distributed.world_size(process_group)
    if ranks is None:
        loss, stats, status, scale = ops.reduce_and_update(
            row_loss, outcome, flat_groups, q, *rule, num_classes, name
        )
    else:
        loss, stats, status, scale = distributed.reduce_and_update(
            row_loss, outcome, flat_groups, q, rule, num_classes, process_group, ranks, name
        )
    loss = ops.LinearRowsLoss.apply(
        rows,
        weight,
        bias,
        loss,
        scale,
        *kept,
        normaliser,
        flat_labels,
        index,
        position,
        name,
        epsilon,
        *layout,
    )
    return Grouped(loss, stats, status, num_classes, None if index is None else places)


def _rows(logits: Tensor, argument: str) -> Tensor:
    """[..., V] -> [N, V] with unit stride along V."""
    if logits.shape[-1] == 0:
        raise ValueError(f"{argument} must have at least one class, got shape {list(logits.shape)}")
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or (rows.shape[1] == 1 and rows.is_contiguous()) else rows.contiguous()


def _check_inplace(inplace_backward: bool, rows: Tensor, argument: str) -> None:
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


def _check_group_weights(q: Tensor) -> None:
    if q.dim() != 1 or q.shape[0] < 1 or q.dtype != torch.float32 or not q.is_contiguous():
        raise ValueError(
            f"group_weights must be a contiguous float32 tensor [G] with G >= 1, "
            f"got {q.dtype} {list(q.shape)}"
        )


def _decoder_rows(x: Tensor, rows: int, dtype: torch.dtype, order: Tensor | None) -> Tensor:
    """``x`` [V, ...] as ``dtype`` in this order, with zeros up to ``rows``."""
    if x.shape[0] == rows and order is None:
        return x.to(dtype)
    return ops.DecoderRows.apply(x, rows, dtype, order)


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


def _adjustment(objective: Objective, q: Tensor) -> Tensor | None:
    adjustment = objective.adjustment_for(q.shape[0])
    return None if adjustment is None else adjustment.to(q.device)


def _total_weight(weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Sum of the class weights of the labels that count; labels out of range add nothing."""
    counted = counted & (labels >= 0) & (labels < weight.shape[0])
    return torch.where(counted, weight[torch.where(counted, labels, 0)], 0).sum()
