"""One file an architecture: how the labelled positions of its masked language model reach the loss."""

from robustdebias.adapters import bert
from robustdebias.adapters.interface import Adapter

__all__ = ["ADAPTERS", "Adapter"]

ADAPTERS: dict[str, Adapter] = {"bert": bert.decoder_inputs}
"""By `config.model_type`."""
