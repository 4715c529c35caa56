"""Launches what Triton does between the linear op's matrix products. N rows, V vocabulary, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from rd_kernels.backends.interface import with_unit_stride
from rd_kernels.backends.triton_launcher import Launcher

__all__ = ["TritonLinear"]

_SCALED = {"ROWS": 4, "COLUMNS": 512}  # a 16-byte piece for each of 128 threads, twice for 2-byte dtypes
_CHUNK = 128  # rows of a program of column_partials; their sums are 1/64 of what a 2-byte dtype has to read
_SUMMED = {"ROWS": 4, "COLUMNS": 1024}


class TritonLinear(Launcher):
    """The part of TritonBackend that serves the linear op."""

    def scale_rows(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        x = with_unit_stride(x)
        rows, width = x.shape
        self._launch(
            "scale_rows",
            (-(-rows // _SCALED["ROWS"]), -(-width // _SCALED["COLUMNS"])),
            (x, scale, out),
            (x.stride(0), out.stride(0), rows, width),
            **_SCALED,
        )
        return out

    def add_column_sums(self, x: Tensor, scale: Tensor, total: Tensor) -> None:
        rows, columns = x.shape
        chunks, tiles = -(-rows // _CHUNK), -(-columns // _SUMMED["COLUMNS"])
        partials = torch.empty((chunks, columns), dtype=torch.float32, device=x.device)
        self._launch(
            "column_partials",
            (tiles, chunks),
            (x, scale, partials),
            (x.stride(0), rows, columns),
            CHUNK=_CHUNK,
            **_SUMMED,
        )
        self._launch(
            "column_totals", (-(-columns // 256),), (partials, total), (chunks, columns), COLUMNS=256
        )
