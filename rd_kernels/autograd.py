"""Backwards for the values of the ops: they attach a gradient to what is there already and compute nothing before it is
asked for.

So torch.compile traces the update of the state at the top level of the graph, and a second backward through a retained
graph finds everything it needs. Letters: N rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rd_kernels import ops

__all__ = ["DecoderRows", "LinearRowsLoss", "RowsLoss", "gradient_of_rows", "refuse_other_backwards"]


def refuse_other_backwards(grad_out: Tensor) -> None:
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


def gradient_of_rows(
    overwrite: bool, grad_out: Tensor, row_scale: Tensor | None, logits: Tensor, *others: Any
) -> Tensor:
    """``Backend.row_backward``, written over the logits or not; a compiler plans memory itself."""
    if not overwrite or torch.compiler.is_compiling():
        return ops.row_backward(grad_out, row_scale, logits, *others)
    ops.row_backward_(grad_out, row_scale, logits, *others)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


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
        refuse_other_backwards(grad_out)
        logits, scale, divisor, labels, normaliser, class_weight = ctx.saved_tensors
        if divisor is not None:
            grad_out = grad_out / divisor
        gradient = gradient_of_rows(
            ctx.inplace_backward, grad_out, scale, logits, labels, normaliser, class_weight, *ctx.constants
        )
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
        refuse_other_backwards(grad_out)
        hidden, weight, bias, *saved = ctx.saved_tensors
        row_scale, unweighted, factor, tile_sums, normaliser, labels, index, position = saved
        needs = list(ctx.needs_input_grad[:3])
        gradients = ops.linear_backward(
            grad_out, row_scale, unweighted, factor, tile_sums, normaliser, hidden, weight, bias, labels, index,
            position, *ctx.layout, needs, ctx.backend, ctx.filter_eps,
        )  # fmt: skip
        picked = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return (*picked, *[None] * (11 + len(ctx.layout)))
