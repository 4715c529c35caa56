"""What the form of the groups costs in the logits op: masks and lists of ids against ids, forward and backward.

Every row is in one group in each form, so that all compute the same loss, which is checked. Forms take turns, and each
ratio is of two neighbouring calls; medians of many. On a GPU the time is that of the GPU, by events.

    python -m benchmarks.group_forms [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import rd_kernels as rd

SHAPES = ((1024, 30522), (16384, 1000))  # N, V
GROUPS = (8, 64)


def forms(ids: Tensor, num_groups: int) -> dict[str, Tensor]:
    """The same membership [N] four times."""
    nothing = torch.full_like(ids, -1)
    return {
        "ids": ids,
        "mask": ids[:, None] == torch.arange(num_groups, device=ids.device),
        "list of 2": torch.stack([ids, nothing], dim=1),
        "list of 4": torch.stack([ids, nothing, nothing, nothing], dim=1),
    }


def seconds(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def measure(
    rows: int, vocabulary: int, num_groups: int, dtype: torch.dtype, device: str, repeats: int
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,), device=device)
    ids = torch.randint(num_groups, (rows,), device=device)
    loss_fn = rd.GroupDROLoss(num_groups, rd.GroupDRO(0.0)).to(device)
    losses: dict[str, float] = {}

    def step(groups: Tensor) -> Tensor:
        logits.grad = None
        loss = loss_fn(logits, labels, groups)
        loss.backward()
        return loss

    variants = forms(ids, num_groups)
    for name, groups in variants.items():
        losses[name] = step(groups).item()
        assert abs(losses[name] - losses["ids"]) <= 1e-6 * losses["ids"], (name, losses)
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    of_ids: list[float] = []
    for _ in range(repeats):
        for name, groups in variants.items():
            base = seconds(lambda: step(ids), device)
            of_ids.append(base)
            ratios[name].append(seconds(lambda groups=groups: step(groups), device) / base)
    cells = "  ".join(f"{name} {statistics.median(values):.3f}" for name, values in ratios.items())
    milliseconds = 1e3 * statistics.median(of_ids)
    print(
        f"{rows} x {vocabulary} {str(dtype)[6:]}, G = {num_groups}: ids {milliseconds:.2f} ms; ratios: {cells}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    for rows, vocabulary in SHAPES:
        for num_groups in GROUPS:
            for dtype in (torch.float32, torch.bfloat16):
                measure(rows, vocabulary, num_groups, dtype, options.device, options.repeats)


if __name__ == "__main__":
    main()
