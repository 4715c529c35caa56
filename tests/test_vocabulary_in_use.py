"""A decoder sharded over the vocabulary as users have it: parallelize_module, accumulation, autocast, torch.compile; and
what is not served says so."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import rd_kernels as rd
from tests.ranks import run
from tests.test_vocabulary_parallel import (
    CUT,
    GROUPS,
    WIDTH,
    assert_equal,
    make,
    message,
    sharder,
    train,
    whole,
)


def everything(rank: int) -> dict[Any, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {**in_use(mesh), **compiled(mesh), "refused": refused(mesh)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Any, Any]]:
    return run(everything, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(WIDTH, 8), nn.Linear(8, 13)

    def fit(self, op: str, hidden_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Two steps -> what was learned."""
        x, *_, labels, groups = make()
        loss_fn = rd.GroupDROLoss(GROUPS) if op == "logits" else rd.LinearGroupDROLoss(GROUPS)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            hidden = self.encoder(x)
            if op == "logits":
                loss = loss_fn(self.decoder(hidden), labels, groups)
            else:
                decoder = self.decoder
                loss = loss_fn(hidden_of(hidden), decoder.weight, labels, groups, decoder.bias)
            loss.backward()
            optimizer.step()
        weights = [each.full_tensor() if isinstance(each, DTensor) else each for each in self.parameters()]
        return [each.detach() for each in weights]


def accumulated(op: str, place: Callable[[Tensor, Any], Tensor]) -> list[Tensor]:
    """Two micro-batches as one batch."""
    _, _, _, logits, labels, groups = make()
    loss_fn, results = rd.GroupDROLoss(GROUPS, rd.GroupDRO(0.5)), []
    leaves = [place(logits[rows], Shard(1)).requires_grad_() for rows in (slice(0, CUT), slice(CUT, None))]
    batches = list(zip(leaves, labels.split([CUT, 5]), groups.split([CUT, 5]), strict=True))
    with loss_fn.accumulate() as window:
        for batch in batches:
            window.observe(*batch)
        for batch in batches:
            loss_fn(*batch).backward()
    for leaf in leaves:
        results.append(leaf.grad.full_tensor() if isinstance(leaf.grad, DTensor) else leaf.grad)
    return [*results, loss_fn.group_weights]


def under_autocast(place: Callable[[Tensor, Any], Tensor]) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return train("linear", {}, "auto", place)


def in_use(mesh: Any) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for op in ("logits", "linear"):
        model = Model()
        parallelize_module(model.decoder, mesh, ColwiseParallel(use_local_output=False))
        results["model", op] = model.fit(op, lambda x: DTensor.from_local(x, mesh, [Replicate()]))
    results["accumulated"] = accumulated("logits", sharder(mesh))
    results["autocast"] = under_autocast(sharder(mesh))

    def gathered(tensor: Tensor, placement: Any) -> Tensor:  # as sequence parallelism leaves it
        start = Shard(0) if placement.is_replicate() else placement
        return distribute_tensor(tensor, mesh, [start]).redistribute(placements=[placement])

    results["gathered"] = train("linear", {}, "auto", gathered)
    return results


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_a_parallelized_decoder_learns_what_a_whole_one_does(two_ranks, op):
    expected = Model().fit(op, lambda x: x)
    for rank in two_ranks:
        assert_equal(rank["model", op], expected, 2)


def test_accumulation(two_ranks):
    assert_equal(two_ranks[0]["accumulated"], accumulated("logits", whole))


def test_autocast(two_ranks):
    expected = under_autocast(whole)
    assert_equal(two_ranks[0]["autocast"], expected, 4 * 2**12)  # the rounding is that of bfloat16


def test_hidden_states_that_were_just_gathered(two_ranks):
    assert_equal(two_ranks[0]["gathered"], train("linear", {}, "auto", whole), 4)


def compiled(mesh: Any) -> dict[Any, Any]:
    """Both ops in one graph; inductor would only compile what aot_eager runs."""
    return {
        ("compiled", op): train(op, {}, "auto", sharder(mesh), transform=_compile)
        for op in ("logits", "linear")
    }


def _compile(loss_fn: nn.Module) -> Any:
    return torch.compile(loss_fn, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_torch_compile(two_ranks, op):
    assert_equal(two_ranks[0]["compiled", op], train(op, {}, "auto", whole), 4)


# --- what is not served says so

REFUSED = {
    "replicated logits": r"ValueError: logits .*\(Replicate\(\),\).* allowed is \(Shard\(dim=1\),\)",
    "logits of a sharded batch": r"ValueError: logits .*allowed is",
    "partial logits": r"ValueError: logits .*allowed is",
    "logits on two dimensions": r"ValueError: logits .*mesh of shape \(2, 1\)",
    "logits of unequal pieces": r"ValueError: logits .* 3 entries of the vocabulary on this rank",
    "a rank outside": r"RuntimeError: several ranks|ValueError: logits is on .* of which rank 1 is no part",
    "labels": r"TypeError: labels must be a plain tensor.*labels\.full_tensor\(\)",
    "groups": r"TypeError: groups must be a plain tensor",
    "plain logits": r"TypeError: labels must be a plain tensor",
    "group_weights": r"TypeError: group_weights must be a plain tensor",
    "inplace_backward": r"ValueError: inplace_backward is not served where the vocabulary is sharded",
    "entropy": r"ValueError: entropy is not served",
    "top_k": r"ValueError: top_k is not served",
    "a label out of range": r"ValueError: labels: 1 of them are neither ignore_index nor in \[0, 13\)$",
    "plain hidden": r"TypeError: hidden is a plain tensor.*FSDP.*weight\.full_tensor\(\)",
    "plain weight": r"TypeError: weight is a plain tensor",
    "plain bias": r"TypeError: bias is a plain tensor",
    "hidden of a sharded batch": r"ValueError: hidden .*allowed is \(Replicate\(\),\)",
    "replicated weight": r"ValueError: weight .*allowed is \(Shard\(dim=0\),\)",
    "weight sharded over D": r"ValueError: weight .*allowed is",
    "replicated bias": r"ValueError: bias .*allowed is",
    "another mesh": r"ValueError: hidden is on .*, but weight is on",
    "memory_budget": r"ValueError: memory_budget is not served",
    "capacity": r"ValueError: capacity is not served",
    "filter_eps": r"ValueError: filter_eps is not served",
    "a second backward": r"RuntimeError: .*modified by an inplace operation",
    "a second derivative": r"RuntimeError: .*create_graph=True is not supported",
}


def refused(mesh: Any) -> dict[str, str]:
    hidden, weight, bias, logits, labels, groups = make()
    place, q = sharder(mesh), torch.full((GROUPS,), 1 / GROUPS)
    square = init_device_mesh("cpu", (2, 1))
    other, alone = DeviceMesh("cpu", [1, 0]), DeviceMesh("cpu", [0])
    z, h, w, b = (
        place(t, s)
        for t, s in ((logits, Shard(1)), (hidden, Replicate()), (weight, Shard(0)), (bias, Shard(0)))
    )
    bad = labels.clone()
    bad[0] = 13
    unequal = DTensor.from_local(logits[:, :3], mesh, [Shard(1)], shape=logits.shape, stride=logits.stride())

    def rows(logits=z, labels=labels, groups=groups, q=q, **options):
        options = {"inplace_backward": False, **options}
        loss_fn = rd.GroupDROLoss(GROUPS, **options)
        loss_fn.group_weights = q
        return lambda: loss_fn(logits, labels, groups)

    def linear(hidden=h, weight=w, bias=b, **options):
        return lambda: rd.LinearGroupDROLoss(GROUPS, **options)(hidden, weight, labels, groups, bias)

    def backward(loss, **options):
        loss.backward(**options)

    loss = linear(h.detach().requires_grad_(), w.detach().requires_grad_())()
    loss.backward(retain_graph=True)
    calls = {
        "replicated logits": rows(place(logits, Replicate())),
        "logits of a sharded batch": rows(place(logits, Shard(0))),
        "partial logits": rows(DTensor.from_local(logits, mesh, [Partial()])),
        "logits on two dimensions": rows(distribute_tensor(logits, square, [Shard(1), Shard(0)])),
        "logits of unequal pieces": rows(unequal),
        "a rank outside": rows(distribute_tensor(logits, alone, [Shard(1)])),
        "labels": rows(labels=place(labels, Replicate())),
        "groups": rows(groups=place(groups, Replicate())),
        "plain logits": rows(logits, place(labels, Replicate())),
        "group_weights": rows(q=place(q, Replicate())),
        "inplace_backward": rows(inplace_backward=True),
        "entropy": rows(entropy=True),
        "top_k": rows(top_k=2),
        "a label out of range": rows(labels=bad, q=q),
        "plain hidden": linear(hidden),
        "plain weight": linear(weight=weight),
        "plain bias": linear(bias=bias),
        "hidden of a sharded batch": linear(place(hidden, Shard(0))),
        "replicated weight": linear(weight=place(weight, Replicate())),
        "weight sharded over D": linear(weight=place(weight, Shard(1))),
        "replicated bias": linear(bias=place(bias, Replicate())),
        "another mesh": linear(distribute_tensor(hidden, other, [Replicate()])),
        "memory_budget": linear(memory_budget=1 << 20),
        "capacity": linear(capacity=0.5),
        "filter_eps": linear(filter_eps=0.1),
        "a second backward": loss.backward,
        "a second derivative": lambda: linear(h.detach().requires_grad_())().backward(create_graph=True),
    }
    messages = {name: message(call) for name, call in calls.items()}
    assert torch.equal(q, torch.full((GROUPS,), 1 / GROUPS))
    return messages


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_raises_by_name(two_ranks, name):
    for rank in two_ranks:
        assert rank["refused"].keys() == REFUSED.keys()
        assert re.match(REFUSED[name], rank["refused"][name], re.DOTALL), rank["refused"][name]


def test_plain_tensors_do_not_import_dtensor():
    code = (
        "import sys, torch, rd_kernels as rd; before = 'torch.distributed.tensor' in sys.modules;"
        "weight = torch.nn.Parameter(torch.randn(5, 4)); ids = torch.tensor([0, 1]);"
        "rd.LinearGroupDROLoss(2)(torch.randn(2, 4), weight, ids, ids).backward();"
        "assert not before and 'torch.distributed.tensor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_distributed(monkeypatch):
    class Own(Tensor):
        pass

    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", None)  # importing it raises
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    groups = torch.zeros(4, dtype=torch.int64)
    loss = rd.GroupDROLoss(1)(logits.as_subclass(Own), labels, groups)
    monkeypatch.undo()
    assert_equal([loss.as_subclass(Tensor)], [nn.functional.cross_entropy(logits, labels)])
