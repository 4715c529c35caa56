"""The parts of the loop, each against an independent statement of what it should be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from robustdebias.checkpoint import RunDirectory, write_json
from robustdebias.sampling import BatchStream
from robustdebias.training import _schedule

# The order of the data


def make_stream(seed: int = 0, examples: int = 500, batch_size: int = 20) -> tuple[BatchStream, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    groups = torch.rand(examples, 4, generator=draw) < torch.tensor([0.5, 0.2, 0.06, 0.0])
    return BatchStream(groups, batch_size, seed), groups


def test_an_epoch_holds_every_example_once() -> None:
    stream, _ = make_stream(examples=503)
    for epoch in range(2):
        numbers = range(epoch * stream.batches_per_epoch, (epoch + 1) * stream.batches_per_epoch)
        batches = [stream.batch(number) for number in numbers]
        assert {batch[0] for batch in batches} == {epoch}
        assert sorted(index for _, indices in batches for index in indices) == list(range(503))


def test_every_batch_is_a_small_picture_of_the_corpus() -> None:
    stream, groups = make_stream()
    for number in range(stream.batches_per_epoch):
        members = groups[stream.batch(number)[1]].sum(0)
        expected = groups.float().mean(0) * 20
        # The rarest group is laid out exactly; others also come along as members of rarer ones.
        assert abs(members[2] - expected[2]) < 1
        assert abs(members[1] - expected[1]) < 4


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    batches = [make_stream()[0].batch(number)[1] for number in range(50)]  # a new object for each
    stream, _ = make_stream()
    assert [stream.batch(number)[1] for number in reversed(range(50))] == batches[::-1]
    assert batches[:25] != batches[25:]
    assert make_stream(seed=1)[0].batch(0)[1] != batches[0]


def test_the_rate_rises_then_falls_to_zero() -> None:
    shares = [_schedule(step, 20, 0.25) for step in range(1, 21)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5:] == pytest.approx([1 - k / 15 for k in range(15)])
    assert _schedule(1, 1, 0.0) == 1.0


# A run's directory


def test_an_occupied_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        run.claim({}, resume=False, overwrite=False)
    with pytest.raises(ValueError, match="holds no run, so it is not overwritten"):
        run.claim({}, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        run.claim({}, resume=True, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        RunDirectory(tmp_path / "out").claim({}, resume=False, overwrite=False)


def test_resuming_with_other_settings_names_each_difference(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim({"train": {"lr": 0.1, "seed": 0}, "model": "x"}, resume=False, overwrite=False)
    with pytest.raises(ValueError, match=r"model was 'x', now 'y'; train\.lr was 0\.1, now 0\.2$"):
        run.claim({"train": {"lr": 0.2, "seed": 0}, "model": "y"}, resume=True, overwrite=False)
    run.claim({"train": {"lr": 0.1, "seed": 0}, "model": "x"}, resume=True, overwrite=False)


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim({"seed": 0}, resume=False, overwrite=False)
    run.append_history({"step": 1})
    run.save_checkpoint({"step": 1})
    write_json(run.result, {})
    (tmp_path / "notes.txt").write_text("mine")
    run.claim({"seed": 1}, resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert json.loads(run.config.read_text()) == {"seed": 1}


def test_history_is_rewound_to_the_checkpoint_past_a_torn_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in range(1, 6):
        run.append_history({"step": step})
    with run.history.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in run.rewind_history(3)] == [1, 2, 3]
    run.append_history({"step": 4})
    assert [record["step"] for record in run.read_history()] == [1, 2, 3, 4]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    torch.save({"step": Path("x")}, run.checkpoint)  # an object, not a plain tensor
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        run.load_checkpoint()


def test_json_without_a_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []
