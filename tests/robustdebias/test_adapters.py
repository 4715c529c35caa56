"""Each adapter against the plain Transformers forward: loss and every parameter's gradient."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM

import rd_kernels as rd
from robustdebias import modeling
from robustdebias.adapters import ADAPTERS, adapter_of
from robustdebias.evaluation.scoring import logits_at
from robustdebias.modeling import HeadInputs, masked_lm_inputs

B, T, V, D, E = 5, 12, 113, 32, 16

SIZES = {
    "vocab_size": V, "num_hidden_layers": 2, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": E},
    "distilbert": {"hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
    "electra": {"embedding_size": E},
    # Layers of both kinds. Windows as wide as leave every padding token a real one in sight: Transformers' eager
    # attention gives NaN in float64 for those that have none.
    "modernbert": {
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "cls_token_id": 0,
        "sep_token_id": 1,
    },
}
ARCHITECTURES = sorted(ADAPTERS)
LIKE_BERT = [name for name in ARCHITECTURES if name not in ("albert", "modernbert")]
VARIANTS = {
    "electra, as wide as its embeddings": ("electra", {"embedding_size": D}),
    "albert, two groups of two layers": ("albert", {"num_hidden_groups": 2, "inner_group_num": 2}),
    "albert, another activation": ("albert", {"hidden_act": "relu"}),
    "roberta, another activation": ("roberta", {"hidden_act": "relu"}),  # of the encoder, not of the head
    "modernbert, windows of one token to each side": ("modernbert", {"local_attention": 2}),
    "modernbert, sparse": ("modernbert", {"sparse_prediction": True}),
    "modernbert, no decoder bias": ("modernbert", {"decoder_bias": False}),
    "modernbert, all biases": (
        "modernbert",
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
    ),
    "distilbert, sinusoidal positions": ("distilbert", {"sinusoidal_pos_embds": True}),
    "roberta, one token type": ("roberta", {"type_vocab_size": 1}),
    "bert, one layer": ("bert", {"num_hidden_layers": 1}),
    "bert, no layer": ("bert", {"num_hidden_layers": 0}),
    "distilbert, one layer": ("distilbert", {"num_hidden_layers": 1}),
    "camembert, three layers": ("camembert", {"num_hidden_layers": 3}),
}


def make_model(kind: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Random weights, biases and norms included, so that none of them can be left out unseen. In eval mode."""
    torch.manual_seed(0)
    settings = {**SIZES, **OWN_SIZES.get(kind, {}), **changes}
    model = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(kind, **settings), attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_batch(model: Any, padding: str = "right") -> dict[str, Tensor]:
    """Ragged sequences; labels at the first and at the last token, several in a sequence, none in the last one."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([T, 5, 9, T, 7])[:, None]
    places = torch.arange(T)
    real = places < lengths if padding == "right" else places >= T - lengths
    pad = model.config.pad_token_id
    words = torch.randint(5, V, (2, B, T), generator=draw)
    chosen = (torch.rand(B, T, generator=draw) < 0.3) & real
    chosen[0, 0] = chosen[3, -1] = True
    chosen[-1] = False
    return {
        "input_ids": torch.where(real, words[0], pad), "attention_mask": real.long(),
        "token_type_ids": torch.zeros(B, T, dtype=torch.long),
        "labels": torch.where(chosen, words[1], -100), "groups": torch.ones(B, 1, dtype=torch.bool),
    }  # fmt: skip


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**{name: tensor for name, tensor in batch.items() if name not in ("groups", "positions")})
    if output.loss.dtype == output.logits.dtype:
        return output.loss
    labels = batch["labels"].flatten()  # ModernBERT's own loss is always in float32
    return nn.functional.cross_entropy(
        output.logits.flatten(0, -2), labels if output.logits.dim() == 3 else labels[labels != -100]
    )


def token_mean(inputs: HeadInputs) -> Tensor:
    if inputs.weight is None:
        return rd.GroupDROLoss(1, rd.ERM())(inputs.hidden, inputs.labels, inputs.groups)
    op = rd.LinearGroupDROLoss(1, rd.ERM())
    return op(inputs.hidden, inputs.weight, inputs.labels, inputs.groups, bias=inputs.bias)


def adapted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return token_mean(masked_lm_inputs(model, batch))


def loss_and_gradients(loss_of: Any, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, under "loss", and the gradients of the parameters that have one. Dropout draws from the same seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = loss_of(model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal_in_float64(model: Any, batch: dict[str, Tensor], rtol: float = 1e-10) -> dict[str, Tensor]:
    """-> loss and gradients of the adapter."""
    model = model.double()
    expected = loss_and_gradients(plain, model, batch)
    actual = loss_and_gradients(adapted, model, batch)
    assert actual.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        # Attention doesn't feel a shift of all keys: what their bias gets is rounding.
        assert scale > 1e-9 * largest or name.endswith(("key.bias", "k_lin.bias")), name
        torch.testing.assert_close(
            actual[name], tensor, rtol=rtol, atol=rtol * max(scale, 1e-3 * largest), msg=name
        )
    return actual


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loss_and_every_gradient_equal_the_plain_forward(
    kind: str, tied: bool, attention: str, padding: str
) -> None:
    model = make_model(kind, attention, tie_word_embeddings=tied)
    inputs = masked_lm_inputs(model, make_batch(model, padding))
    assert (inputs.weight is model.get_input_embeddings().weight) is tied
    assert inputs.hidden.shape[1] == (E if kind in ("albert", "electra") else D)
    actual = assert_equal_in_float64(model, make_batch(model, padding))
    unfelt = {"cls.predictions.bias", "predictions.bias", "lm_head.bias"} if not tied else set()
    assert actual.keys() >= {name for name, _ in model.named_parameters()} - unfelt


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_does_so_for_other_configurations(variant: str) -> None:
    kind, changes = VARIANTS[variant]
    model = make_model(kind, **changes)
    assert_equal_in_float64(model, make_batch(model))
