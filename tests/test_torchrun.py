"""examples/several_processes.py as torchrun starts it: processes are killed, and the run ends as if none had been."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 60, 5
PATIENCE = 300  # seconds for what takes 20 on an idle machine

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds processes in /proc")


class Launch:
    """torchrun with the example, its output in a file; ``with`` kills what is left of it."""

    def __init__(self, out: Path, *options: str, ranks: int = 2, restarts: int = 0):
        self.out, self.log = out, out.with_name(f"{out.name}-{time.monotonic_ns()}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                    "--max-restarts", str(restarts), str(ROOT / "examples" / "several_processes.py"), "--cpu",
                    "--out", str(out), "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), *options,
                ],
                stdout=log, stderr=subprocess.STDOUT, env={
                    **os.environ, "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
                },
            )  # fmt: skip

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    @property
    def text(self) -> str:
        return self.log.read_text()

    def workers(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (
                    (folder / "environ").read_bytes().split(b"\0") if parent == self.process.pid else []
                )
            except OSError:  # it has ended since
                continue
            found.update({int(name[5:]): int(folder.name) for name in variables if name.startswith(b"RANK=")})
        return found

    def kill_in_the_middle(self, rank: int) -> None:
        wait_for((self.out / "checkpoint.pt").is_file, self)
        os.kill(self.workers()[rank], signal.SIGKILL)
        assert "finished" not in self.text

    def kill_all(self) -> list[int]:
        """As a machine that goes down: torchrun cannot stop its workers -> their process ids."""
        workers = list(self.workers().values())
        for process in (self.process.pid, *workers):
            if process != self.process.pid or self.process.poll() is None:
                os.kill(process, signal.SIGKILL)
        self.process.wait(PATIENCE)
        return workers

    def finish(self) -> str:
        """The last line of a run that ends well."""
        assert self.process.wait(PATIENCE) == 0, self.text
        (line,) = re.findall(r"^finished: .*", self.text, re.M)
        return line


def wait_for(condition: Callable[[], bool], launch: Launch) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert launch.process.poll() is None, launch.text
        assert time.monotonic() < end, launch.text
        time.sleep(0.005)


def resumed_after(launch: Launch) -> int:
    (step,) = re.findall(r"^resumed after step (\d+)$", launch.text, re.M)
    return int(step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> str:
    with Launch(folder / "uninterrupted") as launch:
        line = launch.finish()
        assert "resumed" not in launch.text
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", launch.text, re.M)]
    assert len(losses) == STEPS // SAVE_EVERY
    assert losses[-1] < 0.95 * losses[0]
    q = eval(re.search(r"q (\{.*\})", line)[1])
    assert sum(q.values()) == pytest.approx(1, abs=1e-5)
    assert max(q.values()) > 1.1 * min(q.values())
    return line


def test_a_killed_worker_and_torchruns_restart(uninterrupted: str, folder: Path) -> None:
    """Bit for bit: the loss, q and all parameters are in the line."""
    with Launch(folder / "restarted", restarts=3) as launch:
        launch.kill_in_the_middle(rank=1)
        assert launch.finish() == uninterrupted
        assert SAVE_EVERY <= resumed_after(launch) < STEPS


@pytest.fixture(scope="module")
def broken(folder: Path) -> Path:
    """The folder of a run in which rank 1 died, without restarts."""
    with Launch(folder / "broken") as launch:
        launch.kill_in_the_middle(rank=1)
        survivors = launch.workers()
        assert launch.process.wait(60) != 0  # and does not hang
        assert "exitcode  : -9" in launch.text
        assert not [process for process in survivors.values() if Path(f"/proc/{process}").exists()]
        assert "finished" not in launch.text
    return launch.out


def test_another_number_of_ranks_is_refused(broken: Path) -> None:
    before = (broken / "checkpoint.pt").read_bytes()
    with Launch(broken, ranks=1) as launch:
        assert launch.process.wait(PATIENCE) == 1
        assert "checkpoint.pt was written by 2 ranks, but this run has 1: start 2" in launch.text
    assert (broken / "checkpoint.pt").read_bytes() == before


def test_a_broken_run_started_again(uninterrupted: str, broken: Path) -> None:
    with Launch(broken) as launch:
        assert launch.finish() == uninterrupted
        assert SAVE_EVERY <= resumed_after(launch) < STEPS
    state = torch.load(broken / "checkpoint.pt", weights_only=True)
    assert (state["step"], state["ranks"]) == (STEPS, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_and_all_workers_killed_while_batches_are_accumulated(ranks: int, folder: Path) -> None:
    """Two numbers have one sum. Of three, DDP adds in another order in the first step of a process than later, when it
    has seen in which order gradients come, so the last bits are others."""
    options, out = ("--accumulate", "2", "--batch-size", "4"), folder / f"down{ranks}"
    with Launch(folder / f"accumulated{ranks}", *options, ranks=ranks) as launch:
        expected = launch.finish()
    with Launch(out, *options, ranks=ranks) as launch:
        wait_for((out / "checkpoint.pt").is_file, launch)
        assert len(launch.kill_all()) == ranks
        assert "finished" not in launch.text
    with Launch(out, *options, ranks=ranks) as launch:
        line = launch.finish()
        assert SAVE_EVERY <= resumed_after(launch) < STEPS
    if ranks == 2:
        assert line == expected
    else:
        assert numbers(line) == pytest.approx(numbers(expected), rel=1e-5)
    with Launch(out, *options, ranks=ranks) as launch:  # nothing is left to do
        assert launch.finish() == line
        assert resumed_after(launch) == STEPS


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d\.\d+", line)]


@pytest.mark.slow
def test_a_saved_model_and_a_corpus_of_ones_own(folder: Path) -> None:
    """More processes than the last batch of an epoch has texts: one of them runs a text without labels."""
    example = runpy.run_path(str(ROOT / "examples" / "several_processes.py"))
    sentences = example["made_up_sentences"]()[::2]
    for part in example["tiny_bert"](sentences):
        part.save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text("\n".join(sentence.text for sentence in sentences))
    options = "--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt"), "--min-texts", "5"
    with Launch(folder / "saved", *options, "--batch-size", "1") as launch:
        assert "'gender:female': 0." in launch.finish()
