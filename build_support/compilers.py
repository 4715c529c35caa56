"""The C++ compiler, and what it offers, found out by trying."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools.errors import CompileError, PlatformError

ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
X86_64_PROGRAM = """
#ifndef __x86_64__
#error
#endif
int main() { return 0; }
"""
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class Compiler:
    """The C++ compiler: ``CXX``, else the first of c++, g++ and clang++."""

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
        return complaint([*self.command, *self.user_flags, *flags], program, ".cpp", self.link_flags)


def complaint(
    command: list[str], program: str, suffix: str, last_words: list[str] | None = None
) -> str | None:
    """What ``command`` says to a program that it cannot compile; None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"program{suffix}")
        source.write_text(program)
        words = [*command, str(source), "-o", str(source.with_suffix("")), *(last_words or [])]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else result.stderr + result.stdout
