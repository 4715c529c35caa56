"""What a figure belongs to: the machine and the versions, without the host's name."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import rd_kernels
from rd_kernels.backends import registry


def describe(device: str) -> dict[str, object]:
    """For the result file."""
    description: dict[str, object] = {
        "device": device,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa of rd_kernels": _isa(),
        "isa of torch": torch.backends.cpu.get_cpu_capability(),
        "os": f"{platform.system()} {re.match(r'[0-9.]*', platform.release())[0].rstrip('.')}",
        "huge pages": _huge_pages(),
        "python": platform.python_version(),
        "load": load(),
        "rd_kernels": rd_kernels.__version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    for package in (
        "torch",
        "triton",
        "transformers",
        "liger-kernel",
        "cut-cross-entropy",
        "quack-kernels",
        "flash-attn",
    ):
        description[package] = _version(package)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        description |= {
            "gpu": properties.name,
            "gpu memory GiB": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return description


def load() -> float | None:
    """The 1-minute load average. Well above 0 before a run, or above the threads after it: others ran beside it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def file_name(description: dict) -> str:
    """Where a result belongs: ``cpu-<model>-<cores>cores.json`` or ``cuda-<gpu>-<suites>.json``."""
    if description["device"] == "cuda":
        return f"cuda-{_slug(description['gpu'])}-{_slug(description['suites'])}.json"
    return f"cpu-{_slug(description['cpu'])}-{description['cores']}cores.json"


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """MiB that ``run`` needs beyond what is allocated before it; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    gc.collect()
    rd_kernels.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of freed blocks would hide what the run takes
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak VmHWM back to the present VmRSS
    except (OSError, AttributeError):
        return None
    before = _status_kib("VmRSS")
    run()
    return round((_status_kib("VmHWM") - before) / 2**10, 1)


def _status_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _cpu() -> str:
    """The model as the system names it; AMD's server parts need family and model to tell their generation."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE)
    )
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _isa() -> str | None:
    if registry.get("cpu").missing() is not None:
        return None
    return importlib.import_module("rd_kernels._native").cpu.isa()


def _huge_pages() -> str | None:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return re.search(r"\[(\w+)\]", text)[1]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _first_line("git", "-C", str(Path(__file__).parent), *arguments)


def _first_line(*command: str) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.partition("\n")[0]


def _slug(name: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", str(name)).lower()).strip("-")
