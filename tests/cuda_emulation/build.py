"""Compiles CUDA sources with g++ against the emulation in this folder, into build/emulation; nothing twice."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

EMULATION = Path(__file__).resolve().parent
ROOT = EMULATION.parents[1]
CACHE = ROOT / "build" / "emulation"

# Kernels read floats as float4, which nvcc lets them.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
]
FLAGS += ["-Wno-unknown-pragmas"]
# Never instrumented, see scheduler.cpp.
SCHEDULER = ["scheduler.cpp", "threads.cpp", "reports.cpp", "runtime_api.cpp"]
SCHEDULER_FLAGS = [*FLAGS, "-O2"]


def missing() -> str | None:
    """Why nothing can be emulated here; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the fibres of the emulation are written for Linux on x86-64"
    return None if shutil.which("g++") else "the emulation is compiled with g++"


def module(
    sanitize: str | None = None, replace: Mapping[str, str] | None = None, csrc: Path = ROOT / "csrc"
) -> Path:
    """The extension module ``_cuda`` made of ``csrc/cuda``.

    ``sanitize``: "address,undefined" or None. ``replace``: other text for files, by their path below ``csrc``.
    """
    if replace:
        csrc = _copy(csrc, replace)
    units = [
        *sorted(csrc.glob("cuda/*.cu")),
        *sorted(csrc.glob("cuda/*.cpp")),
        *sorted(csrc.glob("common/*.cpp")),
    ]
    flags = [f"-I{path}" for path in _binding_includes()]
    return _build(f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", units, sanitize, flags, ["-shared"], csrc)


def load(path: Path) -> ModuleType:
    """The module at that path, also beside another build of it: pybind11 keeps one for each name."""
    spec = importlib.util.spec_from_file_location(f"emulation_{path.parent.name}._cuda", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def program(
    source: Path,
    sanitize: str | None = None,
    defines: Sequence[str] = (),
    *,
    with_kernels: bool = False,
    replace: Mapping[str, str] | None = None,
) -> Path:
    """An executable made of one file, and the kernels of ``csrc/cuda``; ``sanitize`` may be "thread" as well."""
    csrc = _copy(ROOT / "csrc", replace) if replace else ROOT / "csrc"
    units = [source, *(sorted(csrc.glob("cuda/*.cu")) if with_kernels else [])]
    return _build(source.stem, units, sanitize, [f"-D{name}" for name in defines], [], csrc)


def library(source: Path) -> Path:
    """A shared library made of one file, for ctypes."""
    return _build(f"{source.stem}.so", [source], None, [], ["-shared"], ROOT / "csrc")


def sanitized_environment() -> dict[str, str]:
    """What a Python process needs to load a module built with "address,undefined"."""
    # libstdc++ too: the sanitizer looks for what throws exceptions when the process starts.
    libraries = [_gxx("-print-file-name=" + name) for name in ("libasan.so", "libstdc++.so.6")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch leak on exit, and mix allocators.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def _build(
    name: str,
    units: Sequence[Path],
    sanitize: str | None,
    flags: list[str],
    link_flags: list[str],
    csrc: Path,
) -> Path:
    headers = _headers(EMULATION)
    sanitizers = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    sanitizers += ["-fno-omit-frame-pointer"] if sanitize else []
    jobs = [(EMULATION / unit, SCHEDULER_FLAGS, csrc, headers) for unit in SCHEDULER]
    jobs += [(unit, [*FLAGS, *sanitizers, *flags], csrc, headers + _headers(csrc)) for unit in units]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    link = [*sanitizers, *link_flags]
    folder = CACHE / _hash(*(path.name for path in objects), *link)
    return _make(folder / name, [*map(str, objects), *link, "-ldl"])


HEADERS = {".h", ".cuh", ".hpp"}


def _compile(unit: Path, flags: list[str], csrc: Path, headers: str) -> Path:
    key = _hash(headers, unit.name, unit.read_text(), *flags, _gxx("-dumpfullversion"))
    # The emulation first: its cuda/hardware.cuh is the one to find.
    includes = [f"-I{EMULATION}", f"-I{csrc}"]
    return _make(CACHE / "objects" / f"{key}.o", ["-x", "c++", *flags, *includes, "-c", str(unit)])


def _make(target: Path, arguments: list[str]) -> Path:
    """Runs g++ unless its result is there; concurrent processes may both, and the last one's stays."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder, target.name)
            command = ["g++", *arguments, "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
            made.replace(target)
    return target


def _copy(csrc: Path, replace: Mapping[str, str]) -> Path:
    texts = {str(path.relative_to(csrc)): path.read_text() for path in _sources(csrc)}
    unknown = set(replace) - set(texts)
    if unknown:
        raise ValueError(f"not below {csrc}: {sorted(unknown)}")
    texts.update(replace)
    folder = CACHE / "sources" / _hash(*(part for item in sorted(texts.items()) for part in item))
    for name, text in texts.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in HEADERS | {".cu", ".cpp"})


def _headers(folder: Path) -> str:
    paths = [path for path in _sources(folder) if path.suffix in HEADERS]
    return _hash(*(part for path in paths for part in (str(path.relative_to(folder)), path.read_text())))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _binding_includes() -> list[str]:
    import pybind11

    return [sysconfig.get_path("include"), pybind11.get_include()]


@functools.cache
def _gxx(argument: str) -> str:
    return subprocess.run(["g++", argument], capture_output=True, text=True, check=True).stdout.strip()
