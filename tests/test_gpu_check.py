"""``tools.gpu_check`` with steps that need no GPU, and the calls that the sanitizers watch, on the CPU backend."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.suites import SUITES
from rd_kernels.backends.registry import get
from tools import gpu_check, sanitizer_calls
from tools.gpu_check import Outcome, Step, check, main, missing, run, steps, table


def python(name, *codes, seconds=30.0, **options):
    return Step(name, tuple((sys.executable, "-c", code) for code in codes), seconds, **options)


def test_a_failed_step_does_not_stop_the_others(tmp_path):
    chosen = [
        python("good", "print('first')", "print('12 passed')"),
        python("bad", "raise SystemExit(3)", "print('never')"),
        python("absent", "print(1)", needs=("no-such-program", ".no_such_module", ".json")),
        python("after", "import os; print(os.environ['COLOUR'])", environment={"COLOUR": "green"}),
    ]
    outcomes = check(chosen, sys.executable, tmp_path, 100)
    assert [each.status for each in outcomes] == ["passed", "failed", "missing", "passed"]
    assert outcomes[0].detail == "12 passed"
    assert "exit status 3" in outcomes[1].detail
    assert outcomes[2].detail == "not found: no-such-program, no_such_module"
    assert outcomes[3].detail == "green"
    assert "first" in (tmp_path / "good.log").read_text()
    assert "never" not in (tmp_path / "bad.log").read_text().splitlines()
    assert [each["status"] for each in json.loads((tmp_path / "summary.json").read_text())] == [
        each.status for each in outcomes
    ]
    assert len(table(outcomes).splitlines()) == 5


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path):
    child = tmp_path / "child.py"
    child.write_text("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    code = f"import subprocess, sys; subprocess.run([sys.executable, {str(child)!r}], cwd={str(tmp_path)!r})"
    began = time.monotonic()
    assert run(python("hangs", code), tmp_path, 3.0).status == "timed out"
    assert time.monotonic() - began < 20
    process = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while process.exists() and process.read_text().split()[2] != "Z":  # until its new parent has noticed
        assert time.monotonic() - began < 20
        time.sleep(0.1)


def test_the_time_for_all_ends_the_last_steps(tmp_path):
    outcomes = check(
        [python("slow", "import time; time.sleep(9)"), python("late", "print(1)")],
        sys.executable,
        tmp_path,
        1.5,
    )
    assert [each.status for each in outcomes] == ["timed out", "no time"]


def test_a_command_is_told_how_long_it_may_take(tmp_path):
    assert run(python("told", "print({seconds})"), tmp_path, 100).detail == "20"


def test_what_cannot_be_started_is_missing(tmp_path):
    assert run(Step("none", (("/no/such/program",),), 5), tmp_path, 5).status == "missing"


def test_steps_name_files_that_exist_and_the_native_code_of_the_gpu(tmp_path):
    every = {step.name: step for step in steps("python3", tmp_path, "9.0")}
    benchmarks = [f"bench {suite}" for suite in SUITES]
    assert list(every) == [
        "describe",
        "build",
        "gpu tests",
        "suite",
        *gpu_check.SANITIZERS,
        "memcheck triton",
        "racecheck triton",
        *benchmarks,
    ]
    assert all(step.seconds <= 540 for step in every.values())
    assert every["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert gpu_check.architecture("8.0") == "8.0"
    (suite,) = every["suite"].commands
    files = [word for word in suite if word.endswith(".py")]
    assert len(files) >= 7
    assert all((gpu_check.ROOT / file).exists() for file in files)
    for suite, name in zip(SUITES, benchmarks, strict=True):
        (command,) = every[name].commands
        assert {suite, "{seconds}", str(tmp_path / f"bench-{suite}.json")} <= set(command)
    assert every["bench step"].needs == (".transformers",)
    assert missing(Step("nothing", (), 1), sys.executable) == ""


def test_files_whose_packages_are_not_there_are_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "absent", lambda python, modules: ["hypothesis", "scipy"])
    (suite,) = [step for step in steps("python3", tmp_path, "8.0") if step.name == "suite"]
    assert "tests/test_group_dro.py" not in suite.commands[0]
    assert "tests/test_conformance.py" in suite.commands[0]
    left_out = "tests/test_cross_entropy.py, tests/test_group_dro.py, tests/test_properties.py"
    assert f"without {left_out}: hypothesis is not found; without " in suite.note
    assert "tests/test_levels.py" in suite.note
    assert suite.note.endswith(": scipy is not found")


def test_a_sanitizer_is_found_beside_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find("compute-sanitizer") is None
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert gpu_check.find("compute-sanitizer") == str(tool)


def test_the_exit_status_is_0_only_if_everything_passed(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--python", sys.executable]
    monkeypatch.setattr(gpu_check, "DESCRIBE", "print('9.0')")
    for status, code in (("passed", 0), ("missing", 1), ("failed", 1)):
        monkeypatch.setattr(gpu_check, "check", lambda *_, status=status: [Outcome("build", status)])
        assert main([*arguments, "--only", "build"]) == code
    with pytest.raises(SystemExit):
        main([*arguments, "--only", "biuld"])
    assert main([*arguments, "--skip", "bench linear", "bench step", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in listed if "benchmarks.gpu" in line] == ["bench logits"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "DESCRIBE", "raise SystemExit('no GPU')")
    assert main(["--out", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_the_sanitizers_calls_run_and_notice_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["calls", "--backend", "cpu", "--device", "cpu"])
    assert sanitizer_calls.main() == 0
    assert "as the reference" in capsys.readouterr().out
    cpu = get("cpu")
    monkeypatch.setattr(cpu, "row_scale", lambda coefficients, outcome, groups: outcome * 0.0)
    monkeypatch.setattr(cpu, "reduce_and_update", super(type(cpu), cpu).reduce_and_update)
    with pytest.raises(AssertionError):
        sanitizer_calls.main()
    monkeypatch.setattr("sys.argv", ["calls", "--backend", "none"])
    assert sanitizer_calls.main() == 2
