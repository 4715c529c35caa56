"""The ops that torch sees: schemas and fakes. Everything below this file is invisible to torch.compile.

The forward ops run on detached tensors and change the group weights q (``Tensor(a!)``); :mod:`rd_kernels.autograd`
attaches backwards to what they return.

Ops are declared with ``Library.define`` + ``impl`` and an ``autograd.Function`` outside: a call costs a
fraction of what ``custom_op`` with ``register_autograd`` does, and nothing where nobody watches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rd_kernels import linear
from rd_kernels.backends.interface import BAD_LABEL
from rd_kernels.backends.registry import get
from rd_kernels.gemm import leading_dimension

__all__ = ["raise_if_bad"]

_library = torch.library.Library("rd_kernels", "DEF")
_OBJECTIVE = "Tensor(a!) q, str rule, float rate, Tensor? adjustment"


def _register(schema: str, implementation: Any, fake: Any) -> Any:
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rd_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.rd_kernels, name).default

    def call(tensor: Tensor, *arguments: Any) -> Any:
        return (op if _watched(tensor) else implementation)(tensor, *arguments)

    return call


def _watched(tensor: Tensor) -> bool:
    """Whether anyone but the autograd functions below looks at the op: a compiler, a mode, a transform, a profiler.

    If not, the implementation is called at once: torch's dispatcher takes 15 us to come back to Python.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def _acc(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def raise_if_bad(status: Tensor, num_classes: int, num_groups: int | None) -> None:
    """Raise ValueError if a kernel counted labels or group ids out of range. Reads ``status`` on the host.

    On the CPU this runs inside the op, before anything is returned. On a GPU it would be a synchronisation,
    so the kernels make such a batch harmless instead (loss NaN, zero gradient, group weights kept) and the
    error is raised where the host reads the results anyway: ``report()``.
    """
    bad_labels, bad_groups = status.tolist()
    if bad_labels:
        raise ValueError(f"labels: {bad_labels} of them are neither ignore_index nor in [0, {num_classes})")
    if bad_groups:
        raise ValueError(f"groups: {bad_groups} labelled rows have an id outside [-1, {num_groups})")


def _row_forward(logits, labels, class_weight, label_smoothing, ignore_index, backend, detailed=False):
    details = _empty_details(logits, logits.shape[0], detailed)
    row_loss, normaliser, outcome = get(backend).row_forward(
        logits, labels, class_weight, label_smoothing, ignore_index, details if detailed else None
    )
    if logits.device.type == "cpu" and outcome.numel() and outcome.max() == BAD_LABEL:
        raise_if_bad(torch.stack([(outcome == BAD_LABEL).sum(), torch.tensor(0)]), logits.shape[1], None)
    return row_loss, normaliser, outcome, details


def _row_forward_fake(logits, labels, class_weight, label_smoothing, ignore_index, backend, detailed=False):
    row_loss = logits.new_empty(logits.shape[0], dtype=_acc(logits))
    normaliser = row_loss.new_empty((2, logits.shape[0]))
    details = _empty_details(logits, logits.shape[0], detailed)
    return row_loss, normaliser, torch.empty_like(row_loss, dtype=torch.uint8), details


def _empty_details(logits: Tensor, rows: int, detailed: bool) -> Tensor:
    """[2, N] acc where details are wanted, else [2, 0]."""
    return logits.new_empty((2, rows if detailed else 0), dtype=_acc(logits))


row_forward = _register(
    "row_forward(Tensor logits, Tensor labels, Tensor? class_weight, float label_smoothing, int ignore_index, "
    "str backend, bool detailed=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _row_forward,
    _row_forward_fake,
)


def _row_backward(
    grad_out, row_scale, logits, labels, normaliser, class_weight, label_smoothing, ignore_index, backend
):
    return get(backend).row_backward(
        grad_out, row_scale, logits, labels, normaliser, class_weight, label_smoothing, ignore_index
    )


def _row_backward_fake(
    grad_out, row_scale, logits, labels, normaliser, class_weight, label_smoothing, ignore_index, backend
):
    return logits.new_empty(logits.shape)


row_backward = _register(
    "row_backward(Tensor grad_out, Tensor? row_scale, Tensor logits, Tensor labels, Tensor normaliser, "
    "Tensor? class_weight, float label_smoothing, int ignore_index, str backend) -> Tensor",
    _row_backward,
    _row_backward_fake,
)


def _row_backward_(
    grad_out, row_scale, logits, labels, normaliser, class_weight, label_smoothing, ignore_index, backend
):
    get(backend).row_backward(
        grad_out,
        row_scale,
        logits,
        labels,
        normaliser,
        class_weight,
        label_smoothing,
        ignore_index,
        out=logits,
    )


def _row_backward_fake_(
    grad_out, row_scale, logits, labels, normaliser, class_weight, label_smoothing, ignore_index, backend
):
    return None


row_backward_ = _register(
    "row_backward_(Tensor grad_out, Tensor? row_scale, Tensor(a!) logits, Tensor labels, Tensor normaliser, "
    "Tensor? class_weight, float label_smoothing, int ignore_index, str backend) -> ()",
    _row_backward_,
    _row_backward_fake_,
)


def _group_outputs_fake(logits, q):
    loss = logits.new_empty((), dtype=_acc(logits))
    stats = logits.new_empty((4, q.shape[0] + 2), dtype=_acc(logits))
    status = logits.new_empty((2,), dtype=torch.int64)
    return loss, stats, status, logits.new_empty(logits.shape[0], dtype=_acc(logits))


def _grouped_forward(logits, labels, groups, q, rule, rate, adjustment, ignore_index, backend):
    loss, stats, status, scale, normaliser = get(backend).grouped_forward(
        logits, labels, groups, q, rule, rate, adjustment, ignore_index
    )
    if logits.device.type == "cpu":
        raise_if_bad(status, logits.shape[1], q.numel())
    return loss, stats, status, scale, normaliser


def _grouped_forward_fake(logits, labels, groups, q, rule, rate, adjustment, ignore_index, backend):
    loss, stats, status, scale = _group_outputs_fake(logits, q)
    return loss, stats, status, scale, scale.new_empty((2, logits.shape[0]))


grouped_forward = _register(
    f"grouped_forward(Tensor logits, Tensor labels, Tensor groups, {_OBJECTIVE}, int ignore_index, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grouped_forward,
    _grouped_forward_fake,
)


def _pack_mask(mask, backend):
    return get(backend).pack_mask(mask)


def _pack_mask_fake(mask, backend):
    return mask.new_empty((mask.shape[0], -(-mask.shape[1] // 32)), dtype=torch.int32)


pack_mask = _register("pack_mask(Tensor mask, str backend) -> Tensor", _pack_mask, _pack_mask_fake)


def _group_reduce(row_loss, outcome, groups, num_classes, num_groups, backend):
    stats, status = get(backend).group_reduce(row_loss, outcome, groups, num_groups)
    if row_loss.device.type == "cpu":
        raise_if_bad(status, num_classes, num_groups)
    return stats, status


def _group_reduce_fake(row_loss, outcome, groups, num_classes, num_groups, backend):
    return row_loss.new_empty((4, num_groups + 2)), row_loss.new_empty((2,), dtype=torch.int64)


group_reduce = _register(
    "group_reduce(Tensor row_loss, Tensor outcome, Tensor groups, int num_classes, int num_groups, str backend)"
    " -> (Tensor, Tensor)",
    _group_reduce,
    _group_reduce_fake,
)


def _group_update(stats, status, q, rule, rate, adjustment, backend):
    return get(backend).group_update(stats, status, q, rule, rate, adjustment)


def _group_update_fake(stats, status, q, rule, rate, adjustment, backend):
    return stats.new_empty(()), stats.new_empty(q.shape)


group_update = _register(
    "group_update(Tensor(b!) stats, Tensor status, Tensor(a!) q, str rule, float rate, "
    "Tensor? adjustment, str backend) -> (Tensor, Tensor)",
    _group_update,
    _group_update_fake,
)


def _row_scale(coefficients, outcome, groups, backend):
    return get(backend).row_scale(coefficients, outcome, groups)


def _row_scale_fake(coefficients, outcome, groups, backend):
    return coefficients.new_empty(outcome.shape)


row_scale = _register(
    "row_scale(Tensor coefficients, Tensor outcome, Tensor groups, str backend) -> Tensor",
    _row_scale,
    _row_scale_fake,
)


def _compact(labels, ignore_index, backend):
    index, position, _ = get(backend).compact(labels, ignore_index, labels.numel())
    return index, position


def _compact_fake(labels, ignore_index, backend):
    return torch.empty_like(labels), torch.empty_like(labels)


compact = _register(
    "compact(Tensor labels, int ignore_index, str backend) -> (Tensor, Tensor)", _compact, _compact_fake
)

_LAYOUT = "int num_classes, int ignore_index, SymInt capacity, SymInt stored, SymInt block, bool fused"


def _linear_forward(
    hidden,
    weight,
    bias,
    labels,
    index,
    num_classes,
    ignore_index,
    capacity,
    stored,
    block,
    fused,
    backend,
    detailed=False,
):
    layout = linear.Layout(capacity, stored, block, fused)
    details = _empty_details(hidden, labels.numel(), detailed)
    *results, left = linear.forward(
        get(backend), hidden, weight, bias, labels, index, num_classes, ignore_index, layout,
        details if detailed else None,
    )  # fmt: skip
    return *results, details, *left


def _linear_forward_fake(
    hidden,
    weight,
    bias,
    labels,
    index,
    num_classes,
    ignore_index,
    capacity,
    stored,
    block,
    fused,
    backend,
    detailed=False,
):
    row_loss = hidden.new_empty(labels.shape[0], dtype=_acc(hidden))
    outcome = torch.empty_like(row_loss, dtype=torch.uint8)
    details = _empty_details(hidden, labels.shape[0], detailed)
    results = row_loss, row_loss.new_empty((2, labels.shape[0])), outcome, details
    stride = leading_dimension(weight.shape[0], hidden.element_size())
    unweighted = hidden.new_empty_strided((stored, weight.shape[0]), (stride, 1))
    factor = results[0].new_empty(stored if fused else 0)
    tiles = get(backend).tile_count(weight.shape[0], hidden.device) if fused else 0
    return *results, unweighted, factor, results[0].new_empty((tiles, stored if fused else 0))


linear_forward = _register(
    f"linear_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? index, {_LAYOUT}, "
    "str backend, bool detailed=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_forward,
    _linear_forward_fake,
)


def _linear_backward(
    grad_out,
    row_scale,
    unweighted,
    factor,
    tile_sums,
    normaliser,
    hidden,
    weight,
    bias,
    labels,
    index,
    position,
    num_classes,
    ignore_index,
    capacity,
    stored,
    block,
    fused,
    needs,
    backend,
    filter_eps=0.0,
):
    return linear.backward(
        get(backend), grad_out, row_scale, linear.Stored(unweighted, factor, tile_sums), normaliser, hidden, weight,
        bias, labels, index, position, num_classes, ignore_index, linear.Layout(capacity, stored, block, fused),
        needs, filter_eps,
    )  # fmt: skip


def _linear_backward_fake(
    grad_out,
    row_scale,
    unweighted,
    factor,
    tile_sums,
    normaliser,
    hidden,
    weight,
    bias,
    labels,
    index,
    position,
    num_classes,
    ignore_index,
    capacity,
    stored,
    block,
    fused,
    needs,
    backend,
    filter_eps=0.0,
):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


linear_backward = _register(
    "linear_backward(Tensor grad_out, Tensor row_scale, Tensor unweighted, Tensor factor, Tensor tile_sums, "
    "Tensor normaliser, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? index, "
    f"Tensor? position, {_LAYOUT}, bool[3] needs, str backend, float filter_eps=0.0) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)


def _reduce_and_update(row_loss, outcome, groups, q, rule, rate, adjustment, num_classes, backend):
    loss, stats, status, scale = get(backend).reduce_and_update(
        row_loss, outcome, groups, q, rule, rate, adjustment
    )
    if row_loss.device.type == "cpu":
        raise_if_bad(status, num_classes, q.numel())
    return loss, stats, status, scale


def _reduce_and_update_fake(row_loss, outcome, groups, q, rule, rate, adjustment, num_classes, backend):
    return _group_outputs_fake(row_loss, q)


reduce_and_update = _register(
    f"reduce_and_update(Tensor row_loss, Tensor outcome, Tensor groups, {_OBJECTIVE}, int num_classes, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _reduce_and_update,
    _reduce_and_update_fake,
)
