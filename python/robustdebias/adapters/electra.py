"""ELECTRA's generator. Its decoder is as wide as the embeddings, which are narrower than the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustdebias.adapters.interface import DecoderInputs
from robustdebias.adapters.last_layer import encoded_at

__all__ = ["decoder_inputs"]


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> DecoderInputs:
    """See :data:`robustdebias.adapters.Adapter`."""
    encoded = encoded_at(model.electra, model.electra.encoder, inputs, positions)
    decoder = model.generator_lm_head
    return model.generator_predictions(encoded), decoder.weight, decoder.bias
