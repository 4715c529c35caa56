"""The FLOPs, kernels and bytes of both ops, counted on the CPU: what the design promises of them."""

import pytest
import torch

from benchmarks import count as counting
from benchmarks.cases import LinearCase, LogitsCase
from benchmarks.count import budget, count
from benchmarks.peers import Eager, Ours, OursInPlace, OursLinear, OursLinearERM, on
from rd_kernels.linear import plan

ROWS, VOCABULARY, WIDTH = 640, 96, 16  # a budget holds a part of no fewer rows
FEW = 16  # for kernels that are interpreted
PRODUCT = 2 * ROWS * VOCABULARY * WIDTH
LOGITS_KERNELS = ["grouped_forward", "row_scale", "row_backward"]
GROUP_KERNELS = ["group_partials", "group_totals", "group_update", "row_scale"]
BETWEEN_PRODUCTS = ["scale_rows", "scale_rows", "column_partials", "column_totals"]


def linear(backend, dtype="fp32", memory_budget=1 << 30, peer=None, rows=ROWS):
    chosen = on(backend, peer or OursLinear())
    chosen.options = {"memory_budget": memory_budget}
    inputs = LinearCase(rows, WIDTH, VOCABULARY, dtype, groups=3).inputs("cpu")
    return count(lambda: chosen.step(inputs))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("peer", [OursLinear(), OursLinearERM()], ids=lambda peer: peer.name)
def test_three_gemms_whatever_the_weights_of_the_rows(backend, dtype, peer):
    counts = linear(backend, dtype, peer=peer, rows=FEW)
    assert counts.flops == 3 * PRODUCT * FEW // ROWS
    assert counts.ops == ["linear_forward", "reduce_and_update", "linear_backward"]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_four_less_the_fraction_that_is_stored(share):
    memory_budget = budget(share, ROWS, VOCABULARY, WIDTH, 4)
    stored, _ = plan(ROWS, VOCABULARY, WIDTH, 4, memory_budget)
    assert share * ROWS <= stored < ROWS
    assert plan(ROWS, VOCABULARY, WIDTH, 4, memory_budget - 1)[0] < share * ROWS
    assert linear("reference", memory_budget=memory_budget).flops / PRODUCT == 4 - stored / ROWS


def test_eager_pytorch_needs_three_as_well():
    """The counter counts what it does not know: a product more would be seen."""
    inputs = LinearCase(ROWS, WIDTH, VOCABULARY, groups=3).inputs("cpu")
    assert count(lambda: Eager().step(inputs)).flops == 3 * PRODUCT
    assert count(lambda: torch.mm(inputs.hidden, inputs.weight.T)).products == 1
    total = torch.zeros(ROWS, VOCABULARY)
    assert count(lambda: total.addmm_(inputs.hidden.detach(), inputs.weight.detach().T)).flops == PRODUCT


@pytest.mark.parametrize("peer", [Ours(), OursInPlace()], ids=lambda peer: peer.name)
def test_the_logits_op_reads_twice_and_writes_once(peer):
    """6 bytes for each logit in bfloat16; what belongs to rows and groups comes on top."""
    rows, vocabulary = 8, 8192
    inputs = LogitsCase(rows, vocabulary, "bf16", groups=3).inputs("cpu")
    counts = count(lambda: on("triton", peer).step(inputs))
    assert counts.kernels == LOGITS_KERNELS
    assert counts.flops == 0
    assert 6.0 <= counts.nbytes / (rows * vocabulary) < 6.1


def test_the_kernels_of_the_linear_op():
    counts = linear("triton", "fp32", rows=FEW)
    assert counts.kernels == ["softmax_minus_onehot", *GROUP_KERNELS, *BETWEEN_PRODUCTS]


def test_a_capacity_shrinks_the_products_and_adds_eight_kernels():
    """16 rows of which 4 have a place: a quarter of the FLOPs, whatever the labels; no row is beyond."""
    peer = on("triton", OursLinear())
    peer.options = {"capacity": 4}
    inputs = LinearCase(FEW, WIDTH, VOCABULARY, "fp32", groups=3).inputs("cpu")
    inputs.labels[3:] = -100
    counts = count(lambda: peer.step(inputs))
    assert counts.flops == 3 * PRODUCT * 4 // ROWS
    packing = ["compact_counts", "compact_places", "gather_rows"]
    assert counts.kernels == [
        *packing, "softmax_minus_onehot", "overflow_forward", *GROUP_KERNELS, "gather_rows", *BETWEEN_PRODUCTS,
        "gather_rows", "overflow_grad_hidden", "overflow_grad_weight",
    ]  # fmt: skip


def test_it_prints_what_it_counted(monkeypatch, capsys):
    monkeypatch.setattr(counting, "INTERPRETED", True)
    monkeypatch.setattr("sys.argv", ["count", "--rows", "16", "--vocabulary", "64", "--width", "16"])
    assert counting.main() == 0
    printed = capsys.readouterr().out
    assert "3.00 products of 2 N V D FLOPs" in printed
    assert "grouped_forward, row_scale, row_backward" in printed
    assert "capacity 20%" in printed
    monkeypatch.setattr(counting, "INTERPRETED", False)
    assert counting.main() == 2
