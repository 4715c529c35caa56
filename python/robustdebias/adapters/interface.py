"""What an adapter is. Letters: B sequences, T tokens, M labelled positions, V vocabulary, D hidden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Adapter", "DecoderInputs"]

DecoderInputs = tuple[Tensor, Tensor, "Tensor | None"]
"""What the decoder is applied to [M, D] (D: its own width, where the embeddings are narrower than the encoder), its
weight [V, D] and its bias [V] or None."""

Adapter = Callable[[Any, Mapping[str, Tensor], Tensor], DecoderInputs]
"""(model, the encoder's inputs: input_ids, maybe attention_mask and token_type_ids, all [B, T]; positions [M] of the
flattened batch, in any order, none twice) -> what its decoder needs at these positions."""
