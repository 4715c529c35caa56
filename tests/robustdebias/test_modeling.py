"""Loading, and the adapter against the plain Transformers forward: loss and every parameter's gradient."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForMaskedLM

import rd_kernels as rd
from robustdebias import modeling
from robustdebias.modeling import HeadInputs, load, masked_lm_inputs

B, T, G = 5, 12, 3


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
    groups = torch.nn.functional.one_hot(torch.randint(0, G, shape, generator=draw), G).bool()
    return {
        "input_ids": input_ids * attention_mask, "attention_mask": attention_mask,
        "token_type_ids": torch.zeros(B, T, dtype=torch.long), "labels": labels, "groups": groups,
    }  # fmt: skip


def plain(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{key: value for key, value in batch.items() if key != "groups"}).loss


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def through_adapter(batch_inputs: HeadInputs) -> torch.Tensor:
    hidden, weight, labels, groups, bias = batch_inputs
    if weight is None:
        return rd.GroupDROLoss(G, rd.ERM())(hidden, labels, groups)
    return rd.LinearGroupDROLoss(G, rd.ERM())(hidden, weight, labels, groups, bias=bias)


def assert_equals_plain_forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(1)
    reference = plain(model, batch)
    expected = gradients(model, reference)
    torch.manual_seed(1)
    loss = through_adapter(masked_lm_inputs(model, batch))
    actual = gradients(model, loss)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    assert actual.keys() == expected.keys()
    assert "cls.predictions.bias" in expected
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0 or name.endswith("key.bias"), name  # softmax doesn't feel a shift of all keys
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6 + 1e-5 * scale, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_loss_and_every_gradient_equal_the_plain_forward(level: str, attention: str, tiny_model) -> None:
    tiny_model.eval().set_attn_implementation(attention)
    assert_equals_plain_forward(tiny_model, make_batch(tiny_model.config.vocab_size, level=level))


@pytest.mark.parametrize("layers", [1, 3])
def test_it_does_so_at_any_depth_and_where_a_sequence_has_no_label(layers: int, make_tiny_model) -> None:
    model = make_tiny_model(60, num_hidden_layers=layers).eval()
    batch = make_batch(60)
    batch["labels"][[0, 3]] = -100
    assert_equals_plain_forward(model, batch)


def test_before_the_last_layer_dropout_draws_as_the_plain_forward_does(tiny_model) -> None:
    tiny_model.train()
    for module in tiny_model.bert.encoder.layer[-1].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_equals_plain_forward(tiny_model, make_batch(tiny_model.config.vocab_size))


def test_the_last_layer_drops_out_at_its_rates(tiny_model) -> None:
    tiny_model.train()
    batch = make_batch(tiny_model.config.vocab_size)
    last = tiny_model.bert.encoder.layer[-1]
    for module in tiny_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    undisturbed = masked_lm_inputs(tiny_model, batch).hidden
    for dropout in (last.attention.self.dropout, last.attention.output.dropout, last.output.dropout):
        dropout.p = 0.5
        assert not torch.allclose(masked_lm_inputs(tiny_model, batch).hidden, undisturbed)
        tiny_model.eval()
        assert torch.equal(masked_lm_inputs(tiny_model, batch).hidden, undisturbed)
        tiny_model.train()
        dropout.p = 0.0


def test_a_hook_on_the_last_layer_sees_the_whole_layer(tiny_model) -> None:
    tiny_model.eval()
    batch = make_batch(tiny_model.config.vocab_size)
    shapes = []
    handle = tiny_model.bert.encoder.layer[-1].register_forward_hook(
        lambda _module, _inputs, output: shapes.append(tuple(output.shape))
    )
    assert_equals_plain_forward(tiny_model, batch)
    assert shapes == [(B, T, tiny_model.config.hidden_size)] * 2
    handle.remove()
    masked_lm_inputs(tiny_model, batch)
    assert len(shapes) == 2


def test_a_failing_forward_leaves_the_model_whole(tiny_model) -> None:
    names = list(tiny_model.state_dict())
    batch = make_batch(tiny_model.config.vocab_size)
    with pytest.raises(IndexError):
        masked_lm_inputs(tiny_model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert list(tiny_model.state_dict()) == names


def test_gradient_checkpointing_changes_nothing(tiny_model) -> None:
    for module in tiny_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tiny_model.train().gradient_checkpointing_enable()
    assert_equals_plain_forward(tiny_model, make_batch(tiny_model.config.vocab_size))


def test_fp64_agrees_to_fp64_rounding(tiny_model) -> None:
    model = tiny_model.double().eval()
    batch = make_batch(model.config.vocab_size, seed=3)
    expected = gradients(model, plain(model, batch))
    hidden, weight, labels, groups, bias = masked_lm_inputs(model, batch)
    loss = rd.LinearGroupDROLoss(G, rd.ERM(), backend="reference")(hidden, weight, labels, groups, bias=bias)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_rows_carry_the_groups_of_their_sequence_or_token(level: str, tiny_model) -> None:
    batch = make_batch(tiny_model.config.vocab_size, level=level)
    inputs = masked_lm_inputs(tiny_model, batch)
    expected = [
        (batch["labels"][b, t].item(), (batch["groups"][b] if level == "sequence" else batch["groups"][b, t]).tolist())
        for b in range(B) for t in range(T) if batch["labels"][b, t] != -100
    ]  # fmt: skip
    assert [
        (label.item(), row.tolist()) for label, row in zip(inputs.labels, inputs.groups, strict=True)
    ] == expected
    assert inputs.hidden.shape == (len(expected), tiny_model.config.hidden_size)
    assert inputs.weight is tiny_model.bert.embeddings.word_embeddings.weight  # tied


def test_a_batch_without_labels_gives_zero_loss(tiny_model) -> None:
    batch = make_batch(tiny_model.config.vocab_size)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = through_adapter(masked_lm_inputs(tiny_model, batch))
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for name, gradient in gradients(tiny_model, loss).items())


def test_a_model_without_adapter_falls_back_to_logits_and_says_so_once() -> None:
    torch.manual_seed(0)
    model = DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32
        )
    ).eval()
    batch = make_batch(50)
    del batch["token_type_ids"]
    expected = gradients(model, plain(model, batch))
    with pytest.warns(UserWarning, match="no adapter for model type 'distilbert'"):
        inputs = masked_lm_inputs(model, batch)
    assert inputs.weight is None
    assert not modeling.has_adapter(model)
    for name, gradient in gradients(model, through_adapter(inputs)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked_lm_inputs(model, batch)


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
