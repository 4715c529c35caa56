"""ModernBERT. What its sparse prediction does, the head at labelled positions alone, is done whether it is on or not.

A last layer at labelled positions alone would have to repeat rotations and windows: the encoder runs as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustdebias.adapters.interface import DecoderInputs

__all__ = ["decoder_inputs"]


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> DecoderInputs:
    """See :data:`robustdebias.adapters.Adapter`."""
    encoded = model.model(**inputs).last_hidden_state.flatten(0, 1)[positions]
    return model.head(encoded), model.decoder.weight, model.decoder.bias
