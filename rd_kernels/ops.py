"""The ops that torch sees: schemas, fakes, autograd. Everything below this file is invisible to torch.compile.

The forward ops run on detached tensors and change the group weights q (``Tensor(a!)``); the autograd
functions only attach a backward to values that are already there. So torch.compile traces the state update
at the top level of the graph, and a second backward through a retained graph finds everything it needs.

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

__all__ = ["DecoderRows", "LinearRowsLoss", "RowsLoss", "raise_if_bad"]

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


def _refuse_other_backwards(grad_out: Tensor) -> None:
    """RuntimeError for a backward that is not the plain one: of second order, or of many gradients at once."""
    if torch.compiler.is_compiling():
        return
    # once_differentiable would let a gradient penalty through silently: it looks at grad_out alone.
    if torch.is_grad_enabled():
        raise RuntimeError("rd_kernels losses have no second derivative: create_graph=True is not supported")
    if torch._C._functorch.is_legacy_batchedtensor(grad_out):
        raise RuntimeError(
            "rd_kernels losses have no batched backward: is_grads_batched=True and vectorize=True are not "
            "supported, use a loop over torch.autograd.grad"
        )


class RowsLoss(torch.autograd.Function):
    """``value`` as it is, with the gradient sum_i grad_out_i r_i d(row_loss_i) / d logits.

    ``value`` is the per-row loss [N], or a scalar that weights rows by r = ``row_scale`` [N] (None: 1), all of it
    divided by ``divisor``.
    ``inplace_backward`` writes the gradient over the logits; their version counter goes up, so autograd refuses
    a later backward that needs them. Under torch.compile, which plans memory itself, it changes nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [N, V]
        value: Tensor,  # [] or [N] acc
        row_scale: Tensor | None,  # [N] acc
        divisor: Tensor | None,  # [] acc or int64
        labels: Tensor,  # [N]
        normaliser: Tensor,  # [2, N] acc
        class_weight: Tensor | None,  # [V] acc
        label_smoothing: float,
        ignore_index: int,
        backend: str,
        inplace_backward: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, row_scale, divisor, labels, normaliser, class_weight)
        ctx.constants = (label_smoothing, ignore_index, backend)
        ctx.inplace_backward = inplace_backward
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_other_backwards(grad_out)
        logits, scale, divisor, labels, normaliser, class_weight = ctx.saved_tensors
        if divisor is not None:
            grad_out = grad_out / divisor
        arguments = (grad_out, scale, logits, labels, normaliser, class_weight, *ctx.constants)
        if ctx.inplace_backward and not torch.compiler.is_compiling():
            row_backward_(*arguments)
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        else:
            gradient = row_backward(*arguments)
        return (gradient, *[None] * 10)


class DecoderRows(torch.autograd.Function):
    """``x`` [V, ...] as ``dtype``, in an order of its rows, with rows of zeros behind them: a cast makes a copy anyway.

    Products with a matrix of 30522 rows are slower than with one of 30528, and their results have rows that begin
    at no multiple of 16 bytes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, dtype: torch.dtype, order: Tensor | None) -> Tensor:
        ctx.save_for_backward(order)
        ctx.rows, ctx.dtype = x.shape[0], x.dtype
        padded = torch.empty((rows, *x.shape[1:]), dtype=dtype, device=x.device)
        padded[: ctx.rows].copy_(x if order is None else x.index_select(0, order))
        padded[ctx.rows :].zero_()
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        gradient = gradient[: ctx.rows].to(ctx.dtype)
        if order is not None:
            gradient = torch.empty_like(gradient).index_copy_(0, order, gradient)
        return gradient, None, None, None


class LinearRowsLoss(torch.autograd.Function):
    """The scalar ``value`` as it is, with gradients for hidden, weight and bias folded in late (design: 3 GEMMs)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [Vp, D]
        bias: Tensor | None,  # [Vp]
        value: Tensor,  # [] acc
        row_scale: Tensor,  # [N] acc
        unweighted: Tensor,  # linear.Stored
        factor: Tensor,
        tile_sums: Tensor,
        normaliser: Tensor,  # [2, N] acc
        labels: Tensor,  # [N]
        index: Tensor | None,  # [N] compact's
        position: Tensor | None,  # [N] compact's
        backend: str,
        filter_eps: float,
        *layout: Any,  # num_classes, ignore_index and the fields of linear.Layout
    ) -> Tensor:
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            row_scale,
            unweighted,
            factor,
            tile_sums,
            normaliser,
            labels,
            index,
            position,
        )
        ctx.layout, ctx.backend, ctx.filter_eps = layout, backend, filter_eps
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_other_backwards(grad_out)
        hidden, weight, bias, *saved = ctx.saved_tensors
        row_scale, unweighted, factor, tile_sums, normaliser, labels, index, position = saved
        needs = list(ctx.needs_input_grad[:3])
        gradients = linear_backward(
            grad_out, row_scale, unweighted, factor, tile_sums, normaliser, hidden, weight, bias, labels, index,
            position, *ctx.layout, needs, ctx.backend, ctx.filter_eps,
        )  # fmt: skip
        picked = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return (*picked, *[None] * (11 + len(ctx.layout)))
