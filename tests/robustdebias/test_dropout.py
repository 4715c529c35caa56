"""Another dropout over the same weights, in every architecture that there is an adapter for and a few others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from robustdebias.dropout import with_dropout

V = 40
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SIZES),
    "roberta": ("RobertaConfig", SIZES),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 16}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "albert": ("AlbertConfig", {**SIZES, "embedding_size": 16}),
    "modernbert": ("ModernBertConfig", {**SIZES, **IDS}),
    "mpnet": ("MPNetConfig", SIZES),
    "deberta-v2": ("DebertaV2Config", SIZES),
}
CONFIGS_WITHOUT_ATTENTION = {"fnet": ("FNetConfig", {**SIZES, "use_tpu_fourier_optimizations": False})}
# Dropouts of attention's weights; all others are of hidden states. ModernBERT has a number instead, and takes the same
# for what comes out of attention.
OF_ATTENTION = (
    "attention.self.dropout",
    "attention.dropout",
    "attention.attention_dropout",
    "attn.dropout",
    "out_drop",
)


def make_model(name: str) -> Any:
    config, settings = {**CONFIGS, **CONFIGS_WITHOUT_ATTENTION}[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(
        getattr(transformers, config)(vocab_size=V, **settings)
    )
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(4, 24).view(2, 10)).logits


def dropouts(model: nn.Module) -> dict[str, float]:
    return {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_dropout_has_the_probability(name: str) -> None:
    model = make_model(name)
    before = model.config.to_dict()
    twin = with_dropout(model, 0.3, 0.17)
    found = dropouts(twin)
    expected = {
        part: 0.17
        if part.endswith(OF_ATTENTION) and not (name == "mpnet" and not part.endswith("attn.dropout"))
        else 0.3
        for part in found
    }
    assert found == expected
    if name == "modernbert":
        assert {part.attention_dropout for part in twin.modules() if hasattr(part, "Wqkv")} == {0.17}
    else:
        assert set(found.values()) == {0.3, 0.17}
    assert model.config.to_dict() == before


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_same_model_over_the_same_tensors(name: str) -> None:
    model = make_model(name)
    twin = with_dropout(model, 0.3, 0.17)
    for kind in ("named_parameters", "named_buffers"):
        own = dict(getattr(model, kind)())
        shared = dict(getattr(twin, kind)())
        assert shared.keys() == own.keys()
        assert all(shared[part] is tensor for part, tensor in own.items())
    assert torch.equal(logits(twin.eval()), logits(model))
    twin.train()
    assert not torch.equal(logits(twin), logits(twin))  # dropout draws
    assert not model.training
    logits(twin).sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert torch.equal(logits(twin.eval()), logits(model))


def test_no_dropout_is_none_and_none_is_the_models_own() -> None:
    model = make_model("bert")
    assert with_dropout(model, None, None) is model
    none = with_dropout(model, 0.0, 0.0).train()
    assert torch.equal(logits(none), logits(model))
    assert set(dropouts(with_dropout(model, None, 0.4)).values()) == {0.1, 0.4}
    assert set(dropouts(with_dropout(model, 0.4, None)).values()) == {0.1, 0.4}


def test_gradient_checkpointing_stays_on() -> None:
    model = make_model("bert")
    model.bert.encoder.layer[1].gradient_checkpointing = True
    twin = with_dropout(model, 0.2, 0.15)
    assert [layer.gradient_checkpointing for layer in twin.bert.encoder.layer] == [False, True]


def test_what_is_saved_has_the_models_own_dropout(tmp_path: Path) -> None:
    model = make_model("bert")
    with_dropout(model, 0.3, 0.17)
    model.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (saved.hidden_dropout_prob, saved.attention_probs_dropout_prob) == (0.1, 0.1)


def test_models_that_have_none_or_are_changed() -> None:
    model = make_model("fnet")
    with pytest.raises(
        ValueError, match=r"attention_dropout: a model of type 'fnet' has none; .* attention_probs"
    ):
        with_dropout(model, None, 0.2)
    wrapped = make_model("bert")
    wrapped.bert.encoder.layer[0].output.dense = nn.Sequential(wrapped.bert.encoder.layer[0].output.dense)
    with pytest.raises(
        ValueError, match=r"dropout: the model is not as BertForMaskedLM builds it, .*dense\.0"
    ):
        with_dropout(wrapped, 0.2, 0.15)
