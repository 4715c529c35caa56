"""The stored MLM head: quantise, save, put back; the errors; and the file that is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from robustdebias.demo_head import EMBEDDINGS, SCALE, apply_head, quantise_rows, save_head

SHIPPED = Path(__file__).parent.parent / "python/robustdebias/data/minilm_mlm_head.safetensors"


def tiny_model(seed: int = 0, **changes) -> BertForMaskedLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**{**sizes, "intermediate_size": 16, "max_position_embeddings": 12, **changes})
    return BertForMaskedLM(config).eval()


def encoder_weights(model: BertForMaskedLM) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("bert.")}


def train_like(model: BertForMaskedLM) -> None:
    """Change the head and the last encoder layer, as training would."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layer.1." in name or name.startswith("cls."):
                p.add_(0.05 * torch.randn_like(p))


@pytest.fixture
def trained(tmp_path):
    """-> trained model, path of its stored head."""
    model = tiny_model()
    base = encoder_weights(model)
    train_like(model)
    path = tmp_path / "head.safetensors"
    assert save_head(model, base, path) == path.stat().st_size
    return model, path


def test_quantise_rows_stays_within_half_a_step():
    torch.manual_seed(0)
    delta = torch.randn(40, 64) * torch.logspace(-9, 2, 40)[:, None]  # rows of very unlike size
    delta[3] = 0
    codes, scale = quantise_rows(delta)
    assert codes.dtype == torch.int8
    error = (delta.double() - codes.double() * scale.double()[:, None]).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    assert torch.equal(codes[3], torch.zeros(64, dtype=torch.int8))
    assert (codes.abs().amax(1)[torch.arange(40) != 3] == 127).all()


def test_round_trip_restores_parameters_within_stated_error(trained):
    model, path = trained
    fresh = tiny_model()  # the same encoder, its head to be replaced
    with torch.no_grad():
        fresh.cls.predictions.transform.dense.weight.fill_(float("nan"))
    apply_head(fresh, path)
    stored = load_file(path)
    for (name, want), got in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if name not in stored:
            assert torch.equal(want, got), name
        elif name + SCALE in stored:
            half_step = stored[name + SCALE][:, None] / 2
            assert ((want - got).abs() <= half_step + 1e-6).all(), name
        else:
            torch.testing.assert_close(got, want, rtol=2**-11, atol=1e-4, msg=name)


def test_only_changed_parameters_are_stored_in_small_types(trained):
    _, path = trained
    stored = load_file(path)
    assert not any("layer.0." in name or "embeddings" in name for name in stored)
    assert stored["bert.encoder.layer.1.output.dense.weight"].dtype == torch.int8
    assert stored["bert.encoder.layer.1.output.dense.bias"].dtype == torch.float16
    assert stored["cls.predictions.bias"].dtype == torch.float16


def test_predictions_survive_the_round_trip(trained):
    model, path = trained
    fresh = tiny_model()
    ids = torch.arange(20).reshape(2, 10)
    before = fresh(input_ids=ids).logits
    apply_head(fresh, path)
    want, got = model(input_ids=ids).logits, fresh(input_ids=ids).logits
    assert (got - want).abs().max() < 0.02 * (before - want).abs().max()


def unchanged_after_error(model, path, message):
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        apply_head(model, path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 51}, "vocabulary of 51, the head was made for 50"),
        ({"intermediate_size": 24}, r"has shape \(24,.*\(16,"),
        ({"num_hidden_layers": 1}, r"unmatched: bert\.encoder\.layer\.1"),
        ({"tie_word_embeddings": False}, "not tied"),
    ],
)
def test_a_model_of_another_shape_is_refused(trained, changes, message):
    unchanged_after_error(tiny_model(**changes), trained[1], message)


def test_another_encoder_is_refused(trained):
    unchanged_after_error(tiny_model(seed=1), trained[1], "encoder weights aren't those")


def test_adding_the_head_twice_is_refused(trained):
    fresh = tiny_model()
    apply_head(fresh, trained[1])
    unchanged_after_error(fresh, trained[1], "added already")


def test_a_model_without_word_embeddings_is_refused(trained):
    unchanged_after_error(torch.nn.Linear(2, 2), trained[1], "BertForMaskedLM is needed")


def test_files_that_are_no_head_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(FileNotFoundError, match=r"train_demo_head\.py"):
        apply_head(model, tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("not a head")
    with pytest.raises(ValueError, match="not a safetensors file"):
        apply_head(model, tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="format is None"):
        apply_head(model, tmp_path / "other")


def test_trained_embeddings_are_refused_and_nothing_is_written(tmp_path):
    model = tiny_model()
    base = encoder_weights(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3] += 1
    with pytest.raises(ValueError, match=EMBEDDINGS):
        save_head(model, base, tmp_path / "head.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_shipped_file_is_small_and_its_card_tells_what_it_reaches():
    card = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert SHIPPED.stat().st_size == card["file_bytes"] <= 8_000_000
    assert card["status"] == "final"
    shipped = card["held_out"]["shipped"]
    assert shipped["masked_tokens"] >= 5_000
    assert shipped["accuracy"] >= 0.30  # the goal
    assert 0 < shipped["loss"] < 4.88  # what 400 untuned steps reach
    assert shipped["accuracy"] == pytest.approx(card["held_out"]["unquantised"]["accuracy"], abs=0.005)
    assert 0 < card["out_of_domain_xsum"]["shipped"]["accuracy"] < 1
    assert {"seed", "steps", "tokens_seen", "minutes", "recipe"} <= set(card["training"])


def test_shipped_file_holds_finite_numbers_for_the_pinned_vocabulary():
    stored = load_file(SHIPPED)
    assert stored["cls.predictions.bias"].shape == (30522,)
    assert all(torch.isfinite(t.float()).all() for t in stored.values())
