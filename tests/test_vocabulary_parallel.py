"""A decoder sharded over the vocabulary computes what a whole one does, bit for bit the same on all ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import rd_kernels as rd
from tests.ranks import run

GROUPS, WIDTH, STEPS = 3, 4, 3
# What a case changes about: 12 rows of float32, 13 entries, ids, Group DRO. 13 is cut in 4, 4, 4, 1 or 7, 6.
CASES: dict[str, dict[str, Any]] = {
    "ids": {},
    "mask": {"mask": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 mask": {"dtype": torch.bfloat16, "mask": True},
    "float64": {"dtype": torch.float64},
    "erm": {"objective": rd.ERM()},
    "cvar": {"objective": rd.CVaR(0.5)},
    "fewer entries than ranks": {"vocabulary": 3},
    "one entry": {"vocabulary": 1},
    "no label": {"labels": [-100] * 12},
    "no rows": {"rows": 0},
    "sequences": {"leading": (3, 4)},
    "sequence level": {"leading": (3, 4), "loss": {"level": "sequence"}},
    "ignore_index in the vocabulary": {"labels": list(range(12)), "loss": {"ignore_index": 5}},
    "the label's logit is -inf": {"logits": [(6, -torch.inf)], "labels": [6] * 12},
    "a part is -inf": {"logits": [(slice(0, 7), -torch.inf)], "labels": [8] * 12},
    "all is -inf": {"logits": [(slice(None), -torch.inf)]},
    "+inf": {"logits": [(9, torch.inf)], "labels": [4] * 12},
    "the label's logit is +inf": {"logits": [(9, torch.inf)], "labels": [9] * 12},
    "NaN": {"logits": [(9, torch.nan)], "labels": [4] * 12},
    "a part is -inf and NaN": {"logits": [(slice(0, 8), -torch.inf), (5, torch.nan)], "labels": [9] * 12},
}  # fmt: skip
RUNS = [
    (op, name, backend)
    for op in ("logits", "linear")
    for name, case in CASES.items()
    for backend in ("reference", "cpu")
    if (op == "logits" or "logits" not in case) and (backend == "reference" or name != "float64")
]
# Of the largest: a few roundings of float32; the gradients' rounding to 16 bits. Linear op: hidden's gradient is the
# sum of what 4 ranks rounded.
ROUNDING = {torch.float32: 2**-20, torch.float64: 2**-48, torch.bfloat16: 2**-8}


def make(
    vocabulary=13, rows=12, dtype=torch.float32, mask=False, leading=None, labels=None, logits=None, **_
):
    """-> hidden, weight, bias, whose product is exact in 16 bits too, logits, labels, groups."""
    generator = torch.Generator().manual_seed(7)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    hidden, weight, bias = eighths(rows, WIDTH).mul(8).sign(), eighths(vocabulary, WIDTH), eighths(vocabulary)
    drawn = torch.randint(vocabulary, (rows,), generator=generator)
    groups = torch.randint(-1, GROUPS, (rows,), generator=generator)
    groups[2:3] = 0  # that of the row which a case changes
    if mask:
        groups = torch.rand(rows, GROUPS, generator=generator) < 0.5
    made = hidden @ weight.T + bias
    drawn[::5] = made[::5].argmax(dim=1)  # hits
    drawn[1:5:3] = -100
    drawn = drawn if labels is None else torch.tensor(labels)
    for columns, value in logits or []:
        made[2, columns] = value
    if leading is not None:
        hidden, made, drawn = (each.reshape(*leading, *each.shape[1:]) for each in (hidden, made, drawn))
        groups = groups[: leading[0]]
    return [*(each.to(dtype) for each in (hidden, weight, bias, made)), drawn, groups]


def train(
    op: str, case: dict[str, Any], backend: str, place: Callable[[Tensor, Any], Tensor], **options: Any
) -> list[Tensor]:
    """Some steps of one batch -> each step's loss, q and gradients, and the last one's hits."""
    hidden, weight, bias, logits, labels, groups = make(**case)
    options = {"objective": rd.GroupDRO(0.5), **case.get("loss", {}), **options, "backend": backend}
    options["objective"] = case.get("objective", options["objective"])
    loss_fn: nn.Module
    if op == "logits":
        loss_fn, inputs = rd.GroupDROLoss(GROUPS, **options), [place(logits, Shard(logits.dim() - 1))]
    else:
        loss_fn = rd.LinearGroupDROLoss(GROUPS, **options)
        inputs = [place(hidden, Replicate()), place(weight, Shard(0)), place(bias, Shard(0))]
    results = []
    for _ in range(STEPS):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        loss = loss_fn(*leaves[:2], labels, groups, *leaves[2:])
        gradients = torch.autograd.grad(loss, leaves)
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients]
        results += [loss.detach(), loss_fn.group_weights.clone(), *whole]
    return [*results, loss_fn._last[0]]


def whole(tensor: Tensor, placement: Any) -> Tensor:
    return tensor


def worker(rank: int) -> dict[Any, Any]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def place(tensor: Tensor, placement: Any) -> Tensor:
        return distribute_tensor(tensor, mesh, [placement])

    results: dict[Any, Any] = {}
    for op, name, backend in RUNS:
        results[op, name, backend] = [train(op, CASES[name], backend, place) for _ in range(2)]
    return results


@pytest.fixture(scope="module", params=[2, 4])
def trained(request) -> list[dict[Any, Any]]:
    return run(worker, request.param)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("op", "name", "backend"), RUNS)
def test_ranks_equal_one_process(trained, op, name, backend):
    first, again = trained[0][op, name, backend]
    for results in [again] + [rank[op, name, backend][0] for rank in trained[1:]]:
        assert same_bits(first, results)
    expected = train(op, CASES[name], backend, whole)
    for actual, one in zip(first, expected, strict=True):
        assert actual.dtype == one.dtype
        tolerance = ROUNDING[one.dtype] * (4 if op == "linear" else 1)
        largest = one[torch.isfinite(one)].abs().max().item() if torch.isfinite(one).any() else 0.0
        torch.testing.assert_close(actual, one, rtol=0, atol=tolerance * largest, equal_nan=True)


if __name__ == "__main__":
    pass
