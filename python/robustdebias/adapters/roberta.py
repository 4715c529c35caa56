"""RoBERTa, and CamemBERT and XLM-RoBERTa, which are the same model with other names and vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from robustdebias.adapters.interface import DecoderInputs
from robustdebias.adapters.last_layer import encoded_at

__all__ = ["decoder_inputs"]


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> DecoderInputs:
    """See :data:`robustdebias.adapters.Adapter`."""
    encoded = encoded_at(model.roberta, model.roberta.encoder, inputs, positions)
    head = model.lm_head
    # The head's activation is not the configuration's.
    return head.layer_norm(F.gelu(head.dense(encoded))), head.decoder.weight, head.decoder.bias
