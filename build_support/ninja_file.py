"""build.ninja: one edge for each object and one that links them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from setuptools.errors import CompileError, PlatformError


@dataclass
class NinjaFile:
    """``compilers`` names a command for each kind of source; "cxx" is there and links."""

    compilers: dict[str, list[str]]
    folder: Path
    edges: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

    def compile(self, source: Path, name: str, flags: list[str], compiler: str = "cxx") -> None:
        self.objects.append(f"{name}.o")
        self.edges.append(
            f"build {name}.o: {compiler} {_ninja_path(source)}\n  flags = {_ninja_command(flags)}\n"
        )

    def link(self, target: Path, flags: list[str], libraries: list[str]) -> None:
        self.edges.append(
            f"build {_ninja_path(target)}: link {' '.join(self.objects)}\n"
            f"  flags = {_ninja_command(flags)}\n  libraries = {_ninja_command(libraries)}\n"
        )

    def run(self) -> None:
        rules = [
            f"rule {name}\n  command = {_ninja_command(command)} -MD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n"
            for name, command in self.compilers.items()
        ]
        cxx = _ninja_command(self.compilers["cxx"])
        rules.append(f"rule link\n  command = {cxx} $flags $in -o $out $libraries\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("".join(rules + self.edges))
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
