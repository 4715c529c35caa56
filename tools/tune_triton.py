"""``python -m tools.tune_triton --out FILE``: times the row kernels' shapes on this GPU and writes the table of configurations.

FILE is ``rd_kernels/backends/triton_configs.py``, or a copy to look at first. The entries of this GPU's architecture
are replaced, those of others kept. A shape that does not compile or fails its comparison with the reference is left
out; the others take turns over several inputs, so that the L2 cache holds none of them. Exit status 2 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rd_kernels.backends import triton_configs
from rd_kernels.backends.registry import get
from rd_kernels.backends.triton_backend import TritonBackend
from rd_kernels.backends.triton_configs import Config

BYTES = 256 * 2**20  # of logits in an input: several times what an L2 cache holds
INPUTS, LAPS = 3, 20
LARGEST = 128256  # stands for "any vocabulary"
DTYPES = {2: torch.bfloat16, 4: torch.float32}
LIMITS: dict[
    str, dict[int, tuple[int | None, ...]]
] = {  # kernel -> itemsize -> vocabularies that have an entry
    "row_forward": dict.fromkeys((2, 4), (1024, None)),
    "row_backward": dict.fromkeys((2, 4), (1024, None)),
    "softmax_minus_onehot": {2: (2048, 8192, 16384, 32768, 65536), 4: (2048, 8192, 16384, 32768)},
}
Clock = Callable[[Config], "float | None"]  # seconds of a call; None where the shape cannot be used


class Tuned(TritonBackend):
    """Runs every kernel in one shape."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def _config(self, kernel, logits):
        if kernel != self.config.kernel:
            return super()._config(kernel, logits)
        return self.config if self.config.block else None


def candidates(kernel: str, architecture: str, itemsize: int, limit: int | None) -> Iterator[Config]:
    """The shapes worth a try: 1 to 8 pieces of 16 bytes a thread and step; a whole row has up to 64 elements a thread.

    Block 0 stands for doing without the kernel that holds a row.
    """
    threads = 64 if architecture.startswith("gfx") else 32
    whole_row = kernel == "softmax_minus_onehot"
    if whole_row:
        yield Config(kernel, architecture, itemsize, limit, block=0, warps=0)
    blocks = (limit,) if whole_row else (512, 1024, 2048, 4096, 8192, 16384)
    for block in blocks:
        assert block is not None
        for warps in (1, 2, 4, 8, 16, 32):
            pieces = block * itemsize / 16 / (threads * warps)
            fits = block <= 64 * threads * warps if whole_row else pieces <= 8
            if threads * warps <= 1024 and pieces >= 1 and fits:
                yield Config(kernel, architecture, itemsize, limit, block, warps)


def tune(architecture: str, clock: Clock, machine: dict[str, Any]) -> Iterator[Config]:
    """The fastest shape of each kind, with its time; no entry where none can be used, or is faster than doing without."""
    for kernel, sizes in LIMITS.items():
        for itemsize, limits in sizes.items():
            for limit in limits:
                times = {shape: clock(shape) for shape in candidates(kernel, architecture, itemsize, limit)}
                usable = {shape: seconds for shape, seconds in times.items() if seconds is not None}
                best = min(usable, key=lambda shape: (usable[shape], shape.block, shape.warps), default=None)
                if best is not None and best.block:
                    measured = tuple({**machine, "seconds": usable[best]}.items())
                    yield dataclasses.replace(best, measured=measured)


def updated(text: str, entries: Iterable[Config]) -> str:
    """The file of configurations with the entries of these architectures replaced."""
    new = list(entries)
    tuned = {entry.architecture for entry in new}
    kept = [entry for entry in triton_configs.TABLE if entry.architecture not in tuned]
    ordered = sorted(
        kept + new, key=lambda e: (e.kernel, e.architecture, e.itemsize, e.vocabulary or sys.maxsize)
    )
    head = text[: text.index("TABLE = (")]
    return head + "TABLE = (\n" + "".join(f"    {_line(entry)},\n" for entry in ordered) + ")\n"


def _line(entry: Config) -> str:
    measured = "" if entry.measured is None else f", measured={entry.measured!r}"
    return (
        f'Config("{entry.kernel}", "{entry.architecture}", {entry.itemsize}, {entry.vocabulary}, '
        f"block={entry.block}, warps={entry.warps}{measured})"
    )


def call(backend: Any, kernel: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """-> what the kernel writes"""
    if kernel == "row_forward":
        return backend.row_forward(logits, labels, None, 0.0, -100)
    if kernel == "softmax_minus_onehot":
        return (*backend.softmax_minus_onehot_(logits, labels, -100), logits)
    # A normaliser of any values will do, the same for all.
    normaliser = torch.stack([torch.full_like(labels, 4, dtype=torch.float32)] * 2)
    return (backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100, out=logits),)


def agrees(config: Config, logits: Tensor, labels: Tensor) -> bool:
    """With the reference, to the rounding of the dtype; False too where the shape does not compile."""
    expected = call(get("reference"), config.kernel, logits.clone(), labels)
    try:
        found = call(Tuned(config), config.kernel, logits.clone(), labels)
        for a, b in zip(found, expected, strict=True):
            eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
            torch.testing.assert_close(a, b, rtol=8 * eps, atol=2.0**-20)
    except Exception as error:
        print(f"left out: {config}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def gpu_clock(config: Config) -> float | None:  # pragma: no cover, needs a GPU
    """The median time of a call on the current GPU, by CUDA events."""
    vocabulary = config.vocabulary or LARGEST
    rows = max(1, BYTES // (vocabulary * config.itemsize))
    inputs = []
    for _ in range(INPUTS):
        logits = torch.randn(rows, vocabulary, device="cuda").to(DTYPES[config.itemsize])
        inputs.append((logits, torch.randint(vocabulary, (rows,), device="cuda")))
    few = slice(0, 64)
    if not agrees(config, inputs[0][0][few], inputs[0][1][few]):
        return None
    backend = Tuned(config)
    events = []
    for lap in range(INPUTS + LAPS):  # the first ones compile and warm up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(backend, config.kernel, *inputs[lap % INPUTS])
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events[INPUTS:])


def machine() -> dict[str, Any]:  # pragma: no cover, needs a GPU
    """What an entry says of where it was measured."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = torch.version.hip or subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tune_triton", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA or ROCm device: nothing can be timed here", file=sys.stderr)
        return 2
    architecture = triton_configs.architecture_of(torch.device("cuda", torch.cuda.current_device()))
    entries = []
    for entry in tune(architecture, gpu_clock, machine()):
        print(_line(entry), flush=True)
        entries.append(entry)
    options.out.write_text(updated(Path(triton_configs.__file__).read_text(), entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
