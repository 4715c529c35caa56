"""What compiled kernels cost, read off the machine code: registers, local memory, how wide their loads and stores are.

NVIDIA's cubins, and libraries that hold some, are taken apart by cuobjdump, which comes with triton. AMD's assembly
is read as Triton leaves it.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "amd_cost", "architectures", "nvidia_costs", "nvidia_listings"]

Access = tuple[str, int]  # "loads" or "stores", width in bits


@dataclass(frozen=True)
class Cost:
    """Of one kernel. ``local``, ``stack``: bytes per thread of local memory (AMD's spills: registers).

    ``loads``, ``stores``: width in bits -> how many global ones there are inside loops, or inside the hot ones;
    in a kernel without loops, everywhere. ``mma``: how many instructions for the tensor cores there are.
    """

    kernel: str
    registers: int
    stack: int
    local: int
    loads: dict[int, int]
    stores: dict[int, int]
    mma: int = 0


def nvidia_costs(
    binary: Path, architecture: str | None = None, with_loops: bool = True, hot: str | None = None
) -> Iterator[Cost]:
    """Of every kernel in a cubin, or in a library for one ``architecture`` ("sm_90a").

    ``hot``: only the innermost loops with this instruction count. Without ``with_loops`` accesses and ``mma`` are left
    out: disassembling takes longer than compiling.
    """
    usage = _cuobjdump(*_choice(architecture), "--dump-resource-usage", binary)
    listings = nvidia_listings(binary, architecture) if with_loops else {}
    for name, numbers in re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", usage):
        counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", numbers)}
        accesses = _nvidia_accesses(listings[name], hot) if with_loops else {"loads": {}, "stores": {}}
        mma = len(re.findall(r"\b[A-Z0-9]+MMA\b", listings[name])) if with_loops else 0
        yield Cost(name, counts["REG"], counts["STACK"], counts["LOCAL"], **accesses, mma=mma)


def nvidia_listings(binary: Path, architecture: str | None = None) -> dict[str, str]:
    """The disassembly of every kernel, by its name."""
    functions = re.split(r"\n\s*Function : ", _cuobjdump(*_choice(architecture), "--dump-sass", binary))[1:]
    return {text.split("\n", 1)[0].strip(): text for text in functions}


def architectures(binary: Path, kind: str = "elf") -> list[str]:
    """Those that a library has machine code ("elf") or "ptx" for, each once."""
    listing = _cuobjdump(f"--list-{kind}", binary)
    return sorted(set(re.findall(r"\.(sm_\w+)\.", listing)), key=lambda name: (len(name.strip("a")), name))


def amd_cost(name: str, assembly: str, with_loops: bool = True) -> Cost:
    counts = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    lines = assembly.splitlines() if with_loops else []
    places = {line.split(":")[0]: place for place, line in enumerate(lines) if line.startswith(".LBB")}
    jumps = [
        (place, places[found[1]])
        for place, line in enumerate(lines)
        if (found := re.search(r"\bs_c?branch\S*\s+(\.LBB\w+)", line))
    ]
    return Cost(
        name,
        counts["vgpr_count"],
        counts["private_segment_fixed_size"],
        counts["vgpr_spill_count"] + counts["sgpr_spill_count"],
        **_loop_accesses(lines, jumps, _amd_access),
        mma=len(re.findall(r"\bv_s?mfma", assembly)),
    )


def _choice(architecture: str | None) -> list[str]:
    return [] if architecture is None else ["--gpu-architecture", architecture]


def _cuobjdump(*arguments: str | Path) -> str:
    path = shutil.which("cuobjdump")
    if path is None:
        import triton

        path = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _nvidia_accesses(listing: str, hot: str | None) -> dict[str, dict[int, int]]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)
    places = {int(address, 16): place for place, (address, _) in enumerate(lines)}
    jumps = [
        (place, places[int(found[1], 16)])
        for place, (_, text) in enumerate(lines)
        if (found := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) and int(found[1], 16) in places
    ]
    return _loop_accesses([text for _, text in lines], jumps, _nvidia_access, hot)


def _nvidia_access(instruction: str) -> Access | None:
    found = re.search(r"\b(LDG|STG)\.E\S*", instruction)
    if found is None:
        return None
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", found[0])
    return ("loads" if found[1] == "LDG" else "stores"), int(width[1]) if width else 32


def _amd_access(instruction: str) -> Access | None:
    found = re.search(
        r"\b(?:global|buffer|flat)_(load|store)_(?:[us]?(byte|short)|dword(?:x(\d))?)", instruction
    )
    if found is None:
        return None
    width = {"byte": 8, "short": 16}.get(found[2]) or 32 * int(found[3] or 1)
    return found[1] + "s", width


def _loop_accesses(
    lines: list[str],
    jumps: list[tuple[int, int]],
    access_of: Callable[[str], Access | None],
    hot: str | None = None,
) -> dict[str, dict[int, int]]:
    """Global accesses of the lines that a backward jump encloses: "loads" and "stores", width -> count."""
    loops = [range(to, source + 1) for source, to in jumps if to < source]
    if hot is not None:
        inner = [loop for loop in loops if not any(_encloses(loop, other) for other in loops)]
        loops = [loop for loop in inner if any(hot in lines[place] for place in loop)]
    elif not loops:
        loops = [range(len(lines))]
    counts = {"loads": collections.Counter[int](), "stores": collections.Counter[int]()}
    for place in {place for loop in loops for place in loop}:
        if (access := access_of(lines[place])) is not None:
            counts[access[0]][access[1]] += 1
    return {kind: dict(sorted(widths.items())) for kind, widths in counts.items()}


def _encloses(loop: range, other: range) -> bool:
    return loop != other and loop.start <= other.start and other.stop <= loop.stop
