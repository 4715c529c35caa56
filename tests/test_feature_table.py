"""The README's table of objectives: what it says is generated here, and each of its cells is a case of a test.

``python -m tests.test_feature_table`` writes it anew.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rd_kernels as rd
from rd_kernels.backends.registry import BACKENDS
from tests import test_distributed
from tests.float64_oracle import Oracle, assert_agrees

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- features: begin -->", "<!-- features: end -->"
FORMS = ["ids", "masks", "lists"]
G, V, D = 4, 9, 5


class Entry(NamedTuple):
    name: str
    objective: rd.Objective
    state: str = "none"


OBJECTIVES = [
    Entry("`ERM`", rd.ERM()),
    Entry("`GroupDRO`", rd.GroupDRO(0.5, 2.0, [9, 4, 6, 2], "hold"), "q"),
    Entry("with `loss_ema` or `floor`", rd.GroupDRO(0.5, loss_ema=0.3, floor=0.05), "q, mean losses"),
    Entry("`DoReMi`", rd.DoReMi(0.5, 0.01), "q, excess"),
    Entry("`CVaR`", rd.CVaR(0.4)),
    Entry("`ChiSquare`", rd.ChiSquare(0.3)),
    Entry("`KL`", rd.KL(0.2)),
    Entry("`Tilted`", rd.Tilted(1.5)),
    Entry("`WorstGroup`", rd.WorstGroup()),
]
OVER_ROWS = [entry for entry in OBJECTIVES if hasattr(entry.objective, "over")]


def table() -> list[str]:
    """The Markdown lines: a row for each objective, a tick for each case that the tests below hold."""
    head = ["objective", "state", "weights made", *sorted(BACKENDS), *FORMS, "over rows", "several ranks"]
    lines = [_line(head), f"|{'|'.join(['---'] * 3 + [':-:'] * (len(head) - 3))}|"]
    for entry in OBJECTIVES:
        step = "in the kernel" if entry.objective.rule else "in a step after it"
        rows, ranks = entry in OVER_ROWS, type(entry.objective) in _on_ranks()
        ticks = [True] * (len(BACKENDS) + len(FORMS)) + [rows, ranks]
        lines.append(_line([entry.name, entry.state, step, *("✓" if tick else "" for tick in ticks)]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _on_ranks() -> set[type]:
    return {type(objective) for objective in test_distributed.OBJECTIVES.values()}


def block() -> str:
    return "\n".join([BEGIN, *table(), END])


def inputs(op: str) -> list[torch.Tensor]:
    if op == "logits":
        return [2 * torch.randn(4, 3, V)]
    return [torch.randn(4, 3, D), torch.randn(V, D), torch.randn(V)]


def batch(form: str):
    """Labels, groups of the tokens, reference losses; the last group is absent, a token is in none."""
    labels = torch.randint(V, (4, 3))
    labels[1, 1] = -100
    ids = torch.arange(12).reshape(4, 3) % (G - 1)
    ids[0, 2] = -1
    if form == "masks":
        groups = (ids[..., None] == torch.arange(G)) | (torch.rand(4, 3, G) < 0.2) & (torch.arange(G) < G - 1)
    else:
        groups = ids if form == "ids" else torch.stack([ids, torch.randint(-1, G - 1, (4, 3)), ids], dim=-1)
    return labels, groups, torch.rand(4, 3) * 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("entry", OBJECTIVES, ids=lambda entry: entry.name.replace("`", ""))
def test_cell(backend, entry, op, form):
    """Objective x backend x form of the groups in both ops: loss, gradients, state and report."""
    make = rd.GroupDROLoss if op == "logits" else rd.LinearGroupDROLoss
    loss_fn, oracle = make(G, entry.objective, backend=backend), Oracle(entry.objective, G)
    labels, groups, reference = batch(form)
    reference = reference if entry.objective.needs_reference else None
    assert_agrees(loss_fn, oracle, inputs(op), labels, groups, reference)


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("entry", OVER_ROWS, ids=lambda entry: entry.name.replace("`", ""))
def test_cell_over_rows(backend, entry, op):
    objective = dataclasses.replace(entry.objective, over="rows")
    make = rd.GroupDROLoss if op == "logits" else rd.LinearGroupDROLoss
    labels, groups, _ = batch("masks")
    assert_agrees(make(G, objective, backend=backend), Oracle(objective, G), inputs(op), labels, groups)


@pytest.mark.parametrize(
    "entry", [entry for entry in OBJECTIVES if entry not in OVER_ROWS], ids=lambda entry: entry.name
)
def test_an_empty_cell_is_refused(entry):
    with pytest.raises(TypeError, match="over"):
        dataclasses.replace(entry.objective, over="rows")


@pytest.mark.parametrize("entry", OBJECTIVES, ids=lambda entry: entry.name.replace("`", ""))
def test_the_columns_about_the_objective(entry):
    """State: what a checkpoint has more of after a batch than before. Kernel: the rules that backends are given."""
    loss_fn = rd.GroupDROLoss(G, entry.objective, backend="reference")
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    labels, groups, reference = batch("ids")
    loss_fn(*inputs("logits"), labels, groups, reference if entry.objective.needs_reference else None)
    changed = {name for name, value in loss_fn.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"none": set(), "q": {"group_weights"}}.get(entry.state, {"group_weights", "memory"})
    assert changed == expected
    assert type(entry.objective) in _on_ranks()  # tests/test_distributed.py has it on 2 and 4


def test_every_objective_has_a_row():
    public = {getattr(rd, name) for name in rd.__all__}
    family = {each for each in public if isinstance(each, type) and issubclass(each, rd.Objective)} - {
        rd.Objective
    }
    assert {type(entry.objective) for entry in OBJECTIVES} == family


def test_an_objective_of_ones_own_runs_everywhere(backend):
    """The sentence below the table."""

    @dataclass(frozen=True)
    class WorstGroup(rd.Objective):  # the oracle goes by the name
        def update(self, batch, q, memory):
            means = torch.where(batch.present, batch.means, -torch.inf)
            return rd.Update((means == means.amax()).double())

    for form in FORMS:
        for op in ("logits", "linear"):
            make = rd.GroupDROLoss if op == "logits" else rd.LinearGroupDROLoss
            labels, groups, _ = batch(form)
            assert_agrees(
                make(G, WorstGroup(), backend=backend), Oracle(WorstGroup(), G), inputs(op), labels, groups
            )


def test_the_readme_has_this_table():
    text = README.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    assert text[begin:end] == block(), "run `python -m tests.test_feature_table`"


if __name__ == "__main__":
    text = README.read_text()
    start, rest = text.split(BEGIN)
    README.write_text(start + block() + rest.split(END)[1])
