"""Log-probabilities of tokens at masked positions. B sequences, T tokens, M positions, V vocabulary, D hidden."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from robustdebias.adapters import adapter_of
from robustdebias.modeling import position_limit

__all__ = [
    "Query", "check_length", "evaluating", "fingerprint", "leading_space", "log_probabilities", "logits_at",
    "lowercases", "mask_each", "progress_bar", "special_tokens_around", "tokenize",
]  # fmt: skip


class Query(NamedTuple):
    """How probable is token ``target`` at ``position`` of a sequence?"""

    input_ids: tuple[int, ...]  # special tokens included
    position: int
    target: int


def mask_each(ids: Sequence[int], positions: Iterable[int], mask_id: int) -> list[Query]:
    """For each position: how probable is the token there, given all the others of the sequence?"""
    return [Query((*ids[:at], mask_id, *ids[at + 1 :]), at, ids[at]) for at in positions]


def log_probabilities(
    model: nn.Module,
    tokenizer: Any,
    queries: Sequence[Query],
    *,
    batch_size: int = 128,
    progress: bool = True,
    label: str = "scoring",
) -> np.ndarray:
    """Natural log-probability of each query's target, float64 [len(queries)], from float32 log-softmax.

    A sequence that several queries share is run once. Sequences are batched by length, and only the positions
    asked for go through the head. The model's training mode is left as it was.

    Raises:
        ValueError: a sequence is longer than the model can read; ``batch_size`` below 1.
        RuntimeError: the model answers with NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    answers = np.empty(len(queries))
    by_sequence: dict[tuple[int, ...], list[int]] = {}
    for number, query in enumerate(queries):
        by_sequence.setdefault(query.input_ids, []).append(number)
    # The longest first: running out of memory, or a sequence too long, shows at once.
    sequences = sorted(by_sequence, key=len, reverse=True)
    check_length(model, len(sequences[0]) if sequences else 0)
    device = next(model.parameters()).device
    pad_id = tokenizer.pad_token_id or 0
    with evaluating(model), progress_bar(len(sequences), label, "sentence", progress) as bar:
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            asked = [number for sequence in batch for number in by_sequence[sequence]]
            answers[asked] = _score(model, batch, by_sequence, queries, pad_id, device)
            bar.update(len(batch))
    undefined = int(np.isnan(answers).sum())
    if undefined:
        raise RuntimeError(f"{label}: the model gives NaN for {undefined} of {len(answers)} tokens")
    return answers


def _score(
    model: nn.Module,
    batch: Sequence[tuple[int, ...]],
    by_sequence: Mapping[tuple[int, ...], Sequence[int]],
    queries: Sequence[Query],
    pad_id: int,
    device: torch.device,
) -> np.ndarray:
    """Log-probabilities of all queries of a batch, sequence by sequence."""
    width = max(map(len, batch))
    input_ids = np.full((len(batch), width), pad_id)
    attention = np.zeros((len(batch), width), dtype=np.int64)
    row_of: dict[int, int] = {}  # position in the flattened batch -> its row of logits
    rows, targets = [], []
    for line, sequence in enumerate(batch):
        input_ids[line, : len(sequence)] = sequence
        attention[line, : len(sequence)] = 1
        for number in by_sequence[sequence]:
            rows.append(row_of.setdefault(line * width + queries[number].position, len(row_of)))
            targets.append(queries[number].target)
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention)}
    positions = torch.tensor(list(row_of), device=device)
    logits = logits_at(model, {name: tensor.to(device) for name, tensor in inputs.items()}, positions)
    return logits.float().log_softmax(-1)[rows, targets].double().cpu().numpy()


def logits_at(model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """Logits [M, V] at ``positions`` [M] of the flattened [B T] batch.

    Models with an adapter run the head on these positions alone; others compute all logits first.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return model(**inputs).logits.flatten(0, 1)[positions]
    hidden, weight, bias = adapter(model, dict(inputs), positions)
    return hidden if weight is None else F.linear(hidden, weight, bias)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inference without dropout; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def progress_bar(total: int | None, label: str, unit: str, shown: bool) -> Any:
    # Where nobody watches, a line now and then is enough.
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total, desc=label, unit=unit, disable=not shown, leave=False,
        mininterval=interval, maxinterval=2 * interval,
    )  # fmt: skip


def tokenize(tokenizer: Any, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, whole: whatever padding or truncation the tokenizer was saved with plays no part."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, padding=False, truncation=False)
    return encoded["input_ids"]


def special_tokens_around(tokenizer: Any) -> tuple[int, int]:
    """How many special tokens the tokenizer puts before and behind a text."""
    (whole,), (bare,) = (tokenize(tokenizer, ["a"], special_tokens=special) for special in (True, False))
    around = len(whole) - len(bare)
    before = next(start for start in range(around + 1) if whole[start : start + len(bare)] == bare)
    return before, around - before


def leading_space(tokenizer: Any) -> str:
    """What a word within a sentence begins with: " " to a tokenizer that keeps leading spaces (RoBERTa's), to which
    a word without one is the middle of a longer word; else nothing."""
    return " " if tokenizer.tokenize(" a") != tokenizer.tokenize("a") else ""


def lowercases(tokenizer: Any) -> bool:
    """Whether the tokenizer ignores case, as those of uncased models do."""
    sample = "The Cat"
    return tokenizer.tokenize(sample) == tokenizer.tokenize(sample.lower())


def fingerprint(items: Iterable[Any]) -> str:
    """Equal for equal items in equal order."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        digest.update(item if isinstance(item, bytes) else repr(item).encode())
    return digest.hexdigest()


def check_length(model: nn.Module, longest: int) -> None:
    """Raises ValueError if the model reads fewer than ``longest`` tokens."""
    limit = position_limit(model) if hasattr(model, "config") else None
    if limit is not None and longest > limit:
        raise ValueError(f"a sentence has {longest} tokens, but the model reads at most {limit}")
