"""Compiles every Triton kernel without a GPU and reports what the machine code costs.

``python -m rd_kernels.backends.triton_aot`` prints a table: registers, spills, shared memory, tensor-core instructions,
and how wide the row kernels' loads and stores are in their loops. It exits with 1 if any kernel spills or keeps a stack
frame. The variants are the ones the launchers would start: they are recorded from :class:`TritonBackend` itself, run
on tensors without data. ``--update`` writes the costs that the tests hold later changes to (``regressions``).
Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rd_kernels.backends import machine_code
from rd_kernels.backends.triton_backend import FUSED_GROUPS, TritonBackend
from rd_kernels.backends.triton_configs import TABLE as CONFIGS
from rd_kernels.backends.triton_launcher import COMPILER_OPTIONS

__all__ = [
    "COST_TABLE",
    "DTYPES",
    "TARGETS",
    "UPDATE",
    "Cost",
    "Variant",
    "from_table",
    "measure",
    "regressions",
    "to_table",
    "variants",
]

# name -> Triton's backend, architecture, threads in a warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COST_TABLE = Path(__file__).parents[2] / "tests" / "triton_costs.json"
UPDATE = "TRITON_INTERPRET= python -m rd_kernels.backends.triton_aot --update"
_POINTERS = {
    **{dtype: f"*{name}" for name, dtype in DTYPES.items()},
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONAL = (
    "grad_out", "row_scale", "class_weight", "smoothing", "adjustment", "bias", "grad_weight", "grad_bias", "factor", "unit", "details",
)  # fmt: skip


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
        operands = dict.fromkeys(kind[1:] for _, kind in self.types if kind[1:] in DTYPES)
        words += [kind for kind in operands if kind != "fp32" or len(operands) == 1]
        words += [
            f"{name}%16=0" for name, kind in self.types if kind in ("i32", "i64") and name in self.divisible
        ]
        words += [name for name, kind in self.types if name in _OPTIONAL and kind != "constexpr"]
        named = (*self.constants, *self.options)
        words += [f"{name}={value}" for name, value in named if value is not None]
        return f"{self.kernel}({', '.join(words)})"

    @property
    def has_rows(self) -> bool:
        return "logits" in dict(self.types)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the machine code of a variant takes.

    ``spills``, ``stack``: local memory, bytes per thread (AMD's spills: registers). ``loads``, ``stores``:
    width in bits -> how many in loops, or in a kernel without any; empty for kernels that do not walk a row.
    """

    variant: str
    target: str
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    mma: int
    loads: dict[int, int]
    stores: dict[int, int]

    @property
    def resident(self) -> int:
        """How many programs a multiprocessor has registers for."""
        granule = -(-self.registers // 8) * 8
        if (
            TARGETS[self.target][0] == "hip"
        ):  # 4 SIMDs of 512 registers for each thread of a wave, 8 waves at most
            return 4 * min(8, 512 // granule) // self.warps
        return min(64, 65536 // (32 * granule)) // self.warps


class _Recorder(TritonBackend):
    """Notes the kernels that the launchers would start on an architecture."""

    def __init__(self, architecture: str):
        if self._kernels["INTERPRETED"].value:
            raise RuntimeError("TRITON_INTERPRET is set: unset it before Python starts, to compile kernels")
        super().__init__()
        self._architecture = architecture
        self.recorded: dict[Variant, None] = {}  # in order, each once

    def _architecture_of(self, device):
        return self._architecture

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
                types[parameter.name] = parameter.annotation_type or "fp32"
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
            for exercise in _EXERCISES:
                exercise(recorder, DTYPES[name], thorough)
    return list(recorder.recorded)


_ROWS = 2458


def _targets(rows: int) -> tuple[Tensor, Tensor]:
    """-> labels [N], an acc [N]"""
    return torch.empty(rows, dtype=torch.int64), torch.empty(rows)


def _exercise_rows(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    labels, acc = _targets(_ROWS)
    details = torch.empty(2, _ROWS)
    # BERT's vocabulary has rows that are only 4-byte aligned in a 2-byte dtype; 30528 is its padded form.
    for vocabulary in (1000, 30522, 30528, 1) if thorough else (1000, 30522, 30528):
        logits = torch.empty(_ROWS, vocabulary, dtype=dtype)
        weight = torch.empty(vocabulary)
        weightings = [(None, 0.0), (weight, 0.1), (None, 0.1), (weight, 0.0)]
        usual = weightings[:2] if vocabulary == 30522 else weightings[:1]
        for class_weight, smoothing in weightings if thorough else usual:
            backend.row_forward(logits, labels, class_weight, smoothing, -100)
            if thorough or (vocabulary == 30522 and class_weight is None):
                backend.row_forward(logits, labels, class_weight, smoothing, -100, details)
            factors = ((acc, acc), (acc, None), (None, None)) if thorough else ((acc, acc),)
            for grad_out, scale in factors:
                backend.row_backward(
                    grad_out, scale, logits, labels, acc, class_weight, smoothing, -100, out=logits
                )


def _exercise_linear(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    rows, width = 2458, 768
    hidden, unweighted = torch.empty(rows, width, dtype=dtype), torch.empty(rows, 30528, dtype=dtype)
    scale = torch.empty(rows)
    backend.scale_rows(hidden, scale, hidden)
    backend.add_column_sums(unweighted, scale, torch.empty(30528))


def _exercise_sparse(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    rows, vocabulary, beyond = 2458, 30522, 1843
    labels = torch.empty(rows, dtype=torch.int64)
    index, scale, normaliser = labels[:beyond], torch.empty(beyond), torch.empty(2, beyond)
    backend.compact(labels, -100, rows - beyond)
    for width in (768, 1020) if thorough else (768,):
        hidden, weight = torch.empty(rows, width, dtype=dtype), torch.empty(vocabulary, width, dtype=dtype)
        backend.gather_rows(hidden, index)
        for bias, grad_bias in ((weight[:, 0], torch.empty(vocabulary)), (None, None)):
            backend.overflow_forward(hidden, weight, bias, index, -100, index)
            for grad_weight in (weight, None) if thorough and grad_bias is not None else (weight,):
                backend.overflow_backward(
                    scale,
                    hidden,
                    weight,
                    bias,
                    index,
                    normaliser,
                    -100,
                    index,
                    hidden,
                    grad_weight,
                    grad_bias,
                )


def _exercise_gemm(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    if dtype == torch.float32:
        return
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


def _exercise_softmax(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    labels, _ = _targets(_ROWS)
    limits = {
        entry.vocabulary for entry in CONFIGS if entry.kernel == "softmax_minus_onehot" and entry.vocabulary
    }
    for limit in sorted(limits):
        vocabulary = limit - 6
        # The linear op pads its rows to 64 bytes; anyone else's may begin anywhere.
        strides = (limit, vocabulary) if thorough or vocabulary > 30000 else (limit,)
        for stride in strides:
            logits = torch.empty(_ROWS, stride, dtype=dtype)[:, :vocabulary]
            backend.softmax_minus_onehot_(logits, labels, -100)
            if thorough or stride == limit == 32768:
                backend.softmax_minus_onehot_(logits, labels, -100, torch.empty(2, _ROWS))


def _groups(count: int) -> dict[str, Tensor]:
    """Groups of the rows in every form that a backend takes."""
    return {
        "ids": torch.empty(_ROWS, dtype=torch.int64),
        "lists": torch.empty(_ROWS, 2, dtype=torch.int64),
        "bits": torch.empty(_ROWS, -(-count // 32), dtype=torch.int32),
    }


def _exercise_grouped_forward(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    labels, _ = _targets(_ROWS)
    # The common case, and those with the fewest warps and the most to hold in registers.
    cases = [(30522, 3, "group_dro", "ids"), (1000, FUSED_GROUPS, "group_dro_hold", "bits")]
    if thorough:
        rules = [("erm", "bits"), *itertools.product(("group_dro", "group_dro_hold"), _groups(1))]
        rules += [("tilted_rows", "ids"), ("tilted_groups", "lists"), ("worst_group", "bits")]
        cases = [
            (vocabulary, count, *rule)
            for vocabulary, count in itertools.product((1000, 30522, 30528), (3, FUSED_GROUPS))
            for rule in rules
        ]
    for vocabulary, count, rule, form in cases:
        logits, q = torch.empty(_ROWS, vocabulary, dtype=dtype), torch.empty(count)
        backend.grouped_forward(logits, labels, _groups(count)[form], q, rule, 0.01, q, -100)


def _exercise_groups(backend: TritonBackend, dtype: torch.dtype, thorough: bool) -> None:
    """The same for every dtype."""
    _, acc = _targets(_ROWS)
    outcome = torch.empty(_ROWS, dtype=torch.uint8)
    for count in (3, 100, 4096):
        q, stats = torch.empty(count), torch.empty(4, count + 2)
        status = torch.empty(2, dtype=torch.int64)
        backend.pack_mask(torch.empty(_ROWS, count, dtype=torch.bool))
        for groups in _groups(count).values():
            backend.group_reduce(acc, outcome, groups, count)
            backend.row_scale(q, outcome, groups)
        rules = [("erm", None), ("group_dro", None), ("group_dro", q), ("group_dro_hold", q)]
        if thorough or count == 4096:
            rules += [(rule, None) for rule in ("tilted_rows", "tilted_groups", "worst_group")]
        for rule, adjustment in rules:
            backend.group_update(stats, status, q, rule, 0.01, adjustment)


# What starts every kernel that the launchers know; a file of launchers adds its own here.
_EXERCISES: list[Callable[[Any, torch.dtype, bool], None]] = [
    _exercise_rows,
    _exercise_softmax,
    _exercise_grouped_forward,
    _exercise_groups,
    _exercise_linear,
    _exercise_gemm,
    _exercise_sparse,
]


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
        disassembled = variant.has_rows or "mma" in compiled.asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            (cost,) = machine_code.nvidia_costs(cubin, with_loops=disassembled)
    walked = variant.has_rows
    return Cost(
        str(variant),
        target,
        compiled.metadata.num_warps,
        cost.registers,
        cost.local,
        cost.stack,
        compiled.metadata.shared,
        cost.mma,
        cost.loads if walked else {},
        cost.stores if walked else {},
    )


def regressions(costs: Iterable[Cost], table: dict[str, Any], version: str) -> list[str]:
    """What is worse in ``costs`` than in the table, each with the old and the new; empty if nothing is.

    Worse: spills, a stack; so many more registers that fewer programs are resident; more shared memory; narrower
    accesses (of the widest, or more that are below 16 bytes); fewer tensor-core instructions gone to none; a variant
    that the table does not have, or that is gone. With another version of triton than the table's only spills, stacks
    and the width of the widest accesses are compared.
    """
    old = {(cost.target, cost.variant): cost for cost in from_table(table)}
    new = {(cost.target, cost.variant): cost for cost in costs}
    same_compiler = version == table["triton"]
    found = []
    for key, cost in new.items():
        before = old.get(key)
        reasons = [name for name in ("spills", "stack") if getattr(cost, name)]
        if before is None:
            reasons += ["not in the table"] if same_compiler else []
        else:
            for name in ("loads", "stores"):
                was, now = getattr(before, name), getattr(cost, name)
                narrower = max(now, default=0) < max(was, default=0)
                if narrower or (same_compiler and _below_16_bytes(now) > _below_16_bytes(was)):
                    reasons.append(f"narrower {name}")
            if same_compiler:
                reasons += ["registers"] if cost.resident < before.resident else []
                reasons += ["shared memory"] if cost.shared > before.shared else []
                reasons += ["no tensor-core instructions"] if before.mma and not cost.mma else []
        if reasons:
            found.append(f"{', '.join(reasons)}\n  table {_row(before)}\n  now   {_row(cost)}")
    if same_compiler:
        found += [f"gone\n  table {_row(old[key])}" for key in old.keys() - new.keys()]
    return found


def _below_16_bytes(widths: dict[int, int]) -> int:
    return sum(count for width, count in widths.items() if width < 128)


def _row(cost: Cost | None) -> str:
    return "-" if cost is None else next(_table([cost], header=False))


def to_table(costs: Iterable[Cost], version: str) -> str:
    """JSON, a line for each variant, sorted."""
    ordered = sorted(costs, key=lambda cost: (cost.target, cost.variant))
    lines = ",\n".join(json.dumps(list(dataclasses.astuple(cost))) for cost in ordered)
    fields = json.dumps([field.name for field in dataclasses.fields(Cost)])
    return f'{{"triton": "{version}", "fields": {fields}, "costs": [\n{lines}\n]}}\n'


def from_table(table: dict[str, Any]) -> Iterator[Cost]:
    """What ``to_table`` wrote, parsed as JSON."""
    for row in table["costs"]:
        cost = Cost(*row)
        accesses = (
            {int(width): count for width, count in row[-2].items()},
            {int(w): n for w, n in row[-1].items()},
        )
        yield dataclasses.replace(cost, loads=accesses[0], stores=accesses[1])


def _table(costs: Iterable[Cost], header: bool = True) -> Iterator[str]:
    if header:
        yield _line("target", "registers", "spills", "stack", "shared", "mma", "loads", "stores", "variant")
    for cost in costs:
        numbers = (cost.registers, cost.spills, cost.stack, cost.shared, cost.mma)
        yield _line(cost.target, *numbers, _widths(cost.loads), _widths(cost.stores), cost.variant)


def _line(*cells: object) -> str:
    target, registers, spills, stack, shared, mma, loads, stores, variant = map(str, cells)
    numbers = "".join(f"{number:>10}" for number in (registers, spills, stack, shared))
    return f"{target:<7}{numbers}{mma:>5}{loads:>24}{stores:>20}  {variant}"


def _widths(counts: dict[int, int]) -> str:
    return "+".join(f"{count}x{width}" for width, count in counts.items()) or "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rd_kernels.backends.triton_aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="ARCH")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the logits or hidden states"
    )
    parser.add_argument("--thorough", action="store_true", help="every combination of optional arguments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the costs here")
    parser.add_argument(
        "--update", action="store_true", help=f"write {COST_TABLE.name}, which the tests compare with"
    )
    options = parser.parse_args(arguments)
    whole = set(options.dtype) == set(DTYPES) and set(options.target) == set(TARGETS)
    if options.update and (options.thorough or not whole):
        parser.error("--update writes the whole table: it goes with no --target, --dtype or --thorough")
    costs = []

    def measured() -> Iterator[Cost]:
        for target in options.target:
            for variant in variants(target, options.dtype, options.thorough):
                costs.append(measure(variant, target))
                yield costs[-1]

    for line in _table(measured()):
        print(line, flush=True)
    import triton

    written = to_table(costs, triton.__version__)
    for path in [options.json] * bool(options.json) + [COST_TABLE] * options.update:
        path.write_text(written)
    return int(any(cost.spills or cost.stack for cost in costs))


if __name__ == "__main__":
    sys.exit(main())
