"""The group-robust modules: the published update over many steps, state, inputs in every form, errors."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rd_kernels as rd
from tests.oracles import PublishedGroupDRO, members_of, row_losses


@pytest.mark.parametrize("absent_groups", ["decay", "hold"])
@pytest.mark.parametrize("adjustment", [0.0, 2.0])
def test_published_update_over_many_steps(backend, adjustment, absent_groups):
    """q follows the published rule for 30 steps, with groups that come and go."""
    counts = [400, 100, 25, 9]
    objective = rd.GroupDRO(0.05, adjustment, counts if adjustment else None, absent_groups)
    loss_fn = rd.GroupDROLoss(4, objective, backend=backend)
    oracle = PublishedGroupDRO(4, 0.05, adjustment, counts, hold_absent=absent_groups == "hold")
    for _ in range(30):
        logits, labels = 2 * torch.randn(12, 9), torch.randint(9, (12,))
        labels[torch.rand(12) < 0.2] = -100
        groups = torch.multinomial(torch.tensor([8.0, 4.0, 1.0, 0.5]), 12, replacement=True)
        loss = loss_fn(logits, labels, groups)
        rows = (labels >= 0).nonzero()[:, 0].tolist()
        expected = oracle.step(row_losses(logits, labels)[rows], members_of(groups, rows))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert loss_fn.group_weights.tolist() == pytest.approx(oracle.probabilities, rel=1e-5)


def test_absent_groups_decay_or_hold(backend):
    """The published rule takes weight from a group it never sees; "hold" leaves it bit for bit."""
    logits, labels, groups = torch.randn(8, 5), torch.arange(8) % 5, torch.tensor([0, 1] * 4)
    for absent_groups in ("decay", "hold"):
        loss_fn = rd.GroupDROLoss(3, rd.GroupDRO(0.5, absent_groups=absent_groups), backend=backend)
        for _ in range(5):
            loss_fn(logits, labels, groups)
        if absent_groups == "decay":
            assert loss_fn.group_weights[2] < 0.1
        else:
            assert loss_fn.group_weights[2] == torch.tensor(1 / 3)
        assert loss_fn.group_weights.sum().item() == pytest.approx(1, abs=1e-6)


def test_erm_is_the_mean():
    logits, labels = torch.randn(9, 5), torch.randint(5, (9,))
    labels[3] = -100
    loss_fn = rd.GroupDROLoss(3, rd.ERM())
    loss = loss_fn(logits, labels, torch.arange(9) % 3)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    assert torch.equal(loss_fn.group_weights, torch.full((3,), 1 / 3))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 12),
    classes=st.integers(1, 20),
    num_groups=st.integers(1, 6),
    mask=st.booleans(),
    step=st.sampled_from([0.0, 0.01, 1.0, 40.0]),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    which=st.sampled_from(["reference", "cpu"]),
    seed=st.integers(0, 1 << 30),
)
def test_invariants(rows, classes, num_groups, mask, step, scale, which, seed):
    """q stays on the simplex; renaming the groups renames q and changes neither loss nor gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    groups = torch.randint(-1, num_groups, (rows,), generator=generator)
    if mask:
        groups = torch.rand(rows, num_groups, generator=generator) < 0.4
    order = torch.randperm(num_groups, generator=generator)
    renamed = groups[:, order] if mask else torch.where(groups < 0, groups, order.argsort()[groups])
    results = []
    for membership in (groups, renamed):
        leaf = logits.clone().requires_grad_()
        loss_fn = rd.GroupDROLoss(num_groups, rd.GroupDRO(step), backend=which)
        loss = loss_fn(leaf, labels, membership)
        loss.backward()
        assert loss_fn.group_weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert (loss_fn.group_weights >= 0).all()
        assert torch.isfinite(leaf.grad).all()
        results.append((loss.detach(), leaf.grad, loss_fn.group_weights))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][2][order], results[1][2], rtol=1e-4, atol=1e-6)


def test_every_form_of_groups_gives_the_same():
    """Ids per token, ids per sequence, masks per token and per sequence."""
    logits, labels = torch.randn(3, 4, 6), torch.randint(6, (3, 4))
    sequence = torch.tensor([2, -1, 0])
    token = sequence[:, None].expand(3, 4)
    mask = sequence[:, None] == torch.arange(3)
    forms = [sequence, token, token.to(torch.int32), mask, mask[:, None].expand(3, 4, 3)]
    losses = []
    for groups in forms:
        loss_fn = rd.GroupDROLoss(3)
        losses.append((loss_fn(logits, labels, groups), loss_fn.group_weights))
    for loss, q in losses[1:]:
        assert torch.equal(loss, losses[0][0])
        assert torch.equal(q, losses[0][1])


def test_state_dict_round_trip_is_bitwise():
    loss_fn = rd.GroupDROLoss(3, rd.GroupDRO(0.7))
    for _ in range(3):
        loss_fn(torch.randn(9, 5), torch.randint(5, (9,)), torch.arange(9) % 3)
    buffer = io.BytesIO()
    torch.save(loss_fn.state_dict(), buffer)
    buffer.seek(0)
    restored = rd.GroupDROLoss(3, rd.GroupDRO(0.7))
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(restored.group_weights, loss_fn.group_weights)
    assert list(loss_fn.state_dict()) == ["group_weights"]
    assert torch.equal(copy.deepcopy(loss_fn).group_weights, loss_fn.group_weights)


def test_eval_mode_keeps_q():
    loss_fn = rd.GroupDROLoss(2, rd.GroupDRO(1.0)).eval()
    loss_fn(torch.randn(4, 5), torch.arange(4), torch.arange(4) % 2)
    assert torch.equal(loss_fn.group_weights, torch.full((2,), 0.5))
    loss_fn.train()(torch.randn(4, 5), torch.arange(4), torch.arange(4) % 2)
    assert not torch.equal(loss_fn.group_weights, torch.full((2,), 0.5))


def test_gradcheck_with_coefficients_held():
    """step_size 0 holds q, so the numerical derivative sees the same constants (Danskin)."""
    groups = torch.rand(6, 3) < 0.5
    labels = torch.tensor([0, 1, -100, 3, 4, 2])

    def loss(logits):
        q = torch.tensor([0.2, 0.5, 0.3])
        return rd.functional.group_dro_cross_entropy(
            logits, labels, groups, q, rd.GroupDRO(0.0), backend="reference"
        )

    assert torch.autograd.gradcheck(loss, torch.randn(6, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("mask", [False, True])
def test_row_weights_are_not_rounded_by_autocast(backend, mask):
    groups = torch.rand(40, 3) < 0.5 if mask else torch.randint(-1, 3, (40,))
    logits, labels = torch.randn(40, 11), torch.randint(11, (40,))
    gradients = []
    for enabled in (False, True):
        leaf, loss_fn = logits.clone().requires_grad_(), rd.GroupDROLoss(3, backend=backend).to(logits.device)
        with torch.autocast(logits.device.type, torch.bfloat16, enabled=enabled):
            loss = loss_fn(leaf, labels, groups)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)


def test_autocast():
    """Under autocast the linear op computes its GEMMs in bfloat16 and returns gradients in the leaves' dtype."""
    hidden = torch.randn(40, 16, requires_grad=True)
    weight = torch.randn(30, 16, requires_grad=True)
    labels, groups = torch.randint(30, (40,)), torch.arange(40) % 3
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        loss = rd.GroupDROLoss(3)(logits, labels, groups)
        linear = rd.LinearGroupDROLoss(3)(hidden, weight, labels, groups)
    exact = rd.GroupDROLoss(3)((hidden @ weight.t()).double(), labels, groups)
    expected = torch.autograd.grad(exact, (hidden, weight))
    for value in (loss, linear):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=2e-2)
        for gradient, truth in zip(torch.autograd.grad(value, (hidden, weight)), expected, strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - truth).norm() <= 1e-2 * truth.norm()


def test_report_before_the_first_call():
    with pytest.raises(RuntimeError, match="needs a call"):
        rd.GroupDROLoss(2).report()


def test_report_of_empty_groups_and_as_text():
    loss_fn = rd.GroupDROLoss(2, group_names=["seen", "unseen"])
    loss_fn(torch.zeros(2, 4), torch.tensor([0, -100]), torch.tensor([0, 0]))
    report = loss_fn.report()
    assert report.by_group["seen"].loss == pytest.approx(math.log(4))
    assert report.by_group["unseen"].count == 0
    assert math.isnan(report.by_group["unseen"].loss)
    assert math.isnan(report.by_group["unseen"].accuracy)
    assert [line.split()[0] for line in str(report).splitlines()[1:]] == ["overall", "seen", "unseen"]


CALL = {
    "logits": torch.randn(2, 3, 4),
    "labels": torch.zeros(2, 3, dtype=torch.int64),
    "groups": torch.tensor([0, 1]),
}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"groups": torch.tensor([0.0, 1.5])}, TypeError, "groups must be integer ids or a bool mask"),
        ({"groups": torch.tensor([0, 1, 1])}, ValueError, r"groups, ids, must have shape \[2, 3\] or \[2\]"),
        ({"groups": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"mask, must have shape \[2, 3, 2\] or"),
        ({"groups": torch.tensor([0, 2])}, ValueError, r"groups: 3 .* outside \[-1, 2\)"),
        ({"groups": torch.tensor([0, -2])}, ValueError, "groups: 3 "),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"labels must have shape \[2, 3\]"),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels must hold class indices"),
        ({"labels": torch.full((2, 3), 4)}, ValueError, r"labels: 6 .*\[0, 4\)"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, "at least one class"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int32)}, TypeError, "logits must be floating point"),
        ({"logits": torch.tensor(1.0)}, ValueError, "got a scalar"),
        (
            {"logits": torch.zeros(2, 3, 4, device="meta")},
            ValueError,
            "labels is on cpu, but logits is on meta",
        ),
    ],
)
def test_bad_input_is_named_and_q_kept(kwargs, error, message):
    loss_fn = rd.GroupDROLoss(2, rd.GroupDRO(0.5))
    with pytest.raises(error, match=message):
        loss_fn(**CALL | kwargs)
    assert torch.equal(loss_fn.group_weights, torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rd.GroupDROLoss(0), ValueError, "num_groups must be at least 1"),
        (lambda: rd.GroupDROLoss(2.0), TypeError, "num_groups must be an integer"),
        (lambda: rd.GroupDROLoss(2, group_names=["a"]), ValueError, "2 different names"),
        (lambda: rd.GroupDROLoss(2, group_names=["a", "a"]), ValueError, "2 different names"),
        (lambda: rd.GroupDROLoss(2, objective="erm"), TypeError, "objective must be an Objective"),
        (lambda: rd.GroupDRO(-0.1), ValueError, "step_size must be finite and >= 0"),
        (lambda: rd.GroupDRO(math.inf), ValueError, "step_size must be finite"),
        (lambda: rd.GroupDRO(math.nan), ValueError, "step_size must be finite"),
        (lambda: rd.GroupDRO("0.1"), TypeError, "step_size must be a number"),
        (lambda: rd.GroupDRO(0.1, adjustment=1.0), ValueError, "adjustment > 0 needs group_counts"),
        (lambda: rd.GroupDRO(0.1, group_counts=[1, 0]), ValueError, "group_counts must be positive"),
        (
            lambda: rd.GroupDROLoss(2, rd.GroupDRO(0.1, 1.0, [1, 2, 3])),
            ValueError,
            "group_counts has 3 entries",
        ),
        (lambda: rd.LinearGroupDROLoss(2, memory_budget=0), ValueError, "memory_budget must be a positive"),
    ],
)
def test_bad_construction_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_group_weights_of_the_functional_form_are_checked():
    labels, groups = torch.tensor([0, 1]), torch.tensor([0, 1])
    for q in (torch.full((2,), 0.5, dtype=torch.float64), torch.ones(1, 2), torch.ones(0)):
        with pytest.raises(ValueError, match="group_weights must be a contiguous float32"):
            rd.functional.group_dro_cross_entropy(torch.randn(2, 4), labels, groups, q)
