"""The benchmark harness itself: its gate, its arithmetic, its comparison, and every CPU peer on a tiny case."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gate, others
from benchmarks.bench import Bench, Rejected, schedule
from benchmarks.cases import LinearCase, LogitsCase
from benchmarks.floor import FreshFloor, InPlaceFloor, ThreeGemms, read
from benchmarks.peers import (
    Compiled,
    Eager,
    EagerMean,
    Ours,
    OursInPlace,
    OursLinear,
    OursMean,
    OursReference,
    group_dro,
)
from benchmarks.report import app
from benchmarks.results import Row, Run, compare, load, ratio, save
from benchmarks.tables import case_lines
from tests.oracles import PublishedGroupDRO, members_of

RESULTS = sorted(
    (Path(__file__).parents[1] / "benchmarks" / "results").glob("c*-*.json")
)  # cpu-, cuda-: runs
LOGITS, LINEAR = LogitsCase(33, 301, groups=4), LinearCase(33, 16, 301, groups=4)


class OnceRun:
    """In the place of pytest-benchmark's fixture: runs once, with nothing to report."""

    stats = None

    def pedantic(self, run, setup, rounds, iterations, warmup_rounds):
        if setup is not None:
            setup()
        run()


def admitted(case, peer) -> Row:
    """``peer``'s row after the gate; raises ``Rejected``."""
    bench = Bench.__new__(Bench)  # without measuring the machine
    bench.device, bench.run, bench._contest = "cpu", Run({}, {}), None
    bench.measure(OnceRun(), case, peer)
    return bench.run.cases[case.name][peer.name]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "peer",
    [Ours(), OursInPlace(), OursMean(), OursReference(), Eager(), EagerMean()],
    ids=lambda peer: peer.name,
)
def test_logits_peers_pass_the_gate(peer, dtype):
    if reason := peer.missing("cpu"):
        pytest.skip(reason)
    assert "<=" in admitted(dataclasses.replace(LOGITS, dtype=dtype), peer).error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("peer", [OursLinear(), Eager(), *others.LINEAR], ids=lambda peer: peer.name)
def test_linear_peers_pass_the_gate(peer, bias):
    case = dataclasses.replace(LINEAR, bias=bias)
    if reason := peer.missing("cpu") or peer.refuses(case):
        pytest.skip(reason)
    assert "<=" in admitted(case, peer).error


@pytest.mark.slow
@pytest.mark.parametrize("case", [LOGITS, LINEAR], ids=["logits", "linear"])
def test_torch_compile_passes_the_gate(case):
    assert "<=" in admitted(case, Compiled()).error


@pytest.mark.parametrize(
    ("case", "peer"), [(LOGITS, FreshFloor()), (LOGITS, InPlaceFloor()), (LINEAR, ThreeGemms())]
)
def test_floors_run_without_a_gate(case, peer):
    assert admitted(case, peer).error == ""


def test_read_covers_all_memory():
    assert read(torch.ones(7, 3, dtype=torch.bfloat16)) == 5 * read(torch.ones(1, 4, dtype=torch.bfloat16))


class WrongGradient(Ours):
    """One gradient in a thousand is wrong by one per cent: too little to be seen in a training run."""

    def step(self, inputs):
        result = super().step(inputs)
        result.gradients[0].view(-1)[::1000] *= 1.01
        return result


class WrongProbabilities(Ours):
    """Right at the labels, zero elsewhere, as if every small probability had been dropped."""

    def step(self, inputs):
        result = super().step(inputs)
        kept = torch.zeros_like(result.gradients[0])
        rows = torch.arange(len(inputs.labels))
        kept[rows, inputs.labels] = result.gradients[0][rows, inputs.labels]
        return dataclasses.replace(result, gradients=(kept,))


class ForgottenUpdate(Ours):
    """The weights of the last batch stay."""

    def step(self, inputs):
        before = inputs.q.clone()
        result = super().step(inputs)
        inputs.q.copy_(before)
        return result


class UpdatedTooLate(Eager):
    """The loss is weighted with the q of the last batch."""

    def loss(self, inputs):
        before = inputs.q.clone()
        return super().loss(inputs) * 0 + torch.dot(before, self._means(inputs))

    def _means(self, inputs):
        member = torch.nn.functional.one_hot(inputs.ids, inputs.q.numel()).float()
        return member.T @ self.row_losses(inputs).float() / member.sum(0).clamp(min=1)


class NotANumber(Ours):
    def step(self, inputs):
        result = super().step(inputs)
        result.gradients[0][0, 0] = float("nan")
        return result


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("peer", "measure"),
    [
        (WrongProbabilities(), "gradient"),
        (ForgottenUpdate(), "q"),
        (UpdatedTooLate(), ""),
        (NotANumber(), "gradient"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gate_refuses(peer, measure, dtype):
    with pytest.raises(Rejected, match=f"^{measure}.* > ") as rejected:
        admitted(LogitsCase(64, 5000, dtype), peer)
    assert rejected.value.failed


def test_gate_refuses_a_slightly_wrong_gradient():
    with pytest.raises(Rejected, match=r"^gradient 0"):
        admitted(LOGITS, WrongGradient())


def test_gate_runs_on_fewer_rows_of_a_huge_case_and_times_the_whole(monkeypatch):
    seen = []

    class Watched(Ours):
        def step(self, inputs):
            seen.append(len(inputs.labels))
            return super().step(inputs)

    monkeypatch.setattr(LogitsCase, "gate_rows", 5)
    assert "<=" in admitted(LOGITS, Watched()).error
    assert seen[0] == 5
    assert seen[-1] == LOGITS.rows


def test_peers_errors_are_reported_and_ours_raise():
    class Broken(Eager):
        def row_losses(self, inputs):
            raise RuntimeError("no such kernel")

    with pytest.raises(Rejected, match="no such kernel") as rejected:
        admitted(LOGITS, Broken())
    assert rejected.value.failed
    with pytest.raises(RuntimeError, match="no such kernel"):
        admitted(LOGITS, type("BrokenOurs", (Broken,), {"ours": True})())


def test_exact_and_eager_group_dro_follow_the_published_loop():
    inputs = LOGITS.inputs("cpu")
    oracle = PublishedGroupDRO(4, 0.01, probabilities=inputs.q.double().tolist())
    losses = torch.nn.functional.cross_entropy(inputs.logits.double(), inputs.labels, reduction="none")
    loss = oracle.step(losses, members_of(inputs.ids, list(range(LOGITS.rows))))
    exact = LOGITS.exact(inputs, groups=True)
    assert float(exact.loss) == pytest.approx(loss, rel=1e-12)
    assert exact.q.tolist() == pytest.approx(oracle.probabilities, rel=1e-7)
    assert float(group_dro(losses, inputs.ids, inputs.q).detach()) == pytest.approx(loss, rel=1e-5)
    assert inputs.q.tolist() == pytest.approx(oracle.probabilities, rel=1e-5)


@pytest.mark.parametrize("case", [LOGITS, LINEAR], ids=["logits", "linear"])
@pytest.mark.parametrize("groups", [True, False])
def test_exact_gradients_are_autograds(case, groups):
    inputs = case.inputs("cpu")
    double = dataclasses.replace(
        inputs,
        **{
            name: getattr(inputs, name).detach().double().requires_grad_()
            for name in ("logits", "hidden", "weight", "bias")
            if hasattr(inputs, name)
        },
    )
    exact = case.exact(inputs, groups)
    expected = (Eager() if groups else EagerMean()).step(double)
    measured = gate.errors(expected, exact)
    assert max(measured.values()) < 1e-6  # group_dro rounds the row losses to float32, q with them


def hand_made(slower: float = 1.0, machine: float = 1.0) -> Run:
    """Two cases; ours takes 10 s, eager 40, the floor 5, times ``slower`` for ours and ``machine`` for all."""
    run = Run({"device": "cpu", "cpu": "A CPU (family 1)", "cores": 2}, {"read GB/s": 1.0})
    for case in ("a", "b"):
        for name, kind, seconds in (
            ("floor", "floor", 5),
            ("ours", "ours", 10 * slower),
            ("eager", "peer", 40),
        ):
            drift = (1.0, 1.5, 1.1)  # the machine's, the same for all within a repeat
            run.row(case, Row(name, kind)).seconds = [seconds * machine * factor for factor in drift]
    run.row("a", Row("absent", "peer", rejected="is not installed"))
    run.row("a", Row("wrong", "peer", rejected="loss: error 1.0 > 0.1", failed=True))
    return run


def test_ratios_are_taken_within_a_repeat():
    run = hand_made()
    rows = run.timed("a")
    value = ratio(rows["eager"], rows["ours"])
    assert (value.median, value.low, value.high) == pytest.approx((4, 4, 4))
    rows["eager"].seconds = [40, 80, 120]
    value = ratio(rows["eager"], rows["ours"])
    assert (value.median, value.low, value.high) == pytest.approx((80 / 15, 4, 120 / 11))
    assert run.base("a").name == "ours"
    assert run.floor("a", run.base("a")).name == "floor"


def test_table_shows_who_failed_and_who_is_missing():
    text = "\n".join(case_lines(hand_made(), "a"))
    assert "FAILED: loss: error 1.0 > 0.1" in text
    assert "not timed: is not installed" in text
    assert "4.00 [4.00, 4.00]" in text


def test_compare_ignores_the_speed_of_the_machine_and_finds_a_regression():
    assert [change.factor for change in compare(hand_made(), hand_made(machine=2))] == pytest.approx([1, 1])
    assert [change.factor for change in compare(hand_made(), hand_made(1.3, machine=0.5))] == pytest.approx(
        [1.3] * 2
    )


def test_compare_finds_what_is_no_longer_timed():
    fresh = hand_made()
    fresh.cases["a"]["ours"] = Row("ours", "ours", rejected="q: error 1 > 0.1", failed=True)
    (change, _) = compare(hand_made(), fresh)
    assert change.factor is None
    assert change.reason == "q: error 1 > 0.1"


@pytest.mark.parametrize(
    ("fresh", "arguments", "code"),
    [
        (hand_made(machine=2), [], 0),
        (hand_made(1.1), [], 0),
        (hand_made(1.3), [], 1),
        (hand_made(1.3), ["--tolerance", "0.5"], 0),
    ],
)
def test_compare_command_exits_with_1_on_a_regression(tmp_path, fresh, arguments, code):
    save(hand_made(), tmp_path / "stored.json")
    save(fresh, tmp_path / "fresh.json")
    files = [str(tmp_path / "stored.json"), str(tmp_path / "fresh.json")]
    assert CliRunner().invoke(app, ["compare", *files, *arguments]).exit_code == code


def test_result_files_round_trip_and_refuse_another_schema(tmp_path):
    path = tmp_path / "result.json"
    save(hand_made(), path)
    assert load(path) == hand_made()
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        load(path)


def test_report_commands_print_and_plot(tmp_path):
    save(hand_made(), tmp_path / "result.json")
    table = CliRunner().invoke(app, ["table", str(tmp_path / "result.json")])
    assert "cpu-a-cpu-2cores.json" in table.output
    markdown = CliRunner().invoke(app, ["markdown", str(tmp_path / "result.json"), "--case", "a"])
    assert "| eager | 44.0 s (4.00) |" in markdown.output
    CliRunner().invoke(app, ["plot", str(tmp_path / "result.json"), "--out", str(tmp_path)])
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert (tmp_path / "shapes.png").stat().st_size > 1000


def test_schedule_repeats_what_is_short_and_not_what_is_long():
    assert schedule(2.0, one_by_one=False) == {"rounds": 1, "iterations": 1, "warmup_rounds": 0}
    assert schedule(0.03, one_by_one=True) == {"rounds": 10, "iterations": 1, "warmup_rounds": 1}
    short = schedule(1e-5, one_by_one=False)
    assert short["iterations"] == 200
    assert short["rounds"] == 15


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_stored_results_are_readable_and_carry_no_host_name(path):
    run = load(path)
    assert run.machine["commit"]
    assert any(run.base(case) for case in run.cases)
    assert not {"node", "hostname"} & set(run.machine)


@pytest.mark.parametrize("module", ["test_logits", "test_linear"])
def test_names_in_a_contest_are_unique(module):
    """Rows are filed by case and name."""
    contents = vars(importlib.import_module(f"benchmarks.{module}"))
    contests = [
        mark.kwargs
        for test in contents.values()
        for mark in getattr(test, "pytestmark", [])
        if mark.name == "contest"
    ]
    assert contests
    for contest in contests:
        for group in (contest["cases"], contest["peers"]):
            assert len({member.name for member in group}) == len(group)


def test_the_readmes_table_is_that_of_the_stored_result(tmp_path):
    readme = Path(__file__).parents[1] / "README.md"
    stored = next(path for path in RESULTS if f"benchmarks/results/{path.name}" in readme.read_text())
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    result = CliRunner().invoke(app, ["readme", str(stored), str(copy)])
    assert result.exit_code == 0, result.output
    assert copy.read_text() == readme.read_text(), (
        f"python -m benchmarks.report readme {stored.name} changes README"
    )
