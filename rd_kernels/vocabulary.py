"""Decoders that tensor parallelism shards over the vocabulary: each rank has some columns of the logits.

As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) the softmax is put together from what the ranks
know of their own columns: with the largest logit m_k and l_k = log sum exp(z - m_k) of rank k,

    m = max_k m_k,   S = sum_k exp((m_k - m) + l_k),   row loss = log S + (m - z_y),

in two messages a forward and none in the backward of the logits. All ranks of the mesh have the same labels and
groups, so they compute the same statistics and the same group weights.

How it is called is what torch's ``loss_parallel`` does: DTensors carry the mesh. Logits are ``Shard(-1)`` on a 1-D mesh,
or the linear op's hidden states ``Replicate()``, weight and bias ``Shard(0)``; labels and groups are plain tensors,
labels with their place in the whole vocabulary. Where the mesh is all ranks, ``process_group`` stays None; else it is
the data-parallel group, whose ranks have other batches. Any other DTensor raises. Under torch.compile ...

Letters: N rows, V vocabulary, Vk this rank's part of it, D hidden, G groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rd_kernels import distributed, ops
from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS
from rd_kernels.backends.registry import select
from rd_kernels.groups import canonical_groups
from rd_kernels.objectives import Objective

__all__ = ["Part", "linear_loss", "logits_loss", "part_of_decoder", "part_of_logits"]

_NO_LABEL = -100  # in labels as the kernels get them: places in a part are not negative


class Part(NamedTuple):
    """This rank's part of the vocabulary: entries ``start`` to ``start + width`` of ``total``."""

    mesh: Any  # 1-D DeviceMesh
    start: int
    width: int
    total: int


def part_of_logits(logits: Tensor, inplace_backward: bool, **plain: Tensor) -> Part | None:
    """None if all tensors are plain ones. Raises TypeError or ValueError, naming it, for a DTensor not served."""
    if not _any_sharded(logits, *plain.values()):
        return None
    _refuse_dtensors(**plain)
    if inplace_backward:
        raise ValueError(
            "inplace_backward is not served for logits that are a DTensor: autograd could not see that their memory "
            "was overwritten"
        )
    from torch.distributed.tensor import Shard

    return _part("logits", logits, Shard(logits.dim() - 1), f"Shard({logits.dim() - 1})")


def part_of_decoder(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any], **plain: Tensor
) -> Part | None:
    """As ``part_of_logits``. ``options``: what a sharded decoder does not serve, by name; None or 0 where not wanted."""
    if not _any_sharded(hidden, weight, bias, *plain.values()):
        return None
    _refuse_dtensors(**plain)
    from torch.distributed.tensor import Replicate, Shard

    if not _any_sharded(hidden):
        raise TypeError(
            "hidden is a plain tensor, but weight or bias is a DTensor: does each rank have its own hidden states "
            "(FSDP), or all the same (tensor parallelism)? For FSDP call the loss in the wrapped module's forward, "
            "where parameters are whole, or pass weight.full_tensor(); for tensor parallelism pass hidden as a DTensor "
            "Replicate() on weight's mesh"
        )
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not _any_sharded(tensor):
            raise TypeError(
                f"{argument} is a plain tensor, but hidden is a DTensor: pass {argument} as a DTensor Shard(0) on hidden's "
                "mesh, or hidden.to_local() with the whole decoder"
            )
    part = _part("weight", weight, Shard(0), "Shard(0)")
    _part("hidden", hidden, Replicate(), "Replicate()", part.mesh)
    if bias is not None:
        _part("bias", bias, Shard(0), "Shard(0)", part.mesh)
    for option, value in options.items():
        if value:
            raise ValueError(f"{option} is not served where weight is sharded over the vocabulary, got {value!r}")
    return part


def logits_loss(
    part: Part,
    logits: Tensor,  # DTensor [..., V]
    labels: Tensor,  # [N]
    groups: Tensor,  # as a user gives them
    q: Tensor,  # [G] float32, updated in place
    objective: Objective,
    adjustment: Tensor | None,  # [G]
    ignore_index: int,
    process_group: Any,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The logits op -> the first fields of ``grouped.Grouped``."""
    rows = _local("logits", logits, part.width, -1).reshape(labels.numel(), part.width).contiguous()
    name = select(backend, rows, q.shape[0])
    groups = canonical_groups(groups, logits.shape[:-1], q.shape[0], partial(ops.pack_mask, backend=name))
    rule = (q, objective, adjustment, ignore_index, process_group, name)
    return _loss(part, rows, labels, groups, *rule, overwrite=False)


def linear_loss(
    part: Part,
    hidden: Tensor,  # DTensor [..., D], of autocast's dtype
    weight: Tensor,  # DTensor [V, D]
    bias: Tensor | None,  # DTensor [V]
    labels: Tensor,  # [N]
    groups: Tensor,  # as a user gives them
    q: Tensor,  # [G] float32, updated in place
    objective: Objective,
    adjustment: Tensor | None,  # [G]
    ignore_index: int,
    process_group: Any,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The linear op with 3 GEMMs: its logits are kept until the backward, which writes their gradient over them.

    hidden's gradient is that of this rank's columns: a DTensor ``Partial()``, which DTensor adds up where it is needed.
    """
    from torch.distributed.tensor import Partial

    rows = hidden.to_local(grad_placements=[Partial()]).reshape(labels.numel(), hidden.shape[-1])  # type: ignore[attr-defined]
    weight = _local("weight", weight, part.width, 0).to(rows.dtype)
    bias = None if bias is None else _local("bias", bias, part.width, 0).to(rows.dtype)
    name = select(backend, rows, q.shape[0])
    groups = canonical_groups(groups, hidden.shape[:-1], q.shape[0], partial(ops.pack_mask, backend=name))
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        labelled = (labels != ignore_index).nonzero()[:, 0]  # values may decide about shapes here
        rows, labels, groups = (tensor.index_select(0, labelled) for tensor in (rows, labels, groups))
    with torch.autocast(rows.device.type, enabled=False):
        logits = torch.nn.functional.linear(rows, weight, bias)
    rule = (q, objective, adjustment, ignore_index, process_group, name)
    return _loss(part, logits, labels, groups, *rule, overwrite=True)


def _loss(
    part: Part,
    rows: Tensor,  # [N, Vk]
    labels: Tensor,  # [N]
    groups: Tensor,  # canonical
    q: Tensor,  # [G]
    objective: Objective,
    adjustment: Tensor | None,  # [G]
    ignore_index: int,
    process_group: Any,
    backend: str,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    ranks = _data_parallel_ranks(process_group, part.mesh)
    ignored = labels == ignore_index
    counted = ~ignored & (labels >= 0) & (labels < part.total)
    here = counted & (labels >= part.start) & (labels < part.start + part.width)
    # The kernels want a label in every row that counts. Where it is elsewhere: 0, which the backward corrects.
    places = torch.where(here, labels - part.start, torch.where(counted, 0, _NO_LABEL))
    row_loss, normaliser, outcome = _row_forward(part, rows.detach(), places, ignored, counted, here, backend)
    loss, stats, status, scale = distributed.reduce_and_update(
        row_loss, outcome, groups, q, objective, adjustment, part.total, process_group, ranks, backend
    )
    loss = _PartLoss.apply(rows, loss, scale, places, counted & ~here, normaliser, backend, overwrite)
    return loss, stats, status, part.total


def _row_forward(
    part: Part,
    rows: Tensor,  # [N, Vk]
    places: Tensor,  # [N] labels as the kernels get them
    ignored: Tensor,  # [N] bool
    counted: Tensor,  # [N] bool: not ignored, and a label of the vocabulary
    here: Tensor,  # [N] bool: counted, and the label in this part
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``Backend.row_forward`` returns, of the whole rows: the same on all ranks."""
    if part.width == 0:
        rows = rows.new_full((rows.shape[0], 1), -torch.inf)
    _, (own_largest, own_log_sum), own_outcome = ops.row_forward(
        rows, places, None, 0.0, _NO_LABEL, backend
    )
    group = part.mesh.get_group()
    largest = own_largest.clone()
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    share = ((own_largest - largest) + own_log_sum).exp()
    # Where the largest is infinite the kernels' log sum is NaN, but a part of -inf alone adds nothing to the others.
    # Nor does a maximum show a NaN, but a row with one is no hit.
    share = torch.where(own_largest.isinf() & (own_outcome == HIT), own_largest.exp(), share)
    label_logit = rows.gather(1, places.clamp(min=0)[:, None])[:, 0].to(share.dtype)
    message = torch.stack([share, torch.where(here, label_logit, 0)])  # exact: one rank has the label
    torch.distributed.all_reduce(message, group=group)
    total, label_logit = message
    largest = torch.where(total.isnan(), torch.nan, largest)
    log_sum = total.log() + (largest - largest)  # NaN where the largest is infinite, as in one process
    row_loss = log_sum + (largest - label_logit)
    outcome = torch.where(label_logit >= largest, HIT, MISS)
    outcome = torch.where(counted, outcome, torch.where(ignored, IGNORED, BAD_LABEL)).to(torch.uint8)

    def filled(values: Tensor) -> Tensor:
        return torch.where(counted, values, torch.where(ignored, 0, torch.nan))

    return filled(row_loss), filled(torch.stack([largest, log_sum])), outcome


class _PartLoss(torch.autograd.Function):
    """``ops.RowsLoss`` for this rank's logits: ``value`` as it is, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,  # [N, Vk]
        value: Tensor,  # [] acc
        row_scale: Tensor,  # [N] acc
        places: Tensor,  # [N] labels as the kernels get them
        elsewhere: Tensor,  # [N] bool: the label is on another rank, ``places`` says 0
        normaliser: Tensor,  # [2, N] acc, of the whole rows
        backend: str,
        overwrite: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, row_scale, places, elsewhere, normaliser)
        ctx.backend, ctx.overwrite = backend, overwrite
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ops._refuse_other_backwards(grad_out)
        rows, row_scale, places, elsewhere, normaliser = ctx.saved_tensors
        if rows.shape[1] == 0:
            return (torch.zeros_like(rows), *[None] * 7)
        scale = grad_out * row_scale
        # Without the label's 1, which the kernels subtract; to add it back in 16 bits would not be exact.
        first = scale * ((rows[:, 0].to(scale.dtype) - normaliser[0]) - normaliser[1]).exp()
        first = torch.where(scale == 0, 0, first).to(rows.dtype)
        arguments = (grad_out, row_scale, rows, places, normaliser, None, 0.0, _NO_LABEL, ctx.backend)
        if ctx.overwrite:
            ops.row_backward_(*arguments)
            torch.autograd.graph.increment_version(rows)
            gradient = rows.detach()
        else:
            gradient = ops.row_backward(*arguments)
        gradient[:, 0] = torch.where(elsewhere, first, gradient[:, 0])
        return (gradient, *[None] * 7)


def _any_sharded(*tensors: Tensor | None) -> bool:
    unusual = [tensor for tensor in tensors if type(tensor) not in (Tensor, torch.nn.Parameter, type(None))]
    if not unusual or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # takes a second, so only for what may be one

    return any(isinstance(tensor, DTensor) for tensor in unusual)


def _refuse_dtensors(**tensors: Any) -> None:
    for argument, tensor in tensors.items():
        if _any_sharded(tensor):
            raise TypeError(
                f"{argument} must be a plain tensor, the same on all ranks of the mesh, got a DTensor with placements "
                f"{tensor.placements}: pass {argument}.full_tensor()"
            )


def _part(argument: str, tensor: Any, placement: Any, allowed: str, mesh: Any = None) -> Part:
    """What this rank has of ``tensor``, with the vocabulary along the dimension of a ``Shard``. ValueError for another
    placement, another mesh than ``mesh``, or a rank outside of it."""
    given = tensor.device_mesh
    if given.ndim != 1 or tuple(tensor.placements) != (placement,):
        raise ValueError(
            f"{argument} is a DTensor with placements {tensor.placements} on a mesh of shape {tuple(given.shape)}; "
            f"allowed is {allowed} on a mesh of one dimension: redistribute it, or pass a plain tensor"
        )
    if mesh is not None and given != mesh:
        raise ValueError(f"{argument} is on {given}, but weight is on {mesh}: they must be the same mesh")
    if given.get_coordinate() is None:
        raise ValueError(f"{argument} is on {given}, of which rank {torch.distributed.get_rank()} is no part")
    total = tensor.shape[placement.dim] if placement.is_shard() else 0
    largest = -(-total // given.size())  # as torch.chunk cuts
    start = min(largest * given.get_local_rank(), total)
    return Part(given, start, min(largest, total - start), total)


def _local(argument: str, tensor: Any, width: int, dim: int) -> Tensor:
    local = tensor.to_local()
    if local.shape[dim] != width:
        raise ValueError(
            f"{argument} has {local.shape[dim]} entries of the vocabulary on this rank, but a DTensor of shape "
            f"{list(tensor.shape)} has {width} there: make it with distribute_tensor"
        )
    return local


def _data_parallel_ranks(process_group: Any, mesh: Any) -> int | None:
    """The ranks with other batches. None for one batch, which is right where the mesh is all ranks."""
    if process_group is None and mesh.size() == torch.distributed.get_world_size():
        return None
    ranks = distributed.world_size(process_group)
    same_batch = set(torch.distributed.get_process_group_ranks(mesh.get_group()))
    if len(same_batch.intersection(torch.distributed.get_process_group_ranks(process_group))) > 1:
        raise ValueError(
            f"process_group must hold ranks with different batches (data parallelism), but it has several of the ranks "
            f"{sorted(same_batch)} of the mesh, which share one batch. Where the mesh is all ranks, leave it None"
        )
    return ranks
