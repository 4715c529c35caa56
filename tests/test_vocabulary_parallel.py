"""A decoder sharded over the vocabulary computes what a whole one does, bit for bit the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

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
    "NaN in no group": {"logits": [(0, torch.nan)], "labels": [9] * 12, "group": -1},
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
    vocabulary=13,
    rows=12,
    dtype=torch.float32,
    mask=False,
    leading=None,
    labels=None,
    logits=None,
    group=0,
    **_,
):
    """-> hidden, weight, bias, whose product is exact in 16 bits too, logits, labels, groups."""
    generator = torch.Generator().manual_seed(7)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    hidden, weight, bias = eighths(rows, WIDTH).mul(8).sign(), eighths(vocabulary, WIDTH), eighths(vocabulary)
    drawn = torch.randint(vocabulary, (rows,), generator=generator)
    groups = torch.randint(-1, GROUPS, (rows,), generator=generator)
    groups[2:3] = group  # of the row that a case changes
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
    op: str,
    case: dict[str, Any],
    backend: str,
    place: Callable[[Tensor, Any], Tensor],
    transform: Callable[[nn.Module], Any] = lambda loss_fn: loss_fn,
    **options: Any,
) -> list[Tensor]:
    """Some steps of one batch -> each step's loss, q and gradients, and the last one's statistics."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        made = make(**case)
    hidden, weight, bias, logits, labels, groups = (each.to(device) for each in made)
    if "part" in case:
        hidden, logits, labels, groups = (each[case["part"]] for each in (hidden, logits, labels, groups))
    options = {"objective": rd.GroupDRO(0.5), **case.get("loss", {}), **options, "backend": backend}
    options["objective"] = case.get("objective", options["objective"])
    loss_fn: nn.Module
    if op == "logits":
        loss_fn, inputs = rd.GroupDROLoss(GROUPS, **options), [place(logits, Shard(logits.dim() - 1))]
    else:
        loss_fn = rd.LinearGroupDROLoss(GROUPS, **options)
        inputs = [place(hidden, Replicate()), place(weight, Shard(0)), place(bias, Shard(0))]
    call, results = transform(loss_fn), []
    for _ in range(STEPS):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        loss = call(*leaves[:2], labels, groups, *leaves[2:])
        gradients = torch.autograd.grad(loss, leaves)
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients]
        results += [loss.detach(), loss_fn.group_weights.clone(), *whole]
    return [*results, loss_fn._last[0]]


def whole(tensor: Tensor, placement: Any) -> Tensor:
    return tensor


def sharder(mesh: Any) -> Callable[[Tensor, Any], Tensor]:
    return lambda tensor, placement: distribute_tensor(tensor, mesh, [placement])


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def everything(rank: int) -> dict[Any, Any]:
    """What all tests look at: one start of the processes is dear."""
    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    results: dict[Any, Any] = {each: train(each[0], CASES[each[1]], each[2], sharder(mesh)) for each in RUNS}
    results["again"] = train("linear", CASES["ids"], "cpu", sharder(mesh))
    return {**results, **data_parallel()} if ranks == 4 else results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Any, Any]]:
    return run(everything, 2)


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[Any, Any]]:
    return run(everything, 4)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs
    )


def assert_equal(results: list[Tensor], expected: list[Tensor], roundings: int = 1) -> None:
    for actual, one in zip(results, expected, strict=True):
        assert actual.dtype == one.dtype
        finite = one[torch.isfinite(one)]
        tolerance = roundings * ROUNDING[one.dtype] * (finite.abs().max().item() if finite.numel() else 0.0)
        torch.testing.assert_close(actual, one, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
@pytest.mark.parametrize(("op", "name", "backend"), RUNS)
def test_ranks_equal_one_process(ranks, op, name, backend, request):
    first, *others = (rank[op, name, backend] for rank in request.getfixturevalue(ranks))
    assert all(same_bits(first, other) for other in others)
    assert_equal(first, train(op, CASES[name], backend, whole), 4 if op == "linear" else 1)


def test_a_second_run_has_the_same_bits(four_ranks):
    assert same_bits(four_ranks[0]["again"], four_ranks[0]["linear", "ids", "cpu"])


def test_the_loss_is_that_of_torch_in_float64(four_ranks):
    hidden, weight, bias, _, labels, groups = make()
    logits = (hidden.double() @ weight.double().T + bias).requires_grad_()
    picked = torch.where(groups >= 0, labels, -100)
    loss = nn.functional.cross_entropy(logits, picked)
    (gradient,) = torch.autograd.grad(loss, logits)
    results = four_ranks[0]["logits", "erm", "cpu"]
    assert_equal([results[0], results[2]], [loss.detach().float(), gradient.float()])


# --- data parallelism and tensor parallelism


OBJECTIVES = {"group dro": rd.GroupDRO(0.5), "cvar": rd.CVaR(0.5), "over rows": rd.CVaR(0.3, over="rows")}
CUT = 7  # of 12 rows


def data_parallel() -> dict[Any, Any]:
    """Two parts of a batch, each on two ranks that share the vocabulary."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    part = slice(0, CUT) if mesh.get_local_rank("data") == 0 else slice(CUT, None)
    place, group = sharder(mesh["tensor"]), mesh["data"].get_group()
    results: dict[Any, Any] = {}
    for name, objective in OBJECTIVES.items():
        for op in ("logits", "linear"):
            case = {"objective": objective, "part": part}
            results[op, name] = train(op, case, "auto", place, process_group=group)
    results["no group"] = message(lambda: train("logits", {}, "auto", place))
    everyone = torch.distributed.group.WORLD
    results["wrong group"] = message(lambda: train("logits", {}, "auto", place, process_group=everyone))
    return results


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("op", ["logits", "linear"])
def test_data_parallel_ranks_join_their_batches(four_ranks, op, name):
    one, same, other, _ = (rank[op, name] for rank in four_ranks)
    assert same_bits(one, same)
    expected = train(op, {"objective": OBJECTIVES[name]}, "auto", whole)
    step = (len(one) - 1) // STEPS
    joined = list(one)
    for i in range(len(one) - 1):
        if i % step == 2:  # gradients of rows; DDP takes the mean of gradients
            joined[i] = torch.cat([one[i], other[i]]) / 2
        elif i % step > 2:
            joined[i] = (one[i] + other[i]) / 2
        else:
            assert torch.equal(one[i], other[i])
    assert_equal(joined, expected, 4)


def test_process_group_must_be_that_of_data_parallelism(four_ranks):
    for rank in four_ranks:
        assert "RuntimeError: several ranks need process_group" in rank["no group"]
        assert "ValueError: process_group must hold ranks with different batches" in rank["wrong group"]
