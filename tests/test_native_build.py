"""The build script, what it leaves in the module, and how the module behaves in a process: instruction sets,
OpenMP, fork, threads."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from rd_kernels.backends.cpu import CPUBackend

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "rd_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
X86_64_GLIBC = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"

on_x86_64_glibc = pytest.mark.skipif(not X86_64_GLIBC, reason="needs x86-64 and glibc")


def setup_py(*arguments: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Without CUDA, which test_cuda_build.py builds."""
    command = [sys.executable, "setup.py", *map(str, arguments)]
    env = {**os.environ, "RD_KERNELS_SKIP_CUDA": "1", "RD_KERNELS_FORCE_CUDA": "", **env}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, check=False)


def run_python(code: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
        timeout=240,
    )


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the build reads."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("build_support", "csrc", "rd_kernels", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": "/nowhere/c++"}, r"needs a C\+\+17 compiler, but /nowhere/c\+\+ is not found"),
        ({"RD_KERNELS_FORCE_CUDA": "1"}, "RD_KERNELS_SKIP_CUDA=1 and RD_KERNELS_FORCE_CUDA=1 contradict"),
        ({"CXXFLAGS": "-fno-such-flag"}, r"cannot build a C\+\+17 program"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tree, env, message):
    result = setup_py("-q", "build_ext", "--inplace", cwd=tree, **env)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert re.search(message, line)
    assert "Traceback" not in result.stderr


def test_setup_does_not_import_torch_and_packs_everything(tree):
    (tree / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = setup_py("-q", "build_py", "--build-lib", "packed", cwd=tree, PYTHONPATH=str(tree))
    assert result.returncode == 0, result.stderr
    packed = {str(path.relative_to(tree / "packed")) for path in (tree / "packed").rglob("*")}
    assert {"rd_kernels/__init__.py", "rd_kernels/backends/cpu.py"} <= packed
    assert {"robustdebias/__init__.py", "robustdebias/lexicons/gender.txt"} <= packed
    assert "robustdebias/demo_assets.txt" in packed
    assert not [path for path in packed if path.startswith(("tests", "python", "csrc"))]


def test_a_compiler_that_offers_nothing(tree):
    """No OpenMP, no x86 instruction sets: the module is built and right all the same, and what did
    not change is not compiled again."""
    wrapper = tree / "plain-c++"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    wrapper.write_text(
        "#!/bin/sh\n"
        'for word; do case "$word" in -fopenmp|-m*) echo "no $word" >&2; exit 1;; esac; done\n'
        f'exec {compiler} "$@"\n'
    )
    wrapper.chmod(0o755)

    def build() -> subprocess.CompletedProcess:
        return setup_py("build_ext", "--inplace", cwd=tree, CXX=str(wrapper), CXXFLAGS="-O0", MAX_JOBS="1")

    result = build()
    assert result.returncode == 0, result.stdout + result.stderr
    code = """
import torch, torch.nn.functional as F
from rd_kernels.backends.cpu import CPUBackend
backend = CPUBackend()
native = backend._native
print(native.has_openmp(), native.usable_isas(), native.isa())
logits, labels = torch.randn(9, 5000), torch.randint(5000, (9,))
loss, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
gradient = backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100)
expected = logits.softmax(1) - F.one_hot(labels, 5000)
torch.testing.assert_close(gradient, expected)
"""
    result = run_python(code, tree)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "False ['portable'] portable"

    assert "no work to do" in build().stdout
    (tree / "csrc/cpu/parallel.h").touch()
    changed = build().stdout
    assert "-o rows.o" in changed
    assert "-o bindings.o" not in changed


@on_x86_64_glibc
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.parametrize("optimisation", ["-O0", "-O3"])
def test_kernel_units_define_nothing_that_others_could_pick_up(tmp_path, optimisation):
    """An inline function of the AVX-512 unit that the linker kept would crash a machine without AVX-512."""
    target = tmp_path / "unit.o"
    command = [shutil.which("c++"), "-std=c++17", optimisation, "-mavx512f", f"-I{ROOT / 'csrc'}", "-c"]
    command += ["-DRD_HAVE_AVX512", "-DRD_ISA=avx512"]
    command += [str(ROOT / "csrc/cpu/row_kernels.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", "--extern-only", str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
    assert names == ["rd::cpu::avx512::kKernels"]


@on_x86_64_glibc
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
@pytest.mark.parametrize(
    ("namespace", "multiply_add", "register", "stream"),
    [("avx512", "vfmadd", "zmm", "vmovntps"), ("avx2", "vfmadd", "ymm", "vmovntps"), ("portable", "mulps", "xmm", "movntps")],
)  # fmt: skip
def test_the_inner_loops_are_vectorised(namespace, multiply_add, register, stream):
    """Each instruction set's loops work in its widest registers, stream, and call no exponential."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "-C", str(NATIVE)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = [
        part for part in listing.split("\n\n") if f"rd::cpu::{namespace}::" in part.split("\n", 1)[0]
    ]
    lines = "\n".join(functions).splitlines()
    assert sum(multiply_add in line and register in line for line in lines) >= 50
    assert any(stream in line and register in line for line in lines)
    assert not [
        line for line in lines if "call" in line and "exp" in line.split("call", 1)[1].split("rd::")[0]
    ]


@on_x86_64_glibc
def test_every_instruction_set_of_this_cpu_is_usable():
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1).split()
    expected = ["avx2"] if {"avx2", "fma"} <= set(flags) else []
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= set(flags):
        expected.insert(0, "avx512")
    assert CPUBackend()._native.usable_isas() == [*expected, "portable"]


def test_the_instruction_set_can_be_named():
    """By the environment variable, in a module that works without torch."""
    show = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", {str(NATIVE)!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
print(native.cpu.isa())
"""
    usable = CPUBackend()._native.usable_isas()
    assert usable[-1] == "portable"
    assert run_python(show, RD_KERNELS_CPU_ISA="").stdout.strip() == usable[0]
    for name in usable:
        assert run_python(show, RD_KERNELS_CPU_ISA=name).stdout.strip() == name
    result = run_python(show, RD_KERNELS_CPU_ISA="avx1024")
    assert "RD_KERNELS_CPU_ISA must be one of " + ", ".join(usable) in result.stderr
    with pytest.raises(ValueError, match=r"isa must be one of .* got 'mmx'"):
        CPUBackend()._native.set_isa("mmx")


def test_a_missing_module_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "rd_kernels._native", None)
    backend = CPUBackend()
    assert "python setup.py build_ext --inplace" in backend.missing()
    with pytest.raises(RuntimeError, match="the native module cannot be loaded"):
        backend.row_forward(torch.randn(1, 2), torch.tensor([0]), None, 0.0, -100)


def test_what_is_refused():
    backend = CPUBackend()
    assert backend.refuses(torch.randn(1, 2)) is None
    assert backend.refuses(torch.randn(1, 2).bfloat16()) is None
    assert "torch.float16" in backend.refuses(torch.randn(1, 2).half())
    assert "torch.float64" in backend.refuses(torch.randn(1, 2).double())
    assert "meta" in backend.refuses(torch.randn(1, 2, device="meta"))


FORWARD = """
import os, re, torch
from rd_kernels.backends.cpu import CPUBackend
torch.set_num_threads(2)
logits, labels = torch.randn(64, 9000), torch.randint(9000, (64,))
def forward():
    return CPUBackend().row_forward(logits, labels, None, 0.0, -100)[0]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_torch_and_the_kernels_share_one_openmp():
    code = FORWARD + "forward(); logits.softmax(1)\nprint(open('/proc/self/maps').read())"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert len(set(re.findall(r"\S+/lib(?:gomp|omp|iomp5)\S*\.so\S*", result.stdout))) == 1


def test_one_openmp_thread_gives_the_same_bits():
    code = """
import hashlib, torch, rd_kernels as rd
torch.manual_seed(0)
logits = torch.randn(64, 40000, requires_grad=True)
loss_fn = rd.GroupDROLoss(4, backend="cpu")
loss_fn(logits, torch.arange(64), torch.arange(64) % 4).backward()
print(torch.get_num_threads())
print(hashlib.sha256(logits.grad.numpy().tobytes() + loss_fn.group_weights.numpy().tobytes()).hexdigest())
"""
    results = [run_python(code, OMP_NUM_THREADS=threads) for threads in ("1", "2")]
    assert results[0].stdout.split()[:1] == ["1"], results[0].stderr
    assert results[0].stdout.split()[1] == results[1].stdout.split()[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_do_not_wait_for_the_parents_threads():
    """The parent ran a parallel region; a child asks for two threads and must neither hang nor differ."""
    code = (
        FORWARD
        + """
expected = forward()
children = []
for _ in range(3):
    if (pid := os.fork()) == 0:
        os._exit(0 if torch.equal(forward(), expected) else 3)
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
print(torch.equal(forward(), expected))
"""
    )
    result = run_python(code)
    assert result.stdout.split("\n")[:2] == ["[0, 0, 0]", "True"], result.stderr


def test_many_python_threads_at_once():
    """Calls run side by side without the GIL, each with its own team of threads."""
    backend = CPUBackend()
    logits, labels = torch.randn(40, 9000), torch.randint(9000, (40,))
    expected = backend.row_forward(logits, labels, None, 0.0, -100)
    _, normaliser, _ = expected
    gradient = backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100)
    differing: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            results = backend.row_forward(logits, labels, None, 0.0, -100)
            again = backend.row_backward(None, None, logits, labels, results[1], None, 0.0, -100)
            pairs = [*zip(results, expected, strict=True), (again, gradient)]
            if not all(torch.equal(a, b) for a, b in pairs):
                differing.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not differing
