"""Every backend against the float64 oracle over the shape grid, through the public functions.

A backend's error may be at most that of the same computation in eager PyTorch at the same dtype, plus
``EPSILON``: a few roundings of that dtype.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import rd_kernels as rd
from tests.devices import device_of
from tests.oracles import PublishedGroupDRO, eager_group_dro, members_of, row_losses

pytestmark = pytest.mark.usefixtures("poisoned")

STEP = 0.3
# Allowed on top of eager's own error, relative to the largest value: a few roundings of the output dtype.
EPSILON = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = {
    "reference": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "cpu": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.bfloat16, torch.float16],
    "cuda": [torch.float32, torch.bfloat16, torch.float16],
}
# Triton's interpreter is slow; test_gpu_kernels.py has 30522.
INTERPRETED_DTYPES, INTERPRETED_ELEMENTS = [torch.float32, torch.bfloat16], 3000
VOCABULARIES = [1, 2, 127, 1000, 30522]
ROWS = [0, 1, 3, 17]
GROUPINGS = ["ids", "one group", "one absent", "overlapping mask", "some in none"]


def make_groups(kind: str, rows: int, num_groups: int = 4) -> torch.Tensor:
    if kind == "overlapping mask":
        return torch.rand(rows, num_groups) < 0.5
    ids = torch.randint(num_groups, (rows,))
    if kind == "one group":
        ids[:] = 1
    elif kind == "one absent":
        ids[ids == 2] = 0
    elif kind == "some in none":
        ids[::2] = -1
    return ids


def as_mask(groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    return groups if groups.dtype == torch.bool else groups[:, None] == torch.arange(num_groups)


def run(backend, logits, labels, groups, q, grad_out=1.0, step=STEP, ignore_index=-100):
    """-> loss, gradient, new q of the public function."""
    logits, q = logits.detach().clone().requires_grad_(), q.clone()
    loss = rd.functional.group_dro_cross_entropy(
        logits, labels, groups, q, rd.GroupDRO(step), backend=backend, ignore_index=ignore_index
    )
    (gradient,) = torch.autograd.grad(loss, logits, torch.full_like(loss, grad_out))
    return loss.detach(), gradient, q


def truth(logits, labels, groups, q, grad_out=1.0, step=STEP, ignore_index=-100):
    """-> loss, gradient, new q in float64, from torch's losses and the published update."""
    exact = logits.detach().double().requires_grad_()
    rows = (labels != ignore_index).nonzero()[:, 0].tolist()
    losses = F.cross_entropy(exact, labels, ignore_index=ignore_index, reduction="none")
    members = members_of(groups, rows)
    oracle = PublishedGroupDRO(q.numel(), step, probabilities=q.double().tolist())
    value = oracle.step(losses.detach()[rows], members)
    counts = [sum(group in m for m in members) for group in range(q.numel())]
    scale = torch.zeros(len(labels), dtype=torch.float64)
    for row, groups_of_row in zip(rows, members, strict=True):
        scale[row] = sum(oracle.probabilities[group] / counts[group] for group in groups_of_row)
    (gradient,) = torch.autograd.grad((losses * scale).sum() * grad_out, exact)
    return value, gradient, torch.tensor(oracle.probabilities, dtype=torch.float64)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).abs().max()) if exact.numel() else 0.0


def grid(backend: str):
    dtypes, elements = DTYPES[backend], 1 << 30
    if backend == "triton" and device_of(backend) == "cpu":
        dtypes, elements = INTERPRETED_DTYPES, INTERPRETED_ELEMENTS
    for dtype, vocabulary, rows in itertools.product(dtypes, VOCABULARIES, ROWS):
        if rows * vocabulary <= elements:
            yield dtype, vocabulary, rows


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_grid(backend, grouping):
    cases = 0
    for dtype, vocabulary, rows in grid(backend):
        logits = (3 * torch.randn(rows, vocabulary)).to(dtype)
        labels = torch.randint(vocabulary, (rows,))
        if rows > 1:
            labels[-1] = -100
        groups = make_groups(grouping, rows)
        q = torch.softmax(torch.randn(4), 0)
        loss, gradient, new_q = run(backend, logits, labels, groups, q, grad_out=2.5)
        value, exact, exact_q = truth(logits, labels, groups, q, grad_out=2.5)

        eager_logits = logits.clone().requires_grad_()
        eager_loss, eager_q = eager_group_dro(eager_logits, labels, as_mask(groups, 4), q, STEP)
        (eager,) = torch.autograd.grad(2.5 * eager_loss, eager_logits)
        case = f"{dtype}, N={rows}, V={vocabulary}"
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        allowed = largest * EPSILON[dtype]
        assert gradient.dtype == dtype, case
        assert error(gradient, exact) <= error(eager, exact) + allowed, case
        loss, eager_loss = float(loss), float(eager_loss.detach())
        assert abs(loss - value) <= abs(eager_loss - value) + 1e-6 * max(1, abs(value)), case
        assert error(new_q, exact_q) <= error(eager_q, exact_q) + 2e-7, case
        cases += 1
    assert cases >= 20


def test_all_rows_ignored(backend):
    """Loss 0, zero gradient, q unchanged bit for bit: the documented values."""
    q = torch.softmax(torch.randn(3), 0)
    logits = torch.randn(5, 40)
    loss, gradient, new_q = run(backend, logits, torch.full((5,), -100), torch.zeros(5, dtype=torch.int64), q)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(5, 40))
    assert torch.equal(new_q, q)


def test_ignored_rows_may_hold_anything(backend):
    logits = torch.randn(4, 9)
    labels = torch.tensor([1, -100, 3, -100])
    groups = torch.tensor([0, 77, 1, -9])  # ids of rows without a label are not looked at
    logits[1], logits[3] = torch.nan, torch.inf
    loss, gradient, _ = run(backend, logits, labels, groups, torch.full((2,), 0.5))
    keep = labels >= 0
    value, exact, _ = truth(logits[keep], labels[keep], groups[keep], torch.full((2,), 0.5))
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert error(gradient[keep], exact) < 1e-6
    assert torch.equal(gradient[~keep], torch.zeros(2, 9))


def test_ignore_index_may_be_a_class(backend):
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 2])
    groups = torch.arange(6) % 2
    loss, gradient, _ = run(backend, logits, labels, groups, torch.full((2,), 0.5), ignore_index=2)
    value, exact, _ = truth(logits, labels, groups, torch.full((2,), 0.5), ignore_index=2)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert error(gradient, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_logits(backend, dtype):
    """p -> 1: the loss underflows to 0 at worst, and the gradient stays finite and right."""
    logits = torch.zeros(4, 1000)
    labels = torch.arange(4) * 100
    logits[torch.arange(4), labels] = torch.tensor([5.0, 20.0, 80.0, 1e4])
    logits[3] -= 3e4
    logits = logits.to(dtype)
    groups = torch.tensor([0, 0, 1, 1])
    loss, gradient, _ = run(backend, logits, labels, groups, torch.full((2,), 0.5))
    value, exact, _ = truth(logits, labels, groups, torch.full((2,), 0.5))
    assert float(loss) == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert error(gradient, exact) <= EPSILON[dtype] * float(exact.abs().max())


NON_FINITE = {
    "NaN": [1.0, torch.nan, 2.0, 0.5],
    "NaN first": [torch.nan, 1.0, 2.0, 0.5],
    "+inf": [1.0, torch.inf, 2.0, 0.5],
    "+inf at the label": [1.0, 0.3, torch.inf, 0.5],
    "-inf": [1.0, -torch.inf, 2.0, 0.5],
    "-inf at the label": [1.0, 0.3, -torch.inf, 0.5],
    "-inf first": [-torch.inf, -torch.inf, 2.0, 0.5],
    "all -inf": [-torch.inf] * 4,
    "large": [3e38, -3e38, 3e38, 0.0],
}


@pytest.mark.parametrize("kind", NON_FINITE)
@pytest.mark.parametrize("width", [4, 3000])
def test_non_finite_logits_behave_as_in_torch(backend, kind, width):
    """Loss and gradient row by row as torch.nn.functional.cross_entropy gives them, NaN for NaN."""
    logits = torch.full((3, width), -torch.inf if kind == "all -inf" else -4.0)
    logits[1, -4:] = torch.tensor(NON_FINITE[kind])
    labels = torch.full((3,), width - 2)
    logits[0], logits[2] = torch.randn(2, width)
    ours, theirs = logits.clone().requires_grad_(), logits.cpu().clone().requires_grad_()
    loss = rd.functional.cross_entropy(ours, labels, reduction="none", backend=backend)
    expected = F.cross_entropy(theirs, labels.cpu(), reduction="none")
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_non_finite_group_loss_keeps_q(backend):
    """One bad batch shows in the loss but does not destroy the state."""
    logits = torch.randn(4, 6)
    logits[2, 3] = torch.nan
    q = torch.tensor([0.25, 0.75])
    loss, _, new_q = run(backend, logits, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]), q)
    assert loss.isnan()
    assert torch.equal(new_q, q)


def test_rows_in_no_group_have_coefficient_zero(backend):
    """Even NaN logits of such a row do not reach the loss or the gradient."""
    logits = torch.randn(4, 6)
    logits[3] = torch.nan
    groups = torch.tensor([0, 1, -1, -1])
    loss, gradient, _ = run(backend, logits, torch.tensor([0, 1, 2, 3]), groups, torch.full((2,), 0.5))
    assert torch.isfinite(loss)
    assert torch.equal(gradient[2:], torch.zeros(2, 6))
    assert gradient[:2].abs().sum() > 0


def test_large_steps_do_not_overflow(backend):
    """float32 q * exp(10 * 11) is infinite; log space is not."""
    logits = torch.zeros(2, 3)
    logits[0, 1] = 11
    _, gradient, q = run(
        backend, logits, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.full((2,), 0.5), step=1000.0
    )
    torch.testing.assert_close(q, torch.tensor([1.0, 0.0]))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "layout", ["rows far apart", "transposed", "every second column", "one row expanded"]
)
def test_strided_logits(backend, layout):
    if layout == "rows far apart":
        logits = torch.randn(6, 400)[:, 100:229]
    elif layout == "transposed":
        logits = torch.randn(129, 6).t()
    elif layout == "every second column":
        logits = torch.randn(6, 258)[:, ::2]
    else:
        logits = torch.randn(1, 129).expand(6, 129)
    labels, groups = torch.randint(129, (6,)), torch.arange(6) % 3
    leaf = logits.detach().requires_grad_()
    q = torch.full((3,), 1 / 3)
    loss = rd.functional.group_dro_cross_entropy(leaf, labels, groups, q, rd.GroupDRO(STEP), backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf)
    value, exact, _ = truth(logits, labels, groups, torch.full((3,), 1 / 3))
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert error(gradient, exact) < 2e-7


def test_runs_are_bitwise_equal(backend):
    logits, labels = torch.randn(33, 500), torch.randint(500, (33,))
    groups, q = torch.rand(33, 5) < 0.4, torch.full((5,), 0.2)
    first = run(backend, logits, labels, groups, q)
    for _ in range(3):
        assert all(
            torch.equal(a, b) for a, b in zip(first, run(backend, logits, labels, groups, q), strict=True)
        )


def test_second_backward_through_a_retained_graph(backend):
    logits = torch.randn(5, 300, requires_grad=True)
    loss = rd.functional.group_dro_cross_entropy(
        logits, torch.arange(5), torch.arange(5) % 2, torch.full((2,), 0.5), backend=backend
    )
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(second, 3 * first)


def test_per_row_grad_out(backend):
    """A non-scalar, non-contiguous grad_out: each row's gradient is scaled by its own element."""
    logits = torch.randn(5, 300, requires_grad=True)
    labels = torch.tensor([0, 299, -100, 5, 7])
    factors = torch.randn(10)[::2]
    losses = rd.functional.cross_entropy(logits, labels, reduction="none", backend=backend)
    losses.backward(factors)
    exact = logits.detach().double().requires_grad_()
    F.cross_entropy(exact, labels, reduction="none").backward(factors.double())
    assert error(logits.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("objective", [rd.ERM(), rd.GroupDRO(0.2)])
def test_report(backend, objective):
    """Counts, means and hits agree with a plain count over rows, for overlapping groups and ungrouped rows."""
    logits = torch.randn(40, 7)
    labels = torch.randint(7, (40,))
    labels[5:9] = -100
    groups = torch.rand(40, 3) < 0.4
    loss_fn = rd.GroupDROLoss(3, objective, group_names=["a", "b", "c"], backend=backend)
    loss_fn(logits, labels, groups)
    report = loss_fn.report()
    counted = labels != -100
    losses, hits = row_losses(logits, labels), logits.argmax(1) == labels
    selections = [(report.overall, counted), (report.ungrouped, counted & ~groups.any(1))]
    selections += [(report.by_group[name], counted & groups[:, i]) for i, name in enumerate("abc")]
    for stats, rows in selections:
        assert stats.count == int(rows.sum())
        assert stats.loss == pytest.approx(float(losses[rows].mean()), rel=1e-6)
        assert stats.accuracy == pytest.approx(float(hits[rows].double().mean()))
    weights = [stats.weight for stats in report.by_group.values()]
    if isinstance(objective, rd.ERM):
        member = (groups & counted[:, None]).sum(0).double()
        assert weights == pytest.approx((member / member.sum()).tolist())
    else:
        assert weights == pytest.approx(loss_fn.group_weights.tolist())
    assert report.ungrouped.weight == 0
    assert report.worst_group == max("abc", key=lambda name: report.by_group[name].loss)


@pytest.mark.parametrize("bad", ["label", "group"])
def test_values_out_of_range_raise_before_q_changes(backend, bad):
    if device_of(backend) != "cpu":
        pytest.skip("a GPU does not stop for the error: tests/gpu/test_inputs.py")
    labels, groups = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1])
    (labels if bad == "label" else groups)[1] = 6
    q = torch.tensor([0.4, 0.6])
    with pytest.raises(ValueError, match=f"{bad}s: 1 "):
        rd.functional.group_dro_cross_entropy(torch.randn(3, 6), labels, groups, q, backend=backend)
    assert torch.equal(q, torch.tensor([0.4, 0.6]))
    with pytest.raises(ValueError, match=f"{bad}s: 1 "):
        rd.functional.linear_group_dro_cross_entropy(
            torch.randn(3, 4), torch.randn(6, 4), labels, groups, q, backend=backend
        )
    assert torch.equal(q, torch.tensor([0.4, 0.6]))


def test_more_than_two_to_the_31_elements():
    """The CPU kernels address with 64 bits; the logits are one row expanded, so only the gradient is large."""
    vocabulary, rows = 30522, (1 << 31) // 30522 + 5
    row = torch.randn(vocabulary).bfloat16()
    logits = row.expand(rows, vocabulary).requires_grad_()
    labels = torch.full((rows,), -100)
    labels[0], labels[-1] = 5, 7
    loss = rd.functional.group_dro_cross_entropy(
        logits, labels, torch.zeros(rows, dtype=torch.int64), torch.ones(1), rd.ERM(), backend="cpu"
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    for index in (0, -1):
        exact = row.double().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(exact, labels[index]) / 2, exact)
        assert error(gradient[index], expected) <= EPSILON[torch.bfloat16]
    assert not gradient[1].any()
    assert not gradient[-2].any()


def test_llama_vocabulary():
    logits, labels = torch.randn(3, 128256), torch.tensor([0, 128255, 64000])
    loss, gradient, _ = run("cpu", logits, labels, torch.tensor([0, 1, 1]), torch.full((2,), 0.5))
    value, exact, _ = truth(logits, labels, torch.tensor([0, 1, 1]), torch.full((2,), 0.5))
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert error(gradient, exact) <= 1e-6
