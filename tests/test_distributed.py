"""K ranks with a process group compute one process's loss, gradients, state and report on the joined batch.

Sequences are cut unevenly, one rank has none, one has no labelled row, and one group lives on a single rank.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import rd_kernels as rd
from tests import ranks

B, T, V, D, G = 9, 3, 11, 5, 4
CUTS = {2: [0, 4, 9], 4: [0, 2, 2, 4, 9]}  # with four ranks the second has no rows, the third no labelled one
OBJECTIVES = {
    "ERM": rd.ERM(),
    "GroupDRO": rd.GroupDRO(0.5),
    "GroupDRO, adjusted, hold": rd.GroupDRO(0.5, 2.0, [5, 9, 3, 20], "hold"),
    "GroupDRO, average, floor": rd.GroupDRO(0.5, loss_ema=0.3, floor=0.05),
    "CVaR": rd.CVaR(0.4),
    "CVaR, rows": rd.CVaR(0.3, over="rows"),
    "ChiSquare": rd.ChiSquare(0.3),
    "ChiSquare, rows": rd.ChiSquare(0.3, over="rows"),
    "KL": rd.KL(0.2),
    "KL, rows": rd.KL(0.2, over="rows"),
    "Tilted": rd.Tilted(1.5),
    "Tilted, rows": rd.Tilted(1.5, over="rows"),
    "WorstGroup": rd.WorstGroup(),
    "DoReMi": rd.DoReMi(),
}
FORMS = {2: ("ids", "mask", "lists"), 4: ("mask",)}
OPS = ("logits", "linear")
STEPS = 2


def batch(form: str, step: int):
    """Hidden states, labels, groups (one a sequence) and reference losses."""
    generator = torch.Generator().manual_seed(7 + step)
    hidden = torch.randn(B, T, D, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[:, 1][::2] = -100
    labels[2:4] = -100
    reference = torch.rand(B, T, generator=generator) * 3
    ids = torch.tensor([0, 1, 0, 1, 1, 0, 2, -1, 2])  # group 2 on the last rank only, group 3 nowhere
    if form == "ids":
        groups = ids
    elif form == "mask":
        groups = (ids[:, None] == torch.arange(G)) | (torch.arange(B)[:, None] % 4 == torch.arange(G))
    else:
        groups = torch.stack([ids, torch.full_like(ids, -1), torch.where(ids == 1, 0, ids)], dim=1)
    return hidden, labels, groups, reference


def arguments(op: str, level: str, objective: rd.Objective, weight, form: str, step: int, cut: slice):
    hidden, labels, groups, reference = (each[cut] for each in batch(form, step))
    if level == "token" and form == "lists":
        groups = groups[:, None]
    more = {"reference_losses": reference} if objective.needs_reference else {}
    if op == "linear":
        return (hidden, weight, labels, groups), more
    return (hidden @ weight.t(), labels, groups), more


def train(process_group, cut: slice, form: str, accumulated: bool = False) -> dict[tuple[str, ...], list]:
    """Some steps of every objective, level and op -> losses, gradients of the weight, state, report."""
    results = {}
    for (name, objective), level, op in itertools.product(OBJECTIVES.items(), ("token", "sequence"), OPS):
        weight = torch.nn.Parameter(torch.randn(V, D, generator=torch.Generator().manual_seed(1)))
        make = rd.LinearGroupDROLoss if op == "linear" else rd.GroupDROLoss
        loss_fn = make(G, objective, process_group=process_group, level=level, entropy=True, top_k=3)
        seen = []
        for step in range(STEPS):
            calls = [arguments(op, level, objective, weight, form, step, cut)]
            if accumulated:
                middle = (cut.start + cut.stop) // 2
                cuts = slice(cut.start, middle), slice(middle, cut.stop)
                calls = [arguments(op, level, objective, weight, form, step, each) for each in cuts]
                with loss_fn.accumulate() as window:
                    for call, more in calls:
                        window.observe(*call, **more)
                    loss = sum(loss_fn(*call, **more) for call, more in calls)
            else:
                ((call, more),) = calls
                loss = loss_fn(*call, **more)
            (gradient,) = torch.autograd.grad(loss, weight)
            seen += [loss.detach(), gradient, loss_fn.group_weights.clone(), loss_fn.memory.clone()]
        report = loss_fn.total_report()
        seen += [
            torch.tensor(
                [list(vars(each).values())[:4] for each in (report.overall, *report.by_group.values())]
            )
        ]
        seen += [torch.tensor([report.overall.entropy, report.overall.top_k_accuracy])]
        results[name, level, op] = seen
    return results


def work(rank: int, size: int) -> dict:
    world, cut = torch.distributed.group.WORLD, slice(*CUTS[size][rank : rank + 2])
    results = {form: train(world, cut, form) for form in FORMS[size]}
    results["again"] = train(world, cut, "mask")
    results["accumulated"] = train(world, cut, "ids", accumulated=True)
    loss_fn = rd.GroupDROLoss(G, process_group=world)
    results["checkpoint"] = loss_fn.state_dict()
    other = {**loss_fn.state_dict(), "ranks": torch.tensor(size + 1)}
    for name, attempt in {
        "another size": lambda: loss_fn.load_state_dict(other),
        "no group": lambda: rd.GroupDROLoss(G)(torch.randn(2, V), torch.tensor([1, 2]), torch.tensor([0, 1])),
    }.items():
        with pytest.raises(RuntimeError) as error:
            attempt()
        results[name] = str(error.value)
    return results


@functools.cache
def alone(form: str) -> dict[tuple[str, ...], list]:
    """One process on the joined batch."""
    return train(None, slice(0, B), form)


@pytest.fixture(scope="module", params=sorted(CUTS), ids="{} ranks".format)
def several(request):
    return ranks.run(work, request.param, request.param)


def test_ranks_equal_one(several):
    cases = [(form, case) for form in FORMS[len(several)] for case in alone(form)]
    for form, case in cases:
        found = [rank[form][case] for rank in several]
        for place, wanted in enumerate(alone(form)[case]):
            ours = [each[place] for each in found]
            # DDP takes the mean over ranks of the gradients.
            gradient = place < 4 * STEPS and place % 4 == 1
            for one in [torch.stack(ours).mean(0)] if gradient else ours:
                torch.testing.assert_close(
                    one, wanted, atol=2e-6, rtol=2e-5, equal_nan=True,
                    msg=lambda text, case=(form, *case): f"{case}: {text}",
                )  # fmt: skip


def test_repeated_runs_have_the_same_bits(several):
    for rank in several:
        for case, expected in rank["mask"].items():
            for one, other in zip(rank["again"][case], expected, strict=True):
                assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), case


def test_all_ranks_have_the_same_state(several):
    for case in several[0]["mask"]:
        for rank in several[1:]:
            for place in (2, 3, 4 * STEPS - 2, 4 * STEPS - 1):
                one, other = rank["mask"][case][place], several[0]["mask"][case][place]
                assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), case


def test_micro_batches_on_several_ranks(several):
    for case, expected in alone("ids").items():
        gradient = torch.stack([rank["accumulated"][case][1] for rank in several]).mean(0)
        torch.testing.assert_close(gradient, expected[1], atol=2e-6, rtol=2e-5)
        for rank in several:
            for place in (0, 2, 4 * STEPS - 2):
                torch.testing.assert_close(
                    rank["accumulated"][case][place], expected[place], atol=2e-6, rtol=2e-5, equal_nan=True
                )


def test_a_checkpoint_knows_its_ranks(several):
    size = len(several)
    for rank in several:
        assert (
            rank["another size"].count(f"was saved by {size + 1} ranks, but its process_group has {size}")
            == 1
        )
        assert rank["checkpoint"]["ranks"] == size
    rd.GroupDROLoss(G).load_state_dict(several[0]["checkpoint"])  # one process alone may read it


def test_ranks_without_a_process_group_are_refused(several):
    assert all("several ranks need process_group" in rank["no group"] for rank in several)
