"""Builds the package and its native module ``rd_kernels._native``; the metadata stand in pyproject.toml.

Needs a C++17 compiler, not torch: the native code is torch-free. ninja compiles the units in parallel, and only
those that changed. Environment variables: ``CXX`` (default: the first of c++, g++, clang++), ``CFLAGS``,
``CXXFLAGS``, ``LDFLAGS``, ``MAX_JOBS``. Without OpenMP (Apple's clang) the kernels run on one thread.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CSRC = Path(__file__).resolve().parent / "csrc"

# Compiled once for every instruction set the compiler knows, each into a namespace of its own;
# cpu/dispatch.cpp chooses between them when the module runs.
PER_ISA_SOURCE = "cpu/row_kernels.cpp"
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# A comparison may be made where its result is not used; NaN and infinity are kept.
KERNEL_FLAGS = ["-fno-trapping-math"]
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]

X86_64_PROGRAM = """
#ifndef __x86_64__
#error
#endif
int main() { return 0; }
"""
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class Compiler:
    """The C++ compiler, and what it offers, found out by trying."""

    def __init__(self) -> None:
        candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        usable = [name for name in candidates if shutil.which(shlex.split(name)[0])]
        if not usable:
            raise PlatformError(
                f"rd_kernels needs a C++17 compiler, but {', '.join(candidates)} is not found; install one "
                "(Debian: apt install g++; macOS: xcode-select --install) or set CXX"
            )
        self.command = shlex.split(usable[0])
        self.user_flags = shlex.split(f"{os.environ.get('CFLAGS', '')} {os.environ.get('CXXFLAGS', '')}")
        self.link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        complaint = self.complaint("int main() { return 0; }", ["-std=c++17"])
        if complaint is not None:
            raise CompileError(f"{usable[0]} cannot build a C++17 program:\n{complaint}")

        self.isas = [
            isa for isa, flags in ISA_FLAGS.items() if not flags or self.builds(X86_64_PROGRAM, flags)
        ]
        self.openmp = [flag for flag in ["-fopenmp"] if self.builds(OPENMP_PROGRAM, [flag])]

    def builds(self, program: str, flags: list[str]) -> bool:
        return self.complaint(program, flags) is None

    def complaint(self, program: str, flags: list[str]) -> str | None:
        """What the compiler says to a program that it cannot compile and link; None if it can."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "program.cpp")
            source.write_text(program)
            command = [
                *self.command,
                *self.user_flags,
                *flags,
                str(source),
                "-o",
                str(source.with_suffix("")),
            ]
            command += self.link_flags
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if result.returncode == 0 else result.stderr


@dataclass
class NinjaFile:
    """build.ninja: one edge for each object and one that links them."""

    compiler: list[str]
    folder: Path
    edges: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

    def compile(self, source: Path, name: str, flags: list[str]) -> None:
        self.objects.append(f"{name}.o")
        self.edges.append(
            f"build {name}.o: compile {_ninja_path(source)}\n  flags = {_ninja_command(flags)}\n"
        )

    def link(self, target: Path, flags: list[str]) -> None:
        self.edges.append(
            f"build {_ninja_path(target)}: link {' '.join(self.objects)}\n  flags = {_ninja_command(flags)}\n"
        )

    def run(self) -> None:
        compiler = _ninja_command(self.compiler)
        rules = (
            f"rule compile\n  command = {compiler} -MD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n"
            f"rule link\n  command = {compiler} $flags $in -o $out\n"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text(rules + "".join(self.edges))
        if importlib.util.find_spec("ninja") is not None:
            command = [sys.executable, "-m", "ninja"]
        elif shutil.which("ninja"):
            command = ["ninja"]
        else:
            raise PlatformError("rd_kernels is built with ninja, which is missing; pip install ninja")
        command += ["-C", str(self.folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, check=False).returncode != 0:
            raise CompileError("the native module could not be compiled; the compiler's messages are above")


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


class NinjaBuild(build_ext):
    """Builds ``rd_kernels._native`` with ninja instead of setuptools' own compiler driver."""

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("RD_KERNELS_FORCE_CUDA") == "1":
            # CUDA units will be more objects of the file below; RD_KERNELS_SKIP_CUDA=1 will leave them out.
            raise PlatformError("RD_KERNELS_FORCE_CUDA=1, but this release of rd_kernels has no CUDA units")
        compiler = Compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        defines = [f"-DRD_HAVE_{isa.upper()}" for isa in compiler.isas]
        flags = [*FLAGS, f"-I{CSRC}", *defines]
        ninja = NinjaFile(compiler.command, Path(self.build_temp).resolve())
        for isa in compiler.isas:
            kernel_flags = [*flags, *KERNEL_FLAGS, f"-DRD_ISA={isa}", *ISA_FLAGS[isa]]
            ninja.compile(CSRC / PER_ISA_SOURCE, f"row_kernels_{isa}", kernel_flags + compiler.user_flags)
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            if source != CSRC / PER_ISA_SOURCE:
                ninja.compile(source, source.stem, [*flags, *compiler.openmp, *compiler.user_flags])
        includes = [f"-I{path}" for path in _binding_includes()]
        ninja.compile(
            CSRC / "bindings.cpp", "bindings", [*flags, *includes, *compiler.openmp, *compiler.user_flags]
        )
        ninja.link(target, [*LINK_FLAGS, *compiler.openmp, *compiler.link_flags])
        ninja.run()


def _binding_includes() -> list[str]:
    import pybind11

    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise PlatformError(f"Python.h is not in {headers}; install Python's headers (Debian: python3-dev)")
    return [headers, pybind11.get_include()]


sources = [str(path.relative_to(CSRC.parent)) for path in sorted(CSRC.rglob("*.cpp"))]
headers = [str(path.relative_to(CSRC.parent)) for path in sorted(CSRC.rglob("*.h"))]

setup(
    packages=find_packages(include=["rd_kernels", "rd_kernels.*"]) + find_packages("python"),
    package_dir={"robustdebias": "python/robustdebias"},
    package_data={"robustdebias": ["lexicons/**", "data/**"]},
    ext_modules=[Extension("rd_kernels._native", sources, depends=headers)],
    cmdclass={"build_ext": NinjaBuild},
)
