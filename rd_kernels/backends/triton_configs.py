"""How the Triton kernels over the rows are shaped on each architecture: a table, no tuning at run time.

``python -m tools.tune_triton`` measures on a GPU and rewrites the table, which is the end of this file. An
architecture without entries for a kernel takes those of the nearest older one of its vendor, so the table holds only
where a choice is known or needed to differ. Letters: V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TABLE", "Config", "architecture_of", "choose", "nearest"]


@dataclass(frozen=True)
class Config:
    """Of one kernel, for elements of ``itemsize`` bytes and V up to ``vocabulary`` (None: any V)."""

    kernel: str  # row_forward (and grouped_forward), row_backward, softmax_minus_onehot
    architecture: str  # sm_80, gfx942, ...
    itemsize: int
    vocabulary: int | None
    block: int  # columns in a step of the loop; softmax_minus_onehot, which has none: in the row
    warps: int
    # {gpu, driver, torch, triton, date, seconds} of the measurement that chose this; None: a guess, from the
    # registers that the compiler needs for it.
    measured: tuple[tuple[str, Any], ...] | None = None


@functools.cache
def architecture_of(device: torch.device) -> str:
    """A GPU's name in the table; the CPU, where Triton's interpreter runs, passes for the oldest NVIDIA GPU."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def choose(kernel: str, architecture: str, itemsize: int, vocabulary: int) -> Config | None:
    """The entry to use; None where this kernel has none for so large a vocabulary."""
    entries = [entry for entry in TABLE if (entry.kernel, entry.itemsize) == (kernel, itemsize)]
    known = nearest(architecture, [entry.architecture for entry in entries])
    fitting = [entry for entry in entries if entry.architecture == known and vocabulary <= _limit(entry)]
    return min(fitting, key=_limit, default=None)


def nearest(architecture: str, known: Iterable[str]) -> str:
    """Of the ``known`` ones the newest of the same vendor that is no newer; else the oldest."""
    vendor, generation = _parsed(architecture)
    same = sorted((name for name in known if _parsed(name)[0] == vendor), key=_parsed)
    return max((name for name in same if _parsed(name)[1] <= generation), key=_parsed, default=same[0])


def _limit(entry: Config) -> float:
    return float("inf") if entry.vocabulary is None else entry.vocabulary


def _parsed(architecture: str) -> tuple[str, int]:
    """-> vendor, a number that grows with the generation: "sm_90" -> "sm_", 90; "gfx942" -> "gfx", 0x942."""
    if architecture.startswith("gfx"):
        return "gfx", int(architecture[3:], 16)
    return "sm_", int(architecture[3:])


# Row kernels with a loop: 16 columns per thread and step: two 16-byte loads in flight for a 2-byte dtype, and few
# enough registers that several rows are resident on a multiprocessor. A warp of AMD has 64 threads.
# fmt: off
TABLE = (
    Config("row_backward", "gfx942", 2, 1024, block=1024, warps=2),
    Config("row_backward", "gfx942", 2, None, block=2048, warps=4),
    Config("row_backward", "gfx942", 4, 1024, block=1024, warps=2),
    Config("row_backward", "gfx942", 4, None, block=2048, warps=4),
    Config("row_backward", "sm_80", 2, 1024, block=1024, warps=4),
    Config("row_backward", "sm_80", 2, None, block=4096, warps=8),
    Config("row_backward", "sm_80", 4, 1024, block=1024, warps=4),
    Config("row_backward", "sm_80", 4, None, block=4096, warps=8),
    Config("row_forward", "gfx942", 2, 1024, block=1024, warps=2),
    Config("row_forward", "gfx942", 2, None, block=2048, warps=4),
    Config("row_forward", "gfx942", 4, 1024, block=1024, warps=2),
    Config("row_forward", "gfx942", 4, None, block=2048, warps=4),
    Config("row_forward", "sm_80", 2, 1024, block=1024, warps=4),
    Config("row_forward", "sm_80", 2, None, block=4096, warps=8),
    Config("row_forward", "sm_80", 4, 1024, block=1024, warps=4),
    Config("row_forward", "sm_80", 4, None, block=4096, warps=8),
    Config("softmax_minus_onehot", "gfx942", 2, 2048, block=2048, warps=2),
    Config("softmax_minus_onehot", "gfx942", 2, 8192, block=8192, warps=4),
    Config("softmax_minus_onehot", "gfx942", 2, 16384, block=16384, warps=8),
    Config("softmax_minus_onehot", "gfx942", 2, 32768, block=32768, warps=16),
    Config("softmax_minus_onehot", "gfx942", 2, 65536, block=65536, warps=16),
    Config("softmax_minus_onehot", "gfx942", 4, 2048, block=2048, warps=2),
    Config("softmax_minus_onehot", "gfx942", 4, 8192, block=8192, warps=4),
    Config("softmax_minus_onehot", "gfx942", 4, 16384, block=16384, warps=8),
    Config("softmax_minus_onehot", "gfx942", 4, 32768, block=32768, warps=16),
    Config("softmax_minus_onehot", "sm_80", 2, 2048, block=2048, warps=4),
    Config("softmax_minus_onehot", "sm_80", 2, 8192, block=8192, warps=8),
    Config("softmax_minus_onehot", "sm_80", 2, 16384, block=16384, warps=16),
    Config("softmax_minus_onehot", "sm_80", 2, 32768, block=32768, warps=32),
    Config("softmax_minus_onehot", "sm_80", 4, 2048, block=2048, warps=4),
    Config("softmax_minus_onehot", "sm_80", 4, 8192, block=8192, warps=8),
    Config("softmax_minus_onehot", "sm_80", 4, 16384, block=16384, warps=8),
    Config("softmax_minus_onehot", "sm_80", 4, 32768, block=32768, warps=32),
)
