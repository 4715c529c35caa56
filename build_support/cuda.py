"""nvcc: where it is, what it compiles for, and with which flags. torch's variables mean here what they mean there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.errors import PlatformError

from build_support.compilers import Compiler, complaint

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")  # the newest one also as PTX
FLAGS = ["-std=c++17", "-O3", "--ftz=true", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
# The runtime is linked in and its symbols kept to the module: another CUDA runtime in the process (torch's) is
# neither needed nor disturbed, whatever its version.
LINK_FLAGS = ["-Wl,--exclude-libs,ALL"]
SYSTEM_LIBRARIES = ["-lrt", "-lpthread", "-ldl"]

PIP_PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl"
ADVICE = f"install the CUDA toolkit, or: pip install {PIP_PACKAGES}; see docs/building.md"
PROGRAM = "#include <cuda_runtime.h>\n__global__ void kernel() {}\nvoid start() { kernel<<<1, 1>>>(); }\n"


class Unusable(Exception):
    """Why an nvcc cannot be used."""


class Nvcc:
    """An nvcc that was seen to compile; raises :class:`Unusable`, and PlatformError for an impossible list."""

    def __init__(self, command: list[str], compiler: Compiler) -> None:
        self.command = command
        if os.environ.get("CXX"):  # less a launcher like ccache before it and flags behind it
            self.command = [*command, "-ccbin", [w for w in compiler.command if not w.startswith("-")][-1]]
        user_flags = shlex.split(os.environ.get("NVCC_FLAGS", ""))
        message = complaint([*self.command, "-std=c++17", *user_flags, "-c"], PROGRAM, ".cu")
        if message is not None:
            lines = [line for line in message.splitlines() if "error" in line or "fatal" in line]
            first = (lines or message.strip().splitlines() or ["no message"])[0]
            raise Unusable(f"{shlex.join(command)} cannot compile a small program ({first.strip()})")
        self.cudart = self._cudart()
        known = re.findall(r"sm_(\d+)(\d)\b", self._says("--list-gpu-code"))
        architectures = gencode(
            os.environ.get("TORCH_CUDA_ARCH_LIST", ""), [".".join(pair) for pair in known]
        )
        self.flags = [*FLAGS, *architectures, *user_flags]

    def _says(self, *words: str) -> str:
        result = subprocess.run([*self.command, *words], capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    def _cudart(self) -> str:
        # nvcc may be a script that starts another one: ask it where its libraries are.
        folders = re.findall(r'"-L([^"]*)"', self._says("--dryrun", "program.cu"))
        for folder in folders:
            if Path(folder, "libcudart_static.a").exists():
                return str(Path(folder, "libcudart_static.a").resolve())
        raise Unusable(
            f"{shlex.join(self.command)} has no libcudart_static.a in {', '.join(folders) or 'any folder'}"
        )


def find_nvcc(compiler: Compiler) -> Nvcc | None:
    """The first nvcc that works; None, after one line that says so, if there is none or none is wanted."""
    skip, force = (os.environ.get(f"RD_KERNELS_{word}_CUDA") == "1" for word in ("SKIP", "FORCE"))
    if skip and force:
        raise PlatformError("RD_KERNELS_SKIP_CUDA=1 and RD_KERNELS_FORCE_CUDA=1 contradict each other")
    if skip:
        return None
    reasons = []
    for command in _candidates():
        try:
            return Nvcc(command, compiler)
        except Unusable as unusable:
            reasons.append(str(unusable))
    reason = "; ".join(reasons) or f"{os.environ.get('NVCC') or 'nvcc'} is not found"
    if force:
        raise PlatformError(f"RD_KERNELS_FORCE_CUDA=1, but {reason}; {ADVICE}")
    print(f"rd_kernels: the CUDA backend is left out: {reason}; {ADVICE}")
    return None


def _candidates() -> list[list[str]]:
    if os.environ.get("NVCC"):
        command = shlex.split(os.environ["NVCC"])
        return [command] if shutil.which(command[0]) else []
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    paths = [Path(home, "bin", "nvcc") for home in homes]
    paths += [Path(path) for path in [shutil.which("nvcc")] if path]
    paths.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in _packages():
        paths += sorted(Path(folder).glob("nvidia/cu[0-9]*/bin/nvcc"), reverse=True)
        paths.append(Path(folder, "nvidia/cuda_nvcc/bin/nvcc"))
    return [[str(path)] for path in dict.fromkeys(paths) if shutil.which(path)]


def _packages() -> list[str]:
    # pip hides the environment's packages from a build; a compiler among them is used all the same.
    return [*sys.path, sysconfig.get_path("purelib")]


def gencode(requested: str, known: list[str]) -> list[str]:
    """nvcc's flags for a list in torch's syntax, "8.0;9.0a 12.0+PTX"; for the default if it is empty."""
    words = requested.replace(";", " ").split()
    if not words:
        words = [word for word in DEFAULT_ARCHITECTURES if word.removesuffix("a") in known]
        # PTX of an "a" architecture runs nowhere else.
        words = [f"{w}+PTX" if w == max(words, key=_portability) else w for w in words]
    flags = []
    for word in dict.fromkeys(words):
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", word)
        number, suffix, ptx = match.groups() if match else (None, "", None)
        if number == "10.3":
            raise PlatformError(
                "TORCH_CUDA_ARCH_LIST names 10.3, for which CUDA 13's compiler is reported to generate wrong code; "
                "name 10.0 instead, whose code runs there"
            )
        if number not in known or (suffix and float(number) < (9 if suffix == "a" else 10)):
            raise PlatformError(
                f"TORCH_CUDA_ARCH_LIST names {word!r}, which this nvcc does not know; it knows "
                f"{', '.join(name for name in known if name != '10.3')}, each also with +PTX, and with the suffix a from "
                "9.0 on"
            )
        target = number.replace(".", "") + suffix
        codes = [f"sm_{target}", *([f"compute_{target}"] if ptx else [])]
        flags += [f"-gencode=arch=compute_{target},code={code}" for code in codes]
    return flags


def _portability(word: str) -> tuple[bool, float]:
    return not word.endswith("a"), float(word.removesuffix("a"))
