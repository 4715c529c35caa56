"""Whether a wheel can be given to others: size, contents, what its modules link to, its platform tag; then
``wheel_smoke.py`` in clean environments with the installed wheel, one for each version of torch.

    python -m tools.check_wheel dist/*.whl --cuda yes --expect-tag manylinux_2_28_x86_64 --torch 2.14.1
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
SMOKE = ROOT / "tools" / "wheel_smoke.py"

MAX_BYTES = 20_000_000
FOLDERS = ("rd_kernels", "robustdebias")  # beside NAME-VERSION.dist-info
SOURCES = (".o", ".a", ".c", ".cc", ".cpp", ".h", ".cu", ".cuh", ".ninja")
# libgomp stays outside: torch is loaded first and brings it, and a second OpenMP would compete with torch's threads.
OUTSIDE = {"libgomp.so.1"}
SYSTEM = re.compile(r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux[-\w]*\.so\.\d+")
# Mangled names of torch and c10, the CUDA driver's functions, and the runtime's, which must have been linked in.
FOREIGN_SYMBOL = re.compile(r"torch|3c10|_ZNK?2at\d|^_?_?cu(da)?[A-Z]")
LEGACY_TAGS = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


class BadWheel(Exception):
    """What is wrong with the wheel, in one line."""


def check_size(wheel: Path) -> str:
    size = wheel.stat().st_size
    if size >= MAX_BYTES:
        raise BadWheel(f"it has {size / 1e6:.1f} MB; {MAX_BYTES / 1e6:.0f} MB are allowed")
    return f"{size / 1e6:.1f} MB"


def check_contents(wheel: Path, cuda: bool | None) -> str:
    """``cuda``: whether ``_cuda`` must be there; None if both is right."""
    names = zipfile.ZipFile(wheel).namelist()
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    strangers = [name for name in names if name.split("/")[0] not in (*FOLDERS, metadata)]
    strangers += [name for name in names if name.endswith(SOURCES)]
    if strangers:
        raise BadWheel(f"it contains {', '.join(strangers[:5])}")
    wanted = ["rd_kernels/__init__.py", "robustdebias/__init__.py"]
    wanted += [f"{metadata}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")]
    missing = [name for name in wanted if name not in names]
    modules = [name for name in names if re.fullmatch(r"rd_kernels/_(native|cuda)\.[^/]*\.so", name)]
    kinds = sorted(name.split("/")[1].split(".")[0] for name in modules)
    missing += [
        f"rd_kernels/{name}" for name in ["_native", *(["_cuda"] if cuda else [])] if name not in kinds
    ]
    if missing:
        raise BadWheel(f"it lacks {', '.join(missing)}")
    if cuda is False and "_cuda" in kinds:
        raise BadWheel("it contains rd_kernels/_cuda, which it should not")
    return f"{len(names)} files, modules {' and '.join(kinds)}"


def check_links(wheel: Path) -> str:
    """Modules need system libraries only, and no symbol of torch or of CUDA."""
    seen = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if ".so" not in Path(name).suffixes:
                continue
            elf: Any = ELFFile(io.BytesIO(archive.read(name)))
            needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
            allowed = OUTSIDE if name.startswith("rd_kernels/_native") else set()
            strangers = [lib for lib in needed if lib not in allowed and not SYSTEM.fullmatch(lib)]
            if strangers:
                raise BadWheel(f"{name} needs {', '.join(strangers)}")
            symbols = elf.get_section_by_name(".dynsym").iter_symbols()
            undefined = {symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"}
            strangers = sorted(symbol for symbol in undefined if FOREIGN_SYMBOL.search(symbol))
            if strangers:
                raise BadWheel(f"{name} has the undefined symbols {', '.join(strangers[:5])}")
            seen.update(needed)
    return f"needs {', '.join(sorted(seen))}"


def check_tag(wheel: Path, expected: str | None) -> str:
    """The oldest manylinux that auditwheel finds possible, not younger than the file's name and ``expected`` say."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BadWheel(f"auditwheel says: {(result.stderr or result.stdout).strip()}")
    report = json.loads(result.stdout)
    if "error" in report:
        raise BadWheel(f"auditwheel says: {report['error']}")
    tag, libraries = report["sym_tag"], set(report["external_libs"]) - OUTSIDE
    possible = _glibc(tag)
    if possible is None or libraries or report["unsupported_isa"]:
        raise BadWheel(
            f"it is not manylinux but {tag}; libraries from outside: {', '.join(libraries) or 'none'}"
        )
    claims = [claim for claim in wheel.stem.split("-")[-1].split(".") if _glibc(claim)]
    for claim in [*claims, *([expected] if expected else [])]:
        limit = _glibc(claim)
        if limit is None or possible[1] != limit[1] or possible[0] > limit[0]:
            raise BadWheel(f"it fits {tag}, not {claim}")
    return f"fits {tag}"


def _glibc(tag: str) -> tuple[tuple[int, int], str] | None:
    """manylinux_2_28_x86_64 -> (2, 28), x86_64."""
    if match := re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", tag):
        return (int(match[1]), int(match[2])), match[3]
    if (match := re.fullmatch(r"(manylinux\d+)_(\w+)", tag)) and match[1] in LEGACY_TAGS:
        return LEGACY_TAGS[match[1]], match[2]
    return None


def smoke(wheel: Path, torch: str | None, cuda: bool | None) -> str:
    """Installs the wheel and torch (None: the version in constraints.txt) in a new environment and uses it there."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RD_KERNELS_"))
    }
    with tempfile.TemporaryDirectory(prefix="rd-kernels-wheel-") as folder:

        def run(*command: object) -> str:
            result = subprocess.run(
                list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            if result.returncode != 0:
                raise BadWheel(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
            return result.stdout

        # Compiling all of torch's Python files would take longer than the suite.
        pip = "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"
        run(sys.executable, "-m", "venv", "venv")
        python = Path(folder, "venv", "bin", "python")
        wanted = f"torch=={torch}" if torch else "torch"
        run(python, *pip, *([] if torch else ["--constraint", CONSTRAINTS]), wanted)
        run(python, *pip, wheel.resolve())
        words = [] if cuda is None else ["--cuda", "yes" if cuda else "no"]
        return run(python, "-I", SMOKE, *words).strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("wheel", type=Path, nargs="*", help="default: the only wheel in dist/")
    parser.add_argument("--cuda", choices=["auto", "yes", "no"], default="auto", help="must _cuda be in it?")
    parser.add_argument("--expect-tag", metavar="TAG", help="the youngest platform it may need")
    parser.add_argument(
        "--torch", action="append", default=[], help="one more version to use it with; repeatable"
    )
    parser.add_argument("--no-install", action="store_true", help="only look at the file")
    options = parser.parse_args(arguments)
    wheels = options.wheel or sorted(Path("dist").glob("*.whl"))
    if len(wheels) != 1:
        parser.error(f"name one wheel; there are {len(wheels)}")
    (wheel,) = wheels
    cuda = {"auto": None, "yes": True, "no": False}[options.cuda]
    print(wheel.name)
    checks = [
        ("size", lambda: check_size(wheel)),
        ("contents", lambda: check_contents(wheel, cuda)),
        ("links", lambda: check_links(wheel)),
        ("tag", lambda: check_tag(wheel, options.expect_tag)),
    ]
    if not options.no_install:
        for torch in [None, *options.torch]:
            checks.append((f"torch {torch or 'pinned'}", lambda torch=torch: smoke(wheel, torch, cuda)))
    for name, check in checks:
        try:
            print(f"  {name}: {check()}", flush=True)
        except BadWheel as bad:
            print(f"  {name}: BAD: {bad}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
