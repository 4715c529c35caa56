"""Builds the package and its native modules; the metadata stand in pyproject.toml.

``rd_kernels._native`` needs a C++17 compiler; ``rd_kernels._cuda`` needs nvcc too, and is left out where there is
none. Neither needs torch: the native code is torch-free. ninja compiles the units in parallel, and only those that
changed. docs/building.md lists the environment variables. Without OpenMP (Apple's clang) the kernels run on one thread.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # PEP 517 does not

from build_support import cuda  # noqa: E402
from build_support.compilers import ISA_FLAGS, Compiler  # noqa: E402
from build_support.ninja_file import NinjaFile  # noqa: E402

CSRC = ROOT / "csrc"

# Compiled once for every instruction set the compiler knows, each into a namespace of its own;
# cpu/dispatch.cpp chooses between them when the module runs.
PER_ISA_SOURCE = "cpu/row_kernels.cpp"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# A comparison may be made where its result is not used; NaN and infinity are kept.
KERNEL_FLAGS = ["-fno-trapping-math"]
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


class NinjaBuild(build_ext):
    """Builds the modules with ninja instead of setuptools' own compiler driver."""

    extensions: list[Extension]

    def run(self) -> None:
        self.cxx = Compiler()
        self.nvcc = cuda.find_nvcc(self.cxx)
        if self.nvcc is None:
            self.extensions = [ext for ext in self.extensions if ext.name != "rd_kernels._cuda"]
            # One of an earlier build would be packed.
            file = self.get_ext_filename("rd_kernels._cuda")
            for folder in (self.build_lib, ROOT) if self.inplace else (self.build_lib,):
                Path(folder, file).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        if ext.name == "rd_kernels._cuda":
            assert self.nvcc is not None
            self.build_cuda(self.nvcc, target, folder)
        else:
            self.build_native(target, folder)

    def build_native(self, target: Path, folder: Path) -> None:
        cxx = self.cxx
        defines = [f"-DRD_HAVE_{isa.upper()}" for isa in cxx.isas]
        flags = [*FLAGS, f"-I{CSRC}", *defines]
        ninja = NinjaFile({"cxx": cxx.command}, folder)
        for isa in cxx.isas:
            kernel_flags = [*flags, *KERNEL_FLAGS, f"-DRD_ISA={isa}", *ISA_FLAGS[isa]]
            ninja.compile(CSRC / PER_ISA_SOURCE, f"row_kernels_{isa}", kernel_flags + cxx.user_flags)
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            if source != CSRC / PER_ISA_SOURCE:
                ninja.compile(source, source.stem, [*flags, *cxx.openmp, *cxx.user_flags])
        ninja.compile(
            CSRC / "bindings.cpp", "bindings", [*flags, *_binding_includes(), *cxx.openmp, *cxx.user_flags]
        )
        ninja.link(target, [*LINK_FLAGS, *cxx.openmp], cxx.link_flags)
        ninja.run()

    def build_cuda(self, nvcc: cuda.Nvcc, target: Path, folder: Path) -> None:
        cxx = self.cxx
        ninja = NinjaFile({"cxx": cxx.command, "nvcc": nvcc.command}, folder)
        for source in sorted(CSRC.glob("cuda/*.cu")):
            ninja.compile(source, source.stem, [*nvcc.flags, f"-I{CSRC}"], "nvcc")
        ninja.compile(
            CSRC / "cuda/bindings.cpp",
            "bindings",
            [*FLAGS, f"-I{CSRC}", *_binding_includes(), *cxx.user_flags],
        )
        libraries = [nvcc.cudart, *cuda.SYSTEM_LIBRARIES, *cxx.link_flags]
        ninja.link(target, [*LINK_FLAGS, *cuda.LINK_FLAGS], libraries)
        ninja.run()


def _binding_includes() -> list[str]:
    import pybind11

    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise PlatformError(f"Python.h is not in {headers}; install Python's headers (Debian: python3-dev)")
    return [f"-I{headers}", f"-I{pybind11.get_include()}"]


def _sources(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted(CSRC.glob(pattern))]


extensions = [
    Extension("rd_kernels._native", [*_sources("*.cpp"), *_sources("cpu/*.cpp")]),
    Extension("rd_kernels._cuda", [*_sources("cuda/*.cpp"), *_sources("cuda/*.cu")]),
]

setup(
    packages=find_packages(include=["rd_kernels", "rd_kernels.*"]) + find_packages("python"),
    package_dir={"robustdebias": "python/robustdebias"},
    package_data={
        "robustdebias": [
            "demo_assets.txt",
            "lexicons/**",
            "counterfactuals/**",
            "experiments/templates/**",
            "data/**",
        ]
    },
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
