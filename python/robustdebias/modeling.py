"""Loading a masked language model, and handing its labelled positions to the loss.

Letters: B sequences, T tokens, M labelled positions, V vocabulary, D hidden, G groups.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustdebias.adapters import ADAPTERS, adapter_of

__all__ = [
    "HeadInputs",
    "check_length",
    "fingerprint",
    "has_adapter",
    "load",
    "masked_lm_inputs",
    "pick_device",
    "position_limit",
    "quiet_transformers",
]

# Checkpoints often pad the vocabulary of the matrix to a multiple of up to 128.
_VOCABULARY_PADDING = 128


class HeadInputs(NamedTuple):
    """What the loss needs of one batch. Without a ``weight``, ``hidden`` holds the logits [M, V] themselves."""

    hidden: Tensor  # [M, D]
    weight: Tensor | None  # [V, D]
    labels: Tensor  # [M]
    groups: Tensor  # [M, G] bool
    texts: Tensor  # [M] int64: the sequence of the batch that a labelled position is in
    bias: Tensor | None = None  # [V]


def load(name_or_path: str | Path, head: str | Path | None = None) -> tuple[Any, Any]:
    """A masked language model and its tokenizer, on the CPU, in float32.

    Args:
        name_or_path: a local directory as ``save_pretrained`` writes it (nothing is looked up elsewhere then),
            or an id on the Hugging Face hub.
        head: a file with a trained MLM head for an encoder that has none; see :mod:`robustdebias.demo_head`.

    Raises:
        ValueError: no model there, weights of the encoder missing or of other shapes than the configuration
            says, or a tokenizer whose vocabulary is not the model's.

    Warns: UserWarning if the MLM head is missing and is therefore initialised at random.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    quiet_transformers()
    local = Path(name_or_path).is_dir()
    if not local and (Path(name_or_path).exists() or str(name_or_path).startswith((".", "/", "~"))):
        raise ValueError(f"model: {name_or_path} is not a directory with a saved model")
    source = str(name_or_path)
    # Weights are read as tensors only: safetensors, or torch's format with unpickling restricted.
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForMaskedLM.from_pretrained(
            source, weights_only=True, output_loading_info=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"model: cannot load {source}: {_first_line(error)}") from error
    _check_tokenizer(source, model, tokenizer)
    missing = {key for key in info["missing_keys"] if not key.endswith("position_ids")}
    of_encoder = sorted(key for key in missing if key.startswith(model.base_model_prefix + "."))
    if of_encoder:
        raise ValueError(
            f"model: {source} lacks {len(of_encoder)} weights of its encoder, for instance {of_encoder[0]}"
        )
    if head is not None:
        from robustdebias.demo_head import apply_head

        apply_head(model, Path(head))
    elif missing:
        warnings.warn(
            f"{source} holds an encoder without an MLM head: {len(missing)} weights of the head start at "
            "random, so its predictions mean nothing until it is trained",
            stacklevel=2,
        )
    return model, tokenizer


def masked_lm_inputs(model: Any, batch: Mapping[str, Tensor]) -> HeadInputs:
    """Run the encoder and gather the labelled positions BEFORE the head: with 15% masked tokens the head does
    a sixth of the work that ``model(**batch)`` does, for the same loss and gradients.

    Args:
        batch: input_ids, attention_mask, labels [B, T] int64 (-100: no label), groups bool [B, G] or
            [B, T, G]; token_type_ids where the model has them. Whoever makes the labels on the host can add
            positions int64 [M], where the flattened labels aren't -100, ascending: to find them here, the host
            has to wait for a GPU. They are believed; a label that they leave out does not count.

    Models without an adapter, or with a decoder that is more than a linear layer, compute all logits; a UserWarning
    says so once.

    Raises: ValueError for ``positions`` of another shape or dtype.
    """
    labels, groups = batch["labels"], batch["groups"]
    positions = batch.get("positions")  # [M] in the flattened batch
    if positions is None:
        positions = (labels.flatten() != -100).nonzero()[:, 0]
    elif positions.dim() != 1 or positions.dtype != torch.int64:
        raise ValueError(f"positions: expected int64 [M], got {positions.dtype} {list(positions.shape)}")
    encoder_inputs = {key: batch[key] for key in _ENCODER_INPUTS if key in batch}
    adapter = adapter_of(model)
    if adapter is None:
        _say_full_logits(model)
        logits = model(**encoder_inputs).logits  # [B, T, V]
        hidden, weight, bias = logits.flatten(0, 1)[positions], None, None
    else:
        hidden, weight, bias = adapter(model, encoder_inputs, positions)
    texts = positions // labels.shape[1]
    of_rows = groups.flatten(0, 1)[positions] if groups.dim() == 3 else groups[texts]
    return HeadInputs(hidden, weight, labels.flatten()[positions], of_rows, texts, bias)


def has_adapter(model: Any) -> bool:
    """Whether the model's decoder goes through the linear op; else its full logits go to the logits op."""
    return adapter_of(model) is not None


_ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def _say_full_logits(model: Any) -> None:
    if getattr(model, "_said_full_logits", False):
        return
    model._said_full_logits = True
    kind = model.config.model_type
    if kind in ADAPTERS:
        reason = f"the decoder of this {kind!r} model is not a linear layer as it was built"
    else:
        reason = f"no adapter for model type {kind!r} (there are adapters for {', '.join(sorted(ADAPTERS))})"
    warnings.warn(f"{reason}: its logits are computed at every position", stacklevel=3)


def fingerprint(model: Any) -> str:
    """Tells whether two models have the same weights, bit for bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def position_limit(model: Any) -> int | None:
    """The most tokens of a sequence, special ones included; None if the model's configuration names no limit.

    RoBERTa and its descendants count positions from the padding id + 1 on: of 514 there are 512 for tokens.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else positions - _first_position(model)


def check_length(model: Any, max_length: int) -> None:
    """Raises ValueError if the model has fewer positions than ``max_length``."""
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length: {max_length} tokens, but the model has {limit} positions")


def _first_position(model: Any) -> int:
    """The position of a sequence's first token: behind the padding's, where padding has a position of its own."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def pick_device(name: str) -> torch.device:
    """ "auto" (a GPU if torch can use one), or what torch calls a device. ValueError if it can't be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} can't be used here: {_first_line(error)}") from None
    return device


def quiet_transformers() -> None:
    """Silence loading reports, progress bars and advice: this module says itself what matters of them."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check_tokenizer(source: str, model: Any, tokenizer: Any) -> None:
    words, rows = len(tokenizer), model.config.vocab_size
    if words > rows or rows - words >= _VOCABULARY_PADDING:
        raise ValueError(
            f"model: {source} has {rows} rows in its vocabulary, but its tokenizer knows {words} pieces: "
            "they do not belong together, or the tokenizer's files are incomplete"
        )
    for name in ("mask_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"model: the tokenizer of {source} has no {name.removesuffix('_id')}")
    padding = _first_position(model) - 1
    if padding >= 0 and tokenizer.pad_token_id != padding:
        raise ValueError(
            f"model: {source} counts positions by leaving out the padding id {padding}, but its tokenizer pads "
            f"with {tokenizer.pad_token_id}"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Sentence encoders ship with both switched on: texts would be cut and padded behind our back.
        backend.no_padding()
        backend.no_truncation()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
