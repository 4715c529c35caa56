"""What holds for all objectives: invariants, extreme and broken batches, bad parameters, the page that lists them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rd_kernels as rd
from tests.objective_cases import base, batch_of, start, weights_of

STATELESS = [
    rd.ERM(),
    rd.WorstGroup(),
    *(
        objective
        for base in ("rows", "groups")
        for objective in (
            rd.Tilted(0.7, base),
            rd.Tilted(-3.0, base),
            rd.CVaR(0.3, base),
            rd.ChiSquare(0.2, base),
            rd.KL(0.2, base),
        )
    ),
]
STATEFUL = [
    rd.GroupDRO(0.1),
    rd.GroupDRO(0.1, 2.0, [100, 50, 7, 3, 1], "hold"),
    rd.GroupDRO(0.1, [1.0, 0.0, 3.0, 2.0, 0.5], [100, 50, 7, 3, 1], "hold", loss_ema=0.3, floor=0.05),
    rd.GroupDRO(0.1, loss_ema=0.3, floor=0.05),
    rd.DoReMi(0.5, 0.01),
]


@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_the_order_of_the_groups_does_not_matter(objective):
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = objective
    if isinstance(objective, rd.GroupDRO):
        listed = {
            name: [getattr(objective, name)[group] for group in order]
            for name in ("adjustment", "group_counts")
            if isinstance(getattr(objective, name), tuple)
        }
        moved = replace(objective, **listed)
    (q, memory), (moved_q, moved_memory) = start(objective, 5), start(moved, 5)
    for counts, means in (
        ([3.0, 0.0, 5.0, 2.0, 4.0], [1.0, 0.0, 4.0, 2.5, 3.0]),
        ([0.0, 2.0, 5.0, 2.0, 1.0], [0.0, 2.5, 2.5, 0.3, 2.5]),
    ):
        batch = batch_of(counts, means, objective.adjustment_for(5))
        other = rd.Batch(batch.sums[order], batch.counts[order], batch.excess[order], moved.adjustment_for(5))
        one, two = objective.update(batch, q, memory), moved.update(other, moved_q, moved_memory)
        torch.testing.assert_close(two.weights, one.weights[order], rtol=1e-12, atol=1e-15)
        if objective in STATEFUL:
            q, moved_q = one.q, two.q
            torch.testing.assert_close(moved_q, q[order], rtol=1e-12, atol=1e-15)
        if one.memory is not None:
            memory, moved_memory = one.memory, two.memory
            torch.testing.assert_close(moved_memory, memory[:, order], rtol=1e-12, atol=1e-15, equal_nan=True)


EXTREME = [
    rd.Tilted(1e200),
    rd.Tilted(-1e200),
    rd.Tilted(1e200, "groups"),
    rd.CVaR(1e-300),
    rd.ChiSquare(1e300),
    rd.ChiSquare(1e-300),
    rd.KL(1e300),
    rd.KL(1e-300),
    rd.GroupDRO(1e200),
    rd.GroupDRO(1e200, 1e38, [1, 2, 3, 4, 5], "hold"),
    rd.GroupDRO(1e200, loss_ema=0.5, floor=0.1),
    rd.GroupDRO(1e200, absent_groups="hold", floor=0.1),
    rd.DoReMi(1e200, 1e-300),
    rd.DoReMi(1e200),
]


@pytest.mark.parametrize("objective", STATELESS + STATEFUL + EXTREME, ids=str)
@settings(deadline=None, max_examples=30)
@given(
    counts=st.lists(st.sampled_from([0, 1, 7, 10**9]), min_size=5, max_size=5).filter(any),
    means=st.lists(st.sampled_from([0.0, 1e-38, 1.0, 1.0 + 2**-52, 1e10, 1e38]), min_size=5, max_size=5),
)
def test_extreme_losses_and_parameters_leave_a_simplex(objective, counts, means):
    q, memory = start(objective, 5)
    for turn in (1, -1):  # the second batch meets the state that the first one left
        batch = batch_of(counts[::turn], means[::turn], objective.adjustment_for(5))
        weights, new_q, new_memory = objective.update(batch, q, memory)
        for simplex in (weights, new_q):
            if simplex is not None:
                assert (simplex >= 0).all()
                assert simplex.sum().item() == pytest.approx(1, abs=1e-6)
        if not isinstance(objective, rd.GroupDRO):  # there the weights are q
            assert not weights[~batch.present].any()
        if new_q is not None:
            q = new_q.float().double()  # as it is kept
        if new_memory is not None:
            memory = new_memory
            assert (memory.isfinite() | ~batch.present).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_a_mean_that_is_not_finite(objective, bad):
    """The loss is not finite either, so that it is seen, and the state stays."""
    q, memory = start(objective, 5)
    seen = objective.update(batch_of([2.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]), q, memory)
    q, memory = (now if new is None else new for now, new in ((q, seen.q), (memory, seen.memory)))
    batch = batch_of([2.0, 3.0, 1.0, 0.0, 2.0], [1.0, bad, 2.0, 0.0, 0.5], objective.adjustment_for(5))
    weights, new_q, new_memory = objective.update(batch, q, memory)
    assert not math.isfinite((weights * batch.means).sum())
    if objective in STATELESS:
        kind = "groups" if objective == rd.WorstGroup() else getattr(objective, "base", "rows")
        np.testing.assert_allclose(weights, base(batch.counts.numpy(), kind))
    assert new_q is None or torch.equal(new_q, q)
    assert new_memory is None or torch.equal(new_memory, memory)


@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_a_batch_without_rows_changes_nothing(objective):
    q, memory = start(objective, 5)
    weights, new_q, new_memory = objective.update(batch_of([0.0] * 5, [0.0] * 5), q, memory)
    assert torch.isfinite(weights).all()
    if not isinstance(objective, rd.GroupDRO):  # there the weights are q
        assert not weights.any()
    assert new_q is None or torch.equal(new_q, q)
    assert new_memory is None or torch.equal(new_memory.nan_to_num(-1), memory.nan_to_num(-1))


@pytest.mark.parametrize("objective", STATELESS + STATEFUL, ids=str)
def test_no_value_is_read_on_the_host(objective):
    """Tensors without data: what reads one raises."""
    batch = rd.Batch(*(torch.empty(5, dtype=torch.float64, device="meta") for _ in range(3)))
    q, memory = (each.to("meta") for each in start(objective, 5))
    assert objective.update(batch, q, memory).weights.shape == (5,)


def test_every_update_compiles_in_one_graph():
    batch = batch_of([3.0, 0.0, 5.0, 2.0, 4.0], [1.0, 0.0, 4.0, 2.5, 3.0])
    stateless = [
        rd.KL(0.3, over="rows"),
        rd.CVaR(0.3),
        rd.ChiSquare(0.3, "groups"),
        rd.Tilted(0.3, over="rows"),
    ]
    for objective in stateless + STATEFUL[2:]:
        arguments = (batch._replace(adjustment=objective.adjustment_for(5)), *start(objective, 5))
        torch.compiler.reset()
        compiled = torch.compile(objective.update, fullgraph=True, backend="aot_eager")(*arguments)
        for one, other in zip(compiled, objective.update(*arguments), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rd.CVaR(0.0), ValueError, r"alpha must be in \(0, 1\], got 0.0"),
        (lambda: rd.CVaR(1.5), ValueError, "alpha"),
        (lambda: rd.CVaR("0.1"), TypeError, "alpha must be a number, got str"),
        (lambda: rd.ChiSquare(-1.0), ValueError, "rho must be finite and >= 0, got -1.0"),
        (lambda: rd.ChiSquare(math.nan), ValueError, "rho must be finite and >= 0, got nan"),
        (lambda: rd.KL(-1e-9), ValueError, "rho must be finite and >= 0, got -1e-09"),
        (lambda: rd.KL(math.inf), ValueError, "rho must be finite and >= 0, got inf"),
        (lambda: rd.KL(True), TypeError, "rho must be a number, got bool"),
        (lambda: rd.Tilted(2e200), ValueError, r"t must be finite and >= -1e\+200 and <= 1e\+200, got 2e\+200"),
        (lambda: rd.Tilted(-math.inf), ValueError, "t must be finite"),
        (lambda: rd.GroupDRO(2e200), ValueError, r"step_size must be finite and >= 0 and <= 1e\+200"),
        (lambda: rd.GroupDRO(adjustment="1"), TypeError, "adjustment must be a number, got str"),
        (lambda: rd.GroupDRO(adjustment=None), TypeError, "adjustment must be a number, got NoneType"),
        (lambda: rd.GroupDRO(adjustment=[1.0, "b"]), TypeError, r"adjustment must hold numbers only, got \[1.0"),
        (lambda: rd.GroupDRO(adjustment=[1.0, -2.0]), ValueError, "adjustment must be finite and >= 0"),
        (lambda: rd.GroupDRO(adjustment=[1.0, 0.0]), ValueError, "adjustment > 0 needs group_counts"),
        (lambda: rd.GroupDRO(group_counts=5), TypeError, "group_counts must be a sequence of numbers, got int"),
        (lambda: rd.GroupDRO(group_counts=[1, 0]), ValueError, "group_counts must be positive and finite"),
        (lambda: rd.GroupDRO(loss_ema=0.0), ValueError, r"loss_ema must be in \(0, 1\], or None, got 0.0"),
        (lambda: rd.GroupDRO(loss_ema=1.1), ValueError, "loss_ema"),
        (lambda: rd.GroupDRO(loss_ema="0.1"), TypeError, "loss_ema must be a number, got str"),
        (lambda: rd.GroupDRO(floor=-0.1), ValueError, "floor must be finite and >= 0 and <= 1, got -0.1"),
        (lambda: rd.GroupDRO(floor=0.3).check(4), ValueError, "floor must be <= 1 / 4, the number of groups, got 0.3"),
        (lambda: rd.GroupDRO(0.1, [1, 2], [1, 2]).check(3), ValueError, "adjustment has 2 entries, but there are 3"),
        (lambda: rd.GroupDRO(0.1, 1.0, [1, 2]).check(3), ValueError, "group_counts has 2 entries, but there are 3"),
        (lambda: rd.GroupDRO(0.1, 1.0, [1, 2]).adjustment_for(3), ValueError, "group_counts has 2 entries"),
        (lambda: rd.GroupDRO(absent_groups="drop"), ValueError, "absent_groups must be 'decay' or 'hold', got 'drop'"),
        (lambda: rd.DoReMi(-1.0), ValueError, "step_size must be finite and >= 0"),
        (lambda: rd.DoReMi(smoothing=1.5), ValueError, r"smoothing must be in \(0, 1\], got 1.5"),
        (lambda: rd.DoReMi(smoothing=0.0), ValueError, r"smoothing must be in \(0, 1\], got 0.0"),
        (lambda: rd.DoReMi(smoothing=None), TypeError, "smoothing must be a number, got NoneType"),
        (
            lambda: rd.DoReMi().update(rd.Batch(torch.ones(2), torch.ones(2)), torch.ones(2) / 2, torch.zeros(3, 2)),
            ValueError,
            "needs batch.excess",
        ),
        (lambda: rd.DoReMi.average_weights(torch.zeros(4)), ValueError, r"memory must be \[3, G\].*got \[4\]"),
    ],
)  # fmt: skip
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("make", [rd.Tilted, rd.CVaR, rd.ChiSquare, rd.KL])
def test_bad_choices_of_base_and_over(make):
    with pytest.raises(ValueError, match="base must be 'rows' or 'groups', got 'texts'"):
        make(0.5, "texts")
    with pytest.raises(ValueError, match="over must be 'groups' or 'rows', got 'tokens'"):
        make(0.5, over="tokens")
    with pytest.raises(ValueError, match=r"base must be 'rows' with over='rows'.*got 'groups'"):
        make(0.5, "groups", "rows")


def test_the_floor_may_be_all_there_is():
    """1 / G itself is allowed; q is then uniform whatever the losses are. And hashing works with lists given."""
    objective = rd.GroupDRO(5.0, [1, 2, 3], [3, 2, 1], floor=1 / 3)
    objective.check(3)
    assert hash(objective) == hash(replace(objective))
    q = objective.update(batch_of([1.0] * 3, [1.0, 5.0, 9.0]), *start(objective, 3)).q
    np.testing.assert_allclose(q, [1 / 3] * 3)


def test_the_objective_that_the_documentation_writes():
    text = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    code = text.split("## One of your own")[1].split("```python\n")[1].split("```")[0]
    names = {"dataclass": dataclass, "rd": rd, "torch": torch, "__name__": __name__}
    exec(code, names)
    counts, means = [3.0, 0.0, 5.0, 2.0], [1.0, 0.0, 4.0, 2.5]
    assert weights_of(names["Worst"](2), counts, means).tolist() == [0, 0, 0.5, 0.5]
    assert weights_of(names["Worst"](4), counts, means).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_the_documentation_has_every_objective():
    text = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    for objective in STATELESS + STATEFUL:
        assert f"| `{type(objective).__name__}(" in text
