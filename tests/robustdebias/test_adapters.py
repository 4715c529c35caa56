"""Each adapter against the plain Transformers forward: loss and every parameter's gradient."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, SIZES, make_model
from torch import Tensor, nn

import rd_kernels as rd
from robustdebias import modeling
from robustdebias.adapters import ADAPTERS, adapter_of
from robustdebias.evaluation.scoring import logits_at
from robustdebias.modeling import HeadInputs, masked_lm_inputs

B, T, E = 5, 12, 16
V, D = SIZES["vocab_size"], SIZES["hidden_size"]

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


# Attention doesn't feel a shift of all keys: what their bias gets is rounding.
KEY_BIASES = ("key.bias", "k_lin.bias", "attn.k.bias", "key_proj.bias")


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
        assert scale > 1e-9 * largest or name.endswith(KEY_BIASES), name
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


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_in_lower_precision_it_is_as_near_to_the_exact_as_the_plain_forward(kind: str, bf16: bool) -> None:
    model = make_model(kind).train()
    batch = make_batch(model)
    exact = loss_and_gradients(plain, copy.deepcopy(model).double(), batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = loss_and_gradients(plain, model, batch)
        actual = loss_and_gradients(adapted, model, batch)
    largest = max(tensor.abs().max().item() for tensor in exact.values())
    for name, tensor in exact.items():
        ulp = (2**-8 if bf16 else 2**-23) * max(tensor.abs().max().item(), 1e-3 * largest)
        error, allowed = ((found[name] - tensor).abs().max().item() for found in (actual, expected))
        assert error <= 2 * allowed + 2 * ulp, name


def dropouts(module: nn.Module) -> list[nn.Dropout]:
    return [part for part in module.modules() if isinstance(part, nn.Dropout)]


def layers_of(model: Any) -> nn.ModuleList:
    return (model.distilbert.transformer if hasattr(model, "distilbert") else model.base_model.encoder).layer


def last_layer(model: Any) -> Any:
    return layers_of(model)[-1]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dropout_is_off_in_eval_mode_and_elsewhere_draws_as_the_plain_forward_does(kind: str) -> None:
    rates = {"embedding_dropout": 0.3, "attention_dropout": 0.3, "mlp_dropout": 0.3}
    model = make_model(kind, **(rates if kind == "modernbert" else {}))
    for dropout in dropouts(model):
        dropout.p = 0.3
    batch = make_batch(model)
    still = loss_and_gradients(plain, model, batch)["loss"]
    assert_equal_in_float64(model, batch)
    model.train()
    if kind in LIKE_BERT:
        for dropout in dropouts(last_layer(model)):  # which draws for the labelled positions alone
            dropout.p = 0.0
    moved = assert_equal_in_float64(model, batch)["loss"]
    assert not torch.allclose(moved, still.double(), rtol=1e-3)


@pytest.mark.parametrize("kind", LIKE_BERT)
def test_the_last_layer_drops_out_at_its_rates(kind: str) -> None:
    model = make_model(kind)
    batch = make_batch(model)
    undisturbed = masked_lm_inputs(model, batch).hidden
    assert len(dropouts(last_layer(model))) == (2 if kind == "distilbert" else 3)
    for dropout in dropouts(last_layer(model)):
        dropout.p = 0.5
        model.train()
        assert not torch.allclose(masked_lm_inputs(model, batch).hidden, undisturbed)
        model.eval()
        assert torch.equal(masked_lm_inputs(model, batch).hidden, undisturbed)
        dropout.p = 0.0


@pytest.mark.parametrize(
    "kind", [kind for kind in ARCHITECTURES if kind != "albert"]
)  # which has no checkpointing
@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`:FutureWarning"
)  # the name that all 5.x know
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model = make_model(kind).train()
    model.gradient_checkpointing_enable()
    assert_equal_in_float64(model, make_batch(model))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_frozen_encoder_stays_without_gradients(kind: str) -> None:
    model = make_model(kind, tie_word_embeddings=False)
    model.base_model.requires_grad_(False)
    found = assert_equal_in_float64(model, make_batch(model))
    assert len(found) > 4
    assert not any(name.startswith(f"{model.base_model_prefix}.") for name in found)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_batch_without_labels_gives_zero_loss_and_zero_gradients(kind: str) -> None:
    model = make_model(kind)
    batch = make_batch(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = loss_and_gradients(adapted, model, batch)
    assert len(found) > 10
    assert all((tensor == 0).all() for tensor in found.values())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_at_are_those_of_the_plain_forward_in_any_order(kind: str) -> None:
    model = make_model(kind)
    inputs = {name: make_batch(model)[name] for name in ("input_ids", "attention_mask")}
    positions = torch.tensor([T - 1, 3, 0, 3 * T + 11, 2 * T, T + 2])
    with torch.inference_mode():
        expected = model(**inputs).logits.flatten(0, 1)[positions]
        torch.testing.assert_close(logits_at(model, inputs, positions), expected, rtol=1e-4, atol=1e-5)


# The last layer


class Recorder(nn.Linear):
    """A linear layer that someone else has put in a model; it keeps the shapes it was given."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.added = nn.Parameter(0.1 * torch.randn_like(linear.weight))  # as LoRA adds one of low rank
        self.seen: list[tuple[int, ...]] = []

    def forward(self, given: Tensor) -> Tensor:
        self.seen.append(tuple(given.shape))
        return super().forward(given) + nn.functional.linear(given, self.added)


class Wrapper(nn.Module):
    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)


def query_of(model: Any) -> tuple[nn.Module, str]:
    """The module that holds the last layer's query, and the query's name in it."""
    attention = last_layer(model).attention
    return (attention, "q_lin") if hasattr(attention, "q_lin") else (attention.self, "query")


@pytest.mark.parametrize("kind", LIKE_BERT)
def test_queries_of_the_last_layer_are_computed_at_labelled_positions_alone(kind: str) -> None:
    model = make_model(kind)
    owner, name = query_of(model)
    query = Recorder(getattr(owner, name))
    setattr(owner, name, query)
    batch = make_batch(model)
    labelled = int((batch["labels"] != -100).sum())
    found = assert_equal_in_float64(model, batch)
    assert query.seen == [(B, T, D), (labelled, D)]
    assert any(parameter.endswith("added") for parameter in found)


def wrap_layer(model: Any) -> None:
    layers_of(model)[-1] = Wrapper(last_layer(model))


def wrap_attention(model: Any) -> None:
    last_layer(model).attention = Wrapper(last_layer(model).attention)


def hook_layer(model: Any) -> None:
    last_layer(model).register_forward_hook(lambda module, given, output: output * 1.5)


def hook_part(model: Any) -> None:
    owner, name = query_of(model)
    getattr(owner, name).register_forward_pre_hook(lambda module, given: (given[0] * 1.5,))


def replace_forward(model: Any) -> None:
    """As accelerate does."""
    layer = last_layer(model)
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.5


@pytest.mark.parametrize("change", [wrap_layer, wrap_attention, hook_layer, hook_part, replace_forward])
@pytest.mark.parametrize("kind", LIKE_BERT)
def test_a_last_layer_that_others_changed_runs_as_a_whole(kind: str, change: Any) -> None:
    model = make_model(kind)
    owner, name = query_of(model)
    query = Recorder(getattr(owner, name))
    setattr(owner, name, query)
    change(model)
    assert_equal_in_float64(model, make_batch(model))
    assert query.seen == [(B, T, D)] * 2


@pytest.mark.parametrize("kind", LIKE_BERT)
def test_a_failing_forward_leaves_the_model_whole(kind: str) -> None:
    model = make_model(kind)
    names = list(model.state_dict())
    batch = make_batch(model)
    with pytest.raises(IndexError):
        masked_lm_inputs(model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert list(model.state_dict()) == names


# Without an adapter


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "mpnet": {"pad_token_id": 1, "eos_token_id": 2},
    "convbert": {"embedding_size": D, "conv_kernel_size": 3, "head_ratio": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_other_architectures_fall_back_to_logits_and_say_so_once(kind: str) -> None:
    model = make_model(kind, "eager", **UNSUPPORTED[kind])
    batch = make_batch(model)
    assert not modeling.has_adapter(model)
    with pytest.warns(UserWarning, match=f"no adapter for model type '{kind}'.*albert, bert, .*xlm-roberta"):
        inputs = masked_lm_inputs(model, batch)
    assert inputs.weight is None
    assert inputs.hidden.shape == (int((batch["labels"] != -100).sum()), V)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_equal_in_float64(model, batch)


def add_to_decoder(model: Any) -> None:
    model.set_output_embeddings(Recorder(model.get_output_embeddings()))


def hook_decoder(model: Any) -> None:
    model.get_output_embeddings().register_forward_hook(lambda module, given, output: output * 1.5)


@pytest.mark.parametrize("change", [add_to_decoder, hook_decoder])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_decoder_that_is_more_than_weight_and_bias_falls_back_to_logits(kind: str, change: Any) -> None:
    model = make_model(kind)
    assert adapter_of(model) is ADAPTERS[kind]
    change(model)
    assert adapter_of(model) is None
    with pytest.warns(UserWarning, match=f"the decoder of this '{kind}' model is not"):
        assert_equal_in_float64(model, make_batch(model))
