"""Launches the Triton kernels: allocates what they write, picks their block sizes. No mathematics here.

Runs on NVIDIA and AMD GPUs, and on CPU tensors under Triton's interpreter, which is for tests: it must be
asked for with TRITON_INTERPRET=1 before Python starts. Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from rd_kernels.backends.registry import Backend
from rd_kernels.backends.triton_gemm import TritonGEMM

__all__ = ["RowConfig", "TritonBackend"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_TRITON = (3, 6)
_OLDEST_NVIDIA = (8, 0)  # compute capability, Triton's own limit


@dataclass(frozen=True)
class RowConfig:
    """How a row kernel is shaped: columns per step, and the warps that share them."""

    block: int
    warps: int


# By architecture, no tuning at run time. 16 columns per thread and step: two 16-byte loads in flight for a
# 2-byte dtype, and few enough registers that several rows are resident on a multiprocessor.
_LONG_ROW = {
    "cuda": RowConfig(block=4096, warps=8),
    "hip": RowConfig(block=2048, warps=4),  # a warp has 64 threads there
}
_SHORT_ROW = RowConfig(block=1024, warps=2)

# Columns -> rows of a tile in the group kernels. Few groups are the rule: they get tall tiles.
_GROUP_TILES = {16: 128, 64: 32}
_CHUNKS = 64  # chunks that group_totals adds in one step


class TritonBackend(TritonGEMM, Backend):
    name = "triton"
    _architecture = "hip" if torch.version.hip else "cuda"

    def missing(self) -> str | None:
        try:
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed; pip install 'triton>=3.6'"
            triton, interpreted = self._kernels["triton"], self._kernels["INTERPRETED"]
        except Exception as error:  # whatever a broken installation raises
            return f"triton cannot be imported: {type(error).__name__}: {error}"
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < _OLDEST_TRITON:
            return f"triton {triton.__version__} is too old; pip install 'triton>=3.6'"
        if not interpreted.value and not torch.cuda.is_available():
            return (
                "torch sees no CUDA or ROCm device; for tests, TRITON_INTERPRET=1 set before Python starts "
                "runs the kernels on the CPU under Triton's (slow) interpreter"
            )
        return None

    def refuses(self, logits: Tensor) -> str | None:
        if logits.dtype not in _DTYPES:
            return f"it serves float32, bfloat16 and float16 logits, not {logits.dtype}"
        if logits.device.type == "cuda":
            if not torch.version.hip and torch.cuda.get_device_capability(logits.device) < _OLDEST_NVIDIA:
                return "Triton needs a GPU of compute capability 8.0 or newer"
            return None
        if logits.device.type != "cpu":
            return f"it serves CUDA and ROCm devices, not {logits.device}"
        if not self._kernels["INTERPRETED"].value:
            return "CPU tensors are served under Triton's interpreter only: TRITON_INTERPRET=1 before Python starts"
        return None

    def row_forward(self, logits, labels, class_weight, label_smoothing, ignore_index):
        rows, vocabulary = logits.shape
        row_loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
        normaliser = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
        outcome = torch.empty(rows, dtype=torch.uint8, device=logits.device)
        smoothing, weight_sum = _smoothing_arguments(class_weight, label_smoothing)
        self._launch(
            "row_forward",
            (rows,),
            (logits, labels, class_weight, weight_sum, row_loss, normaliser, outcome),
            (logits.stride(0), normaliser.stride(0), vocabulary, ignore_index, smoothing),
            **self._row_options(logits),
        )
        return row_loss, normaliser, outcome

    def row_backward(
        self,
        grad_out,
        row_scale,
        logits,
        labels,
        normaliser,
        class_weight,
        label_smoothing,
        ignore_index,
        out=None,
    ):
        rows, vocabulary = logits.shape
        if out is None:
            out = torch.empty((rows, vocabulary), dtype=logits.dtype, device=logits.device)
        smoothing, weight_sum = _smoothing_arguments(class_weight, label_smoothing)
        grad_out_stride = 0 if grad_out is None or grad_out.dim() == 0 else grad_out.stride(0)
        strides = (grad_out_stride, logits.stride(0), normaliser.stride(0), out.stride(0))
        self._launch(
            "row_backward",
            (rows,),
            (grad_out, row_scale, logits, labels, normaliser, class_weight, weight_sum, out),
            (*strides, vocabulary, ignore_index, smoothing),
            SAME_STRIDE=logits.stride(0) == out.stride(0),
            **self._row_options(logits),
        )
        return out

    def group_reduce(self, row_loss, outcome, groups, num_groups):
        rows, device = row_loss.numel(), row_loss.device
        height, width = _group_tile(num_groups)
        chunks, tiles = _ceil_div(rows, height), _ceil_div(num_groups + 2, width)
        partials = torch.empty((chunks, 3, num_groups + 2), dtype=torch.float32, device=device)
        bad = torch.empty((chunks, 2), dtype=torch.int32, device=device)
        self._launch(
            "group_partials",
            (chunks, tiles),
            (row_loss, outcome, groups, partials, bad),
            (rows, num_groups),
            IS_MASK=groups.dtype == torch.bool,
            ROWS=height,
            COLUMNS=width,
        )
        stats = torch.empty((4, num_groups + 2), dtype=torch.float32, device=device)
        status = torch.empty(2, dtype=torch.int64, device=device)
        self._launch(
            "group_totals",
            (tiles, 4),
            (partials, bad, stats, status),
            (chunks, num_groups),
            CHUNKS=_CHUNKS,
            COLUMNS=width,
        )
        return stats, status

    def group_update(self, stats, status, q, objective, step_size, adjustment):
        num_groups = q.numel()
        loss = torch.empty((), dtype=torch.float32, device=stats.device)
        coefficients = torch.empty(num_groups, dtype=torch.float32, device=stats.device)
        block = max(16, _power_of_two(num_groups))
        self._launch(
            "group_update",
            (1,),
            (stats, status, q, adjustment, loss, coefficients),
            (num_groups, float(step_size)),
            num_warps=min(16, max(4, block // 256)),
            OBJECTIVE=objective,
            BLOCK=block,
        )
        return loss, coefficients

    def row_scale(self, coefficients, outcome, groups):
        rows, num_groups = outcome.numel(), coefficients.numel()
        height, width = _group_tile(num_groups)
        scale = torch.empty(rows, dtype=torch.float32, device=coefficients.device)
        self._launch(
            "row_scale",
            (_ceil_div(rows, height),),
            (coefficients, outcome, groups, scale),
            (rows, num_groups),
            IS_MASK=groups.dtype == torch.bool,
            ROWS=height,
            COLUMNS=width,
        )
        return scale

    def _row_options(self, logits: Tensor) -> dict[str, int]:
        """The shape of a row kernel: a step's columns as lanes of 16-byte pieces."""
        config = _SHORT_ROW if logits.shape[1] <= _SHORT_ROW.block else _LONG_ROW[self._architecture]
        wide = 16 // logits.element_size()
        return {"num_warps": config.warps, "LANES": config.block // wide, "WIDE": wide}


def _smoothing_arguments(
    class_weight: Tensor | None, label_smoothing: float
) -> tuple[float | None, Tensor | None]:
    """-> the smoothing and the weights' sum, each None where the kernel shall leave it out."""
    if label_smoothing == 0:
        return None, None
    return float(label_smoothing), None if class_weight is None else class_weight.sum()


def _group_tile(num_groups: int) -> tuple[int, int]:
    """-> rows, columns of a tile for G groups and the columns "ungrouped" and "all"."""
    width = 16 if num_groups + 2 <= 16 else 64
    return _GROUP_TILES[width], width


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
