"""``python -m tools.gpu_check``: everything that needs a GPU, step by step, with a log for each and a summary.

A failed step does not stop the next ones. Exit status 0 only if every chosen step passed: what is missing here
(a tool, a package) is reported as missing and is no pass. ``--only`` and ``--skip`` choose. Needs torch, a compiler and
nvcc; pytest for the tests, hypothesis for some of them; transformers for the benchmark of a training step.
benchmarks/README.md has the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.0  # where a command may take 10
RESERVE = 80  # seconds the benchmark takes to start and to finish what it is at when its time is over
SUITE = (
    "conformance", "cross_entropy", "group_dro", "linear", "ops", "inplace_backward",
    "triton_backend", "gpu_groups", "gpu_rules", "gpu_details", "gpu_kernels", "cuda_kernels", "gpu_linear", "capacity", "overflow", "triton_gemm",
    "triton_fused_logits", "torch_integration", "objective_paths", "levels", "statistics", "loss_state", "accumulation",
    "feature_table", "properties",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,mig.mode.current"
BENCHMARKS = ("logits", "linear", "step")  # each fills a command's time: one at a time
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
DESCRIBE = "import torch; c = torch.cuda.get_device_capability(); print(f'{c[0]}.{c[1]}')"


@dataclass(frozen=True)
class Step:
    """Commands, run in turn until one fails; "{seconds}" becomes what is left to them, less ``RESERVE``.

    ``needs``: programs, and Python modules with a dot before the name.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float  # time limit of the step
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""  # for the summary


@dataclass
class Outcome:
    step: str
    status: str  # passed, failed, timed out, missing, no time
    seconds: float = 0.0
    detail: str = ""


def architecture(capability: str) -> str:
    """ "9.0" -> "9.0a": what only that architecture has is in the kernels, with a plain twin for the others."""
    return "9.0a" if capability == "9.0" else capability


def find(program: str) -> str | None:
    """On PATH, or in the CUDA toolkit, which often is not."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    candidates = [toolkit / "bin" / program, toolkit / "compute-sanitizer" / program]
    return shutil.which(program) or next((str(path) for path in candidates if os.access(path, os.X_OK)), None)


def steps(python: str, out: Path, capability: str) -> list[Step]:
    """In the order in which they run."""
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10")
    files = [
        str(path.relative_to(ROOT)) for name in SUITE if (path := ROOT / f"tests/test_{name}.py").exists()
    ]
    notes = []
    for module in absent(python, ["hypothesis", "scipy"]):
        # The float64 oracle needs scipy, so do the files that use it.
        marks = {
            "hypothesis": ("import hypothesis", "from hypothesis"),
            "scipy": ("from tests.float64_oracle",),
        }
        left_out = [name for name in files if any(mark in text(name) for mark in marks[module])]
        files = [name for name in files if name not in left_out]
        notes.append(f"without {', '.join(left_out)}: {module} is not found")
    note = "; ".join(notes)
    sanitizer = find("compute-sanitizer") or "compute-sanitizer"
    calls = (python, "-m", "tools.sanitizer_calls")
    return [
        Step(
            "describe",
            ((python, "-m", "rd_kernels.info"), ("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv")),
            60,
        ),
        Step(
            "build",
            ((python, "setup.py", "build_ext", "--inplace"),),
            180,
            ("nvcc", ".setuptools", ".pybind11", ".ninja"),
            {"TORCH_CUDA_ARCH_LIST": architecture(capability), "RD_KERNELS_FORCE_CUDA": "1"},
        ),
        Step("gpu tests", ((*pytest, "-m", "gpu", "tests/gpu"),), 240, (".pytest",)),
        Step("suite", ((*pytest, *files, "-k", "cuda or triton"),), 400, (".pytest",), note=note),
        *(
            Step(
                name,
                ((sanitizer, "--tool", name, "--error-exitcode", "1", *calls),),
                60,
                ("compute-sanitizer",),
                # One allocation for each tensor: then a read past its end is seen.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for name in SANITIZERS
        ),
        *(
            Step(
                f"{name} triton",
                ((sanitizer, "--tool", name, "--error-exitcode", "1", *calls, "--backend", "triton"),),
                240,  # most of it is Triton's compiler
                ("compute-sanitizer", ".triton"),
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for name in ("memcheck", "racecheck")
        ),
        *(
            Step(
                f"bench {suite}",
                ((python, "-m", "benchmarks.gpu", "--suite", suite, "--seconds", "{seconds}",
                  "--result", str(out / f"bench-{suite}.json")),),
                540,
                (".transformers",) if suite == "step" else (),
            )
            for suite in BENCHMARKS
        ),
    ]  # fmt: skip


def text(name: str) -> str:
    return (ROOT / name).read_text()


def absent(python: str, modules: list[str]) -> list[str]:
    """Those of ``modules`` that ``python`` cannot import."""
    code = f"import importlib.util as u; print(*[m for m in {modules} if u.find_spec(m) is None])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.split()


def missing(step: Step, python: str) -> str:
    """What ``step`` needs and the machine lacks, in words."""
    lacking = [name for name in step.needs if not name.startswith(".") and find(name) is None]
    lacking += absent(python, [name[1:] for name in step.needs if name.startswith(".")])
    return f"not found: {', '.join(lacking)}" if lacking else ""


def run(step: Step, out: Path, seconds: float) -> Outcome:
    """With its output in ``out``; killed with its children when ``seconds`` are over."""
    began, log = time.monotonic(), out / f"{step.name.replace(' ', '-')}.log"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        **step.environment,
    }
    with log.open("w") as file:
        for template in step.commands:
            command = [word.replace("{seconds}", f"{max(seconds - RESERVE, 1):.0f}") for word in template]
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                return Outcome(step.name, "missing", time.monotonic() - began, str(error))
            try:
                code = process.wait(max(0.0, began + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Outcome(step.name, "timed out", time.monotonic() - began, f"after {seconds:.0f} s")
            if code != 0:
                return Outcome(
                    step.name, "failed", time.monotonic() - began, f"exit status {code}; {last_line(log)}"
                )
    return Outcome(step.name, "passed", time.monotonic() - began, last_line(log))


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:120] if lines else ""


def check(chosen: Sequence[Step], python: str, out: Path, seconds: float) -> list[Outcome]:
    """Every step, within ``seconds`` in all; ``summary.json`` is written after each, a killed run keeps its part."""
    out.mkdir(parents=True, exist_ok=True)
    deadline, outcomes = time.monotonic() + seconds, []
    for step in chosen:
        left = deadline - time.monotonic()
        if lacking := missing(step, python):
            outcome = Outcome(step.name, "missing", detail=lacking)
        elif left < 1:
            outcome = Outcome(step.name, "no time", detail=f"the {seconds:.0f} s for all are over")
        else:
            outcome = run(step, out, min(step.seconds, left))
        outcome.detail = "; ".join(filter(None, (outcome.detail, step.note)))
        outcomes.append(outcome)
        print(f"{outcome.step}: {outcome.status}", flush=True)
        (out / "summary.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [f"{'step':<13} {'status':<10} {'seconds':>8}  detail"]
    lines += [f"{each.step:<13} {each.status:<10} {each.seconds:>8.1f}  {each.detail}" for each in outcomes]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--python", default=sys.executable, help="the Python that has torch (default: this one)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-check", help="folder for logs and results")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STEP", help="all steps but these")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the steps' commands and run nothing")
    options = parser.parse_args(arguments)
    found = subprocess.run([options.python, "-c", DESCRIBE], capture_output=True, text=True, check=False)
    if found.returncode != 0 and not options.list:
        print(
            f"{options.python}: torch sees no GPU\n{found.stderr.strip().splitlines()[-1:]}", file=sys.stderr
        )
        return 2
    out = options.out.resolve()
    every = steps(options.python, out, found.stdout.strip())
    unknown = {*options.only, *options.skip} - {step.name for step in every}
    if unknown:
        parser.error(
            f"no step is called {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in every)}"
        )
    chosen = [s for s in every if s.name not in options.skip and (not options.only or s.name in options.only)]
    if options.list:
        print("\n".join(f"{step.name}: {' '.join(command)}" for step in chosen for command in step.commands))
        return 0
    outcomes = check(chosen, options.python, out, 60 * options.minutes)
    print(f"\n{table(outcomes)}\n\nlogs: {out}")
    return int(any(each.status != "passed" for each in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
