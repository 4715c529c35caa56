"""The goals: met, missed, or not measured, by hand-made results."""

import math

import pytest
from typer.testing import CliRunner

from benchmarks import goals
from benchmarks.finetuning import Transformers
from benchmarks.floor import ThreeGemms
from benchmarks.report import app
from benchmarks.results import Row, Run, save
from benchmarks.suites import SUITES

STEP, HEAD, LINEAR, LOGITS = (
    SUITES[suite][index].table("both")
    for suite, index in (("step", 0), ("step", 1), ("linear", 0), ("logits", 0))
)


def run(cases) -> Run:
    """``cases[table]``: rows as (name, kind, milliseconds, peak MiB)."""
    made = Run({"device": "cuda"}, {"copy GB/s": 1000.0})
    for table, rows in cases.items():
        for name, kind, milliseconds, peak in rows:
            made.row(table, Row(name, kind, seconds=[milliseconds / 1e3] * 3, peak_mib=peak, nbytes=10**9))
    return made


def good() -> Run:
    return run(
        {
            STEP: [("robustdebias cuda", "ours", 10, 1), (Transformers.name, "peer", 25, 1)],
            HEAD: [("robustdebias cuda", "ours", 10, 100), (Transformers.name, "peer", 25, 500)],
            LINEAR: [
                ("rd_kernels cuda", "ours", 20, 1),
                ("rd_kernels cuda, all stored", "ours", 11, 1),
                ("rd_kernels cuda, ERM", "ours", 1, 1),
                (ThreeGemms.name, "floor", 10, 1),
                ("Liger-Kernel", "peer", 16.5, 1),
                ("Liger-Kernel, plain mean", "peer", 11, 1),
            ],
            LOGITS: [
                ("rd_kernels triton", "ours", 1.05, 1),
                ("rd_kernels triton, ERM", "ours", 1.04, 1),
                ("rd_kernels triton, plain mean", "ours", 0.5, 1),
                ("QuACK, plain mean", "peer", 1.1, 1),
                ("QuACK", "peer", 1.2, 1),
            ],
        }
    )


def verdicts(*runs) -> list[str]:
    return [outcome.verdict for outcome in goals.check(runs)]


def test_all_met_in_one_file_or_in_three():
    assert verdicts(good()) == ["met"] * 7
    parts = [run({}) for _ in range(3)]
    for part, tables in zip(parts, ((STEP, HEAD), (LINEAR,), (LOGITS,)), strict=True):
        part.cases = {table: good().cases[table] for table in tables}
    assert verdicts(*parts) == ["met"] * 7
    assert [outcome.value for outcome in goals.check(parts)] == pytest.approx(
        [2.5, 5, 1.1, 1.5, 1 / 1.05, 1.05 / 1.04, 1.1 / 1.05]
    )


def test_nothing_is_measured_in_an_empty_result():
    assert verdicts(run({})) == ["not measured"] * 7
    assert verdicts() == ["not measured"] * 7


@pytest.mark.parametrize(
    ("number", "table", "name", "milliseconds"),
    [
        (0, STEP, Transformers.name, 19),
        (2, LINEAR, "rd_kernels cuda, all stored", 11.6),
        (3, LINEAR, "Liger-Kernel", 14),
        (4, LOGITS, "rd_kernels triton", 1.09),
        (5, LOGITS, "rd_kernels triton, ERM", 1.02),
        (6, LOGITS, "QuACK, plain mean", 1.04),
    ],
)
def test_missed(number, table, name, milliseconds):
    missing = good()
    missing.cases[table][name].seconds = [milliseconds / 1e3] * 3
    assert verdicts(missing)[number] == "missed"


def test_memory_is_compared_where_both_are_known():
    result = good()
    result.cases[HEAD]["robustdebias cuda"].peak_mib = 126
    assert verdicts(result)[1] == "missed"
    result.cases[HEAD]["robustdebias cuda"].peak_mib = None
    assert verdicts(result)[1] == "not measured"


def test_the_worst_case_decides_and_is_named():
    result = good()
    other = SUITES["linear"][1].table("both")
    result.cases[other] = {
        **run({other: [("rd_kernels cuda", "ours", 12, 1), (ThreeGemms.name, "floor", 10, 1)]}).cases[other]
    }
    outcome = goals.check([result])[2]
    assert (outcome.verdict, outcome.case, outcome.number) == ("missed", other, 2)


def test_a_failure_of_ours_is_missed_and_a_missing_backend_is_not_measured():
    for failed, verdict in ((True, "missed"), (False, "not measured")):
        result = good()
        for row in result.cases[LINEAR].values():
            if row.kind == "ours":
                row.seconds, row.rejected, row.failed = [], "q: error 1 > 0", failed
        outcome = goals.check([result])[2]
        assert outcome.verdict == verdict
        assert (outcome.value is not None and math.isnan(outcome.value)) == failed
        assert ("FAILED" in "\n".join(goals.lines([result]))) == failed


def test_what_overwrites_the_logits_does_not_count():
    result = good()
    for row in result.cases[LOGITS].values():
        row.in_place = row.kind == "ours"
    assert verdicts(result)[4:] == ["not measured"] * 3


def test_every_goal_looks_at_problems_that_exist():
    tables = [problem.table("both") for suite in SUITES.values() for problem in suite]
    for goal in goals.GOALS:
        assert any(goals.re.fullmatch(goal.cases, table) for table in tables), goal.text
    assert not goals.re.fullmatch(goals.LOGITS, "logits N=2048 V=30522 bf16, both")
    assert not goals.re.fullmatch(goals.STEP, SUITES["step"][-1].table("both"))


def test_the_command_prints_a_line_for_each(tmp_path):
    save(good(), tmp_path / "a.json")
    save(run({}), tmp_path / "b.json")
    printed = CliRunner().invoke(app, ["goals", str(tmp_path / "a.json"), str(tmp_path / "b.json")]).output
    assert len(printed.strip().splitlines()) == 8
    assert printed.count(" met ") == 7
    assert f"{LINEAR} (of 1)" in printed
