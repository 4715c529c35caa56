"""ALBERT. Its decoder is as wide as the embeddings, which are far narrower than the encoder.

Its layers share their weights, so there is no last one to take off: the encoder runs as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustdebias.adapters.interface import DecoderInputs

__all__ = ["decoder_inputs"]


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> DecoderInputs:
    """See :data:`robustdebias.adapters.Adapter`."""
    encoded = model.albert(**inputs).last_hidden_state.flatten(0, 1)[positions]
    head = model.predictions
    hidden = head.LayerNorm(head.activation(head.dense(encoded)))
    return hidden, head.decoder.weight, head.decoder.bias
