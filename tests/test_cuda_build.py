"""How the build finds nvcc, what it asks of it, and what it says when there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.errors import PlatformError

from build_support import cuda
from build_support.compilers import Compiler
from tests.test_native_build import setup_py, tree  # noqa: F401

# What the tests with a real nvcc compile for: one architecture, for their time.
ONE_ARCHITECTURE = "9.0a"
KNOWN = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"]


def arguments(*targets: str) -> list[str]:
    return [f"-gencode=arch=compute_{t.partition('=')[0]},code={t.partition('=')[2]}" for t in targets]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("8.0", ["80=sm_80"]),
        ("8.0;9.0a 12.0+PTX", ["80=sm_80", "90a=sm_90a", "120=sm_120", "120=compute_120"]),
        (" 8.0 ; 8.0;", ["80=sm_80"]),
        ("10.0f 12.1a", ["100f=sm_100f", "121a=sm_121a"]),
        (
            "",
            ["80=sm_80", "86=sm_86", "89=sm_89", "90a=sm_90a", "100=sm_100", "120=sm_120", "120=compute_120"],
        ),
    ],
)
def test_architectures_in_torchs_syntax(requested, expected):
    assert cuda.gencode(requested, KNOWN) == arguments(*expected)


def test_the_default_is_reduced_to_what_nvcc_knows():
    """The newest that is left gets the PTX; that of 9.0a would run on nothing newer."""
    older = ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0"]
    expected = ["80=sm_80", "86=sm_86", "89=sm_89", "89=compute_89", "90a=sm_90a"]
    assert cuda.gencode("", older) == arguments(*expected)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (
            "8.0 13.7",
            "names '13.7', which this nvcc does not know; it knows 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0",
        ),
        ("Hopper", "names 'Hopper'"),
        ("8.0a", "names '8.0a'.*suffix a from 9.0 on"),
        ("9.0f", "names '9.0f'"),
        ("9.0,8.0", "names '9.0,8.0'"),
        ("10.3", "10.3, for which CUDA 13's compiler is reported to generate wrong code; name 10.0"),
        ("10.3a+PTX", "names 10.3"),
    ],
)
def test_architectures_that_are_refused(requested, message):
    with pytest.raises(PlatformError, match=message) as caught:
        cuda.gencode(requested, KNOWN)
    assert "\n" not in str(caught.value)


@pytest.fixture
def nothing(monkeypatch) -> pytest.MonkeyPatch:
    """No variable that matters, no nvcc on PATH, in /usr/local or among the packages."""
    for name in ("NVCC", "NVCC_FLAGS", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RD_KERNELS_SKIP_CUDA", "RD_KERNELS_FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    folders = [folder for folder in os.environ["PATH"].split(":") if not Path(folder, "nvcc").exists()]
    folders += [str(Path(shutil.which("c++")).parent)]
    monkeypatch.setenv("PATH", ":".join(folders))
    exists = shutil.which
    hidden = ("/usr/local/cuda", "/usr/local/bin/nvcc")
    monkeypatch.setattr(cuda.shutil, "which", lambda n: None if str(n).startswith(hidden) else exists(n))
    monkeypatch.setattr(cuda, "_packages", list)
    return monkeypatch


def fake_nvcc(folder: Path, *, cudart: bool = True, complaint: str = "") -> Path:
    """Answers as nvcc does and writes down its arguments."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (folder / "lib").mkdir()
    if cudart:
        (folder / "lib" / "libcudart_static.a").write_text("")
    nvcc.write_text(f"""#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
  *--list-gpu-code*) echo sm_80; echo sm_90; echo sm_120;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L{folder}/stubs" "-L{folder}/lib"' >&2;;
  *) [ -z "{complaint}" ] || {{ echo "program.cu(1)" >&2; echo "{complaint}" >&2; exit 1; }};;
esac
""")
    nvcc.chmod(0o755)
    return nvcc


def test_where_nvcc_is_looked_for(nothing, tmp_path):
    """$NVCC, $CUDA_HOME, $CUDA_PATH, PATH, then pip's packages; the first that works."""
    places = [
        "variable",
        "home",
        "path",
        "search",
        "site/nvidia/cu13",
        "site/nvidia/cu12",
        "site/nvidia/cuda_nvcc",
    ]
    nvccs = {name: fake_nvcc(tmp_path / name) for name in places}
    nothing.setattr(cuda, "_packages", lambda: [str(tmp_path / "site")])
    compiler = Compiler()

    def found() -> str:
        return cuda.find_nvcc(compiler).command[0]

    for name in ["site/nvidia/cu13", "site/nvidia/cu12", "site/nvidia/cuda_nvcc"]:
        assert found() == str(nvccs[name])
        shutil.rmtree(tmp_path / name)
    nothing.setenv("PATH", f"{tmp_path}/search/bin:{os.environ['PATH']}")
    assert found() == str(nvccs["search"])
    nothing.setenv("CUDA_PATH", str(tmp_path / "path"))
    assert found() == str(nvccs["path"])
    nothing.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert found() == str(nvccs["home"])
    nothing.setenv("NVCC", f"env A=1 {nvccs['variable']}")
    assert cuda.find_nvcc(compiler).command == ["env", "A=1", str(nvccs["variable"])]

    nothing.delenv("NVCC")
    shutil.rmtree(tmp_path / "home")
    fake_nvcc(tmp_path / "home", complaint="error: unsupported GNU version")
    assert found() == str(nvccs["path"])


def test_what_is_asked_of_nvcc(nothing, tmp_path):
    nothing.setenv("NVCC", str(fake_nvcc(tmp_path)))
    nothing.setenv("CXX", f"env {shutil.which('c++')} -O1")
    nothing.setenv("NVCC_FLAGS", "--threads 2")
    nvcc = cuda.find_nvcc(Compiler())
    assert nvcc.command == [str(tmp_path / "bin/nvcc"), "-ccbin", shutil.which("c++")]
    assert nvcc.cudart == str(tmp_path / "lib/libcudart_static.a")
    expected = arguments("80=sm_80", "90a=sm_90a", "120=sm_120", "120=compute_120")
    assert nvcc.flags == [*cuda.FLAGS, *expected, "--threads", "2"]
    assert "-std=c++17 --threads 2 -c" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "variable", "message"),
    [
        (None, "", "nvcc is not found"),
        (None, "/nowhere/nvcc", "/nowhere/nvcc is not found"),
        (
            {"complaint": "fatal: unsupported GNU version"},
            None,
            r"a small program \(fatal: unsupported GNU version\)",
        ),
        ({"cudart": False}, None, "has no libcudart_static.a in .*/stubs, .*/lib"),
    ],
)
def test_without_a_usable_nvcc_one_line_says_so(nothing, tmp_path, capsys, arguments, variable, message):
    nvcc = fake_nvcc(tmp_path, **arguments) if arguments else variable
    nothing.setenv("NVCC", str(nvcc))
    assert cuda.find_nvcc(Compiler()) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("rd_kernels: the CUDA backend is left out: ")
    assert "pip install nvidia-cuda-nvcc" in line
    nothing.setenv("RD_KERNELS_FORCE_CUDA", "1")
    with pytest.raises(PlatformError, match=f"RD_KERNELS_FORCE_CUDA=1, but .*{message}") as caught:
        cuda.find_nvcc(Compiler())
    assert "\n" not in str(caught.value)
    nothing.delenv("RD_KERNELS_FORCE_CUDA")
    nothing.setenv("RD_KERNELS_SKIP_CUDA", "1")
    assert cuda.find_nvcc(Compiler()) is None
    assert capsys.readouterr().out == ""


def nvcc_here() -> bool:
    try:
        cuda.Nvcc(cuda._candidates()[0], Compiler())
    except (IndexError, cuda.Unusable, PlatformError):
        return False
    return True


needs_nvcc = pytest.mark.skipif(not nvcc_here(), reason="needs nvcc")

PLACEHOLDER = {
    "one.cu": """#include "cuda/both.h"
__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
int one(float* x) { twice<<<1, 32>>>(x); return cudaGetLastError(); }
""",
    "two.cu": '#include "cuda/both.h"\nint two() { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess ? n : -1; }\n',
    "both.h": "#pragma once\nint one(float*);\nint two();\n",
    "bindings.cpp": """#include <pybind11/pybind11.h>
#include "cuda/both.h"
PYBIND11_MODULE(_cuda, m) {
  m.def("devices", &two);
  m.def("run", [](size_t x) { return one(reinterpret_cast<float*>(x)); });
}
""",
}


@needs_nvcc
def test_a_module_is_built_again_only_where_it_changed(tree):  # noqa: F811
    """With small sources in the place of the kernels, which take long; without a driver the module loads."""
    shutil.rmtree(tree / "csrc/cuda", ignore_errors=True)
    (tree / "csrc/cuda").mkdir()
    for name, text in PLACEHOLDER.items():
        (tree / "csrc/cuda" / name).write_text(text)

    def build(**env: str) -> str:
        env = {"RD_KERNELS_SKIP_CUDA": "", "TORCH_CUDA_ARCH_LIST": ONE_ARCHITECTURE, **env}
        result = setup_py("build_ext", "--inplace", cwd=tree, CXXFLAGS="-O0", **env)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    output = build(MAX_JOBS="1", NVCC_FLAGS="-DEXTRA")
    assert output.count("code=sm_90a") == 2
    assert output.count("-DEXTRA") == 2
    assert build(MAX_JOBS="1", NVCC_FLAGS="-DEXTRA").count("no work to do") == 2
    (tree / "csrc/cuda/one.cu").touch()
    output = build(NVCC_FLAGS="-DEXTRA")
    assert "-o one.o" in output
    assert "-o two.o" not in output
    assert "-o bindings.o" not in output
    (tree / "csrc/cuda/both.h").touch()
    output = build(NVCC_FLAGS="-DEXTRA")
    assert all(f"-o {name}.o" in output for name in ("one", "two", "bindings"))

    (module,) = (tree / "rd_kernels").glob("_cuda*.so")
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", {str(module)!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
print(native.devices())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) >= -1

    # What an earlier build left is neither used nor packed by a build without CUDA.
    build(RD_KERNELS_SKIP_CUDA="1")
    assert not list(tree.rglob("_cuda*.so"))
    assert list((tree / "rd_kernels").glob("_native*.so"))


@needs_nvcc
def test_an_impossible_architecture_is_one_line(tree):  # noqa: F811
    result = setup_py("build_ext", cwd=tree, RD_KERNELS_SKIP_CUDA="", TORCH_CUDA_ARCH_LIST="8.0 99.0")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "names '99.0', which this nvcc does not know" in line
    assert "Traceback" not in result.stderr
