"""Decoders that tensor parallelism shards over the vocabulary: each rank has some columns of the logits.

As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) the softmax is put together from what the ranks
know of their own columns: with the largest logit m_k and l_k = log sum exp(z - m_k) of rank k,

    m = max_k m_k,   S = sum_k exp((m_k - m) + l_k),   row loss = log S + (m - z_y),

in two messages a forward, and one for hidden's gradient. All ranks of the mesh compute the same statistics and the same
group weights.

It is called as torch's ``loss_parallel`` is: DTensors carry the mesh. ``logits`` are ``Shard(-1)`` on a 1-D mesh; or
``hidden`` is ``Replicate()`` on it, ``weight`` and ``bias`` ``Shard(0)``, and hidden's gradient comes as ``Partial()``,
which DTensor adds up where it is needed. ``labels``, with their place in the whole vocabulary, and ``groups`` are plain
tensors, the same on all ranks of the mesh. Where the mesh is all ranks, ``process_group`` is None; else it is the
data-parallel group. What this does not serve raises; nothing is redistributed silently. torch.compile makes one graph of
it, ``fullgraph=True`` included; otherwise the linear op's backward runs once, and a second one raises.

Letters: N rows, V vocabulary, Vk this rank's part of it, D hidden, G groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rd_kernels import distributed, ops
from rd_kernels.autograd import gradient_of_rows, refuse_other_backwards
from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS
from rd_kernels.reduction import Given, Keys, Reduced, Settings, State, reduce_rows

__all__ = ["Part", "any_dtensor", "grouped_loss", "part_of"]

_NO_LABEL = -100  # in labels as the kernels get them: places in a part are not negative
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


class Part(NamedTuple):
    """This rank's part of the vocabulary: entries ``start`` to ``start + width`` of ``total``."""

    mesh: Any  # 1-D DeviceMesh
    start: int
    width: int
    total: int


def any_dtensor(*tensors: Tensor | None) -> bool:
    """Whether anything here is for this file. It is asked at every call of the losses, so it must cost next to nothing."""
    unusual = [tensor for tensor in tensors if type(tensor) not in _PLAIN]
    if not unusual or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # takes a second, so only for what may be one

    return any(isinstance(tensor, DTensor) for tensor in unusual)


def part_of(sharded: dict[str, Tensor | None], plain: dict[str, Any], options: dict[str, Any]) -> Part:
    """This rank's part of the vocabulary, for arguments of which at least one is a DTensor.

    ``sharded``: logits, or hidden, weight and bias; ``plain``: what must be the same on all ranks of the mesh;
    ``options``: what is not served here, None, False or 0 where not asked for; all by the names of the arguments.
    Raises TypeError or ValueError, naming the argument, for anything else.
    """
    for name, tensor in plain.items():
        if any_dtensor(tensor):
            raise TypeError(
                f"{name} must be a plain tensor, the same on all ranks of the mesh, got a DTensor with placements "
                f"{tensor.placements}: pass {name}.full_tensor()"
            )
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} is not served where the vocabulary is sharded, got {value!r}")
    parts = {name: _part(name, tensor) for name, tensor in sharded.items() if tensor is not None}
    part = parts["logits" if "logits" in parts else "weight"]
    for name, other in parts.items():
        if other.mesh != part.mesh:
            raise ValueError(f"{name} is on {other.mesh}, but weight is on {part.mesh}: it must be one mesh")
    return part


def grouped_loss(
    part: Part,
    x: Any,  # DTensor: logits [N, V]; with a decoder hidden [N, D], of autocast's dtype
    decoder: tuple[Any, Any] | None,  # DTensors: weight [V, D] and bias, [V] or None
    labels: Tensor,  # [N]
    keys: Keys,
    state: State,
    settings: Settings,
    backend: str,
    given: Given | None,
) -> tuple[Tensor, Reduced]:
    """Both ops. With a decoder: 3 GEMMs, and its logits are kept until the backward writes their gradient over them."""
    from torch.distributed.tensor import Partial

    settings = replace(settings, process_group=_data_parallel(settings.process_group, part.mesh))
    if decoder is None:
        rows = _own("logits", x, part, 1).contiguous()
    else:
        rows = x.to_local(grad_placements=[Partial()])
        weight = _own("weight", decoder[0], part, 0).to(rows.dtype)
        bias = None if decoder[1] is None else _own("bias", decoder[1], part, 0).to(rows.dtype)
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            labelled = (labels != settings.ignore_index).nonzero()[:, 0]  # here shapes may depend on values
            rows, labels = rows.index_select(0, labelled), labels.index_select(0, labelled)
            keys = keys.of_rows(labelled)
        with torch.autocast(rows.device.type, enabled=False):
            rows = torch.nn.functional.linear(rows, weight, bias)
    ignored = labels == settings.ignore_index
    counted = ~ignored & (labels >= 0) & (labels < part.total)
    here = counted & (labels >= part.start) & (labels < part.start + part.width)
    # The kernels want a label in every row that counts. Where it is elsewhere: 0, which the backward corrects.
    places = torch.where(here, labels - part.start, torch.where(counted, 0, _NO_LABEL))
    row_loss, normaliser, outcome = _row_forward(part, rows.detach(), places, ignored, counted, here, backend)
    no_details = row_loss.new_empty((2, 0))
    reduced = reduce_rows(row_loss, outcome, no_details, keys, part.total, state, settings, backend, given)
    saved = (reduced.row_scale, places, counted & ~here, normaliser)
    return _PartLoss.apply(rows, reduced.loss, *saved, backend, decoder is not None), reduced


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
    _, (own_largest, own_log_sum), own_outcome, _ = ops.row_forward(
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
    """:class:`rd_kernels.autograd.RowsLoss` for this rank's logits: ``value`` as it is, with their gradient."""

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
        refuse_other_backwards(grad_out)
        rows, row_scale, places, elsewhere, normaliser = ctx.saved_tensors
        if rows.shape[1] == 0:
            return (torch.zeros_like(rows), *[None] * 7)
        scale = grad_out * row_scale
        # Without the label's 1, which the kernels subtract; to add it back in 16 bits would not be exact.
        first = scale * ((rows[:, 0].to(scale.dtype) - normaliser[0]) - normaliser[1]).exp()
        first = torch.where(scale == 0, 0, first).to(rows.dtype)
        gradient = gradient_of_rows(
            ctx.overwrite, grad_out, row_scale, rows, places, normaliser, None, 0.0, _NO_LABEL, ctx.backend
        )
        gradient[:, 0] = torch.where(elsewhere, first, gradient[:, 0])
        return (gradient, *[None] * 7)


def _part(name: str, tensor: Any) -> Part:
    """This rank's part of the dimension that is sharded."""
    from torch.distributed.tensor import Replicate, Shard

    placement: Any = {"logits": Shard(tensor.dim() - 1), "hidden": Replicate()}.get(name, Shard(0))
    if not any_dtensor(tensor):
        raise TypeError(
            f"{name} is a plain tensor beside others that are DTensors; allowed is a DTensor {placement!r} on their mesh, "
            "or plain tensors throughout. A decoder that is sharded by FSDP is whole in the forward of its module, and "
            "weight.full_tensor() makes it so; for tensor parallelism hidden is a DTensor Replicate()"
        )
    mesh = tensor.device_mesh
    if mesh.ndim != 1 or tuple(tensor.placements) != (placement,):
        raise ValueError(
            f"{name} is a DTensor with placements {tensor.placements} on a mesh of shape {tuple(mesh.shape)}; allowed is "
            f"({placement!r},) on a mesh of one dimension: redistribute it, or pass a plain tensor"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name} is on {mesh}, of which rank {torch.distributed.get_rank()} is no part")
    total = tensor.shape[placement.dim] if placement.is_shard() else 0
    most = -(-total // mesh.size())  # as torch.chunk cuts
    start = min(most * mesh.get_local_rank(), total)
    return Part(mesh, start, min(most, total - start), total)


def _own(name: str, tensor: Any, part: Part, dim: int) -> Tensor:
    """What this rank has. ValueError if that is not its part: a DTensor made of unequal pieces."""
    own = tensor.to_local()
    if own.shape[dim] != part.width:
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} has {own.shape[dim]} entries of the vocabulary on this rank, where "
            f"distribute_tensor puts {part.width}"
        )
    return own


def _data_parallel(process_group: Any, mesh: Any) -> Any:
    """The group whose ranks have other batches; ValueError if it has ranks of the mesh in it."""
    if process_group is None and mesh.size() == torch.distributed.get_world_size():
        return distributed.SAME_BATCH
    distributed.world_size(process_group)
    same_batch = set(torch.distributed.get_process_group_ranks(mesh.get_group()))
    if len(same_batch.intersection(torch.distributed.get_process_group_ranks(process_group))) > 1:
        raise ValueError(
            f"process_group must hold ranks with different batches (data parallelism), but it has several of the ranks "
            f"{sorted(same_batch)} of the mesh, which share one batch. Where the mesh is all ranks, leave it None"
        )
    return process_group
