"""The masked-language-model head that the demo ships, and how it is stored.

The demo's encoder comes without an MLM head. `scripts/train_demo_head.py` trained one, together with
the encoder's last layers; this module stores the outcome in one small safetensors file and puts it back:

* `cls.predictions.*` (the head without the tied decoder matrix): float16, as it is;
* every encoder parameter that training changed, as the difference to the published weights:
  matrices as int8 with one float32 scale per row (`<name>` and `<name>.scale`), vectors as float16.

The file carries a fingerprint of the published weights it was made from, so that it can't be added to
another encoder, nor twice to the same one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "robustdebias-mlm-head-1"
SCALE = ".scale"
HEAD_PREFIX = "cls.predictions."
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def quantise_rows(delta: Tensor) -> tuple[Tensor, Tensor]:
    """delta [R, C] float32 -> codes [R, C] int8, scale [R] float32.

    The largest magnitude of a row maps to 127, so `|delta - codes * scale| <= scale / 2` but for rounding.
    A row of zeros gets scale 0.
    """
    scale = delta.abs().amax(dim=1) / 127
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (delta / step[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def fingerprint(parameters: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """SHA-256 (hex) over the float32 bytes of the named parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(parameters[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def head_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The head's own parameters by name: transform, LayerNorm and the decoder's bias, each once."""
    return {name: p for name, p in model.named_parameters() if name.startswith(HEAD_PREFIX)}


def save_head(model: torch.nn.Module, base: Mapping[str, Tensor], path: str | os.PathLike[str]) -> int:
    """Write the head of `model` and its encoder's differences to `base`; returns the file's size in bytes.

    `base` maps the encoder parameters' names (`bert...`) to their published values. The file is
    replaced atomically. Raises ValueError if the embeddings were trained (they're too large to ship).
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {
        name: p.detach().to("cpu", torch.float16).contiguous() for name, p in head_parameters(model).items()
    }
    changed = [name for name in base if not torch.equal(parameters[name].detach().cpu(), base[name])]
    if EMBEDDINGS in changed:
        raise ValueError(f"{EMBEDDINGS} differs from the published weights; the format keeps it frozen")
    for name in changed:
        delta = parameters[name].detach().cpu().float() - base[name].float()
        if delta.dim() == 2:
            tensors[name], tensors[name + SCALE] = quantise_rows(delta)
        else:
            tensors[name] = delta.to(torch.float16)
    metadata = {
        "format": FORMAT,
        "vocab_size": str(parameters[EMBEDDINGS].shape[0]),
        "base_sha256": fingerprint(base, [EMBEDDINGS, *changed]),
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    temporary.write_bytes(save(tensors, metadata))
    os.replace(temporary, target)
    return target.stat().st_size


def apply_head(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Add the stored head and encoder differences to `model`, a `BertForMaskedLM` that holds the
    published encoder weights and whose decoder is tied to its word embeddings. Works in place.

    Raises FileNotFoundError (no such file) or ValueError: not a head file, another vocabulary, a
    parameter missing or of another shape, untied decoder, or encoder weights other than those the
    file was made from (also when it has been added already). On an error the model is unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no MLM head at {path}; scripts/train_demo_head.py makes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {metadata.get('format')!r}, this version reads {FORMAT!r}")
    values = {name: t for name, t in stored.items() if not name.endswith(SCALE)}
    parameters = dict(model.named_parameters())
    _check_fits(model, parameters, values, metadata)
    with torch.no_grad():
        for name, value in values.items():
            parameter = parameters[name]
            value = value.to(parameter.device, torch.float32)
            if name.startswith(HEAD_PREFIX):
                parameter.copy_(value)
            elif name + SCALE in stored:
                parameter.add_(value * stored[name + SCALE].to(parameter.device)[:, None])
            else:
                parameter.add_(value)


def _check_fits(
    model: torch.nn.Module,
    parameters: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    embeddings = parameters.get(EMBEDDINGS)
    if embeddings is None:
        raise ValueError(
            f"model is a {type(model).__name__} without {EMBEDDINGS}; a BertForMaskedLM is needed"
        )
    if str(embeddings.shape[0]) != metadata["vocab_size"]:
        raise ValueError(
            f"model has a vocabulary of {embeddings.shape[0]}, the head was made for {metadata['vocab_size']}"
        )
    decoder = model.get_output_embeddings()  # type: ignore[operator]
    if decoder.weight.data_ptr() != embeddings.data_ptr():
        raise ValueError("the model's decoder is not tied to its word embeddings")
    absent = sorted((set(values) - set(parameters)) | (set(head_parameters(model)) - set(values)))
    if absent:
        raise ValueError(
            f"model and head file don't hold the same parameters; unmatched: {', '.join(absent)}"
        )
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(parameters[name].shape)} in the model, {tuple(value.shape)} in the head file"
            )
    encoder = [EMBEDDINGS, *(name for name in values if not name.startswith(HEAD_PREFIX))]
    if fingerprint(parameters, encoder) != metadata["base_sha256"]:
        raise ValueError(
            "the model's encoder weights aren't those the head was trained on "
            "(another encoder, other numbers, or the head has been added already)"
        )
