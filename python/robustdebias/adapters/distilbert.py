"""DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustdebias.adapters.interface import DecoderInputs
from robustdebias.adapters.last_layer import encoded_at

__all__ = ["decoder_inputs"]


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> DecoderInputs:
    """See :data:`robustdebias.adapters.Adapter`."""
    encoded = encoded_at(model.distilbert, model.distilbert.transformer, inputs, positions)
    hidden = model.vocab_layer_norm(model.activation(model.vocab_transform(encoded)))
    return hidden, model.vocab_projector.weight, model.vocab_projector.bias
