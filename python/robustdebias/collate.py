"""From texts with groups to masked batches that carry them. Letters: B sequences, T tokens, V vocabulary, G groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from robustdebias.corpus import OTHER, Example
from robustdebias.groups import GroupAnnotator, group_mask

__all__ = ["IGNORED", "Encoded", "MLMCollator", "encode"]

IGNORED = -100
"""The label of a token that is not to be predicted."""

_WRONG_VOCABULARY = 0.1  # share of unknown tokens from which on the tokenizer cannot be the text's


@dataclass(frozen=True)
class Encoded:
    """One tokenized example."""

    index: int  # its place in the corpus, which decides its masks
    input_ids: np.ndarray  # [T] int64
    words: np.ndarray  # [T] int64: the word a token belongs to, counted from 0; -1 for a special token
    groups: tuple[str, ...]
    mentions: (
        tuple[tuple[int, int, str], ...] | None
    )  # tokens first..last-1 name a group; None: nobody looked


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, annotator: GroupAnnotator | None = None
) -> list[Encoded]:
    """Tokenize the examples, each cut at `max_length` tokens, special ones included (`passages` avoids the loss).

    Args:
        tokenizer: a fast tokenizer of transformers; its own padding and truncation settings play no part.
        annotator: fills in the groups of examples that have none and finds the mentions that token-level groups need.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: an example without groups and no annotator; or a tenth or more of the text unknown to the
            tokenizer: its vocabulary was not read, or is another language's, and a loss on it means nothing.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer: expected a fast tokenizer, which knows offsets, got {type(tokenizer).__name__}"
        )
    if not examples:
        return []
    batch = tokenizer(
        [example.text for example in examples],
        padding=False,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    # A text may have "[MASK]" or "</s>" written in it, which then is no word to be predicted.
    special = np.setdiff1d(
        tokenizer.all_special_ids, [tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else []
    )
    encoded = [
        _encode_one(index, example, batch, special, annotator) for index, example in enumerate(examples)
    ]
    ids = np.concatenate([sequence.input_ids[sequence.words >= 0] for sequence in encoded])
    unknown = (
        float(np.mean(ids == tokenizer.unk_token_id))
        if len(ids) and tokenizer.unk_token_id is not None
        else 0.0
    )
    if unknown >= _WRONG_VOCABULARY:
        raise ValueError(
            f"tokenizer: {unknown:.0%} of the text's tokens are {tokenizer.unk_token}; its vocabulary of "
            f"{len(tokenizer)} tokens does not fit this text"
        )
    return encoded


def _encode_one(
    index: int, example: Example, batch: Any, special: np.ndarray, annotator: GroupAnnotator | None
) -> Encoded:
    words = np.array([-1 if word is None else word for word in batch.word_ids(index)], dtype=np.int64)
    words[np.isin(batch["input_ids"][index], special)] = -1
    mentions: list[tuple[int, int, str]] | None = None
    if annotator is not None:
        mentions = []
        offsets = np.array(batch["offset_mapping"][index], dtype=np.int64).reshape(-1, 2)
        for start, end, group in annotator.spans(example.text):
            touched = np.flatnonzero((words >= 0) & (offsets[:, 0] < end) & (offsets[:, 1] > start))
            if len(touched):  # else it was cut off
                mentions.append((int(touched[0]), int(touched[-1]) + 1, group))
    groups = example.groups
    if groups is None:
        if annotator is None:
            raise ValueError(f"examples: text {index} has no groups; label it first, or give an annotator")
        groups = annotator.annotate(example.text)
    return Encoded(
        index,
        np.array(batch["input_ids"][index], dtype=np.int64),
        words,
        groups,
        None if mentions is None else tuple(mentions),
    )


class MLMCollator:
    """Pads and masks a batch: `collator(batch, epoch)` -> tensors for a masked language model and its groups.

    Masking is BERT's (Devlin et al. 2019, section 3.1): each token is chosen with `mask_probability`; of the chosen,
    80% become the mask token, 10% a random ordinary token, 10% stay. Special tokens are never chosen. Where the draw
    chooses nothing, the token that came nearest is taken, so every sequence has a label (if it has any token).
    `whole_word` draws for words and chooses all tokens of one together.

    The masks are a function of `seed`, the epoch and the example's index alone: not of the batch, of other examples
    or of any generator's state. A resumed run therefore sees the batches of an uninterrupted one, and an evaluation
    that leaves the epoch at 0 always sees the same.

    Args:
        group_names: the columns of the group mask.
        group_level: "sequence" (the default) puts every label of a text into all groups that the text mentions: bias
            lies in what is said around a mention. "token" counts a token only in the groups whose mention it is part
            of, and every other token in "other"; far fewer labels then speak for a group.

    Raises ValueError for a tokenizer without mask or padding token, a probability outside (0, 1], names that repeat,
    and, when called, for a text whose groups are not all in `group_names` or, at token level, for one whose mentions
    were not looked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        group_names: Sequence[str],
        *,
        mask_probability: float = 0.15,
        whole_word: bool = False,
        group_level: Literal["sequence", "token"] = "sequence",
        seed: int = 0,
    ) -> None:
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: masked language modelling needs a mask token and a padding token")
        if not 0 < mask_probability <= 1:
            raise ValueError(f"mask_probability: expected a probability in (0, 1], got {mask_probability}")
        if group_level not in ("sequence", "token"):
            raise ValueError(f"group_level: expected 'sequence' or 'token', got {group_level!r}")
        if group_level == "token" and OTHER not in group_names:
            raise ValueError(
                f"group_names: token-level groups need {OTHER!r} for the tokens that name no group"
            )
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        group_mask([], group_names)  # refuses names that repeat
        self.group_names = list(group_names)
        self.mask_probability = mask_probability
        self.whole_word = whole_word
        self.group_level = group_level
        self.seed = seed
        self._mask_id = tokenizer.mask_token_id
        self._pad_id = tokenizer.pad_token_id
        self._padding_side = tokenizer.padding_side
        self._with_types = "token_type_ids" in tokenizer.model_input_names
        self._ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

    def __call__(self, batch: Sequence[Encoded], epoch: int = 0) -> dict[str, Tensor]:
        """Mask and pad to the longest sequence of the batch.

        Returns int64 `input_ids`, `attention_mask`, `labels` [B, T] (-100 where nothing is to be predicted), where
        the model takes them `token_type_ids` [B, T]; bool `groups`: [B, G], or [B, T, G] at token level; and int64
        `positions` [M], where the flattened labels are not -100, ascending: looked for here, a GPU need not wait.
        """
        shape = len(batch), max((len(sequence.input_ids) for sequence in batch), default=0)
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        attention = np.zeros(shape, dtype=np.int64)
        token_groups = (
            np.zeros((*shape, len(self.group_names)), dtype=bool) if self.group_level == "token" else None
        )
        for row, sequence in enumerate(batch):
            length = len(sequence.input_ids)
            at = slice(0, length) if self._padding_side == "right" else slice(shape[1] - length, shape[1])
            input_ids[row, at], labels[row, at] = self._mask(sequence, epoch)
            attention[row, at] = 1
            if token_groups is not None:
                token_groups[row, at] = self._token_groups(sequence)
        tensors = {"input_ids": input_ids, "attention_mask": attention, "labels": labels}
        if self._with_types:
            tensors["token_type_ids"] = np.zeros(shape, dtype=np.int64)
        result = {name: torch.from_numpy(array) for name, array in tensors.items()}
        result["positions"] = torch.from_numpy(np.flatnonzero(labels != IGNORED))
        if token_groups is None:
            result["groups"] = group_mask([sequence.groups for sequence in batch], self.group_names)
        else:
            result["groups"] = torch.from_numpy(token_groups)
        return result

    def _mask(self, sequence: Encoded, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids with masks, and labels, both [T]."""
        ids = sequence.input_ids
        ordinary = sequence.words >= 0
        labels = np.full_like(ids, IGNORED)
        if not ordinary.any():
            return ids, labels
        generator = np.random.default_rng((self.seed, epoch, sequence.index))
        choice, action, replacement = generator.random((3, len(ids)))
        if self.whole_word:
            choice = choice[np.maximum(sequence.words, 0)]
        choice = np.where(ordinary, choice, np.inf)
        chosen = choice < max(self.mask_probability, np.nextafter(choice.min(), np.inf))
        labels[chosen] = ids[chosen]
        random_ids = self._ordinary[(replacement * len(self._ordinary)).astype(np.int64)]
        masked = np.where(action < 0.8, self._mask_id, np.where(action < 0.9, random_ids, ids))
        return np.where(chosen, masked, ids), labels

    def _token_groups(self, sequence: Encoded) -> np.ndarray:
        """Groups of each token, bool [T, G]; special tokens are in none."""
        if sequence.mentions is None:
            raise ValueError("batch: token-level groups need texts that were encoded with an annotator")
        member = np.zeros((len(sequence.input_ids), len(self.group_names)), dtype=bool)
        for first, last, group in sequence.mentions:
            if group in self.group_names:  # else it was too small to stand alone
                member[first:last, self.group_names.index(group)] = True
        member[:, self.group_names.index(OTHER)] = (sequence.words >= 0) & ~member.any(axis=1)
        return member
