"""Launches the linear op's Triton kernels for 16-bit operands: three GEMMs, row weights folded in late.

    row_loss, normaliser, outcome, factor, tile_sums = exponentials(...)   # E into ``out``
    scale = row_scale * grad_out * factor, 0 where row_scale * grad_out is 0
    live = live_tiles(tile_sums, labels, scale, out, eps)
    d hidden = grad_hidden(out, scale, weight, live)
    d weight = grad_weight(out, *scaled_hidden(hidden, scale), live)

No value is read back by the host. What the kernels compute is told in triton_gemm_kernels. Letters: N rows,
V vocabulary (Vp with its padding), D hidden, T tiles of the vocabulary, R blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rd_kernels.backends.triton_configs import nearest
from rd_kernels.backends.triton_launcher import Launcher

__all__ = ["GEMM_TILES", "GEMMTiles", "TritonGEMM"]


@dataclass(frozen=True)
class GEMMTiles:
    """How the GEMMs are cut: E into tiles of rows x columns, sums into steps of ``depth``, which divides both."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    processors: int = 108  # where a product has fewer tiles, each is split along its sum
    group: int = 16  # blocks of rows that share a block of the other operand while it is in L2


# By architecture, no tuning at run time.
GEMM_TILES = {
    "sm_80": GEMMTiles(),
    "sm_90": GEMMTiles(columns=256, stages=4, processors=132),
    "sm_100": GEMMTiles(processors=148),
    "gfx942": GEMMTiles(stages=2, processors=304),
}

# E's exponents, powers of 2. A power of two as step makes a change of k exact. The sum must fit the dtype as well.
_RANGE = {
    torch.bfloat16: {"STEP": 64, "TOP": 64, "ROOM": 96},
    torch.float16: {"STEP": 8, "TOP": 14, "ROOM": 15},
}
# A tile's mass is known but for the rounding of E at the labels, 2^-7 of it, so a little less than allowed is used.
_SURELY = 1 - 2**-6
# Masses are compared as whole numbers of C / 2^52: the sums of these do not depend on their order.
_UNITS = 2.0**52
_MOST_SPLITS = 8
_SHORT = 16  # the depth where operands are not aligned: their elements then pass through registers one by one


class TritonGEMM(Launcher):
    """The GEMMs of the linear op; a part of the Triton backend."""

    def fusable(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16)

    def gemm_tiles(self, device: torch.device) -> GEMMTiles:
        """``rows`` and ``columns`` are those of the tiles that ``tile_sums`` and ``live`` are about."""
        return GEMM_TILES[nearest(self._architecture_of(device), GEMM_TILES)]

    def tile_count(self, vocabulary: int, device: torch.device) -> int:
        return _ceil_div(vocabulary, self.gemm_tiles(device).columns)

    def exponentials(
        self,
        hidden: Tensor,  # [N, D] 16-bit, unit stride along D
        weight: Tensor,  # [Vp, D] of the same dtype, unit stride along D
        bias: Tensor | None,  # [Vp]
        labels: Tensor,  # [N] int64
        ignore_index: int,
        num_classes: int,  # V <= Vp; entries from there on are padding
        out: Tensor,  # [N, Vp] of the same dtype, contiguous, overwritten with E
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> ``row_loss`` [N] acc, ``normaliser`` [2, N] acc, ``outcome`` [N] uint8 as of row_forward, ``factor`` [N]
        acc and ``tile_sums`` [T, N] acc.

        diag(factor) E = softmax - onehot, at the label exactly. A row that does not count: factor 0, E 0. One whose
        loss is NaN: factor NaN, E 0. ``tile_sums``, on E's scale, add up to 1 / factor but for the rounding of E at the
        label; there they count exp(z_label), not E.
        """
        (rows, depth), padded = hidden.shape, weight.shape[0]
        device, tiles, limits = hidden.device, self.gemm_tiles(hidden.device), _RANGE[hidden.dtype]
        count = _ceil_div(padded, tiles.columns)
        step = tiles.depth if _aligned(depth, hidden.stride(0), weight.stride(0)) else _SHORT

        def acc(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        label_logit, steps, row_loss, factor = acc(rows), acc(rows), acc(rows), acc(rows)
        normaliser, tile_max, tile_sums = acc(2, rows), acc(count, rows), acc(count, rows)
        outcome = torch.empty(rows, dtype=torch.uint8, device=device)
        operands = (hidden, weight, bias, labels)
        strides = (hidden.stride(0), weight.stride(0))
        self._launch(
            "label_logits",
            (_ceil_div(rows, 8),),
            (*operands, label_logit),
            (rows, num_classes, depth, *strides, ignore_index),
            ROWS=8,
            DEPTH=128,
        )
        self._launch(
            "exponentials",
            (_ceil_div(rows, tiles.rows) * count,),
            (*operands, label_logit, out, tile_max, tile_sums),
            (rows, num_classes, padded, depth, *strides, ignore_index),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=step,
            WHOLE=depth % step == 0,
            GROUP=tiles.group,
            STEP=limits["STEP"],
            TOP=limits["TOP"],
        )
        self._launch(
            "finish_rows",
            (_ceil_div(rows, 16),),
            (labels, label_logit, tile_max, tile_sums, out, row_loss, normaliser, outcome, factor, steps),
            (rows, count, num_classes, padded, ignore_index),
            ROWS=16,
            TILES=64,
            **limits,
        )
        self._launch(
            "settle_tiles",
            (_ceil_div(rows, 128), count),
            (labels, label_logit, steps, factor, tile_max, tile_sums, out),
            (rows, padded),
            ROWS=128,
            COLUMNS=tiles.columns,
            CHUNK=16,
            STEP=limits["STEP"],
            TOP=limits["TOP"],
        )
        return row_loss, normaliser, outcome, factor, tile_sums

    def filtered_gradients(
        self,
        exponentials: Tensor,  # [N, Vp]
        tile_sums: Tensor,  # [T, N] acc
        labels: Tensor,  # [N]
        scale: Tensor,  # [N] acc: what multiplies E
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [Vp, D]
        filter_eps: float,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        live = self.live_tiles(tile_sums, labels, scale, exponentials, filter_eps)
        return (
            self.grad_hidden(exponentials, scale, weight, live) if needs[0] else None,
            self.grad_weight(exponentials, *self.scaled_hidden(hidden, scale), live) if needs[1] else None,
        )

    def live_tiles(
        self,
        tile_sums: Tensor,  # [T, N] acc
        labels: Tensor,  # [N] int64
        scale: Tensor,  # [N] acc: what multiplies E
        exponentials: Tensor,  # [N, Vp]
        eps: float,
    ) -> Tensor:
        """-> [R, T] uint8: 0 for the lightest tiles of E, which together weigh at most ``eps`` C.

        An entry weighs |scale_i E_ij|, a tile what its entries do, and C is the weight of all. So the errors' norms
        add up to at most eps C max_j |W_j| over the rows of d hidden, eps C max_i |H_i| over those of d weight.
        Weights that are not finite: every tile is live.
        """
        tiles = self.gemm_tiles(scale.device)
        count, rows = tile_sums.shape
        if rows == 0:
            return tile_sums.new_empty((0, count), dtype=torch.uint8)
        vocabulary = exponentials.shape[1]
        at_label = exponentials.gather(1, labels.clamp(0, vocabulary - 1)[:, None])[:, 0].float().abs()
        # |E| at the label is the sum of the row's other entries; those in its own tile are what other tiles lack.
        own = torch.arange(count, device=labels.device)[:, None] == (labels // tiles.columns)[None, :]
        elsewhere = tile_sums.masked_fill(own, 0).sum(0)
        mass = torch.where(own, at_label + (at_label - elsewhere).clamp_min(0), tile_sums) * scale.abs()
        mass = mass.masked_fill(scale == 0, 0)  # whatever the row holds
        blocks = _ceil_div(rows, tiles.rows)
        mass = torch.nn.functional.pad(mass, (0, blocks * tiles.rows - rows))
        mass = mass.view(count, blocks, tiles.rows).sum(2, dtype=torch.float64).t()

        total = mass.sum()
        units = (mass / total.clamp_min(torch.finfo(torch.float64).tiny) * _UNITS).ceil()
        ascending = units.long().flatten().sort().values
        light = ascending.cumsum(0) <= int(eps * _SURELY * _UNITS)
        lightest_live = ascending.masked_fill(light, torch.iinfo(torch.int64).max).amin()
        return ((units.long() >= lightest_live) | ~total.isfinite()).to(torch.uint8).contiguous()

    def grad_hidden(
        self,
        exponentials: Tensor,  # [N, Vp]
        scale: Tensor,  # [N] acc
        weight: Tensor,  # [Vp, D]
        live: Tensor,  # [R, T] uint8
    ) -> Tensor:
        """-> diag(scale) E weight [N, D] over the live tiles."""
        tiles = self.gemm_tiles(scale.device)
        return self._live_product(exponentials, weight, scale, None, live, tiles.rows, tiles.columns)

    def scaled_hidden(self, hidden: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """-> diag(scale) hidden / unit [N, D] in hidden's dtype, and unit [] acc, a power of two.

        ``scale`` may be as small as 2^-15 / N in float16, which knows no such numbers at full precision.
        """
        largest = torch.cat((scale.abs(), scale.new_full((1,), 2.0**-100))).amax()  # never 0
        unit = torch.exp2(largest.log2().floor() - 4)
        column = (scale / unit)[:, None]
        return torch.where(column == 0, 0, hidden * column).to(hidden.dtype), unit

    def grad_weight(
        self,
        exponentials: Tensor,  # [N, Vp]
        scaled_hidden: Tensor,  # [N, D]
        unit: Tensor | None,  # [] acc, None: 1
        live: Tensor,  # [R, T] uint8
    ) -> Tensor:
        """-> unit E^T scaled_hidden [Vp, D] over the live tiles."""
        tiles = self.gemm_tiles(exponentials.device)
        return self._live_product(
            exponentials.t(), scaled_hidden, None, unit, live.t(), tiles.columns, tiles.rows
        )

    def _live_product(
        self,
        a: Tensor,  # [M, K]
        b: Tensor,  # [K, D]
        factor: Tensor | None,  # [M] acc
        unit: Tensor | None,  # [] acc
        live: Tensor,  # [blocks of M, blocks of K]
        height: int,  # of a block of M
        span: int,  # of a block of K
    ) -> Tensor:
        tiles = self.gemm_tiles(b.device)
        (rows, inner), depth = a.shape, b.shape[1]
        aligned = _aligned(depth, *a.stride(), b.stride(0))
        # As large a tile as the forward's, unless much of it would lie beyond D.
        width = span if depth % span == 0 else min(span, height, tiles.rows)
        programs = _ceil_div(rows, height) * _ceil_div(depth, width)
        splits = max(1, min(_MOST_SPLITS, tiles.processors // max(programs, 1)))
        whole = splits == 1
        out = torch.empty((splits, rows, depth), dtype=b.dtype if whole else torch.float32, device=b.device)
        live_blocks = live.sort(dim=1, descending=True, stable=True).indices.int().contiguous()
        self._launch(
            "live_product",
            (programs, splits),
            (
                *(a, b, factor if whole else None, unit if whole else None),
                *(live_blocks, live.sum(1, dtype=torch.int32), out),
            ),
            (rows, inner, depth, live.shape[1], *a.stride(), b.stride(0)),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            HEIGHT=height,
            WIDTH=width,
            DEPTH=tiles.depth if aligned else _SHORT,
            SPAN=span,
            GROUP=tiles.group,
        )
        if whole:
            return out[0]
        product = out.sum(0)
        if factor is not None:
            product *= factor[:, None]
        if unit is not None:
            product *= unit
        return product.to(b.dtype)


def _aligned(*sizes: int) -> bool:
    """Whether tiles of these sizes and strides can be copied in pieces of 16 bytes, as Triton finds out."""
    return all(size == 1 or size % 16 == 0 for size in sizes)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
