"""SEAT, the sentence encoder association test (May et al. 2019), in the form of Meade et al. (2022).

Do sentences about one group lie nearer to one kind of attribute than those about another group? A test has two sets
of target sentences, X and Y (male and female names, say), and two of attribute sentences, A and B (career and
family). The association of a sentence w is s(w) = mean cos(w, A) - mean cos(w, B), and the effect size

    d = (mean of s over X - mean of s over Y) / standard deviation of s over X and Y together (n - 1).

The choices that the numbers depend on:

* ``pooling="mean"``: a sentence's embedding is the mean of the encoder's last layer over all its tokens, special
  tokens included (Meade et al.'s code takes this mean of one unpadded sentence at a time; here an attention mask
  keeps padding out). ``pooling="cls"``: the first token of that layer, as May et al. take it for BERT.
* The p-value is one-sided: the share of the partitions of X and Y together, into sets of their sizes, whose
  difference of means is at least the observed one. All partitions if there are at most PARTITIONS, the observed one
  among them; otherwise PARTITIONS random ones and p = (count + 1) / (PARTITIONS + 1). Ties count.
* ``overall`` is the mean |d| of the 17 tests of Meade et al. that are there, and so it is by group (GROUPS). Other
  tests in the folder are measured and stand by themselves.

N sentences, D hidden, R draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from robustdebias.evaluation import scoring
from robustdebias.evaluation.bootstrap import Resampler
from robustdebias.evaluation.metric import Metric

__all__ = [
    "DEFINITION", "GROUPS", "PARTITIONS", "POOLINGS", "SentenceTest", "associations", "draws", "effect_size", "evaluate", "metric",
    "permutation_p", "read_tests", "scores",
]  # fmt: skip

PARTITIONS = 100_000
POOLINGS = ("mean", "cls")
GROUPS = {
    "gender": ("weat6", "weat6b", "weat7", "weat7b", "weat8", "weat8b"),
    "race": (
        "weat3", "weat3b", "weat4", "weat5", "weat5b",
        "angry_black_woman_stereotype", "angry_black_woman_stereotype_b",
    ),
    "religion": ("religion1", "religion1b", "religion2", "religion2b"),
}  # fmt: skip
"""The tests of Meade et al. (2022), by what their targets (or attributes) differ in."""
DEFINITION = (
    "SEAT (May et al. 2019; Meade et al. 2022): effect size d of the association of two sets of target sentences with "
    "two sets of attribute sentences, by cosine of L2-normalised embeddings (mean of the last layer over all tokens, or "
    "its first token); overall and by group the mean |d| over tests; one-sided permutation p-values, exact up to "
    f"{PARTITIONS:,} partitions, else from as many random ones"
)
_SETS = ("targ1", "targ2", "attr1", "attr2")
_BLOCK = 2_000_000  # random numbers held at a time


@dataclass(frozen=True)
class SentenceTest:
    """The sentences of a test."""

    name: str  # the file's, without "sent-"
    x: tuple[str, ...]  # the file's targ1
    y: tuple[str, ...]  # targ2
    a: tuple[str, ...]  # attr1
    b: tuple[str, ...]  # attr2

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        return self.x, self.y, self.a, self.b


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    batch_size: int = 128,
    pooling: str = "mean",
    progress: bool = True,
) -> dict[str, Any]:
    """Effect sizes of a model's sentence embeddings; 0 is ideal.

    Args:
        model: a transformers model; of one with a head, the encoder is measured. Its training mode is left as it was.
        path: a folder of ``sent-NAME.jsonl`` files as May et al. publish them, a test each.
        pooling: "mean" or "cls", see above.

    Returns: ``overall`` and ``by_group[group]``, the mean |d| (None without tests); ``tests[name]`` with
    ``effect_size`` (None if all associations are the same), ``p``, ``group`` (None: not in the means) and ``counts``,
    the sentences in X, Y, A, B; ``associations[name]``: s of each sentence of ``x`` and of ``y``; ``pooling``;
    ``definition``; ``items``, the fingerprint of sentences and pooling.

    Raises:
        ValueError: an unknown pooling, a file that is not a test (naming file and key), a sentence that is too long.
        RuntimeError: the model gives an embedding that is not finite, or is zero.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    tests = read_tests(path)
    sentences = list(dict.fromkeys(sentence for test in tests for chosen in test.sets for sentence in chosen))
    embeddings = _embed(model, tokenizer, sentences, pooling, batch_size, progress)
    row = {sentence: number for number, sentence in enumerate(sentences)}
    found: dict[str, dict[str, Any]] = {}
    kept: dict[str, dict[str, list[float]]] = {}
    for test in tests:
        x, y, a, b = (embeddings[[row[sentence] for sentence in chosen]] for chosen in test.sets)
        d = effect_size(x, y, a, b)
        found[test.name] = {
            "effect_size": None if math.isnan(d) else d,
            "p": permutation_p(x, y, a, b),
            "group": next((group for group, names in GROUPS.items() if test.name in names), None),
            "counts": [len(chosen) for chosen in test.sets],
        }
        kept[test.name] = {"x": associations(x, a, b).tolist(), "y": associations(y, a, b).tolist()}
    means = {
        name: float(np.mean([abs(found[test]["effect_size"]) for test in own])) if own else None
        for name, own in _averaged(found).items()
    }
    return {
        "overall": means.pop("overall"),
        "by_group": means,
        "tests": found,
        "associations": kept,
        "pooling": pooling,
        "definition": DEFINITION,
        "items": scoring.fingerprint([pooling, *map(astuple, tests)]),
    }


def scores(result: Mapping[str, Any]) -> dict[str, float | None]:
    """``overall``, ``gender``, ``race``, ``religion``: mean |d|; ``test.NAME``: d of a test, with its sign."""
    tests = {f"test.{name}": test["effect_size"] for name, test in result["tests"].items()}
    return {"overall": result["overall"], **result["by_group"], **tests}


def draws(result: Mapping[str, Any], weights: Resampler) -> dict[str, np.ndarray]:
    """Draws [R] of the scores, from target sentences drawn anew, X and Y each by itself.

    None for a test whose X or Y has too few sentences, nor for a mean with such a test. As |d| has no sign, what the
    drawing adds doesn't cancel: near 0 the draws of a mean lie somewhat above it.
    """
    drawn: dict[str, np.ndarray] = {}
    for name, own in result.get("associations", {}).items():
        x, y = (np.array(own[key]) for key in ("x", "y"))
        if weights.enough(min(len(x), len(y))) and result["tests"][name]["effect_size"] is not None:
            drawn[name] = _drawn_effect_sizes(x, y, weights)
    means = {
        name: np.mean([np.abs(drawn[test]) for test in own], axis=0)
        for name, own in _averaged(result["tests"]).items()
        if own and all(test in drawn for test in own)
    }
    return {**means, **{f"test.{name}": sample for name, sample in drawn.items()}}


def metric(name: str) -> Metric:
    """How the score ``name`` of :func:`scores` is called and read."""
    part, _, test = name.partition(".")
    if part == "test":
        return Metric(name, f"SEAT d, {test}", "0", unit="", digits=3)
    overall = part == "overall"
    label = "SEAT mean |d|" + ("" if overall else f", {part}")
    return Metric(name, label, "0", unit="", digits=3, headline=overall)


def associations(words: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """s(w) = mean cos(w, A) - mean cos(w, B) of each row of ``words`` [N, D]; ``a``, ``b``: [., D]. Float64 [N]."""
    words, a, b = (_normalised(vectors) for vectors in (words, a, b))
    return words @ (a.mean(0) - b.mean(0))


def effect_size(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """d of embeddings [., D] of any length, as above. NaN if all associations are the same, up to rounding."""
    s = associations(np.concatenate([x, y]), a, b)
    deviation = s.std(ddof=1)
    if deviation <= _rounding(s):
        return math.nan
    return float((s[: len(x)].mean() - s[len(x) :].mean()) / deviation)


def permutation_p(
    x: np.ndarray,
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    partitions: int = PARTITIONS,
    seed: int = 0,
) -> float:
    """The one-sided p-value of embeddings [., D], as above: exact if there are at most ``partitions`` partitions."""
    s = associations(np.concatenate([x, y]), a, b)
    size = len(x)
    # With the sizes given, a larger difference of means is a larger sum over the first set.
    least = s[:size].sum() - _rounding(s)
    total = math.comb(len(s), size)
    if total <= partitions:
        chosen = np.fromiter(chain.from_iterable(combinations(s, size)), float, total * size)
        return int((chosen.reshape(total, size).sum(1) >= least).sum()) / total
    generator = np.random.default_rng(seed)
    count, rows = 0, max(1, _BLOCK // len(s))
    for first in range(0, partitions, rows):
        # Places of the smallest of uniform numbers are a random subset.
        keys = generator.random((min(rows, partitions - first), len(s)))
        places = np.argpartition(keys, size - 1, axis=1)[:, :size]
        count += int((s[places].sum(1) >= least).sum())
    return (count + 1) / (partitions + 1)


def read_tests(path: str | Path) -> list[SentenceTest]:
    """The tests in a folder, in the order of their names. Raises ValueError naming the file and key that is wrong."""
    path = Path(path)
    files = sorted(path.glob("sent-*.jsonl"))
    if not files:
        raise ValueError(f"{path}: no folder with SEAT's files sent-*.jsonl")
    return [_read_test(file) for file in files]


def _read_test(file: Path) -> SentenceTest:
    try:
        # One object, over many lines, whatever the file is called.
        test = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not one JSON object ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error})") from error
    sets = []
    for key in _SETS:
        examples = test.get(key) if isinstance(test, dict) else None
        examples = examples.get("examples") if isinstance(examples, dict) else None
        if not isinstance(examples, list) or not examples:
            raise ValueError(f"{file}: {key}.examples must be a list of sentences")
        wrong = [example for example in examples if not isinstance(example, str) or not example.strip()]
        if wrong:
            raise ValueError(f"{file}: {key}.examples must hold texts, got {wrong[0]!r}")
        sets.append(tuple(examples))
    return SentenceTest(file.stem.removeprefix("sent-"), *sets)


def _embed(
    model: Any, tokenizer: Any, sentences: Sequence[str], pooling: str, batch_size: int, progress: bool
) -> np.ndarray:
    """Embeddings of the sentences, float32 [N, D]."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encoder = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    tokens = [torch.tensor(ids) for ids in scoring.tokenize(tokenizer, sentences)]
    # The longest first: running out of memory, or a sentence too long, shows at once.
    order = sorted(range(len(tokens)), key=lambda number: -len(tokens[number]))
    scoring.check_length(model, len(tokens[order[0]]))
    embeddings: list[Any] = [None] * len(tokens)
    with (
        scoring.evaluating(model),
        scoring.progress_bar(len(order), "SEAT", "sentence", progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids = pad_sequence([tokens[number] for number in batch], True, tokenizer.pad_token_id or 0)
            lengths = torch.tensor([len(tokens[number]) for number in batch])
            mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(device)
            hidden = encoder(input_ids=input_ids.to(device), attention_mask=mask.long()).last_hidden_state
            if pooling == "cls":
                pooled = hidden[:, 0].float()
            else:
                pooled = torch.where(mask[..., None], hidden.float(), 0).sum(1) / mask.sum(1, keepdim=True)
            for number, embedding in zip(batch, pooled.cpu().numpy(), strict=True):
                embeddings[number] = embedding
            bar.update(len(batch))
    stacked = np.stack(embeddings)
    norms = np.linalg.norm(stacked, axis=1)
    bad = np.flatnonzero(~((norms > 0) & np.isfinite(norms)))
    if len(bad):
        raise RuntimeError(
            f"SEAT: the embedding of {sentences[bad[0]]!r} is zero or not finite ({len(bad)} of {len(stacked)})"
        )
    return stacked


def _averaged(tests: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The tests with an effect size that each mean |d| is over."""
    groups = {
        group: [name for name in names if name in tests and tests[name]["effect_size"] is not None]
        for group, names in GROUPS.items()
    }
    return {"overall": [*chain.from_iterable(groups.values())], **groups}


def _drawn_effect_sizes(x: np.ndarray, y: np.ndarray, weights: Resampler) -> np.ndarray:
    """d of each draw [R] of associations ``x`` and ``y``, from sums and sums of squares."""
    centre = np.concatenate([x, y]).mean()  # so that the difference of squares below loses nothing
    x, y = x - centre, y - centre
    of_x, of_y = (weights.apply(np.stack([s, s * s], axis=1)) for s in (x, y))
    total, squares = (of_x + of_y).T
    count = len(x) + len(y)
    variance = (squares - total**2 / count) / (count - 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # every sentence drawn may have the same association
        return (of_x[:, 0] / len(x) - of_y[:, 0] / len(y)) / np.sqrt(variance)


def _rounding(s: np.ndarray) -> float:
    """How far two sums of the same numbers may be apart, added in different orders: N eps sum |s|."""
    return float(len(s) * np.finfo(float).eps * np.abs(s).sum())


def _normalised(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
