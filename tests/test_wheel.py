"""The source distribution, the wheels built from it, and that tools/check_wheel.py refuses bad ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_cuda_build import ONE_ARCHITECTURE, needs_nvcc, nvcc_here
from tests.test_native_build import ROOT, on_x86_64_glibc
from tools import check_wheel
from tools.check_wheel import BadWheel

PACKED = ["LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", "rd_kernels", "python"]
PACKED += [
    line.split()[1] for line in (ROOT / "MANIFEST.in").read_text().splitlines() if line.startswith("graft")
]
PACKED += ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"]


def run(*command: object, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """What a source distribution made from a copy of the tree unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in PACKED:
        target = folder / "tree" / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=ignored)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, target)
    (folder / "tree/rd_kernels/_native.stale.so").write_text("")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=folder / "tree", PYTHONPATH="")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build(source: Path, **env: str) -> Path:
    """Without build isolation: everything the build needs is among the development packages."""
    target = source.parent / "-".join(["dist", *env])
    command = "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"
    env = {"PYTHONPATH": "", "RD_KERNELS_SKIP_CUDA": "", "RD_KERNELS_FORCE_CUDA": "", **env}
    run(sys.executable, *command, "--wheel-dir", target, ".", cwd=source, **env)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def cpu_wheel(unpacked) -> Path:
    return build(unpacked, RD_KERNELS_SKIP_CUDA="1")


@pytest.fixture(scope="module")
def cuda_wheel(unpacked, cpu_wheel) -> Path:
    """In the folder where the other was built: its objects are used again."""
    return build(unpacked, RD_KERNELS_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=ONE_ARCHITECTURE)


def test_the_source_distribution_has_what_builds_and_tests_it(unpacked):
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    for folder in ("build_support", "csrc", "tests", "tools", "rd_kernels", "python"):
        here = [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix not in (".so", ".pyc") and path.is_file()
        ]
        assert {str(path.relative_to(ROOT)) for path in here} <= packed
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "Makefile"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def test_a_wheel_without_cuda(cpu_wheel):
    assert check_wheel.check_size(cpu_wheel).endswith("MB")
    assert check_wheel.check_contents(cpu_wheel, cuda=False).endswith("modules _native")
    with pytest.raises(BadWheel, match=r"lacks rd_kernels/_cuda$"):
        check_wheel.check_contents(cpu_wheel, cuda=True)


@needs_nvcc
def test_a_wheel_with_cuda(cuda_wheel):
    assert check_wheel.main([str(cuda_wheel), "--no-install", "--cuda", "yes"]) == 0
    with pytest.raises(BadWheel, match="contains rd_kernels/_cuda, which it should not"):
        check_wheel.check_contents(cuda_wheel, cuda=False)


def test_an_installed_wheel_works_outside_the_tree(request):
    """In a new environment with torch. 20 s on 2 cores."""
    cuda = nvcc_here()
    wheel = request.getfixturevalue("cuda_wheel" if cuda else "cpu_wheel")
    assert "CPU kernels right" in check_wheel.smoke(wheel, None, cuda)


@on_x86_64_glibc
def test_links_and_platform(cpu_wheel):
    assert "libgomp.so.1" in check_wheel.check_links(cpu_wheel)
    tag = check_wheel.check_tag(cpu_wheel, None).removeprefix("fits ")
    assert re.fullmatch(r"manylinux_2_\d+_x86_64", tag)
    assert check_wheel.check_tag(cpu_wheel, tag) == check_wheel.check_tag(cpu_wheel, "manylinux_2_99_x86_64")
    for expected in ("manylinux_2_5_x86_64", "manylinux1_x86_64", "manylinux_2_99_aarch64", "linux_x86_64"):
        with pytest.raises(BadWheel, match=f"it fits {tag}, not {expected}"):
            check_wheel.check_tag(cpu_wheel, expected)


def changed(wheel: Path, folder: Path, add: dict[str, bytes] | None = None, drop: str = "nothing") -> Path:
    """A copy with files added or in the place of others, and without those whose names contain ``drop``."""
    add = add or {}
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(folder / wheel.name, "w") as new:
        for name in old.namelist():
            if name not in add and drop not in name:
                new.writestr(name, old.read(name))
        for name, content in add.items():
            new.writestr(name, content)
    return folder / wheel.name


def test_a_wheel_that_is_too_large(cpu_wheel, tmp_path, capsys):
    wheel = changed(cpu_wheel, tmp_path, {"rd_kernels/much.bin": bytes(check_wheel.MAX_BYTES)})
    with pytest.raises(BadWheel, match=r"it has 2\d\.\d MB; 20 MB are allowed"):
        check_wheel.check_size(wheel)
    assert check_wheel.main([str(wheel)]) == 1
    assert "BAD: it has" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("add", "drop", "message"),
    [
        ({"csrc/bindings.cpp": b""}, "nothing", "contains csrc/bindings.cpp"),
        ({"tests/test_ops.py": b""}, "nothing", "contains tests/test_ops.py"),
        ({"rd_kernels/rows.o": b""}, "nothing", "contains rd_kernels/rows.o"),
        ({"rd_kernels.libs/libgomp-1.so": b""}, "nothing", "contains rd_kernels.libs"),
        ({}, "LICENSE", "lacks .*licenses/LICENSE"),
        ({}, "METADATA", "lacks .*METADATA"),
        ({}, "rd_kernels/_native", "lacks rd_kernels/_native"),
    ],
)
def test_contents_that_are_refused(cpu_wheel, tmp_path, add, drop, message):
    with pytest.raises(BadWheel, match=message):
        check_wheel.check_contents(changed(cpu_wheel, tmp_path, add, drop), None)


def module(folder: Path, source: str, *flags: str) -> bytes:
    (folder / "module.cpp").write_text(source)
    run(shutil.which("c++"), "-shared", "-fPIC", "module.cpp", "-o", "module.so", *flags, cwd=folder)
    return (folder / "module.so").read_bytes()


@on_x86_64_glibc
@pytest.mark.parametrize("library", ["torch", "c10", "cuda", "cudart"])
def test_a_module_that_needs_torch_or_cuda(cpu_wheel, tmp_path, library):
    """Linked against a library of that name; in _native, which may need libgomp."""
    module(tmp_path, "int there() { return 1; }")
    (tmp_path / "module.so").rename(tmp_path / f"lib{library}.so")
    native = module(tmp_path, "int there(); int here() { return there(); }", "-L.", f"-l{library}")
    (name,) = [n for n in zipfile.ZipFile(cpu_wheel).namelist() if n.startswith("rd_kernels/_native")]
    wheel = changed(cpu_wheel, tmp_path, {name: native})
    with pytest.raises(BadWheel, match=rf"{re.escape(name)} needs lib{library}\.so"):
        check_wheel.check_links(wheel)
    with pytest.raises(BadWheel, match=rf"it is not manylinux .*lib{library}\.so"):
        check_wheel.check_tag(wheel, None)


@on_x86_64_glibc
def test_only_the_cpu_module_may_need_openmp(cpu_wheel, tmp_path):
    code = '#include <omp.h>\nextern "C" int f() { return omp_get_max_threads(); }'
    wheel = changed(cpu_wheel, tmp_path, {"rd_kernels/_cuda.abi3.so": module(tmp_path, code, "-fopenmp")})
    with pytest.raises(BadWheel, match=r"_cuda.abi3.so needs libgomp.so.1"):
        check_wheel.check_links(wheel)


@on_x86_64_glibc
@pytest.mark.parametrize(
    ("declaration", "name"),
    [
        ('extern "C" int cuInit(unsigned);', "cuInit"),
        ('extern "C" int cudaMalloc(void**, unsigned long);', "cudaMalloc"),
        ("namespace c10 { void f(); }", "c10::f"),
        ("namespace at { int f(); }", "at::f"),
    ],
)
def test_a_module_with_a_foreign_symbol(cpu_wheel, tmp_path, declaration, name):
    code = f"{declaration}\nvoid* here() {{ return reinterpret_cast<void*>(&{name}); }}"
    wheel = changed(cpu_wheel, tmp_path, {"rd_kernels/_cuda.abi3.so": module(tmp_path, code)})
    with pytest.raises(BadWheel, match=f"_cuda.abi3.so has the undefined symbols .*{name.split(':')[0]}"):
        check_wheel.check_links(wheel)


@on_x86_64_glibc
def test_a_file_name_that_promises_too_much(cpu_wheel, tmp_path):
    for claim in ("manylinux_2_5_x86_64", "manylinux1_x86_64.manylinux_2_5_x86_64"):
        wheel = tmp_path / cpu_wheel.name.replace("linux_x86_64", claim)
        shutil.copy(cpu_wheel, wheel)
        with pytest.raises(BadWheel, match=r"it fits manylinux_2_.*, not manylinux"):
            check_wheel.check_tag(wheel, None)
