"""The cases beyond single ops: the fine-tuning step and the growth lines, on small instances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.bench import Bench, Contest, Rejected
from benchmarks.finetuning import OursTraining, StepCase, Transformers, TransformersGathered
from benchmarks.growth import LARGE, GrowthCase, cases, group_cost, lines, plot
from benchmarks.results import Row, Run

SMALL = StepCase("small", layers=1, width=32, heads=2, rows=3)


@pytest.mark.parametrize(
    "peer", [OursTraining(), Transformers(), TransformersGathered()], ids=lambda peer: peer.name
)
def test_steps_pass_the_gate_and_train_with_dropout(peer):
    contest = Contest(replace(SMALL, optimizer=True), "cpu")
    before = [leaf.detach().clone() for leaf in contest.inputs.leaves]
    row = Row(peer.name, "peer")
    contest.admit(peer, row).run()
    assert "<=" in row.error
    assert contest.inputs.model.training
    assert len(contest.inputs.optimizer.state) == len(list(contest.inputs.model.parameters()))
    assert all(torch.equal(old, new) for old, new in zip(before, contest.inputs.leaves, strict=True))
    assert all(leaf.grad is None for leaf in contest.inputs.leaves)


def test_a_wrong_step_is_caught():
    class Wrong(Transformers):
        def row_losses(self, inputs):
            return super().row_losses(inputs) * 1.01

    row = Row("wrong", "peer")
    with pytest.raises(Rejected, match="error"):
        Contest(SMALL, "cpu").admit(Wrong(), row)


def test_growth_cases_stay_within_memory_and_have_names_of_their_own():
    found = cases(cores=6)
    assert max(case.rows * case.vocabulary * 4 for case in found) <= 0.3e9
    assert len({case.name for case in found}) == len(found)
    assert LARGE in {case.name for case in found}
    assert [case.at for case in found if case.line.startswith("threads")] == [1, 2, 4, 6]


def test_growth_is_timed_and_plotted(tmp_path):
    bench = Bench("cpu")
    for groups in (2, 70):
        case = GrowthCase(8, 50, groups=groups, line="G, masks", at=groups, mask=True, threads=1)
        with case.setting():
            bench.interleave(case, case.peers)
    assert lines(bench.run) == {"G, masks": {2: "growth with G, masks: 2", 70: "growth with G, masks: 70"}}
    assert plot(bench.run, tmp_path / "growth.png") == [tmp_path / "growth.png"]
    assert plot(Run({}, {}), tmp_path / "none.png") == []


def test_group_cost_is_a_share_of_the_large_mean():
    run = Run({}, {})
    for case, ours, mean in ((LARGE, 0.05, 0.04), ("growth with G, ids, V = 1000: 4", 0.003, 0.002)):
        run.row(case, Row("rd_kernels", "ours")).seconds = [ours]
        run.row(case, Row("rd_kernels, plain mean", "ours")).seconds = [mean]
    assert group_cost(run, "growth with G, ids, V = 1000: 4").median == pytest.approx(0.001 / 0.04)
    assert group_cost(run, LARGE).median == pytest.approx(0.25)
