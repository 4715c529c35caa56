"""A function on several ranks: processes with a process group between them, and what each returned."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run(
    worker: Callable[..., Any], ranks: int, *args: Any, device: str = "cpu", timeout: float = 240
) -> list[Any]:
    """``worker(rank, *args)`` on so many ranks -> what each returned, CPU tensors and plain Python.

    The ranks are spawned processes of one thread with gloo, or with ``device="cuda"`` NCCL and a GPU each, between them,
    so ``worker`` is a function of a module. It takes seconds to start them: tests share a call in a fixture.

    Raises: torch.multiprocessing's ProcessRaisedException, with its traceback, for what a worker raised;
    TimeoutError after ``timeout`` seconds, for instance where ranks wait for each other. No process is left.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, end = Path(name), time.monotonic() + timeout
        processes = mp.spawn(_start, (worker, ranks, args, folder, device), nprocs=ranks, join=False)
        while not processes.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                for process in processes.processes:
                    process.kill()
                    process.join()
                raise TimeoutError(f"{worker.__name__} on {ranks} ranks took more than {timeout} seconds")
        return [torch.load(folder / str(rank), weights_only=False) for rank in range(ranks)]


def _start(
    rank: int, worker: Callable[..., Any], ranks: int, args: tuple[Any, ...], folder: Path, device: str
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        world_size=ranks,
        rank=rank,
    )
    torch.save(worker(rank, *args), folder / str(rank))
    torch.distributed.barrier()  # none leaves while another still talks to it
    torch.distributed.destroy_process_group()
