"""A tiny random model of each supported architecture, and tokenizers of the kinds they come with."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoConfig,
    AutoModelForMaskedLM,
    CamembertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from robustdebias.adapters import ADAPTERS

__all__ = ["ARCHITECTURES", "SIZES", "make_model", "make_tokenizer"]

ARCHITECTURES = sorted(ADAPTERS)

SIZES = {
    "vocab_size": 113, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

_OWN_SIZES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
    "electra": {"embedding_size": 16},
    # Layers of both kinds. Windows as wide as leave every padding token a real one in sight: Transformers' eager
    # attention gives NaN in float64 for those that have none.
    "modernbert": {
        "local_attention": 16, "global_attn_every_n_layers": 2,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2,
    },
}  # fmt: skip


def make_model(kind: str, attention: str = "sdpa", **changes: Any) -> Any:
    """In eval mode. Weights are random, biases and norms included: none of them can be left out unseen."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **_OWN_SIZES.get(kind, {}), **changes})
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


_TEXTS = [
    "the woman reads her letter in the city .", "he sells his bread near the river , after work",
    "the christian and the muslim visit the garden at home", "The Teacher keeps Their house ; they like it .",
] * 3  # fmt: skip
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_OF_ALBERT = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer(kind: str) -> Any:
    """Byte-level pairs for RoBERTa and ModernBERT, SentencePiece's unigrams for the others. (BERT's word pieces: the
    fixture `tiny_tokenizer`.)"""
    if kind == "roberta":
        return RobertaTokenizer(**_byte_pairs())
    if kind == "modernbert":
        tokenizer = Tokenizer(models.BPE(**_byte_pairs()))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>",
        )  # fmt: skip
    classes = {"albert": AlbertTokenizer, "camembert": CamembertTokenizer, "xlm-roberta": XLMRobertaTokenizer}
    return classes[kind](vocab=_unigrams(_OF_ALBERT if kind == "albert" else _SPECIAL))


def _byte_pairs() -> dict[str, Any]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    state = _trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    return {"vocab": state["vocab"], "merges": [tuple(pair) for pair in state["merges"]]}


def _unigrams(special: list[str]) -> list[tuple[str, float]]:
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    state = _trained(models.Unigram(), pre_tokenizers.Metaspace(), trainer)
    return [(piece, score) for piece, score in state["vocab"]]


def _trained(model: Any, pre_tokenizer: Any, trainer: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return json.loads(tokenizer.to_str())["model"]
