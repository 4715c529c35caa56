"""What an adapter is. Letters: T tokens of a batch, M labelled positions, V vocabulary, D hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Adapter"]

Adapter = Callable[[Any, dict[str, Tensor], Tensor], tuple[Tensor, "Tensor | None", "Tensor | None"]]
"""(model, the encoder's inputs, labelled positions [M] of the flattened batch) -> what the decoder is applied to [M, D],
the decoder's weight [V, D] and its bias [V] or None. Without a weight, the first are the logits [M, V] themselves."""
