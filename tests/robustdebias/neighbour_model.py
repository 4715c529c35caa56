"""A masked language model whose probabilities can be written down: a token depends on its left neighbour alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NeighbourModel"]


class NeighbourModel(nn.Module):
    """``probabilities[left][token]``; what is left to 1 is shared by all tokens that aren't named.

    In ``seen`` it keeps every sequence it was given, without padding.
    """

    def __init__(self, tokenizer: Any, probabilities: dict[str, dict[str, float]]):
        super().__init__()
        ids = tokenizer.convert_tokens_to_ids
        size = len(tokenizer)
        table = torch.full((size, size), -math.log(size), dtype=torch.float64)
        for left, row in probabilities.items():
            rest = (1 - sum(row.values())) / (size - len(row))
            table[ids(left)] = math.log(rest)
            for token, probability in row.items():
                assert ids(token) != tokenizer.unk_token_id, token
                table[ids(left), ids(token)] = math.log(probability)
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            self.seen.append(tuple(row[: sum(mask)]))
        left = input_ids.roll(1, dims=1)
        return SimpleNamespace(logits=self.dropout(self.table[left]))
