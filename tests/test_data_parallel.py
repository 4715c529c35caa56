"""Data-parallel processes train as one process does on the joined batches: DDP, FSDP2, accumulation; and one that dies.

The scenarios run one after the other in the same processes, which `worker` is: to start them is what takes time.
`tests/gpu/test_data_parallel.py` runs them on GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rd_kernels as rd

ROWS, WIDTH, HIDDEN, CLASSES, GROUPS, STEPS, MICRO = 24, 6, 8, 19, 4, 2, 3
OPS = "logits", "linear"
OBJECTIVES = {
    "erm": rd.ERM(), "decay": rd.GroupDRO(0.5), "hold": rd.GroupDRO(0.5, absent_groups="hold"),
    "cvar": rd.CVaR(0.4), "chi_square": rd.ChiSquare(0.5),
}  # fmt: skip
# Rows of each rank. "unlabelled": as unequal, but no row of rank 1 has a label. "apart": each group is on one rank.
SHARES: dict[str, dict[int, list[int]]] = {
    "unequal": {1: [24], 2: [5, 19], 4: [5, 1, 9, 9]},
    "unlabelled": {1: [24], 2: [5, 19], 4: [5, 1, 9, 9]},
    "empty": {1: [24], 2: [0, 24], 4: [9, 0, 6, 9]},
    "apart": {1: [24], 2: [12, 12], 4: [6, 6, 6, 6]},
}
# float32, whose sums over 24 rows are added in another order; then three optimizer steps with it.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
HANG, LOST = (
    3.0,
    60.0,
)  # seconds that the others wait for a rank that sleeps, and at most for one that is gone
PATIENCE = 480.0  # for processes that take 20 seconds on an idle machine


class Case(NamedTuple):
    op: str
    objective: str
    split: str
    groups: str  # "ids" or "mask"
    wrapper: str  # "ddp": around model and loss; "ddp_outside": the loss outside; "fsdp", "fsdp_kept": not resharded
    accumulation: str = (
        "none"  # "exact": accumulate(); "streaming": a mean over micro-batches of their losses
    )


FORMS = ("ids", "ddp"), ("mask", "ddp_outside")
CASES = [
    *(Case(*parts, *form) for *parts, form in product(OPS, OBJECTIVES, SHARES, FORMS)),
    *(
        Case(*parts, "ids", wrapper)
        for *parts, wrapper in product(OPS, ("hold", "cvar"), SHARES, ("fsdp", "fsdp_kept"))
    ),
    *(
        Case(op, "hold", "empty", "mask", wrapper, accumulation)
        for op, wrapper, accumulation in product(OPS, ("ddp", "ddp_outside", "fsdp"), ("exact", "streaming"))
    ),
]


def batch(case: Case, number: int, ranks: int, rank: int | None) -> tuple[Any, ...]:
    """x [N, WIDTH], labels [N], groups [N] or [N, GROUPS]: of one rank, or of all joined."""
    draw = torch.Generator(device="cpu").manual_seed(number)
    options: Any = {"generator": draw, "device": "cpu"}
    x = torch.randn(ROWS, WIDTH, **options)
    labels = torch.randint(CLASSES, (ROWS,), **options)
    labels[::7] = -100
    ids = torch.randint(-1, GROUPS, (ROWS,), **options)
    mask = torch.rand(ROWS, GROUPS, **options) < 0.4
    if case.split == "apart":
        ids = torch.arange(ROWS, device="cpu") // (ROWS // GROUPS)
        mask = ids[:, None] == torch.arange(GROUPS, device="cpu")
    if number % 3 == 1:  # a group that the whole batch has nothing of
        ids[ids == 2] = -1
        mask[:, 2] = False
    shares = SHARES[case.split][ranks]
    if case.split == "unlabelled":
        labels[shares[0] : sum(shares[:2])] = -100
    groups = ids if case.groups == "ids" else mask
    mine = slice(None) if rank is None else slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    return tuple(tensor[mine].to(torch.get_default_device()) for tensor in (x, labels, groups))


class Model(torch.nn.Module):
    """A layer, a decoder and a loss, which is called inside the forward if that gets labels."""

    def __init__(self, case: Case, process_group: Any = None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(WIDTH, HIDDEN)
        self.decoder = torch.nn.Linear(HIDDEN, CLASSES)
        self.op = case.op
        module = rd.GroupDROLoss if case.op == "logits" else rd.LinearGroupDROLoss
        self.loss_fn = module(GROUPS, OBJECTIVES[case.objective], process_group=process_group)

    def forward(self, x, labels=None, groups=None, call=None):
        hidden = torch.tanh(self.layer(x))
        output = self.decoder(hidden) if self.op == "logits" else hidden
        return output if labels is None else self.loss(output, labels, groups, call or self.loss_fn)

    def loss(self, output, labels, groups, call):
        """``call``: the loss, or a window's ``observe``."""
        if self.op == "logits":
            return call(output, labels, groups)
        return call(output, self.decoder.weight, labels, groups, self.decoder.bias)


def wrap(model: Model, case: Case, ranks: int) -> Any:
    """-> what is called with x, labels, groups, and perhaps ``call``, to give the loss."""
    if case.wrapper.startswith("fsdp"):
        mesh = init_device_mesh(str(torch.get_default_device().type), (ranks,))
        fully_shard(model.layer, mesh=mesh, reshard_after_forward=case.wrapper == "fsdp")
        return fully_shard(model, mesh=mesh, reshard_after_forward=case.wrapper == "fsdp")
    return DistributedDataParallel(model)


def train(case: Case, model: Model, wrapped: Any, data: Callable[[int], Any]) -> list[Any]:
    """A few optimizer steps over the batches number 0, 1, ... -> [loss, q, gradients..., parameters...] of each."""

    def run(batch: Any, call: Any = None) -> Any:
        if case.wrapper == "ddp_outside":
            x, labels, groups = batch
            return model.loss(wrapped(x), labels, groups, call or model.loss_fn)
        return wrapped(*batch, call)

    def without_sync(k: int) -> Any:
        if case.wrapper == "fsdp":
            wrapped.set_requires_gradient_sync(k == MICRO - 1)
        return wrapped.no_sync() if case.wrapper.startswith("ddp") and k < MICRO - 1 else nullcontext()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps: list[Any] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if case.accumulation == "none":
            losses = [run(data(step))]
            losses[0].backward()
        else:
            exact, losses = case.accumulation == "exact", []
            batches = [data(step * MICRO + k) for k in range(MICRO)]
            with model.loss_fn.accumulate() if exact else nullcontext() as window:
                if window is not None:
                    with torch.no_grad():
                        for each in batches:
                            run(each, window.observe)
                for k, each in enumerate(batches):
                    with without_sync(k):
                        losses.append(run(each) if exact else run(each) / MICRO)
                        losses[-1].backward()
        parameters = list(model.parameters())
        gradients = [whole(parameter.grad) for parameter in parameters]
        optimizer.step()
        loss = torch.stack(losses).detach().sum()
        steps.append([loss, model.loss_fn.group_weights.clone(), *gradients, *map(whole, parameters)])
    return steps


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def expected(case: Case, ranks: int) -> list[Any]:
    """One process with the joined batches; for exact accumulation all micro-batches in one."""

    def joined(step: int) -> Any:
        parts = [batch(case, step * MICRO + k, ranks, None) for k in range(MICRO)]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    model, alone = Model(case), case._replace(wrapper="none")
    if case.accumulation == "exact":
        return train(alone._replace(accumulation="none"), model, model, joined)
    return train(alone, model, model, lambda number: batch(case, number, ranks, None))


AUTOCAST = [Case(op, "decay", "unequal", "ids", "ddp") for op in OPS]


def autocast_step(model: Model, wrapped: Any, data: tuple[Any, ...]) -> list[Any]:
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = wrapped(*data)
    loss.backward()
    return [loss.detach(), model.loss_fn.group_weights, *(whole(p.grad) for p in model.parameters())]


def lose_a_rank(rank: int, folder: Path) -> None:
    """Rank 1 first sleeps, then ends, instead of calling the loss; the others tell what they got, and how soon."""
    case = Case("linear", "decay", "unequal", "ids", "ddp")
    told: dict[str, Any] = {}
    for name, timeout in (("sleeps", HANG), ("ends", LOST)):
        group = dist.new_group(timeout=timedelta(seconds=timeout))
        if rank == 1 and name == "ends":
            os._exit(3)
        if rank == 1:
            while len(list(folder.glob("told*"))) < dist.get_world_size() - 1:
                time.sleep(0.05)
            continue
        model, started = Model(case, group), time.monotonic()
        before = model.loss_fn.group_weights.clone()
        try:
            model(*batch(case, 0, dist.get_world_size(), rank))
            message = "no error"
        except RuntimeError as error:
            message = str(error)
        told[name] = message, time.monotonic() - started, torch.equal(before, model.loss_fn.group_weights)
        (folder / f"told{rank}").touch()
    torch.save(told, folder / f"lost{rank}.pt")
    os._exit(0)  # destroying the process group would wait for rank 1


def worker(rank: int, ranks: int, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device("cuda", rank))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", world_size=ranks, rank=rank,
        timeout=timedelta(seconds=PATIENCE),
    )  # fmt: skip
    results: dict[Any, Any] = {}

    def make(case: Case) -> tuple[Model, Any]:
        model = Model(case, dist.group.WORLD)
        return model, wrap(model, case, ranks)

    for case in CASES:
        data = partial(batch, case, ranks=ranks, rank=rank)
        results[case] = train(case, *make(case), data)
        if case.split == "unequal":
            results[case, "again"] = train(case, *make(case), data)
    for case in AUTOCAST:
        results[case, "autocast"] = autocast_step(*make(case), batch(case, 0, ranks, rank))
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    if not on_gpu:  # where NCCL would end the process and raise nothing
        lose_a_rank(rank, folder)
    dist.destroy_process_group()


class Ranks(NamedTuple):
    """What the processes left, and their exit codes."""

    results: list[dict[Any, Any]]
    lost: list[dict[str, Any]]  # of all but rank 1
    codes: list[int | None]


def spawn(ranks: int, folder: Path, device: str) -> Ranks:
    context = mp.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, ranks, folder, device)) for rank in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    load = partial(torch.load, map_location="cpu", weights_only=False)
    lost = [load(path) for path in sorted(folder.glob("lost*.pt"))]
    return Ranks([load(folder / f"{rank}.pt") for rank in range(ranks)], lost, codes)


def check(ranks: Ranks, case: Case) -> None:
    """Each rank has what one process computes on the joined batch, and all have the same bits."""
    right = expected(case, len(ranks.results))
    for rank in ranks.results:
        for found, first, step in zip(rank[case], ranks.results[0][case], right, strict=True):
            for own, others, single in zip(found, first, step, strict=True):
                torch.testing.assert_close(own, single.cpu(), **ROUNDING)
                assert torch.equal(own, others)


def check_again(ranks: Ranks, case: Case) -> None:
    for rank in ranks.results:
        for first, second in zip(rank[case], rank[case, "again"], strict=True):
            assert all(map(torch.equal, first, second))


def check_autocast(ranks: Ranks, case: Case) -> None:
    """Weight gradients are sums over a rank's rows, rounded to bfloat16: an error of 2^-9 of each rank's part."""
    model = Model(case)
    loss, q, *gradients = autocast_step(model, model, batch(case, 0, len(ranks.results), None))
    assert (loss.dtype, q.dtype) == (torch.float32, torch.float32)
    for rank in ranks.results:
        own_loss, own_q, *own_gradients = rank[case, "autocast"]
        assert (own_loss.dtype, own_q.dtype) == (loss.dtype, q.dtype)
        torch.testing.assert_close(own_loss, loss.cpu(), rtol=1e-3, atol=0)
        torch.testing.assert_close(own_q, q.cpu(), rtol=1e-3, atol=0)
        for own, gradient in zip(own_gradients, gradients, strict=True):
            assert own.dtype == gradient.dtype == torch.float32
            assert (own - gradient.cpu()).abs().max() <= 2**-7 * gradient.abs().max().cpu()


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return spawn(request.param, tmp_path_factory.mktemp("ranks"), "cpu")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_train_as_one_process_on_the_joined_batch(ranks: Ranks, case: Case) -> None:
    check(ranks, case)


@pytest.mark.parametrize("case", [case for case in CASES if case.split == "unequal"], ids="-".join)
def test_a_repeated_run_has_the_same_bits(ranks: Ranks, case: Case) -> None:
    check_again(ranks, case)


@pytest.mark.parametrize("case", AUTOCAST, ids="-".join)
def test_autocast_to_bfloat16(ranks: Ranks, case: Case) -> None:
    check_autocast(ranks, case)


def test_a_rank_that_hangs_is_an_error_after_the_timeout(ranks: Ranks) -> None:
    """And q is as it was: it is updated after the all-reduce."""
    assert len(ranks.lost) == len(ranks.results) - 1
    for told in ranks.lost:
        message, seconds, q_kept = told["sleeps"]
        assert "Timed out" in message or "reset by peer" in message or "closed" in message
        assert seconds < 10 * HANG
        assert q_kept
    assert any("Timed out" in told["sleeps"][0] for told in ranks.lost)


def test_a_rank_that_ends_is_an_error_within_the_timeout(ranks: Ranks) -> None:
    assert ranks.codes == [3 if rank == 1 else 0 for rank in range(len(ranks.results))]
    for told in ranks.lost:
        message, seconds, q_kept = told["ends"]
        assert "gloo" in message.lower()
        assert seconds < LOST
        assert q_kept
