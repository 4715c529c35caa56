"""One file an architecture: how the labelled positions of its masked language model reach the loss."""

from typing import Any

from torch import nn

from robustdebias.adapters import albert, bert, distilbert, electra, modernbert, roberta
from robustdebias.adapters.interface import Adapter, DecoderInputs
from robustdebias.adapters.last_layer import has_hooks

__all__ = ["ADAPTERS", "Adapter", "DecoderInputs", "adapter_of"]

ADAPTERS: dict[str, Adapter] = {
    "albert": albert.decoder_inputs,
    "bert": bert.decoder_inputs,
    "camembert": roberta.decoder_inputs,
    "distilbert": distilbert.decoder_inputs,
    "electra": electra.decoder_inputs,
    "modernbert": modernbert.decoder_inputs,
    "roberta": roberta.decoder_inputs,
    "xlm-roberta": roberta.decoder_inputs,
}
"""By `config.model_type`."""


def adapter_of(model: Any) -> Adapter | None:
    """The model's adapter. None for another architecture, and for a decoder that is more than its weight and bias,
    which an adapter hands out: one wrapped by LoRA, quantised, or with hooks.
    """
    adapter = ADAPTERS.get(getattr(getattr(model, "config", None), "model_type", ""))
    if adapter is None:
        return None
    decoder = model.get_output_embeddings()
    return adapter if type(decoder) is nn.Linear and not has_hooks(decoder) else None
