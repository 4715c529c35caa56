"""The GPU benchmark without a GPU: its problems, bytes and time limit, and its loop with a clock that is faked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import finetuning, gpu, laps, machine, others
from benchmarks.floor import FreshFloor, InPlaceFloor, ThreeGemms
from benchmarks.gpu import measure_within
from benchmarks.laps import Bench, copy_rate, gemm_rate, schedule
from benchmarks.peers import (
    Eager,
    EagerMean,
    Ours,
    OursERM,
    OursInPlace,
    OursLinear,
    OursLinearERM,
    OursLinearStored,
    OursMean,
    on,
    plain,
)
from benchmarks.results import Run, load
from benchmarks.suites import (
    LINEAR,
    LOGITS,
    STEP,
    SUITES,
    VOCABULARIES,
    HeadProblem,
    LinearProblem,
    LogitsProblem,
    StepProblem,
)
from benchmarks.tables import case_lines

SMALL = LogitsProblem(33, 301, "fp32", groups=4)
SMALL_LINEAR = LinearProblem(33, 16, 101, groups=4)
TINY = {"title": "tiny", "layers": 1, "width": 32, "heads": 2, "rows": 3, "length": 16, "vocabulary": 1200}
SMALL_STEP, SMALL_HEAD = StepProblem(**TINY), HeadProblem(**TINY)


@pytest.fixture(autouse=True)
def _few_laps(monkeypatch):
    """A CPU without bfloat16 instructions multiplies slowly."""
    monkeypatch.setattr(laps, "MOST_LAPS", 2)
    monkeypatch.setattr(laps, "REPEATS", 2)


class FakeClock:
    """Runs both halves; they take 2 ms and 4 ms."""

    def lap(self, forward, backward):
        backward(forward())
        return 0.002, 0.004


def bench() -> Bench:
    rates = {"copy GB/s": 100.0, "GEMM bf16 TFLOP/s": 0.5}
    return Bench(Run({"device": "cpu"}, rates), FakeClock(), "cpu")


def contestants():
    return [
        FreshFloor(),
        InPlaceFloor(),
        *(on("cpu", peer) for peer in (Ours(), OursERM(), OursMean(), OursInPlace())),
        Eager(),
        EagerMean(),
    ]


@pytest.mark.parametrize("suite", SUITES)
def test_problems_and_contestants_have_names_of_their_own(suite):
    """Rows are filed by table and name."""
    tables = [problem.table(which) for problem in SUITES[suite] for which in problem.passes]
    assert len(set(tables)) == len(tables)
    for problem in SUITES[suite]:
        names = [peer.name for peer in problem.contestants()]
        assert len(set(names)) == len(names)
        assert problem.needs < 80e9 or "65536" in problem.name


def test_the_first_problems_are_those_of_the_goals():
    assert LOGITS[0].name == "logits N=4096 V=30522 bf16"
    assert {problem.vocabulary for problem in LOGITS[:4]} == set(VOCABULARIES)
    assert LINEAR[0].name == "linear N=2458 D=768 V=30522 bf16"
    assert STEP[0].name == "BERT-base 12x768, 256x128 tokens bf16, training step"
    assert STEP[1].name == "BERT-base 12x768, 256x128 tokens bf16, head alone"
    assert {"rd_kernels cuda", "rd_kernels triton, ERM", "QuACK, plain mean"} <= names(LOGITS[0])
    assert {
        "rd_kernels cuda", "rd_kernels triton, ERM", "rd_kernels cuda, all stored", "Liger-Kernel",
        "Liger-Kernel, plain mean", "cut-cross-entropy", "torch.compile", "floor: three bare GEMMs",
    } <= names(LINEAR[0])  # fmt: skip
    assert {
        "robustdebias cuda", "robustdebias triton, ERM", "transformers, eager Group DRO",
        "transformers with Liger-Kernel", "transformers with cut-cross-entropy, plain mean",
    } <= names(STEP[0])  # fmt: skip
    assert "transformers, torch.compile" in names(STEP[-1])


def names(problem) -> set[str]:
    return {peer.name for peer in problem.contestants()}


def test_bytes_and_flops_of_the_passes():
    """bfloat16: 2 N V read by the forward, as much read and written by the backward, 6 N V in all."""
    logits, linear = LogitsProblem(4096, 30522, "bf16"), LINEAR[0]
    assert [work.nbytes for work in logits.passes.values()] == [times * 4096 * 30522 for times in (2, 4, 6)]
    assert [work.flops for work in linear.passes.values()] == [
        times * 2458 * 30522 * 768 for times in (2, 4, 6)
    ]
    assert STEP[0].passes["both"].tokens == 256 * 128


def test_gated_timed_and_stored(tmp_path):
    path = tmp_path / "result.json"
    measured = bench()
    measured.measure(SMALL, contestants())
    assert list(measured.run.cases) == [SMALL.table(which) for which in SMALL.passes]
    for which, seconds in {"forward": 0.002, "backward": 0.004, "both": 0.006}.items():
        rows = measured.run.timed(SMALL.table(which))
        assert len(rows) == len(contestants())
        assert all(row.seconds == pytest.approx([seconds] * laps.REPEATS) for row in rows.values())
    assert measured.run.base(SMALL.table("both")).name == "rd_kernels cpu"
    rows = measured.run.cases[SMALL.table("both")]
    assert all("<=" in row.error for row in rows.values() if row.kind != "floor")
    measure_within(measured, [], 1, lambda: 0, path)
    gpu.save(measured.run, path)
    assert load(path) == measured.run
    text = "\n".join(case_lines(load(path), SMALL.table("forward")))
    assert f"{SMALL.nbytes / 0.002 / 1e9:.0f} GB/s, 0% of copy" in text
    assert "Group DRO on top of ERM, rd_kernels cpu: time x 1.00" in text


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_op_is_gated_and_timed_beside_its_floor(bias):
    problem = replace(SMALL_LINEAR, bias=bias)
    torch_has_one = hasattr(torch.nn, "LinearCrossEntropyOptions")
    peers = [
        ThreeGemms(),
        *(on("reference", peer) for peer in (OursLinear(), OursLinearERM(), OursLinearStored())),
        Eager(),
        EagerMean(),
        *(others.LINEAR[:3] if torch_has_one else ()),
        others.LigerLinear(),
    ]
    measured = bench()
    measured.measure(problem, peers)
    table = problem.table("both")
    rows = measured.run.cases[table]
    assert set(rows) - set(measured.run.timed(table)) == {"rd_kernels reference, all stored", "Liger-Kernel"}
    assert "holds all rows" in rows["rd_kernels reference, all stored"].rejected
    assert measured.run.floor(table, rows["torch eager"]).name == "floor: three bare GEMMs"
    text = "\n".join(case_lines(measured.run, table))
    assert f"{6 * 33 * 101 * 16 / 0.006 / 1e12:.0f} TFLOP/s" in text
    assert "Group DRO on top of ERM, rd_kernels reference: time x 1.00" in text


def test_the_floor_of_the_linear_op_is_three_products():
    inputs = SMALL_LINEAR.inputs("cpu")
    floor = ThreeGemms()
    hidden, weight = (leaf.detach().double() for leaf in inputs.leaves[:2])
    result = floor.backward(inputs)(floor.forward(inputs)())
    logits = hidden @ weight.T
    for got, expected in zip(result.gradients, (logits @ weight, logits.T @ hidden), strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max())
        )


def test_the_default_budget_recomputes_the_large_cases_and_all_stored_does_not():
    assert OursLinearStored().refuses(LINEAR[0]) == "the default budget holds all rows"
    assert OursLinearStored().refuses(LINEAR[1]) is None


@pytest.mark.parametrize("problem", [SMALL_STEP, SMALL_HEAD], ids=["step", "head"])
def test_steps_under_autocast_are_gated_and_timed(problem):
    ours = [on("cpu", peer) for peer in (finetuning.OursTraining(), finetuning.OursTrainingERM())]
    peers = [
        *ours,
        finetuning.Transformers(),
        finetuning.TransformersMean(),
        finetuning.TransformersGathered(),
        plain(finetuning.TransformersGathered()),
        *finetuning.PICKED,
    ]
    measured = bench()
    measured.measure(problem, peers)
    (table,) = measured.run.cases
    assert table == problem.table("both")
    rows = measured.run.cases[table]
    assert set(measured.run.timed(table)) == {peer.name for peer in peers} - {
        peer.name for peer in finetuning.PICKED
    }
    assert all(row.rejected == "runs on cuda only" for row in rows.values() if not row.seconds)
    assert all("<=" in row.error for row in rows.values() if row.seconds)
    assert f"{48 / 0.006:,.0f} tokens/s" in "\n".join(case_lines(measured.run, table))


def test_a_step_frees_its_gradients_and_updates_its_own_q():
    inputs = SMALL_STEP.inputs("cpu")
    peer = on("cpu", finetuning.OursTraining())
    peer.backward(inputs)(peer.forward(inputs)())
    assert inputs.model.training
    assert len(inputs.optimizer.state) == len(list(inputs.model.parameters()))
    assert all(leaf.grad is None for leaf in inputs.leaves)
    assert not torch.equal(inputs.q, torch.full_like(inputs.q, 1 / 4))


def test_other_projects_losses_get_the_decoders_operands_in_the_products_dtype():
    """Under autocast a product is one of 16-bit copies; kernels of others do not make them."""
    inputs = SMALL_STEP.inputs("cpu").head(2)
    given = inputs.decoder_inputs()
    labelled = int((inputs.labels != -100).sum())
    assert given.hidden.shape == (labelled, 32)
    assert given.labels.shape == given.ids.shape == (labelled,)
    assert {operand.dtype for operand in given.leaves} == {torch.bfloat16}
    losses = given.cross_entropy("none").float()
    torch.testing.assert_close(losses, inputs.cross_entropy("none"), rtol=2**-7, atol=0)


@pytest.mark.parametrize("width", [15, 16, 31])
def test_a_bias_as_a_column_of_the_weight(width):
    hidden, weight, bias = torch.randn(5, width), torch.randn(7, width), torch.randn(7)
    wide = others.with_bias_column(hidden, weight, bias)
    assert wide[0].shape[1] == wide[1].shape[1] == (width + 16) // 16 * 16
    torch.testing.assert_close(wide[0] @ wide[1].T, hidden @ weight.T + bias)


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
    rows = measured.run.cases[SMALL.table("backward")]
    assert [name for name, row in rows.items() if row.seconds] == ["torch eager"]
    assert rows["wrong"].failed
    assert "no such kernel" in rows["broken"].rejected
    assert (rows["large"].rejected, rows["large"].failed) == ("out of memory", False)
    assert "no backend 'none'" in rows["rd_kernels none"].rejected


def test_a_wrong_step_under_autocast_is_not_timed():
    """Twice the error of eager's bfloat16 is allowed, 3% more in one group is not."""

    class Wrong(finetuning.Transformers):
        name = "wrong"

        def row_losses(self, inputs):
            return super().row_losses(inputs) * torch.where(inputs.ids == 0, 1.03, 1.0)

    measured = bench()
    measured.measure(SMALL_STEP, [finetuning.Transformers(), Wrong()])
    assert list(measured.run.timed(SMALL_STEP.table("both"))) == ["transformers, eager Group DRO"]


def test_the_time_limit_cuts_off_the_end_and_says_so(tmp_path, monkeypatch):
    """Each takes 100 s: of five, and a limit of 290, two are timed; a third could end too late."""
    problems = [LogitsProblem(n, 10, "bf16") for n in (1, 2, 3, 4)] + [LogitsProblem(1 << 20, 10, "bf16")]
    time, measured = [0.0], bench()
    monkeypatch.setattr(measured, "measure", lambda problem, _: time.__setitem__(0, time[0] + 100))
    result = tmp_path / "result.json"
    measure_within(measured, [problems[4], *problems[:4]], 290, lambda: 1 << 20, result, now=lambda: time[0])
    tables = [problem.table("both") for problem in problems]
    expected = f"{tables[4]}: memory; {tables[2]}: time; {tables[3]}: time"
    assert load(result).machine["left out"] == expected
    measure_within(measured, problems[:1], 290, lambda: 0, result, now=lambda: time[0])  # another suite
    assert load(result).machine["left out"] == f"{expected}; {tables[0]}: memory"


def test_laps_fit_the_time_of_a_problem(monkeypatch):
    assert schedule(1e-9) == laps.MOST_LAPS == 2
    monkeypatch.setattr(laps, "MOST_LAPS", 20)
    assert schedule(1e-9) == 20
    monkeypatch.setattr(laps, "REPEATS", 5)
    assert schedule(0.07) == 8
    assert schedule(100) == 2


def test_rates_count_bytes_read_and_written_and_two_flops_for_each_product():
    assert copy_rate(FakeClock(), "cpu", nbytes=1 << 20) == pytest.approx(2**21 / 0.002 / 1e9, abs=0.06)
    assert gemm_rate(FakeClock(), "cpu", size=100) == round(2 * 100**3 / 0.002 / 1e12, 1)


def test_a_result_is_stored_by_gpu_and_suites():
    description = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "suites": "logits linear"}
    assert machine.file_name(description) == "cuda-nvidia-h100-80gb-hbm3-logits-linear.json"


@pytest.mark.parametrize(
    ("there", "only", "package", "reason"),
    [
        (False, "", True, "no GPU"),
        (True, "V=1 ", True, "no problem is called 'V=1 '"),
        (True, "", False, "transformers is not installed"),
        (True, "linear", False, ""),
    ],
)
def test_without_a_gpu_a_problem_or_a_package_it_says_so(monkeypatch, there, only, package, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if package else None)
    chosen = {name: [p for p in SUITES[name] if only in p.table("both")] for name in SUITES}
    assert reason in (gpu.refusal(chosen, only) or "")
    assert (gpu.refusal(chosen, only) is None) == (reason == "")


def test_the_command_ends_with_2_where_it_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--suite", "linear"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_command_measures_prints_and_stores(tmp_path, monkeypatch, capsys):
    """All of main, on the CPU with a clock that is faked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "EventClock", FakeClock)
    monkeypatch.setattr(gpu, "Bench", lambda run, clock: Bench(run, clock, "cpu"))
    monkeypatch.setattr(gpu, "free_memory", lambda: 1 << 40)
    monkeypatch.setattr(gpu, "SUITES", {"logits": [SMALL], "linear": [SMALL_LINEAR], "step": []})
    for name in ("copy_rate", "gemm_rate"):
        monkeypatch.setattr(gpu, name, lambda clock, device: 0.5)
    monkeypatch.setattr(machine, "describe", lambda device: {"device": device, "gpu": "A GPU"})
    for problem in (LogitsProblem, LinearProblem):
        monkeypatch.setattr(problem, "contestants", lambda self: [Eager(), EagerMean()])
    result = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--result", str(result)])
    assert gpu.main() == 0
    output = capsys.readouterr().out
    assert "cuda-a-gpu-logits-linear-step.json" in output
    assert "not measured" in output
    assert len(load(result).cases) == 6
