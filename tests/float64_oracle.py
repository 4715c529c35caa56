"""The whole op once more, in float64 and plain loops: torch's cross-entropy, the objectives as their papers have them.

Written beside the package and not from it: of an objective only its name and its parameters are read. Letters: N rows,
V vocabulary, G groups, U units (what a group counts: rows, or sequences), K group ids in a list.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor

NAN = float("nan")


class Unit(NamedTuple):
    rows: list[int]  # those with a label; none: the unit does not count
    groups: list[int]


@dataclass
class Measured:
    """What an objective looks at: of each group mean loss (0 if absent), count, mean excess; of each unit its loss."""

    means: list[float]
    counts: list[int]
    excess: list[float]
    units: list[float] = field(default_factory=list)


@dataclass
class Expected:
    loss: Tensor  # [] float64, differentiable: sum_i row_scale_i L_i with the scales held constant
    value: float  # of the loss, by the losses that were seen
    row_scale: Tensor  # [N] float64
    weights: list[float]  # of the groups, as the report has them
    q: list[float]
    memory: list[list[float]]
    counts: list[int]  # by group, then of the units in none, then of all
    means: dict[
        str, list[float]
    ]  # of the same: loss, accuracy, entropy, top_k_accuracy, excess; NaN without units


@dataclass
class Oracle:
    objective: Any
    num_groups: int
    level: str = "token"
    ignore_index: int = -100
    top_k: int = 1
    q: list[float] = field(default_factory=list)
    memory: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.q = self.q or [1 / self.num_groups] * self.num_groups
        rows, start = {"GroupDRO": (1, NAN), "DoReMi": (3, 0.0)}.get(type(self.objective).__name__, (0, NAN))
        if getattr(self.objective, "loss_ema", 1) is None:
            rows = 0
        self.memory = self.memory or [[start] * self.num_groups for _ in range(rows)]

    def step(
        self,
        logits: Tensor,  # [N, V] float64
        labels: Tensor,  # [N], or [B, T] with N = B T
        groups: Tensor | None = None,  # in any of the forms that users have
        reference: Tensor | None = None,  # of labels' shape
        seen: Measured | None = None,
    ) -> Expected:
        """The loss of a batch; q and memory go on. ``seen``: what an implementation measured, for the weights.

        Weights jump where losses tie, and a steep objective multiplies a rounding of the losses by its step size. So
        what was measured is compared first, and then the weights are those of the very losses that were measured.
        """
        counted, flat = (
            units_of(labels, groups, self.num_groups, self.level, self.ignore_index),
            labels.reshape(-1),
        )
        logits = torch.where((flat == self.ignore_index)[:, None], 0, logits)  # whatever ignored rows hold
        values = row_values(logits, flat, self.ignore_index, self.top_k, reference)
        counts, means = group_means(values, counted, self.num_groups)
        if seen is None:
            some = [0.0 if math.isnan(mean) else mean for mean in means["loss"]]
            excess = [0.0 if math.isnan(mean) else mean for mean in means["excess"]]
            seen = Measured(some, counts, excess, unit_means(values["loss"].tolist(), counted))
        scale = torch.zeros(len(flat), dtype=torch.float64)
        if getattr(self.objective, "over", "groups") == "rows":
            inside = [u for u, unit in enumerate(counted) if unit.rows and unit.groups]
            shares = weigh_units(self.objective, [seen.units[u] for u in inside])
            by_unit = dict(zip(inside, shares, strict=True))
            value = math.fsum(by_unit[u] * seen.units[u] for u in inside)
            weights = [
                math.fsum(by_unit[u] for u in inside if group in counted[u].groups)
                for group in range(self.num_groups)
            ]
        else:
            given = (
                seen.means[: self.num_groups],
                seen.counts[: self.num_groups],
                seen.excess[: self.num_groups],
            )
            weights, self.q, self.memory = weigh(self.objective, *given, self.q, self.memory)
            value = math.fsum(w * mean for w, mean, count in zip(weights, *given[:2], strict=True) if count)
            by_unit = {
                u: math.fsum(weights[group] / counts[group] for group in unit.groups)
                for u, unit in enumerate(counted)
                if unit.rows
            }
        for u, weight in by_unit.items():
            for row in counted[u].rows:
                scale[row] = weight / len(counted[u].rows)
        loss = (scale * values["loss"]).sum()
        return Expected(
            loss, value, scale, weights, list(self.q), [list(row) for row in self.memory], counts, means
        )


def units_of(
    labels: Tensor, groups: Tensor | None, num_groups: int, level: str = "token", ignore_index: int = -100
) -> list[Unit]:
    """Rows or sequences, in order, each with its labelled rows and its groups."""
    leading = labels.shape if level == "token" else labels.shape[:1]
    length = 1 if level == "token" else labels.shape[1:].numel()
    flat, units = labels.reshape(-1).tolist(), []
    for u, index in enumerate(itertools.product(*map(range, leading))):
        rows = [row for row in range(u * length, (u + 1) * length) if flat[row] != ignore_index]
        units.append(Unit(rows, _groups_at(groups, index, len(leading), num_groups)))
    return units


def _groups_at(groups: Tensor | None, index: tuple[int, ...], axes: int, num_groups: int) -> list[int]:
    if groups is None:
        return [0]
    several = groups.dtype == torch.bool or groups.dim() > axes  # of a row: a mask, or a list of ids
    for axis, i in enumerate(index[: index and groups.dim() - several]):
        groups = groups[0 if axis and len(groups) == 1 else i]  # [B, 1, K]: one list for a sequence
    if groups.dtype == torch.bool:
        return [group for group in range(num_groups) if groups[group]]
    return sorted({int(group) for group in groups.reshape(-1) if group >= 0})


def row_values(
    logits: Tensor,  # [N, V] float64
    labels: Tensor,  # [N]
    ignore_index: int,
    top_k: int,
    reference: Tensor | None,
    ahead: float = 0.0,
) -> dict[str, Tensor]:
    """[N] each, 0 for rows without a label. ``ahead`` is added to the label's logit where it is ranked."""
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    values = {
        name: torch.zeros(len(labels), dtype=torch.float64)
        for name in ("accuracy", "entropy", "top_k_accuracy")
    }
    for row, label in enumerate(labels.tolist()):
        if label != ignore_index:
            z = logits[row].tolist()
            larger = sum(not other <= z[label] + ahead for j, other in enumerate(z) if j != label)
            values["accuracy"][row] = larger == 0
            values["top_k_accuracy"][row] = larger < top_k
            values["entropy"][row] = _entropy(z)
    known = losses.detach() if reference is None else reference.reshape(-1).double()
    excess = torch.where(labels == ignore_index, 0, (losses.detach() - known).clamp(min=0))
    return {"loss": losses, "excess": excess, **values}


def _entropy(z: list[float]) -> float:
    if not all(map(math.isfinite, z)):
        finite = [x for x in z if x != -math.inf]
        return NAN if not finite or not all(map(math.isfinite, finite)) else _entropy(finite)
    shifted = [math.exp(x - max(z)) for x in z]
    total = math.fsum(shifted)
    return -math.fsum(e / total * (x - max(z) - math.log(total)) for e, x in zip(shifted, z, strict=True))


def unit_means(values: Sequence[float], units: list[Unit]) -> list[float]:
    return [math.fsum(values[row] for row in unit.rows) / max(len(unit.rows), 1) for unit in units]


def group_means(
    values: dict[str, Tensor], units: list[Unit], num_groups: int
) -> tuple[list[int], dict[str, list[float]]]:
    """Counts [G + 2] and means by name: of each group, of the units in no group, of all."""
    columns = [
        [u for u, unit in enumerate(units) if unit.rows and g in unit.groups] for g in range(num_groups)
    ]
    columns.append([u for u, unit in enumerate(units) if unit.rows and not unit.groups])
    columns.append([u for u, unit in enumerate(units) if unit.rows])
    means = {}
    for name, value in values.items():
        of_unit = unit_means(value.tolist(), units)
        means[name] = [
            math.fsum(of_unit[u] for u in column) / len(column) if column else NAN for column in columns
        ]
    return [len(column) for column in columns], means


# Objectives: means m, counts n, and base distribution p of the groups (or units) that are present.


def weigh(
    objective: Any,
    means: list[float],
    counts: list[int],
    excess: list[float],
    q: list[float],
    memory: list[list[float]],
) -> tuple[list[float], list[float], list[list[float]]]:
    """-> weights of the group means, new q, new memory."""
    present = [g for g, n in enumerate(counts) if n]
    name = type(objective).__name__
    if name in ("GroupDRO", "DoReMi"):
        if not present:
            nothing = q if name == "GroupDRO" else [0.0] * len(q)
            return list(nothing), q, memory
        return (_group_dro if name == "GroupDRO" else _doremi)(
            objective, means, counts, excess, q, memory, present
        )
    weights = [0.0] * len(counts)
    if present:
        by_rows = getattr(objective, "base", "rows") == "rows"
        total = sum(counts) if by_rows else len(present)
        shares = [(counts[g] if by_rows else 1) / total for g in present]
        for g, weight in zip(present, _mixture(objective, [means[g] for g in present], shares), strict=True):
            weights[g] = weight
    return weights, q, memory


def weigh_units(objective: Any, losses: list[float]) -> list[float]:
    return _mixture(objective, losses, [1 / len(losses)] * len(losses)) if losses else []


def _mixture(objective: Any, m: list[float], p: list[float]) -> list[float]:
    name = type(objective).__name__
    if name == "ERM":
        return p
    if name == "WorstGroup":
        return [(mean == max(m)) / m.count(max(m)) for mean in m]
    if name == "Tilted":
        return _tilted(m, p, objective.t)
    return {"CVaR": _cvar, "ChiSquare": _chi_square, "KL": _kl}[name](objective, m, p)


def _tilted(m: list[float], p: list[float], t: float) -> list[float]:
    """p exp(t m), normalised (Li et al. 2021, equation 2)."""
    top = max(t * mean for mean in m)
    tilted = [share * math.exp(t * mean - top) for share, mean in zip(p, m, strict=True)]
    return [weight / math.fsum(tilted) for weight in tilted]


def _cvar(objective: Any, m: list[float], p: list[float]) -> list[float]:
    """Worst first, all that is equally bad together, until alpha is used up (Rockafellar and Uryasev 2000)."""
    left, weights = objective.alpha, [0.0] * len(m)
    for value in sorted(set(m), reverse=True):
        tied = [i for i, mean in enumerate(m) if mean == value]
        mass = math.fsum(p[i] for i in tied)
        for i in tied:
            weights[i] = p[i] * min(1.0, max(left, 0.0) / mass)
        left -= mass
    return [weight / math.fsum(weights) for weight in weights]


def _chi_square(objective: Any, m: list[float], p: list[float]) -> list[float]:
    """p max(m - eta, 0), eta by bisection on the divergence (Levy et al. 2020, their released code)."""
    worst = _at_most(m, p)
    if objective.rho == 0 or len(set(m)) == 1:
        return p
    if objective.rho >= _chi_square_divergence(worst, p):
        return worst

    def at(depth: float) -> list[float]:  # eta = the largest loss - depth
        excess = [s * max(mean - max(m) + depth, 0.0) for mean, s in zip(m, p, strict=True)]
        return [e / math.fsum(excess) for e in excess]

    low = high = min(max(m) - mean for mean in m if mean < max(m))
    while _chi_square_divergence(at(high), p) > objective.rho:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _chi_square_divergence(at(middle), p) > objective.rho else (low, middle)
    return at(high)


def _chi_square_divergence(w: list[float], p: list[float]) -> float:
    return math.fsum(share * (weight / share - 1) ** 2 for weight, share in zip(w, p, strict=True)) / 2


def _kl(objective: Any, m: list[float], p: list[float]) -> list[float]:
    """The tilted weights whose divergence from p is rho (Hu and Hong 2013), the tilt by Brent's method."""
    worst = _at_most(m, p)
    if objective.rho == 0 or len(set(m)) == 1:
        return p
    if objective.rho >= _kl_divergence(worst, p):
        return worst
    spread = max(m) - min(m)

    def at(log_t: float) -> list[float]:
        return _tilted([(mean - max(m)) / spread for mean in m], p, math.exp(log_t))

    root = brentq(
        lambda log_t: _kl_divergence(at(log_t), p) - objective.rho, -30, 90, xtol=1e-13, maxiter=500
    )
    return at(root)


def _kl_divergence(w: list[float], p: list[float]) -> float:
    # sum (p - w) = 0 is added, so that no term is negative.
    pairs = zip(w, p, strict=True)
    return math.fsum((a * math.log(a / b) if a else 0.0) + b - a for a, b in pairs)


def _at_most(m: list[float], p: list[float]) -> list[float]:
    """All weight on the largest, ties in proportion to p."""
    mass = math.fsum(s for s, mean in zip(p, m, strict=True) if mean == max(m))
    return [s / mass if mean == max(m) else 0.0 for s, mean in zip(p, m, strict=True)]


def _softmax(logs: list[float]) -> list[float]:
    top = max(logs)
    powers = [math.exp(x - top) for x in logs]
    return [power / math.fsum(powers) for power in powers]


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _group_dro(objective, means, counts, excess, q, memory, present):
    """q_g <- q_g exp(step (m_g + C / sqrt(N_g))), normalised (Sagawa et al. 2020, Algorithm 1), then the floor."""
    groups = range(len(q))
    losses = list(means)
    if objective.loss_ema is not None:
        gamma, average = objective.loss_ema, list(memory[0])
        for g in present:
            average[g] = means[g] if math.isnan(average[g]) else (1 - gamma) * average[g] + gamma * means[g]
            losses[g] = average[g]
        memory = [average]
    size = (
        objective.adjustment if isinstance(objective.adjustment, tuple) else [objective.adjustment] * len(q)
    )
    logs = [_log(weight) for weight in q]
    for g in present:
        bonus = size[g] / math.sqrt(objective.group_counts[g]) if objective.group_counts else 0.0
        logs[g] += objective.step_size * (losses[g] + bonus)
    held = objective.absent_groups == "hold"
    taking = present if held else list(groups)
    shared = math.fsum(q[g] for g in present) if held else 1.0
    if shared == 0:  # a share of nothing has no proportions
        return q, q, memory
    floor, new = min(objective.floor, shared / len(taking)), list(q)
    for g, share in zip(taking, _softmax([logs[g] for g in taking]), strict=True):
        new[g] = floor + (shared - len(taking) * floor) * share
    return new, new, memory


def _doremi(objective, means, counts, excess, q, memory, present):
    """Xie et al. 2023, Algorithm 1; an absent group keeps the excess it was last seen with."""
    last, average, updates = memory
    scores = [excess[g] if g in present else last[g] for g in range(len(q))]
    tilted = _softmax([_log(weight) + objective.step_size * s for weight, s in zip(q, scores, strict=True)])
    new = [(1 - objective.smoothing) * share + objective.smoothing / len(q) for share in tilted]
    mass = math.fsum(weight * n for weight, n in zip(new, counts, strict=True))
    weights = [weight * n / (mass or 1) for weight, n in zip(new, counts, strict=True)]
    count = updates[0] + 1
    running = [(before * (count - 1) + weight) / count for before, weight in zip(average, new, strict=True)]
    return weights, new, [scores, running, [count] * len(q)]


def assert_agrees(
    loss_fn: torch.nn.Module,
    oracle: Oracle,
    inputs: list[Tensor],  # logits [..., V]; or hidden [..., D], weight [V, D], bias [V]; float32 or float64
    labels: Tensor,
    groups: Tensor | None = None,
    reference: Tensor | None = None,
    rtol: float = 1e-5,
) -> Tensor:
    """A call of a loss in float32 against the oracle: loss, gradients, state and report. -> the loss.

    For batches without ties and objectives that are not steep: the oracle weighs its own losses.
    """
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    first, weight, bias = leaves[0], leaves[1:2], leaves[2:] or [None]
    loss = loss_fn(first, *weight, labels, groups, *(bias if weight else []), reference)
    logits = F.linear(*exact) if weight else exact[0]
    expected = oracle.step(logits.reshape(-1, logits.shape[-1]), labels, groups, reference)
    close = {"rtol": rtol, "atol": rtol / 10, "equal_nan": True}

    def same(got: Any, want: Any) -> None:
        got, want = (torch.as_tensor(each, dtype=torch.float64) for each in (got, want))
        torch.testing.assert_close(got, want, **close)

    same(loss.detach(), expected.loss.detach())
    for got, want in zip(
        torch.autograd.grad(loss, leaves, retain_graph=True),
        torch.autograd.grad(expected.loss, exact),
        strict=True,
    ):
        same(got, want)
    same(loss_fn.group_weights, expected.q)
    same(loss_fn.memory, torch.tensor(expected.memory).reshape(loss_fn.memory.shape))
    report = loss_fn.report()
    columns = [*report.by_group.values(), report.ungrouped, report.overall]
    assert [column.count for column in columns] == expected.counts
    same([column.weight for column in columns[:-2]], expected.weights)
    for name, means in expected.means.items():
        got = [getattr(column, name) for column in columns]
        if got[0] is not None:
            same(got, means)
    return loss
