"""Loading a model, what of a batch reaches the loss, and how long a text may be."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, make_model, make_tokenizer

import robustdebias
from robustdebias.collate import MLMCollator, encode
from robustdebias.corpus import Example
from robustdebias.modeling import HeadInputs, check_length, load, masked_lm_inputs, position_limit

B, T, G = 5, 12, 3
WORD_PIECES = ("bert", "distilbert", "electra")
HEAD_FILE = Path(robustdebias.__file__).parent / "data/minilm_mlm_head.safetensors"


def make_batch(vocabulary: int, seed: int = 0, level: str = "sequence") -> dict[str, torch.Tensor]:
    """Random tokens, ragged padding, a fifth of the real positions labelled; every row in exactly one group."""
    draw = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, vocabulary, (B, T), generator=draw)
    lengths = torch.randint(4, T + 1, (B,), generator=draw)
    attention_mask = (torch.arange(T) < lengths[:, None]).long()
    labelled = (torch.rand(B, T, generator=draw) < 0.2) & attention_mask.bool()
    labelled[:, 1] = True
    labels = torch.where(labelled, torch.randint(5, vocabulary, (B, T), generator=draw), -100)
    shape = (B,) if level == "sequence" else (B, T)
    groups = F.one_hot(torch.randint(0, G, shape, generator=draw), G).bool()
    return {
        "input_ids": input_ids * attention_mask, "attention_mask": attention_mask,
        "token_type_ids": torch.zeros(B, T, dtype=torch.long), "labels": labels, "groups": groups,
    }  # fmt: skip


def assert_rows(inputs: HeadInputs, batch: dict[str, torch.Tensor]) -> None:
    """Label, groups and sequence of each row, against a walk through the batch."""
    groups = batch["groups"]
    expected = [
        (batch["labels"][b, t].item(), (groups[b] if groups.dim() == 2 else groups[b, t]).tolist(), b)
        for b in range(B) for t in range(T) if batch["labels"][b, t] != -100
    ]  # fmt: skip
    rows = zip(inputs.labels.tolist(), inputs.groups.tolist(), inputs.texts.tolist(), strict=True)
    assert list(rows) == expected
    assert len(inputs.hidden) == len(expected)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_rows_carry_the_groups_of_their_sequence_or_token(level: str, tiny_model) -> None:
    batch = make_batch(tiny_model.config.vocab_size, level=level)
    batch["labels"][2] = -100
    inputs = masked_lm_inputs(tiny_model, batch)
    assert_rows(inputs, batch)
    assert inputs.hidden.shape[1] == tiny_model.config.hidden_size
    assert inputs.weight is tiny_model.bert.embeddings.word_embeddings.weight  # tied
    assert inputs.texts.dtype == torch.int64


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_positions_that_come_with_the_batch_are_taken(level: str, tiny_model, monkeypatch) -> None:
    batch = make_batch(tiny_model.config.vocab_size, level=level)
    expected = masked_lm_inputs(tiny_model.eval(), batch)
    positions = torch.tensor([b * T + t for b in range(B) for t in range(T) if batch["labels"][b, t] != -100])
    # Whatever asks the device for a number; on a GPU it would have to be waited for.
    for name in ("nonzero", "item", "tolist", "bincount", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    # Transformers asks itself whether there is padding at all, unless attention is eager.
    tiny_model.set_attn_implementation("eager")
    inputs = masked_lm_inputs(tiny_model, {**batch, "positions": positions})
    monkeypatch.undo()
    assert_rows(inputs, batch)
    torch.testing.assert_close(inputs.hidden, expected.hidden)


@pytest.mark.parametrize("positions", [torch.tensor([1, 2], dtype=torch.int32), torch.ones(B, T).long()])
def test_positions_that_are_none_are_an_error(positions: torch.Tensor, tiny_model) -> None:
    batch = make_batch(tiny_model.config.vocab_size)
    with pytest.raises(ValueError, match=r"positions: expected int64 \[M\], got torch.int"):
        masked_lm_inputs(tiny_model, {**batch, "positions": positions})


# Length


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mpnet"])
def test_a_sequence_as_long_as_the_limit_runs_and_one_token_more_is_an_error(kind: str) -> None:
    model = make_model(kind, "eager", max_position_embeddings=24)
    counted_from_padding = kind in ("roberta", "camembert", "xlm-roberta", "mpnet")
    limit = position_limit(model)
    assert limit == (22 if counted_from_padding else 24)
    check_length(model, limit)
    tokens = torch.randint(5, 100, (1, limit))
    assert model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.isfinite().all()
    with pytest.raises(
        ValueError, match=f"max_length: {limit + 1} tokens, but the model has {limit} positions"
    ):
        check_length(model, limit + 1)
    if kind != "modernbert":  # its positions are rotations: beyond the limit they run, untrained
        longer = torch.randint(5, 100, (1, limit + 1))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_a_model_without_limit_takes_any_length() -> None:
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace()
    assert position_limit(model) is None
    check_length(model, 10**6)


# Loading


def test_load_gives_back_what_was_saved(tiny_model_dir: Path, tiny_model, tiny_tokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = load(tiny_model_dir)
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    text = "The woman reads her letter in the city."
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def saved(kind: str, directory: Path, word_pieces: Any, **changes: Any) -> Path:
    """A tiny model and a tokenizer of the kind that it comes with."""
    tokenizer = word_pieces if kind in WORD_PIECES else make_tokenizer(kind)
    make_model(kind, **{"vocab_size": len(tokenizer), **changes}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_goes_from_a_directory_to_the_loss(
    kind: str, tmp_path: Path, tiny_tokenizer
) -> None:
    model, tokenizer = load(saved(kind, tmp_path, tiny_tokenizer))
    texts = ["the woman reads the letter", "he sells it"]
    encoded = encode([Example(text, str(i), ("all",)) for i, text in enumerate(texts)], tokenizer, 22)
    batch = MLMCollator(tokenizer, ["all"], mask_probability=0.3)(encoded)
    inputs = masked_lm_inputs(model.eval(), batch)
    loss = F.cross_entropy(F.linear(inputs.hidden, inputs.weight, inputs.bias), inputs.labels)
    tensors = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(loss, model(**tensors).loss)
    assert not set(inputs.labels.tolist()) & set(tokenizer.all_special_ids)
    original = tiny_tokenizer if kind in WORD_PIECES else make_tokenizer(kind)
    assert [sequence.input_ids.tolist() for sequence in encoded] == original(texts)["input_ids"]
    assert tokenizer.unk_token_id not in encoded[0].input_ids


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_refuses_another_vocabulary(kind: str, tmp_path: Path, tiny_tokenizer) -> None:
    directory = saved(kind, tmp_path, tiny_tokenizer, vocab_size=47)
    with pytest.raises(ValueError, match="has 47 rows in its vocabulary, but its tokenizer knows"):
        load(directory)


@pytest.mark.parametrize("kind", ["camembert", "roberta", "xlm-roberta"])
def test_positions_counted_from_another_padding_id_are_an_error(
    kind: str, tmp_path: Path, tiny_tokenizer
) -> None:
    directory = saved(kind, tmp_path, tiny_tokenizer, pad_token_id=3)
    with pytest.raises(ValueError, match="leaving out the padding id 3, but its tokenizer pads with 1"):
        load(directory)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bert", "vocabulary of 1.., the head was made for 30522"), ("roberta", "a BertForMaskedLM is needed")],
)
def test_a_head_made_for_another_model_is_an_error(
    kind: str, reason: str, tmp_path: Path, tiny_tokenizer
) -> None:
    directory = saved(kind, tmp_path, tiny_tokenizer)
    with pytest.raises(ValueError, match=reason):
        load(directory, HEAD_FILE)


def test_padding_and_truncation_saved_in_the_tokenizer_are_switched_off(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = directory / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    path.write_text(json.dumps(saved))
    _, tokenizer = load(directory)
    assert len(tokenizer("the woman reads her letter")["input_ids"]) == 7


def test_an_encoder_without_head_is_said_loudly(tiny_model_dir: Path, tmp_path: Path, tiny_model) -> None:
    tiny_model.bert.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / file, tmp_path)
    with pytest.warns(UserWarning, match="without an MLM head"):
        model, _ = load(tmp_path)
    torch.testing.assert_close(
        model.bert.encoder.layer[0].output.dense.weight, tiny_model.bert.encoder.layer[0].output.dense.weight
    )


def test_another_vocabulary_is_an_error(tiny_model_dir: Path, tmp_path: Path, make_tiny_model) -> None:
    make_tiny_model(60).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / file, tmp_path)
    with pytest.raises(ValueError, match="60 rows in its vocabulary, but its tokenizer knows 1"):
        load(tmp_path)


def test_a_configuration_that_denies_the_weights_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match=r"model: cannot load .*model"):
        load(directory)


def test_missing_encoder_weights_are_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="lacks 16 weights of its encoder"):
        load(directory)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_a_path_that_is_no_directory_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="model: "):
        load(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(ValueError, match="is not a directory with a saved model"):
        load(tmp_path / "model.bin")


def test_a_directory_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: cannot load"):
        load(tmp_path)
