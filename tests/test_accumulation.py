"""``accumulate``: micro-batches with the loss, the gradients and the group weights of one large batch."""

from __future__ import annotations

import pytest
import torch

import rd_kernels as rd

pytestmark = pytest.mark.grid

OBJECTIVES = [
    rd.ERM(), rd.GroupDRO(0.5), rd.GroupDRO(0.5, 2.0, [5, 9, 3], "hold"), rd.CVaR(0.4), rd.ChiSquare(0.3),
]  # fmt: skip
CUTS = (slice(0, 9), slice(9, 11), slice(11, 11), slice(11, 30))  # unequal, one without rows


def batch():
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((30, 8), (13, 8), (13,)))
    labels, groups = torch.randint(0, 13, (30,)), torch.randint(0, 3, (30,))
    labels[::4] = -100
    groups[9:11] = 2  # a micro-batch of one group
    return hidden, weight, bias, labels, groups


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("op", ["linear", "logits"])
def test_equals_one_large_batch(backend, objective, op):
    hidden, weight, bias, labels, groups = batch()
    inputs = (hidden, weight, bias)
    make = rd.LinearGroupDROLoss if op == "linear" else rd.GroupDROLoss

    def arguments(cut):
        if op == "linear":
            return hidden[cut], weight, labels[cut], groups[cut], bias
        return hidden[cut] @ weight.t() + bias, labels[cut], groups[cut]

    large, small = (make(3, objective, backend=backend) for _ in range(2))
    for _ in range(3):  # the group weights go on from step to step
        expected = large(*arguments(slice(None)))
        wanted = torch.autograd.grad(expected, inputs)
        total, got = 0.0, [torch.zeros_like(each) for each in inputs]
        with small.accumulate() as window:
            for cut in CUTS:
                window.observe(*arguments(cut))
            for cut in CUTS:
                loss = small(*arguments(cut))
                total += loss.item()
                for into, gradient in zip(got, torch.autograd.grad(loss, inputs), strict=True):
                    into += gradient
        assert total == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(small.group_weights, large.group_weights, atol=1e-6, rtol=1e-5)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        ours, theirs = small.report(), large.report()
        assert ours.overall.count == theirs.overall.count
        for name, stats in theirs.by_group.items():
            assert (ours.by_group[name].count, ours.by_group[name].accuracy) == (stats.count, stats.accuracy)
            assert ours.by_group[name].loss == pytest.approx(stats.loss, rel=1e-5)
            assert ours.by_group[name].weight == pytest.approx(stats.weight, rel=1e-5)


def test_streaming_is_something_else():
    """Without a window every micro-batch steps q, so that the weights at the end differ."""
    hidden, weight, bias, labels, groups = batch()
    large, streamed = (rd.LinearGroupDROLoss(3, rd.GroupDRO(0.5)) for _ in range(2))
    large(hidden, weight, labels, groups, bias)
    for cut in CUTS:
        streamed(hidden[cut], weight, labels[cut], groups[cut], bias)
    assert (large.group_weights - streamed.group_weights).abs().max() > 0.01


def test_evaluation_leaves_the_weights_alone():
    hidden, weight, bias, labels, groups = batch()
    loss_fn = rd.LinearGroupDROLoss(3, rd.GroupDRO(0.5)).eval()
    with loss_fn.accumulate() as window:
        window.observe(hidden, weight, labels, groups, bias=bias)
        loss = loss_fn(hidden, weight, labels, groups, bias=bias)
    assert loss_fn.group_weights.tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(loss, loss_fn(hidden, weight, labels, groups, bias=bias))


def test_misuse_says_what_is_missing():
    hidden, weight, _, labels, groups = batch()
    loss_fn = rd.LinearGroupDROLoss(3)
    with loss_fn.accumulate() as window:
        with pytest.raises(RuntimeError, match=r"a loss before observe\(\)"):
            loss_fn(hidden, weight, labels, groups)
        with pytest.raises(RuntimeError, match="inside"), loss_fn.accumulate():
            pass
        window.observe(hidden, weight, labels, groups)
        loss_fn(hidden, weight, labels, groups)
        with pytest.raises(RuntimeError, match="1 micro-batches were observed, this is one more"):
            loss_fn(hidden, weight, labels, groups)
    with pytest.raises(RuntimeError, match="1 micro-batches were observed, but the loss was called 0 times"):  # noqa: SIM117
        with loss_fn.accumulate() as window:
            window.observe(hidden, weight, labels, groups)
    with loss_fn.accumulate() as window:
        window.observe(hidden, weight, labels, groups)
        loss_fn(hidden, weight, labels, groups)
        with pytest.raises(RuntimeError, match="observe all micro-batches first"):
            window.observe(hidden, weight, labels, groups)
    loss_fn(hidden, weight, labels, groups)  # and afterwards it is the plain loss again
    assert loss_fn.group_weights.tolist() != pytest.approx([1 / 3] * 3, abs=1e-6)
