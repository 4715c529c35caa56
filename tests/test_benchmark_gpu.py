"""The GPU benchmark without a GPU: its problems, bytes and time limit, and its loop with a clock that is faked."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import PASSES, PROBLEMS, Bench, Problem, copy_rate, measure_within, schedule
from benchmarks.peers import Eager, EagerMean, Ours, OursERM, OursInPlace, OursMean, on
from benchmarks.results import Run, load
from benchmarks.tables import case_lines

SMALL = Problem(33, 301, "fp32", groups=4)


class FakeClock:
    """Runs both halves; they take 2 ms and 4 ms."""

    def lap(self, forward, backward):
        backward(forward())
        return 0.002, 0.004


def bench() -> Bench:
    return Bench(Run({"device": "cpu"}, {"copy GB/s": 100.0}), FakeClock(), "cpu")


def contestants():
    floors = gpu.peers(SMALL)[:2]
    return [
        *floors,
        *(on("cpu", peer) for peer in (Ours(), OursERM(), OursMean(), OursInPlace())),
        Eager(),
        EagerMean(),
    ]


def test_problems_are_distinct_and_the_first_are_the_goals():
    names = [problem.name for problem in PROBLEMS]
    assert len(set(names)) == len(names) == 32
    assert names[0] == "logits N=4096 V=30522 bf16"
    assert {problem.vocabulary for problem in PROBLEMS[:4]} == set(gpu.VOCABULARIES)
    for problem in PROBLEMS[:1] + PROBLEMS[-1:]:
        contest = [peer.name for peer in gpu.peers(problem)]
        assert len(set(contest)) == len(contest)
        assert {"rd_kernels cuda", "rd_kernels triton, ERM", "QuACK, plain mean"} <= set(contest)


def test_bytes_of_the_passes():
    """bfloat16: 2 N V read by the forward, as much read and written by the backward, 6 N V in all."""
    problem = Problem(4096, 30522, "bf16")
    moved = [passes * problem.nbytes for passes in PASSES.values()]
    assert moved == [2 * 4096 * 30522, 4 * 4096 * 30522, 6 * 4096 * 30522]


def test_gated_timed_and_stored(tmp_path):
    path = tmp_path / "result.json"
    measured = bench()
    measured.measure(SMALL, contestants())
    assert list(measured.run.cases) == [SMALL.pass_name(which) for which in PASSES]
    for which, seconds in {"forward": 0.002, "backward": 0.004, "both": 0.006}.items():
        rows = measured.run.timed(SMALL.pass_name(which))
        assert len(rows) == len(contestants())
        assert all(row.seconds == pytest.approx([seconds] * gpu.REPEATS) for row in rows.values())
    assert measured.run.base(SMALL.pass_name("both")).name == "rd_kernels cpu"
    rows = measured.run.cases[SMALL.pass_name("both")]
    assert all("<=" in row.error for row in rows.values() if row.kind != "floor")
    measure_within(measured, [], 1, lambda: 0, path)
    gpu.save(measured.run, path)
    assert load(path) == measured.run
    text = "\n".join(case_lines(load(path), SMALL.pass_name("forward")))
    assert f"{SMALL.nbytes / 0.002 / 1e9:.0f} GB/s, 0% of copy" in text
    assert "Group DRO on top of ERM, rd_kernels cpu: time x 1.00" in text


def test_steps_in_place_start_from_the_same_logits():
    inputs = SMALL.inputs("cpu")
    before = inputs.logits.detach().clone()
    peer = on("cpu", OursInPlace())
    entry = bench()._admit(SMALL, inputs, peer, {})
    assert entry is not None
    assert torch.equal(inputs.logits, before)
    entry.backward(entry.forward())
    assert not torch.equal(inputs.logits, before)


def test_who_is_wrong_broken_missing_or_too_large_is_not_timed():
    class Wrong(Eager):
        name = "wrong"

        def row_losses(self, inputs):
            return super().row_losses(inputs) * 1.01

    class Broken(Eager):
        name = "broken"

        def row_losses(self, inputs):
            raise NotImplementedError("no such kernel")

    class Large(Eager):
        name = "large"

        def row_losses(self, inputs):
            raise torch.OutOfMemoryError("tried to allocate")

    measured = bench()
    measured.measure(SMALL, [Eager(), Wrong(), Broken(), Large(), on("none", Ours())])
    rows = measured.run.cases[SMALL.pass_name("backward")]
    assert [name for name, row in rows.items() if row.seconds] == ["torch eager"]
    assert rows["wrong"].failed
    assert "no such kernel" in rows["broken"].rejected
    assert (rows["large"].rejected, rows["large"].failed) == ("out of memory", False)
    assert "no backend 'none'" in rows["rd_kernels none"].rejected


def test_the_time_limit_cuts_off_the_end_and_says_so(tmp_path, monkeypatch):
    """Each takes 100 s: of five, and a limit of 290, two are timed; a third could end too late."""
    time, problems = [0.0], [Problem(n, 10, "bf16") for n in (1, 2, 3, 4)] + [Problem(1 << 20, 10, "bf16")]
    measured = bench()
    monkeypatch.setattr(measured, "measure", lambda problem, _: time.__setitem__(0, time[0] + 100))
    result = tmp_path / "result.json"
    measure_within(measured, [problems[4], *problems[:4]], 290, lambda: 1 << 20, result, now=lambda: time[0])
    names = [problem.name for problem in problems]
    expected = f"{names[4]}: memory; {names[2]}: time; {names[3]}: time"
    assert load(result).machine["left out"] == expected


def test_laps_fit_the_time_of_a_problem():
    assert schedule(1e-9) == gpu.MOST_LAPS
    assert schedule(0.07) == 8
    assert schedule(100) == 2


def test_copy_rate_counts_bytes_read_and_written():
    assert copy_rate(FakeClock(), "cpu", nbytes=1 << 20) == pytest.approx(2**21 / 0.002 / 1e9, abs=0.06)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "no GPU" in capsys.readouterr().err
