"""An encoder whose last layer is computed at the labelled positions alone, for the layers that are built like BERT's.

A masked language model is asked at a sixth of its positions. Of the last layer only keys and values are needed of
every token; queries, the attention output and the feed-forward part are not. In exact arithmetic loss and gradients
are those of the plain forward; in the last layer dropout draws for the labelled positions only, so other random
numbers than the plain forward.

Of Transformers this relies on the names of a layer's submodules, which are also the names in every checkpoint,
and on an encoder that calls the members of `layer` in turn. Where the last layer is another than those named in
`_PARTS`, or somebody has replaced or listens to a part of it, the whole layer runs.

Letters: B sequences, T tokens, M labelled positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["encoded_at", "has_hooks"]

# How a layer attends, by `config._attn_implementation`, that scaled_dot_product_attention does as well.
_DENSE_ATTENTION = ("eager", "sdpa")


def encoded_at(
    encoder: Any,
    layers: Any,
    inputs: Mapping[str, Tensor],  # input_ids, maybe attention_mask and token_type_ids [B, T]
    positions: Tensor,  # [M] of the flattened batch
) -> Tensor:
    """The encoder's output at ``positions`` [M, D].

    Args:
        layers: the part of ``encoder`` that calls the members of its list ``layer`` in turn.
    """
    parts = _parts(layers.layer[-1], encoder.config) if len(layers.layer) else None
    if parts is None:
        return encoder(**inputs).last_hidden_state.flatten(0, 1)[positions]
    with _without_last_layer(layers):
        hidden = encoder(**inputs).last_hidden_state  # [B, T, D]
    return _layer_at(parts, hidden, inputs.get("attention_mask"), positions)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to what goes in or out of the module, or has put another function in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


class _Parts(NamedTuple):
    """What `_layer_at` takes from a layer."""

    query: nn.Module  # [., D] -> [., D], as key and value
    key: nn.Module
    value: nn.Module
    heads: int
    scaling: float
    dropout: nn.Dropout  # of the attention's probabilities
    finish: Callable[[Tensor, Tensor], Tensor]  # context and input of the layer -> its output, all [M, D]


def _like_bert(layer: Any) -> _Parts:
    attention = layer.attention.self

    def finish(context: Tensor, rows: Tensor) -> Tensor:
        attended = layer.attention.output(context, rows)
        return layer.output(layer.intermediate(attended), attended)

    return _Parts(
        attention.query, attention.key, attention.value,
        attention.num_attention_heads, attention.scaling, attention.dropout, finish,
    )  # fmt: skip


def _distilbert(layer: Any) -> _Parts:
    attention = layer.attention

    def finish(context: Tensor, rows: Tensor) -> Tensor:
        attended = layer.sa_layer_norm(attention.out_lin(context) + rows)
        return layer.output_layer_norm(layer.ffn(attended) + attended)

    return _Parts(
        attention.q_lin, attention.k_lin, attention.v_lin,
        attention.n_heads, attention.scaling, attention.dropout, finish,
    )  # fmt: skip


_PARTS: dict[str, Callable[[Any], _Parts]] = {
    "bert.modeling_bert.BertLayer": _like_bert,
    "camembert.modeling_camembert.CamembertLayer": _like_bert,
    "distilbert.modeling_distilbert.TransformerBlock": _distilbert,
    "electra.modeling_electra.ElectraLayer": _like_bert,
    "roberta.modeling_roberta.RobertaLayer": _like_bert,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _like_bert,
}
"""By the layer's class, below `transformers.models`."""


def _parts(layer: nn.Module, config: Any) -> _Parts | None:
    """None if the layer has to run as a whole."""
    home, name = type(layer).__module__, type(layer).__qualname__
    of = _PARTS.get(f"{home}.{name}".removeprefix("transformers.models."))
    if (
        of is None
        or getattr(config, "is_decoder", False)
        or config._attn_implementation not in _DENSE_ATTENTION
    ):
        return None
    if any(has_hooks(module) for module in layer.modules()):
        return None
    # The attention's own forward is not called, so it must be the one that is known; other parts may be replaced.
    bypassed = [module for path, module in layer.named_modules() if path in ("attention", "attention.self")]
    return of(layer) if all(type(module).__module__ == home for module in bypassed) else None


@contextmanager
def _without_last_layer(layers: Any) -> Iterator[None]:
    whole = layers.layer
    layers.layer = whole[:-1]  # a new list of the same modules
    try:
        yield
    finally:
        layers.layer = whole


def _layer_at(
    parts: _Parts,
    hidden: Tensor,  # [B, T, D]
    attention_mask: Tensor | None,  # [B, T]
    positions: Tensor,  # [M]
) -> Tensor:
    """What the layer gives at ``positions`` [M, D]."""

    def heads(projected: Tensor) -> Tensor:  # [B, T, D] -> [B, heads, T, D / heads]
        return projected.unflatten(-1, (parts.heads, -1)).transpose(1, 2)

    rows = hidden.flatten(0, 1)[positions]  # [M, D]
    asked = parts.query(rows)
    # Queries stand at their tokens' places among zeros, whose results stay where they are. Packing them would save
    # little, attention being the smaller part of a layer, and need their number, for which a GPU would have to be
    # waited for.
    queries = asked.new_zeros((hidden.shape[0] * hidden.shape[1], asked.shape[-1])).index_put(
        (positions,), asked
    )
    context = F.scaled_dot_product_attention(
        heads(queries.view(*hidden.shape[:2], -1)),
        heads(parts.key(hidden)),
        heads(parts.value(hidden)),
        attn_mask=None if attention_mask is None else attention_mask[:, None, None, :].bool(),
        dropout_p=parts.dropout.p if parts.dropout.training else 0.0,
        scale=parts.scaling,
    )
    return parts.finish(context.transpose(1, 2).flatten(2).flatten(0, 1)[positions], rows)
