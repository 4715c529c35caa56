"""The losses as stateless functions. Letters: N rows, V vocabulary, D hidden, G groups."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rd_kernels import ops
from rd_kernels.autograd import RowsLoss
from rd_kernels.backends.registry import select
from rd_kernels.grouped import (
    check_capacity,
    check_group_weights,
    check_inplace,
    flat_rows,
    grouped_loss,
    linear_grouped_loss,
)
from rd_kernels.groups import canonical_labels, check_same_device
from rd_kernels.objectives import GroupDRO, Objective
from rd_kernels.reduction import Settings, State
from rd_kernels.vocabulary import any_dtensor

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
    if any_dtensor(input, target, weight):
        raise TypeError(
            "input, target and weight must be plain tensors, got a DTensor: for logits that are sharded over the "
            "vocabulary use GroupDROLoss(1, ERM()), or torch.distributed.tensor.parallel.loss_parallel"
        )
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
    rows = flat_rows(logits, "input")
    check_inplace(inplace_backward, rows, "input")
    acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if weight is not None:
        if weight.shape != rows.shape[1:]:
            raise ValueError(f"weight must have shape [{rows.shape[1]}], got {list(weight.shape)}")
        weight = weight.detach().to(acc).contiguous()
    name = select(backend, rows)
    row_loss, normaliser, *_ = ops.row_forward(
        rows.detach(), labels, weight, label_smoothing, ignore_index, name
    )
    value, divisor = row_loss, None
    if reduction != "none":
        value = row_loss.sum()
    if reduction == "mean":
        counted = labels != ignore_index
        divisor = counted.sum() if weight is None else _total_weight(weight, labels, counted)
        value = value / divisor
    result = RowsLoss.apply(
        rows, value, None, divisor, labels, normaliser, weight, label_smoothing, ignore_index, name,
        inplace_backward,
    )  # fmt: skip
    if reduction == "none":
        result = result.reshape(target.shape)
    # torch computes this loss in float32 under autocast and in the input's dtype elsewhere.
    return result if torch.is_autocast_enabled(input.device.type) else result.to(input.dtype)


def group_dro_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor | None,
    group_weights: Tensor,
    objective: Objective = GroupDRO(),  # noqa: B008 - frozen
    *,
    ignore_index: int = -100,
    level: Literal["token", "sequence"] = "token",
    reference_losses: Tensor | None = None,
    memory: Tensor | None = None,
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
        groups: ids [...], or ids [B] with B = labels.shape[0] for all tokens of a sequence. Where groups overlap: a
            bool mask [..., G] or [B, G], or lists of K ids [..., K] or [B, 1, K], for many groups of which a row is
            in few. Id -1: no group; a row in none gets coefficient 0. None where G = 1: all rows are in it.
        group_weights: q [G], float32, on the simplex; UPDATED IN PLACE before it weights this batch.
        objective: one of docs/objectives.md, or one of your own.
        level: what a group's mean loss is the mean of. "token": of its rows. "sequence": of its sequences' means over
            their labelled tokens, each sequence counting the same; labels are [B, T], groups ids [B], lists [B, K] or
            a mask [B, G]. A sequence without a labelled token does not count.
        reference_losses: the losses of a reference model, of labels' shape, floating point; for :class:`DoReMi`.
        memory: what the objective remembers beside q, float64 [M, G], at first its ``initial_memory(G)``; UPDATED IN
            PLACE. None for an objective that remembers nothing.
        process_group: sums and counts are all-reduced over it before the objective, and the gradients are
            multiplied by its size, to undo DDP's mean (docs/distributed.md). Where the vocabulary is sharded over
            ranks (DTensors, see :mod:`rd_kernels.vocabulary`) it is the data-parallel group, or None.
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
    settings = Settings(objective, ignore_index, level, process_group=process_group)
    state = _state(objective, group_weights, memory)
    return grouped_loss(
        logits, labels, groups, reference_losses, state, settings, inplace_backward, backend
    ).loss


def linear_group_dro_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    groups: Tensor | None,
    group_weights: Tensor,
    objective: Objective = GroupDRO(),  # noqa: B008 - frozen
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    level: Literal["token", "sequence"] = "token",
    reference_losses: Tensor | None = None,
    memory: Tensor | None = None,
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
        labels, groups, group_weights, objective, ignore_index, level, reference_losses, memory, process_group, backend:
            as there.
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
    settings = Settings(objective, ignore_index, level, process_group=process_group)
    state = _state(objective, group_weights, memory)
    return linear_grouped_loss(
        hidden, weight, bias, labels, groups, reference_losses, state, settings, memory_budget, backend,
        filter_eps, check_capacity(capacity),
    ).loss  # fmt: skip


def _state(objective: Objective, q: Tensor, memory: Tensor | None) -> State:
    check_group_weights(q)
    objective.check(q.numel())
    if memory is None:
        if objective.memory:
            raise ValueError(
                f"{type(objective).__name__} remembers {', '.join(objective.memory)}: pass "
                "memory=objective.initial_memory(num_groups) at first, and the same tensor from then on"
            )
        memory = objective.initial_memory(q.numel()).to(q.device)
    adjustment = objective.adjustment_for(q.numel())
    return State(q, memory, None if adjustment is None else adjustment.to(q.device))


def _total_weight(weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Sum of the class weights of the labels that count; labels out of range add nothing."""
    counted = counted & (labels >= 0) & (labels < weight.shape[0])
    return torch.where(counted, weight[torch.where(counted, labels, 0)], 0).sum()
