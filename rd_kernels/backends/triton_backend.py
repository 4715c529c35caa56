"""Launches the Triton kernels: allocates what they write, picks their block sizes. No mathematics here.

Runs on NVIDIA and AMD GPUs, and on CPU tensors under Triton's interpreter, which is for tests: it must be
asked for with TRITON_INTERPRET=1 before Python starts. Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from rd_kernels.backends.interface import Backend, Counters
from rd_kernels.backends.triton_configs import Config, choose
from rd_kernels.backends.triton_gemm import TritonGEMM
from rd_kernels.backends.triton_linear import TritonLinear
from rd_kernels.backends.triton_sparse import TritonSparse

__all__ = ["TritonBackend"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_TRITON = (3, 6)
_OLDEST_NVIDIA = (8, 0)  # compute capability, Triton's own limit

# The most groups that a forward takes along: they and "ungrouped" and "all" are one tile of the last program. More
# are summed faster by programs of their own, a tile each.
FUSED_GROUPS = 62
# The rows that one program sums: grows with N so that there are at most _CHUNKS sums of chunks for the last program.
_CHUNK_ROWS, _CHUNKS = 128, 256
_LONGEST_WITH_DETAILS = 32768  # a row in registers, of which more than its exponentials are needed at once
_UPDATE_BLOCK = 256  # groups that a rule treats at a time


class TritonBackend(TritonGEMM, TritonLinear, TritonSparse, Backend):
    name = "triton"
    on_gpu = True

    def __init__(self) -> None:
        self._counters = Counters()

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

    def row_forward(self, logits, labels, class_weight, label_smoothing, ignore_index, details=None):
        rows, vocabulary = logits.shape
        row_loss, normaliser, outcome = _row_results(rows, logits.device)
        smoothing, weight_sum = _smoothing_arguments(class_weight, label_smoothing)
        self._launch(
            "row_forward",
            (rows,),
            (logits, labels, class_weight, weight_sum, row_loss, normaliser, outcome, details),
            (logits.stride(0), normaliser.stride(0), _stride(details), vocabulary, ignore_index, smoothing),
            **self._row_options("row_forward", logits),
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
            **self._row_options("row_backward", logits),
        )
        return out

    def softmax_minus_onehot_(self, logits, labels, ignore_index, details=None):
        rows, vocabulary = logits.shape
        config = self._config("softmax_minus_onehot", logits)
        too_long = details is not None and vocabulary > _LONGEST_WITH_DETAILS
        if config is None or too_long:  # for a program's registers
            return super().softmax_minus_onehot_(logits, labels, ignore_index, details)
        row_loss, normaliser, outcome = _row_results(rows, logits.device)
        self._launch(
            "softmax_minus_onehot",
            (rows,),
            (logits, labels, row_loss, normaliser, outcome, details),
            (logits.stride(0), normaliser.stride(0), _stride(details), vocabulary, ignore_index),
            **_options(config),
        )
        return row_loss, normaliser, outcome

    def grouped_forward(self, logits, labels, groups, q, rule, rate, adjustment, ignore_index):
        (rows, vocabulary), num_groups, device = logits.shape, q.numel(), logits.device
        # Triton's barrier does not wait for stores on AMD (the machine code has no s_waitcnt vmcnt before it): a
        # program that announces itself there may do so before all its threads' stores are under way.
        amd = self._architecture_of(device).startswith("gfx")
        if rows == 0 or num_groups > FUSED_GROUPS or amd:
            return super().grouped_forward(logits, labels, groups, q, rule, rate, adjustment, ignore_index)
        row_loss, normaliser, outcome = _row_results(rows, device)
        chunk_rows, partials, bad = _chunk_sums(rows, num_groups, device)
        scratch = (partials, bad, self._counters.zeros(1 + len(bad), device))
        stats, status, loss, coefficients = results = _group_results(num_groups, device)
        strides = (logits.stride(0), normaliser.stride(0))
        self._launch(
            "grouped_forward",
            (rows,),
            (logits, labels, groups, q, adjustment, row_loss, normaliser, outcome, *scratch, *results),
            (*strides, vocabulary, ignore_index, chunk_rows, num_groups, _width(groups), float(rate)),
            RULE=rule,
            BITS=groups.dtype == torch.int32,
            BLOCK=_update_block(num_groups),
            **_group_tile(num_groups),
            **self._row_options("row_forward", logits),
        )
        return loss, stats, status, self.row_scale(coefficients, outcome, groups), normaliser

    def pack_mask(self, mask):
        rows, num_groups = mask.shape
        packed = torch.empty((rows, _ceil_div(num_groups, 32)), dtype=torch.int32, device=mask.device)
        scalars = (packed.numel(), num_groups, packed.shape[1])
        self._launch("pack_mask", (_ceil_div(packed.numel(), 32),), (mask, packed), scalars, WORDS=32)
        return packed

    def group_reduce(self, row_loss, outcome, groups, num_groups):
        rows, device = row_loss.numel(), row_loss.device
        tile = _group_tile(num_groups)
        tiles = _ceil_div(num_groups + 2, tile["COLUMNS"])
        chunk_rows, partials, bad = _chunk_sums(rows, num_groups, device)
        self._launch(
            "group_partials",
            (len(bad), tiles),
            (row_loss, outcome, groups, partials, bad),
            (chunk_rows, rows, num_groups, _width(groups)),
            BITS=groups.dtype == torch.int32,
            ROWS=tile["ROWS"],
            COLUMNS=tile["COLUMNS"],
        )
        stats, status, _, _ = _group_results(num_groups, device)
        self._launch(
            "group_totals",
            (tiles, 4),
            (partials, bad, stats, status),
            (len(bad), num_groups),
            CHUNKS=tile["CHUNKS"],
            COLUMNS=tile["COLUMNS"],
        )
        return stats, status

    def group_update(self, stats, status, q, rule, rate, adjustment):
        _, _, loss, coefficients = _group_results(q.numel(), q.device)
        self._launch(
            "group_update",
            (1,),
            (stats, status, q, adjustment, loss, coefficients),
            (q.numel(), float(rate)),
            RULE=rule,
            BLOCK=_update_block(q.numel()),
        )
        return loss, coefficients

    def row_scale(self, coefficients, outcome, groups):
        rows, num_groups = outcome.numel(), coefficients.numel()
        tile = _group_tile(num_groups)
        scale = torch.empty(rows, dtype=torch.float32, device=coefficients.device)
        self._launch(
            "row_scale",
            (_ceil_div(rows, tile["ROWS"]),),
            (coefficients, outcome, groups, scale),
            (rows, num_groups, _width(groups)),
            BITS=groups.dtype == torch.int32,
            ROWS=tile["ROWS"],
            COLUMNS=tile["COLUMNS"],
        )
        return scale

    def _config(self, kernel: str, logits: Tensor) -> Config | None:
        architecture = self._architecture_of(logits.device)
        return choose(kernel, architecture, logits.element_size(), logits.shape[1])

    def _row_options(self, kernel: str, logits: Tensor) -> dict[str, int]:
        config = self._config(kernel, logits)
        assert config is not None, "the table serves every vocabulary"
        return _options(config)


def _options(config: Config) -> dict[str, int]:
    """The shape of a row kernel: columns as lanes of 16-byte pieces."""
    wide = 16 // config.itemsize
    return {"num_warps": config.warps, "LANES": config.block // wide, "WIDE": wide}


def _row_results(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """-> row_loss [N], normaliser [2, N], outcome [N], not written"""
    return (
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty((2, rows), dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.uint8, device=device),
    )


def _stride(details: Tensor | None) -> int:
    return 0 if details is None else details.stride(0)


def _group_results(num_groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> stats [4, G+2], status [2], loss [], coefficients [G], not written"""
    return (
        torch.empty((4, num_groups + 2), dtype=torch.float32, device=device),
        torch.empty(2, dtype=torch.int64, device=device),
        torch.empty((), dtype=torch.float32, device=device),
        torch.empty(num_groups, dtype=torch.float32, device=device),
    )


def _width(groups: Tensor) -> int:
    """How many ids, or words of bits, a row has."""
    return 1 if groups.dim() == 1 else groups.shape[1]


def _chunk_sums(rows: int, num_groups: int, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """-> rows of a chunk, and where its sums go: partials [chunks, 3, G+2], bad [chunks, 2]"""
    chunk_rows = max(_CHUNK_ROWS, _power_of_two(_ceil_div(rows, _CHUNKS)))
    chunks = _ceil_div(rows, chunk_rows)
    partials = torch.empty((chunks, 3, num_groups + 2), dtype=torch.float32, device=device)
    return chunk_rows, partials, torch.empty((chunks, 2), dtype=torch.int32, device=device)


def _smoothing_arguments(
    class_weight: Tensor | None, label_smoothing: float
) -> tuple[float | None, Tensor | None]:
    """-> the smoothing and the weights' sum, each None where the kernel shall leave it out."""
    if label_smoothing == 0:
        return None, None
    return float(label_smoothing), None if class_weight is None else class_weight.sum()


def _group_tile(num_groups: int) -> dict[str, int]:
    """A tile of the group kernels: rows or chunks by columns, which are the G groups, "ungrouped" and "all"."""
    if num_groups + 2 <= 16:  # few groups are the rule: they get tall tiles
        return {"ROWS": 32, "CHUNKS": 32, "COLUMNS": 16}
    return {"ROWS": 16, "CHUNKS": 16, "COLUMNS": 64}


def _update_block(num_groups: int) -> int:
    return min(_UPDATE_BLOCK, max(16, _power_of_two(num_groups)))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
