"""Random cases over everything a call can be, against the float64 oracle; `make properties` tries many.

A case is compared in two steps. What the loss measured (means by group, losses of the rows or sequences where these are
weighted) may differ from float64 by the error of the same computation in eager torch at that dtype, plus ``EPSILON``: a
few roundings of the dtype, relative to the terms that are added up. Then weights, q, memory, loss and gradients are
compared with those the oracle has for the very means that were measured. So objectives that jump (a worst group, CVaR's
order) or that are steep (a step size of 1e200) are held as tightly as the others, near-ties included.

A failing case is printed as a ``Case(...)``: ``check(Case(...), backend)`` runs it again.
RD_KERNELS_PROPERTY_CASES sets how many are tried in all; then seeds are fresh, otherwise the same in every run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rd_kernels as rd
from rd_kernels.backends.registry import BACKENDS
from rd_kernels.reduction import Given
from tests.conftest import on_device_of
from tests.devices import device_of
from tests.float64_oracle import Expected, Measured, Oracle, row_values, unit_means, units_of
from tests.float64_oracle import group_means as means_of
from tests.test_conformance import DTYPES, EPSILON

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = int(os.environ.get("RD_KERNELS_PROPERTY_CASES", "0"))
# Shares of the cases. Kernels take a tenth of a second for one, those of Triton seconds where they are interpreted.
SHARES = {name: 1 if name == "triton" and device_of(name) == "cpu" else 30 for name in BACKENDS}
PART = 2000  # of a test, so that hypothesis' memory of what it tried stays small and xdist has something to share
WEIGHT = 1e-12  # how far, in all, float64 sums of losses and weights may be apart

ROW_FORMS = ["ids", "mask", "lists"]
SEQUENCE_FORMS = ["ids of sequences", "mask of sequences", "lists of sequences"]
BASES = st.sampled_from(["rows", "groups"])
RADII = st.sampled_from([0.0, 1e-6, 0.1, 0.7, 1e9])


def examples(backend: str, share: float) -> int:
    return max(1, round((CASES or 400) * share * SHARES[backend] / sum(SHARES.values())))


def parts(share: float) -> list:
    """Backend and number of cases of each test."""
    return [
        pytest.param(backend, min(PART, total - start), id=f"{backend}-{start}" if total > PART else backend)
        for backend in BACKENDS
        for total in [examples(backend, share)]
        for start in range(0, total, PART)
    ]


def tried(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=not CASES,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Case:
    objective: rd.Objective
    op: str  # logits, linear, linear with a bias
    call: str  # once, steps, accumulate
    level: str
    form: str  # of the groups
    dtype: torch.dtype
    batch: int  # B sequences, or N rows where there are none
    length: int | None  # T
    num_groups: int
    vocabulary: int
    width: int
    scale: float  # of the logits
    labelled: float  # share of the rows
    detailed: bool  # entropy and top-k are asked for; without, some kernels do more at once
    seed: int


@st.composite
def objectives(draw: Any, num_groups: int) -> rd.Objective:
    over, base = draw(st.sampled_from(["groups", "rows"])), draw(BASES)
    base = "rows" if over == "rows" else base
    adjusted = draw(st.booleans())
    step = draw(st.sampled_from([0.0, 0.01, 1.0, 30.0] if adjusted else [0.01, 1.0, 1e3, 1e200]))
    counts = [1 + 3 * g for g in range(num_groups)] if adjusted else None
    each = draw(st.booleans())
    adjustment = [0.25 * g for g in range(num_groups)] if each else 2.0
    return draw(
        st.one_of(
            st.just(rd.ERM()),
            st.just(rd.WorstGroup()),
            st.builds(
                rd.GroupDRO,
                st.just(step),
                st.just(adjustment if adjusted else 0.0),
                st.just(counts),
                st.sampled_from(["decay", "hold"]),
                st.sampled_from([None, 0.1, 1.0]),
                st.sampled_from([0.0, 0.3 / num_groups, 1 / num_groups]),
            ),
            st.builds(rd.CVaR, st.sampled_from([1e-9, 0.05, 0.3, 0.5, 1.0]), st.just(base), st.just(over)),
            st.builds(rd.ChiSquare, RADII, st.just(base), st.just(over)),
            st.builds(rd.KL, RADII, st.just(base), st.just(over)),
            st.builds(
                rd.Tilted, st.sampled_from([-1e200, -2.0, 0.0, 0.5, 1e3, 1e200]), st.just(base), st.just(over)
            ),
            st.builds(rd.DoReMi, st.sampled_from([0.0, 1.0, 1e3]), st.sampled_from([1e-6, 1e-4, 0.5, 1.0])),
        )
    )


@st.composite
def grouped_cases(draw: Any, backend: str) -> Case:
    level = draw(st.sampled_from(["token", "sequence"]))
    length = draw(st.integers(1, 5)) if level == "sequence" else draw(st.none() | st.integers(1, 5))
    batch = draw(st.sampled_from([*range(1, 25 if length is None else 6), 0]))
    num_groups = draw(st.sampled_from([1, 2, 3, 5, 31, 33, 70]))
    forms = SEQUENCE_FORMS if level == "sequence" else ROW_FORMS + (SEQUENCE_FORMS if length else [])
    return Case(
        draw(objectives(num_groups)),
        draw(st.sampled_from(["logits", "linear", "linear with a bias"])),
        draw(st.sampled_from(["once", "steps", "accumulate"])),
        level,
        draw(st.sampled_from(forms + ["none"] * (num_groups == 1))),
        draw(st.sampled_from(DTYPES[backend])),
        batch,
        length,
        num_groups,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([0.1, 2.0, 12.0])),
        draw(st.sampled_from([1.0, 0.8, 0.6, 0.3, 0.0])),
        draw(st.booleans()),
        draw(st.integers(0, 2**32 - 1)),
    )


class Batch(NamedTuple):
    inputs: list[Tensor]  # the op's, leaves: logits [..., V], or hidden [..., D], weight [V, D], bias [V]
    labels: Tensor
    groups: Tensor | None
    reference: Tensor | None  # of labels' shape

    def cut(self, rows: slice) -> Batch:
        of_rows = [None if each is None else each[rows] for each in self[1:]]
        return Batch([self.inputs[0][rows], *self.inputs[1:]], *of_rows)

    def call(self) -> list[Tensor | None]:
        """What the losses take."""
        first, *decoder = self.inputs
        weight, bias = (decoder[:1], decoder[1:] or [None]) if decoder else ([], [])
        return [first, *weight, self.labels, self.groups, *bias, self.reference]

    def logits(self, inputs: list[Tensor]) -> Tensor:
        """[N, V]"""
        logits = F.linear(*inputs) if len(inputs) > 1 else inputs[0]
        return logits.reshape(-1, logits.shape[-1])


def batch_of(case: Case) -> Batch:
    leading = (case.batch,) if case.length is None else (case.batch, case.length)
    width, vocabulary = case.width, case.vocabulary
    if case.op == "logits":
        inputs = [case.scale * torch.randn(*leading, vocabulary)]
    else:
        inputs = [torch.randn(*leading, width), case.scale * torch.randn(vocabulary, width) / width**0.5]
        if case.op != "linear":
            inputs.append(torch.randn(vocabulary))
    labels = torch.randint(vocabulary, leading)
    ignored = torch.rand(leading) >= case.labelled
    labels[ignored] = -100
    if case.op == "logits":
        inputs[0][ignored] = torch.nan  # nobody may look at it
    reference = 3 * torch.rand(leading) if case.objective.needs_reference else None
    leaves = [each.to(case.dtype).requires_grad_() for each in inputs]
    return Batch(leaves, labels, groups_of(case, leading), reference)


def groups_of(case: Case, leading: tuple[int, ...]) -> Tensor | None:
    if case.form == "none":
        return None
    of_sequences = case.form.endswith("sequences")
    shape = leading[:1] if of_sequences else leading
    absent = torch.rand(case.num_groups) < 0.3
    if case.form.startswith("mask"):
        return (torch.rand(*shape, case.num_groups) < min(0.5, 3 / case.num_groups)) & ~absent
    if case.form.startswith("ids"):
        ids = torch.randint(-1, case.num_groups, shape)
    else:
        places = (1, 3) if of_sequences and case.level == "token" and len(leading) > 1 else (3,)
        ids = torch.randint(
            -1, min(case.num_groups, 6), (*shape, *places)
        )  # of few groups, so that some repeat
    return torch.where(absent[ids] & (ids >= 0), -1, ids)


def check(case: Case, backend: str) -> None:
    torch.manual_seed(case.seed)
    make = rd.GroupDROLoss if case.op == "logits" else rd.LinearGroupDROLoss
    details = {"entropy": True, "top_k": 3} if case.detailed else {}
    loss_fn = make(case.num_groups, case.objective, backend=backend, level=case.level, **details)
    cuts = [slice(0, 1), slice(1, 1), slice(1, None)] if case.call == "accumulate" else [slice(None)]
    for _ in range(3 if case.call == "steps" else 1):
        batch = batch_of(case)
        state = {"q": loss_fn.group_weights.tolist(), "memory": loss_fn.memory.tolist()}
        oracle = Oracle(case.objective, case.num_groups, case.level, top_k=3, **state)
        units = measured_units(loss_fn, batch, cuts)
        loss, gradients = run(loss_fn, batch, cuts)
        report = loss_fn.report()
        columns = [*report.by_group.values(), report.ungrouped, report.overall]
        seen = Measured(
            [column.loss if column.count else 0.0 for column in columns],
            [column.count for column in columns],
            [column.excess or 0.0 if column.count else 0.0 for column in columns],
            units,
        )
        exact = [each.detach().double().requires_grad_() for each in batch.inputs]
        expected = oracle.step(batch.logits(exact), batch.labels, batch.groups, batch.reference, seen)
        compare_measured(case, batch, columns, seen, expected)
        compare_weights(case, columns, loss, loss_fn, seen, expected)
        compare_gradients(case, batch, exact, gradients, cuts, expected)


def run(loss_fn: Any, batch: Batch, cuts: list[slice]) -> tuple[float, list[Tensor]]:
    """Loss and gradients, added up over the micro-batches."""
    if len(cuts) == 1:
        loss = loss_fn(*batch.call())
        return loss.item(), list(torch.autograd.grad(loss, batch.inputs))
    total, sums = 0.0, [torch.zeros_like(each, dtype=torch.float64) for each in batch.inputs]
    with loss_fn.accumulate() as window:
        with torch.no_grad():
            for cut in cuts:
                window.observe(*batch.cut(cut).call())
        for cut in cuts:
            loss = loss_fn(*batch.cut(cut).call())
            total += loss.item()
            for into, gradient in zip(sums, torch.autograd.grad(loss, batch.inputs), strict=True):
                into += gradient
    return total, sums


def measured_units(loss_fn: Any, batch: Batch, cuts: list[slice]) -> list[float]:
    """The losses that an objective over rows is given; no report has them."""
    if not loss_fn.objective.over_rows:
        return []
    with torch.no_grad():
        parts = [loss_fn._grouped(loss_fn._copied_state(), Given(), *batch.cut(cut).call()) for cut in cuts]
    losses = [loss for part in parts for loss in part.reduced.units[0].tolist()]
    counted = units_of(batch.labels, batch.groups, loss_fn.num_groups, loss_fn.settings.level)
    if len(losses) < len(counted):  # the linear op on a CPU has only the rows with a label
        labelled = iter(losses)
        losses = [next(labelled) if unit.rows else 0.0 for unit in counted]
    return losses


def compare_measured(case: Case, batch: Batch, columns: list, seen: Measured, expected: Expected) -> None:
    """Means, against float64 with eager torch at this dtype as the yardstick."""
    labels = batch.labels.reshape(-1)
    logits, exact = (
        torch.where((labels == -100)[:, None], 0, batch.logits(inputs)).detach()
        for inputs in (batch.inputs, [each.double() for each in batch.inputs])
    )
    eager, truth = (F.cross_entropy(each, labels, reduction="none").tolist() for each in (logits, exact))
    units = units_of(batch.labels, batch.groups, case.num_groups, case.level)

    def means(name: str, values: Tensor) -> list[float]:
        return means_of({name: values}, units, case.num_groups)[1][name]

    assert [column.count for column in columns] == expected.counts
    present = [column for column, stats in enumerate(columns) if stats.count]
    # A product rounds its logits, which are sums; the row pass then sums exponentials in float32.
    rounded = EPSILON[case.dtype] * float(exact.abs().max()) if case.op != "logits" and len(exact) else 0.0
    epsilon = 2 * rounded + 10 * EPSILON[torch.promote_types(case.dtype, torch.float32)]
    yardstick = means("loss", torch.tensor(eager))
    for name in ["loss"] + ["excess"] * case.objective.needs_reference + ["entropy"] * case.detailed:
        for column in present:
            loss = expected.means["loss"][column]
            allowed = abs(yardstick[column] - loss) + epsilon * (1 + abs(loss))
            assert abs(getattr(columns[column], name) - expected.means[name][column]) <= allowed, name
    # Logits that are closer than their roundings may be in either order.
    apart = 2 * (float((logits.double() - exact).abs().max()) + rounded) if len(exact) else 0.0
    for name in ["accuracy"] + ["top_k_accuracy"] * case.detailed:
        least, most = (
            means(name, row_values(exact, labels, -100, 3, None, ahead)[name]) for ahead in (-apart, apart)
        )
        for column in present:
            value = getattr(columns[column], name)
            assert least[column] - 1e-6 <= value <= most[column] + 1e-6, name
    for unit, got, want, plain in zip(
        units, seen.units, unit_means(truth, units), unit_means(eager, units), strict=bool(seen.units)
    ):
        if unit.rows and unit.groups:
            assert abs(got - want) <= abs(plain - want) + epsilon * (1 + abs(want))


def weight_rounding(case: Case) -> float:
    """Relative, of weights: they are made in float64 and rounded to float32, for float64 logits only in q."""
    # 1e-8: of KL, whose divergence is within 1e-9 of its radius.
    rounding = 1e-8 if case.dtype == torch.float64 else 5e-7
    if (
        case.objective.adjustment_for(case.num_groups) is not None
    ):  # kept in float32, then times the step size
        rounding += case.objective.step_size * 2.0**-24 * 20
    return rounding


def compare_weights(
    case: Case, columns: list, loss: float, loss_fn: Any, seen: Measured, expected: Expected
) -> None:
    """Weights, loss, q and memory of the means that were measured."""
    rounding = weight_rounding(case)
    weights = [column.weight for column in columns[: case.num_groups]]
    assert weights == pytest.approx(expected.weights, rel=rounding, abs=WEIGHT)
    means = seen.units if case.objective.over_rows else seen.means[: case.num_groups]
    assert loss == pytest.approx(
        expected.value, rel=rounding, abs=rounding * max(map(abs, means), default=0.0)
    )
    assert loss_fn.group_weights.tolist() == pytest.approx(expected.q, rel=max(rounding, 5e-7), abs=WEIGHT)
    for got, want in zip(loss_fn.memory.tolist(), expected.memory, strict=True):
        assert got == pytest.approx(want, rel=max(rounding, 1e-9), abs=WEIGHT, nan_ok=True)


def compare_gradients(
    case: Case,
    batch: Batch,
    exact: list[Tensor],
    gradients: list[Tensor],
    cuts: list[slice],
    expected: Expected,
) -> None:
    wanted = torch.autograd.grad(expected.loss, exact, retain_graph=True)
    scale = expected.row_scale.reshape(batch.labels.shape)
    plain = [torch.zeros_like(each) for each in exact]
    for cut in cuts:
        part = batch.cut(cut)
        logits = part.logits(part.inputs)
        labels = part.labels.reshape(-1)
        logits = torch.where((labels == -100)[:, None], 0, logits)
        losses = F.cross_entropy(logits, labels, reduction="none").float()
        loss = (losses * scale[cut].reshape(-1)).sum()
        for into, gradient in zip(plain, torch.autograd.grad(loss, batch.inputs), strict=True):
            into += gradient
    # Below these a rounding is no longer relative, and what is summed in float32 may become 0.
    summed = torch.promote_types(case.dtype, torch.float32)
    flushed = torch.finfo(summed).smallest_normal / EPSILON[summed]
    smallest = max(torch.finfo(case.dtype).smallest_normal, flushed)
    # What a rounding of the logits does to a probability, or of the exponent in float32.
    steepness = 1 + float(batch.logits(exact).detach().nan_to_num().abs().max()) if scale.numel() else 1.0
    epsilon = steepness * (EPSILON[summed] if case.op == "logits" else 4 * EPSILON[case.dtype])
    epsilon += EPSILON[case.dtype] + weight_rounding(case)
    scale = scale.reshape(-1) + WEIGHT / epsilon  # a weight of 0 may be some roundings of the others
    sizes = magnitudes(batch, exact, scale, smallest)
    for got, want, eager, size in zip(gradients, wanted, plain, sizes, strict=True):
        assert got.shape == want.shape
        allowed = (eager - want).abs() + epsilon * size.clamp(min=smallest)
        assert ((got.double() - want).abs() <= allowed).all()


def magnitudes(batch: Batch, exact: list[Tensor], scale: Tensor, smallest: float) -> list[Tensor]:
    """How large the terms are that add up to each gradient."""
    labels, logits = batch.labels.reshape(-1), batch.logits(exact).detach()
    ignored = (labels == -100)[:, None]
    probabilities = torch.where(ignored, 0, logits).softmax(1)
    onehot = F.one_hot(labels.clamp(min=0), logits.shape[1])
    terms = scale[:, None] * (probabilities + onehot).clamp(min=smallest).masked_fill(ignored, 0)
    if len(exact) == 1:
        return [terms.reshape(exact[0].shape)]
    hidden, weight = exact[0].detach().reshape(-1, exact[0].shape[-1]), exact[1].detach()
    sizes = [(terms @ weight.abs()).reshape(exact[0].shape), terms.t() @ hidden.abs(), terms.sum(0)]
    return sizes[: len(exact)]


@pytest.mark.parametrize(("backend", "count"), parts(0.8))
def test_grouped_losses(backend, count, property_cases):
    @tried(count)
    @given(case=grouped_cases(backend))
    def tries(case):
        property_cases[backend] += 1
        check(case, backend)

    with on_device_of(backend):
        tries()


@dataclass(frozen=True)
class PlainCase:
    """Of the drop-in cross-entropy."""

    shape: tuple[int, ...]  # of the targets
    vocabulary: int
    dtype: torch.dtype
    reduction: str
    weighted: bool
    smoothing: float
    ignore_index: int
    scale: float
    labelled: float
    seed: int


@st.composite
def plain_cases(draw: Any, backend: str) -> PlainCase:
    vocabulary = draw(st.integers(1, 40))
    return PlainCase(
        draw(st.sampled_from([(), (0,), (1,), (7,), (24,), (2, 3), (2, 0), (3, 2, 4)])),
        vocabulary,
        draw(st.sampled_from(DTYPES[backend])),
        draw(st.sampled_from(["mean", "sum", "none"])),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.1, 1.0])),
        draw(st.sampled_from([-100, -1, vocabulary // 2])),
        draw(st.sampled_from([0.1, 2.0, 12.0])),
        draw(st.sampled_from([1.0, 0.8, 0.6, 0.3, 0.0])),
        draw(st.integers(0, 2**32 - 1)),
    )


def check_plain(case: PlainCase, backend: str) -> None:
    """Against torch's own in float64, with torch's at this dtype as the yardstick; NaN where torch's is NaN."""
    torch.manual_seed(case.seed)
    classes = (case.shape[0], case.vocabulary, *case.shape[1:]) if case.shape else (case.vocabulary,)
    logits = (case.scale * torch.randn(classes)).to(case.dtype).requires_grad_()
    target = torch.where(
        torch.rand(case.shape) < case.labelled, torch.randint(case.vocabulary, case.shape), case.ignore_index
    )
    weight = torch.randint(0, 9, (case.vocabulary,)) / 4 if case.weighted else None  # exact in every dtype
    options = {
        "ignore_index": case.ignore_index,
        "reduction": case.reduction,
        "label_smoothing": case.smoothing,
    }
    exact = logits.detach().double().requires_grad_()
    eager = logits.detach().clone().requires_grad_()
    wanted = F.cross_entropy(exact, target, None if weight is None else weight.double(), **options)
    plain = F.cross_entropy(eager, target, None if weight is None else weight.to(case.dtype), **options)
    got = rd.CrossEntropyLoss(weight, backend=backend, **options)(logits, target)
    assert (got.dtype, got.shape) == (case.dtype, target.shape if case.reduction == "none" else ())
    # The largest weight over their mean, in logits' size: what a row adds to a mean, rounded.
    size = (1 + wanted.detach().abs()) * (2 if weight is None else 4)
    close(got, wanted, plain, size, case.dtype)
    grad_out = torch.rand_like(wanted)
    gradients = [
        torch.autograd.grad(loss, leaf, grad_out.to(loss.dtype))[0]
        for loss, leaf in ((got, logits), (wanted, exact), (plain, eager))
    ]
    # Weight times (probability - target), which may nearly cancel: 1 is the largest that either can be.
    largest = 1.0 if weight is None else 2.0
    if case.reduction == "mean":
        counted = target[target != case.ignore_index]
        largest /= max(float(len(counted) if weight is None else weight[counted].sum()), 0.25)
    close(*gradients, torch.tensor(largest), case.dtype)


def close(got: Tensor, want: Tensor, eager: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    want, eager = want.detach(), eager.detach().double()
    assert torch.equal(got.isfinite(), want.isfinite())
    allowed = (
        (eager - want).abs() + EPSILON[dtype] * size + torch.finfo(dtype).smallest_normal * EPSILON[dtype]
    )
    error = (got.detach().double() - want).abs()
    assert (error <= allowed)[want.isfinite()].all()


@pytest.mark.parametrize(("backend", "count"), parts(0.2))
def test_cross_entropy(backend, count, property_cases):
    @tried(count)
    @given(case=plain_cases(backend))
    def tries(case):
        property_cases[backend] += 1
        check_plain(case, backend)

    with on_device_of(backend):
        tries()
