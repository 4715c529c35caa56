"""A BERT small enough to train in seconds, and a word-piece tokenizer that goes with it."""

from __future__ import annotations

import json
import os
import random
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when huggingface_hub is first imported, just below. (An option of pytest would be known too late.)
os.environ.setdefault("HF_HUB_OFFLINE", "0" if "--online" in sys.argv else "1")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SUBJECTS = {
    "she": "her", "he": "his", "the woman": "her", "the man": "his", "the muslim": "their",
    "the christian": "their", "the teacher": "their", "the visitor": "their",
}  # fmt: skip
VERBS = ["likes", "reads", "opens", "finds", "sells", "keeps"]
THINGS = ["book", "house", "garden", "letter", "bread", "lamp"]
PLACES = ["in the morning", "at home", "near the river", "in the city", "after work"]


def _sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    sentences = []
    for _ in range(count):
        subject = draw.choice(list(SUBJECTS))
        sentences.append(
            f"{subject.capitalize()} {draw.choice(VERBS)} {SUBJECTS[subject]} {draw.choice(THINGS)} "
            f"{draw.choice(PLACES)}."
        )
    return sentences


def _vocabulary() -> list[str]:
    words = set(" ".join([*SUBJECTS, *SUBJECTS.values(), *VERBS, *THINGS, *PLACES]).split())
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    return [*SPECIAL, *letters, *(f"##{c}" for c in string.ascii_lowercase + string.digits), *sorted(words)]


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(_vocabulary()))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def _model(vocabulary: int, **overrides: object) -> BertForMaskedLM:
    settings = {
        "vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**{**settings, **overrides}))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer()


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., BertForMaskedLM]:
    """``make_tiny_model(vocabulary, **config)``: the same random weights every time."""
    return _model


@pytest.fixture
def tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    return _model(len(tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model and tokenizer as ``save_pretrained`` writes them. Read it, don't write into it."""
    directory = tmp_path_factory.mktemp("tiny-bert")
    _model(len(tiny_tokenizer)).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 short sentences, one a line, some of them with demographic words."""
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    path.write_text("\n".join(_sentences(240)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def stereoset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four invented items in StereoSet's flattened form, of words that the tiny tokenizer knows."""
    items = [
        ("gender", "woman", "The woman reads her BLANK.", "letter", "book", "river"),
        ("gender", "man", "The man keeps his BLANK.", "house", "garden", "morning"),
        ("religion", "muslim", "The muslim opens their BLANK.", "book", "letter", "bread"),
        ("religion", "christian", "The christian finds their BLANK.", "house", "lamp", "work"),
    ]
    path = tmp_path_factory.mktemp("stereoset") / "dev.jsonl"
    with path.open("w") as file:
        for domain, term, context, *words in items:
            row = {"type": "intrasentence", "target": term, "bias_type": domain, "context": context}
            labels = ("stereotype", "anti-stereotype", "unrelated")
            row.update(zip(labels, (context.replace("BLANK", word) for word in words), strict=True))
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on such matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
