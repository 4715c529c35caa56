"""Compiles every Triton kernel without a GPU and reports what the machine code costs.

``python -m rd_kernels.backends.triton_aot`` prints a table: registers, spills, shared memory, and how wide the
row kernels' loads and stores are in the loop over the vocabulary. It exits with 1 if any kernel spills or keeps
a stack frame. The variants are the ones the launchers would start: they are recorded from
:class:`TritonBackend` itself, run on tensors without data. Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rd_kernels.backends import machine_code
from rd_kernels.backends.triton_backend import TritonBackend
from rd_kernels.backends.triton_gemm import GEMM_TILES
from rd_kernels.backends.triton_launcher import COMPILER_OPTIONS

__all__ = ["DTYPES", "TARGETS", "Cost", "Variant", "measure", "variants"]

# name -> Triton's backend, architecture, threads in a warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_POINTERS = {
    **{dtype: f"*{name}" for name, dtype in DTYPES.items()},
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONAL = ("grad_out", "row_scale", "class_weight", "smoothing", "adjustment", "bias", "factor", "unit")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as Triton's just-in-time compiler would make it."""

    kernel: str
    types: tuple[tuple[str, str], ...]  # argument -> type; "constexpr" for what is known at compile time
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        words: list[str] = []
        if self.has_rows:
            words.append(f"{dict(self.types)['logits'][1:]} V{'%16=0' if 'V' in self.divisible else ''}")
        words += [name for name, kind in self.types if name in _OPTIONAL and kind != "constexpr"]
        words += [f"{name}={value}" for name, value in self.constants if value is not None]
        return f"{self.kernel}({', '.join(words)})"

    @property
    def has_rows(self) -> bool:
        return "logits" in dict(self.types)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the machine code of a variant takes.

    ``spills``, ``stack``: local memory, bytes per thread (AMD's spills: registers). ``loads``, ``stores``:
    width in bits -> how many in the loop over a row; empty for kernels without that loop.
    """

    variant: str
    target: str
    registers: int
    spills: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


class _Recorder(TritonBackend):
    """Notes the kernels that the launchers would start for "cuda" or "hip"."""

    def __init__(self, target: str):
        if self._kernels["INTERPRETED"].value:
            raise RuntimeError("TRITON_INTERPRET is set: unset it before Python starts, to compile kernels")
        self._architecture = TARGETS[target][0]
        self._target = target
        self.recorded: dict[Variant, None] = {}  # in order, each once

    def gemm_tiles(self, device):
        return GEMM_TILES[self._target]

    def _launch(self, kernel, grid, tensors, scalars, **options):
        function = self._kernels[kernel]
        names = {parameter.name for parameter in function.params}
        types: dict[str, str] = {}
        constants: dict[str, Any] = {name: value for name, value in options.items() if name in names}
        divisible = []
        for parameter, value in zip(function.params, (*tensors, *scalars), strict=False):
            if isinstance(value, Tensor):
                types[parameter.name] = _POINTERS[value.dtype]
                divisible.append(parameter.name)  # torch allocates at multiples of more than 16 bytes
            elif value is None or (value == 1 and isinstance(value, int) and not parameter.do_not_specialize):
                constants[parameter.name] = value
            elif isinstance(value, float):
                types[parameter.name] = "fp32"
            else:
                types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(parameter.name)
        types.update(dict.fromkeys(constants, "constexpr"))
        variant = Variant(
            kernel,
            tuple((name, types[name]) for name in function.arg_names),
            tuple(sorted(constants.items())),
            tuple(divisible),
            tuple((name, value) for name, value in options.items() if name not in names),
        )
        self.recorded[variant] = None


def variants(target: str, dtypes: Iterable[str], thorough: bool) -> list[Variant]:
    """What the launchers start on ``target``. ``thorough``: every combination of optional arguments.

    Raises RuntimeError under TRITON_INTERPRET, where there is nothing to compile.
    """
    recorder = _Recorder(target)
    with torch.device("meta"):
        for name in dtypes:
            _exercise_rows(recorder, DTYPES[name], thorough)
            if name != "fp32":
                _exercise_gemm(recorder, DTYPES[name], thorough)
        _exercise_groups(recorder)
    return list(recorder.recorded)


def _exercise_rows(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    rows = 2458
    acc = torch.empty(rows)
    labels = torch.empty(rows, dtype=torch.int64)
    # BERT's vocabulary has rows that are only 4-byte aligned in a 2-byte dtype; 30528 is its padded form.
    for vocabulary in (1000, 30522, 30528, 1) if thorough else (1000, 30522, 30528):
        logits = torch.empty(rows, vocabulary, dtype=dtype)
        weight = torch.empty(vocabulary)
        plain, full = (None, 0.0), (weight, 0.1)
        for class_weight, smoothing in (
            (plain, full, (None, 0.1), (weight, 0.0)) if thorough else (plain, full)
        ):
            backend.row_forward(logits, labels, class_weight, smoothing, -100)
            factors = ((acc, acc), (acc, None), (None, None)) if thorough else ((acc, acc),)
            for grad_out, scale in factors:
                backend.row_backward(
                    grad_out, scale, logits, labels, acc, class_weight, smoothing, -100, out=logits
                )


def _exercise_gemm(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    rows = 2458
    acc = torch.empty(rows)
    labels = torch.empty(rows, dtype=torch.int64)
    # Widths of MiniLM and BERT, and one that is no multiple of anything.
    for width in (384, 768, 400, 100) if thorough else (768,):
        hidden = torch.empty(rows, width, dtype=dtype)
        for vocabulary in (30522, 30528) if thorough else (30528,):
            weight, out = (
                torch.empty(*shape, dtype=dtype) for shape in ((vocabulary, width), (rows, vocabulary))
            )
            for bias in (weight[:, 0].contiguous(), None) if thorough else (weight[:, 0].contiguous(),):
                *_, tile_sums = backend.exponentials(hidden, weight, bias, labels, -100, 30522, out)
            live = backend.live_tiles(tile_sums, labels, acc, out, 0.0)
            backend.grad_hidden(out, acc, weight, live)
            backend.grad_weight(out, *backend.scaled_hidden(hidden, acc), live)


def _exercise_groups(backend: TritonBackend) -> None:
    rows = 2458
    acc = torch.empty(rows)
    outcome = torch.empty(rows, dtype=torch.uint8)
    for count in (3, 100, 4096):
        q, stats = torch.empty(count), torch.empty(4, count + 2)
        status = torch.empty(2, dtype=torch.int64)
        for groups in (torch.empty(rows, dtype=torch.int64), torch.empty(rows, count, dtype=torch.bool)):
            backend.group_reduce(acc, outcome, groups, count)
            backend.row_scale(q, outcome, groups)
        for objective, adjustment in (
            ("erm", None),
            ("group_dro", None),
            ("group_dro", q),
            ("group_dro_hold", q),
        ):
            backend.group_update(stats, status, q, objective, 0.01, adjustment)


def measure(variant: Variant, target: str) -> Cost:
    """Compile ``variant`` for ``target`` and read the costs off the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = TritonBackend()._kernels[variant.kernel]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(function, dict(variant.types), dict(variant.constants), attributes)
    options = {**dict(variant.options), **COMPILER_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if TARGETS[target][0] == "hip":
        cost = machine_code.amd_cost(variant.kernel, compiled.asm["amdgcn"], variant.has_rows)
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            (cost,) = machine_code.nvidia_costs(cubin, with_loops=variant.has_rows)
    return Cost(
        str(variant),
        target,
        cost.registers,
        cost.local,
        cost.stack,
        compiled.metadata.shared,
        cost.loads,
        cost.stores,
    )


def _line(*cells: object) -> str:
    target, registers, spills, stack, shared, loads, stores, variant = map(str, cells)
    numbers = "".join(f"{number:>10}" for number in (registers, spills, stack, shared))
    return f"{target:<7}{numbers}{loads:>20}{stores:>14}  {variant}"


def _widths(counts: dict[int, int]) -> str:
    return "+".join(f"{count}x{width}" for width, count in counts.items()) or "-"


def _table(costs: Iterable[Cost]) -> Iterator[str]:
    yield _line("target", "registers", "spills", "stack", "shared", "loads", "stores", "variant")
    for cost in costs:
        accesses = (_widths(cost.loads), _widths(cost.stores))
        yield _line(
            cost.target, cost.registers, cost.spills, cost.stack, cost.shared, *accesses, cost.variant
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rd_kernels.backends.triton_aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="ARCH")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="of the logits")
    parser.add_argument("--thorough", action="store_true", help="every combination of optional arguments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the costs here")
    options = parser.parse_args(arguments)
    costs = []

    def measured() -> Iterator[Cost]:
        for target in options.target:
            for variant in variants(target, options.dtype, options.thorough):
                costs.append(measure(variant, target))
                yield costs[-1]

    for line in _table(measured()):
        print(line, flush=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(cost) for cost in costs], indent=1) + "\n")
    return int(any(cost.spills or cost.stack for cost in costs))


if __name__ == "__main__":
    sys.exit(main())
