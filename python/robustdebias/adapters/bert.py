"""BERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustdebias.adapters.interface import DecoderInputs
from robustdebias.adapters.last_layer import encoded_at

__all__ = ["decoder_inputs"]


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> DecoderInputs:
    """See :data:`robustdebias.adapters.Adapter`."""
    encoded = encoded_at(model.bert, model.bert.encoder, inputs, positions)
    head = model.cls.predictions
    return head.transform(encoded), head.decoder.weight, head.decoder.bias
