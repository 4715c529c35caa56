"""Another dropout while training: a baseline against bias (Webster et al. 2020, arXiv 2010.06032, section 5.2)."""

from __future__ import annotations

import copy
from typing import Any

import torch

__all__ = ["with_dropout"]

# What architectures call them in their configuration: after embeddings and in the residual stream; of the weights of
# attention.
_HIDDEN = ("hidden_dropout_prob", "hidden_dropout", "dropout", "embedding_dropout", "mlp_dropout")
_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout")


def with_dropout(model: Any, dropout: float | None, attention_dropout: float | None) -> Any:
    """The same model with other dropout: a second object over the very same parameters and buffers.

    The architecture's own code is built anew from a changed configuration, because a layer may read its probability
    into a number, or leave a dropout of 0 out altogether. Training the one trains the other. ``model`` itself keeps
    its configuration, so what it saves says nothing of this dropout: a run's ``config.json`` does.

    Args:
        dropout, attention_dropout: probabilities in [0, 1); None leaves the model's own. With both None, ``model``
            itself is returned.

    Raises ValueError if the configuration knows no such dropout.
    """
    if dropout is None and attention_dropout is None:
        return model
    config = copy.deepcopy(model.config)
    for argument, value, known in (
        ("dropout", dropout, _HIDDEN),
        ("attention_dropout", attention_dropout, _ATTENTION),
    ):
        present = [name for name in known if hasattr(config, name)]
        if value is not None and not present:
            raise ValueError(
                f"{argument}: a model of type {config.model_type!r} has none; its configuration lacks {', '.join(known)}"
            )
        for name in present if value is not None else ():
            setattr(config, name, value)
    with torch.device("meta"):  # its own weights are not wanted
        twin = type(model)(config)
    parts = dict(model.named_modules())
    twin_parts = dict(twin.named_modules())
    if added := sorted(parts.keys() ^ twin_parts.keys()):
        raise ValueError(
            f"dropout: the model is not as {type(model).__name__} builds it, for instance in {added[0]}"
        )
    for name, part in twin_parts.items():
        part._parameters.update(parts[name]._parameters)
        part._buffers.update(parts[name]._buffers)
        for key, value in vars(parts[name]).items():
            if "checkpointing" in key:  # how it saves memory is no part of the configuration
                setattr(part, key, value)
    return twin
