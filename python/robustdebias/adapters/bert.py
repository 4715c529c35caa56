"""The adapter for BERT: what the loss needs is computed at the labelled positions alone, as far back as possible.

A masked language model is asked at a sixth of its positions. The head needs no others, and neither do the queries,
the attention output and the feed-forward part of the last layer: only its keys and values see every token. In
exact arithmetic the loss and every gradient are those of the plain forward; in the last layer dropout draws for
the labelled positions only, so other random numbers than the plain forward.

Of Transformers this relies on the names of a layer's submodules, which are also the names in every checkpoint,
and on an encoder that calls the members of `encoder.layer` in turn.

Letters: B sequences, T tokens, M labelled positions, S most labelled positions of a sequence, V vocabulary,
D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decoder_inputs"]

# How a layer attends, by `config._attn_implementation`, that scaled_dot_product_attention does as well.
_DENSE_ATTENTION = ("eager", "sdpa")


def decoder_inputs(
    model: Any,
    inputs: Mapping[str, Tensor],  # input_ids, attention_mask [B, T], maybe token_type_ids
    positions: Tensor,  # [M] ascending, in the flattened batch
) -> tuple[Tensor, Tensor, Tensor]:
    """-> what the decoder is applied to [M, D], its weight [V, D], its bias [V]."""
    if _plain(model):
        with _without_last_layer(model.bert.encoder) as last:
            hidden = model.bert(**inputs).last_hidden_state  # [B, T, D]
        encoded = _layer_at(last, hidden, inputs.get("attention_mask"), positions)
    else:
        encoded = model.bert(**inputs).last_hidden_state.flatten(0, 1)[positions]
    head = model.cls.predictions
    return head.transform(encoded), head.decoder.weight, head.decoder.bias


def _plain(model: Any) -> bool:
    """Whether the last layer is one that `_layer_at` knows, and nobody listens to what goes in or out of it."""
    from transformers.models.bert.modeling_bert import BertLayer

    config, last = model.config, model.bert.encoder.layer[-1]
    watched = (
        last._forward_hooks or last._forward_pre_hooks or last._backward_hooks or last._backward_pre_hooks
    )
    return (
        type(last) is BertLayer
        and not watched
        and not config.is_decoder
        and config._attn_implementation in _DENSE_ATTENTION
    )


@contextmanager
def _without_last_layer(encoder: Any) -> Iterator[Any]:
    """Yields the last layer, which the encoder goes without meanwhile."""
    layers = encoder.layer
    encoder.layer = layers[:-1]  # a new list of the same modules
    try:
        yield layers[-1]
    finally:
        encoder.layer = layers


def _layer_at(
    layer: Any,
    hidden: Tensor,  # [B, T, D]
    attention_mask: Tensor | None,  # [B, T]
    positions: Tensor,  # [M]
) -> Tensor:
    """What ``layer`` gives at ``positions`` [M, D]."""
    attention = layer.attention.self
    rows = hidden.flatten(0, 1)[positions]  # [M, D]
    sequence = positions // hidden.shape[1]  # [M]
    counts = sequence.bincount(minlength=hidden.shape[0])
    place = torch.arange(len(positions), device=positions.device) - (counts.cumsum(0) - counts)[sequence]

    def heads(projected: Tensor) -> Tensor:  # [B, ., D] -> [B, heads, ., D / heads]
        return projected.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    # Sequences have different numbers of queries: they are padded with zeros, whose results are left where they are.
    asked = attention.query(rows)
    queries = asked.new_zeros((hidden.shape[0], max(int(counts.max()), 1), asked.shape[-1]))  # [B, S, D]
    queries = queries.index_put((sequence, place), asked)
    context = F.scaled_dot_product_attention(
        heads(queries),
        heads(attention.key(hidden)),
        heads(attention.value(hidden)),
        attn_mask=None if attention_mask is None else attention_mask[:, None, None, :].bool(),
        dropout_p=attention.dropout.p if attention.training else 0.0,
        scale=attention.scaling,
    )
    context = context.transpose(1, 2).flatten(2)[sequence, place]  # [M, D]
    attended = layer.attention.output(context, rows)
    return layer.output(layer.intermediate(attended), attended)
