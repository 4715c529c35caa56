"""Groups that nobody named: passages that are alike to a model, called by the words that set them apart.

Letters: N passages, B of them in a batch, T tokens, D hidden, K clusters, W words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from robustdebias.evaluation.scoring import evaluating, progress_bar

__all__ = ["Clusters", "cluster", "embed", "top_words"]

_WORD = re.compile(r"[^\W\d_]{3,}")
_RESTARTS = 5  # k-means depends on its start: the best of these is taken
_NAMED_BY = 3  # words


@dataclass(frozen=True)
class Clusters:
    """Cluster k has the name `names[k]`; they are in the order of their sizes, the largest first."""

    names: list[str]  # "cluster:3 river-water-lake"
    centres: np.ndarray  # [K, D] float32

    def assign(self, embeddings: np.ndarray) -> list[str]:
        """The name of the cluster whose centre is nearest (Euclid), for each of `embeddings` [N, D]."""
        return [self.names[nearest] for nearest in _nearest(embeddings, self.centres)]


def embed(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64, progress: bool = True
) -> np.ndarray:
    """Sentence embeddings float32 [N, D]: the mean of the encoder's last hidden states over a text's tokens, with length 1.

    A text longer than the model can read is cut. The model stays on its device and in its training mode. Raises
    ValueError for a `batch_size` below 1, RuntimeError for embeddings that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    encoder = model.base_model
    longest = int(min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30)))
    order = sorted(
        range(len(texts)), key=lambda row: -len(texts[row])
    )  # little padding, the worst case first
    device = next(model.parameters()).device
    found = np.empty((len(texts), encoder.config.hidden_size), dtype=np.float32)
    with evaluating(model), progress_bar(len(texts), "embedding", "passage", progress) as bar:
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[row] for row in rows],
                padding=True, truncation=True, max_length=longest, return_tensors="pt",
            ).to(device)  # fmt: skip
            hidden = encoder(**batch).last_hidden_state.float()  # [B, T, D]
            mask = batch["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
            bar.update(len(rows))
    if not np.isfinite(found).all():
        raise RuntimeError("embedding: the model gives NaN or infinity")
    return found


def cluster(texts: Sequence[str], embeddings: np.ndarray, count: int, seed: int = 0) -> Clusters:
    """At most `count` clusters of the texts, by mini-batch k-means (Sculley 2010) over their embeddings [N, D].

    The same input and seed give the same clusters. There are fewer than `count` where texts repeat, as none is left
    empty. Raises ValueError if `count` is below 2 or above the number of texts.
    """
    if not 2 <= count <= len(texts):
        raise ValueError(
            f"count: expected 2 to {len(texts)} clusters, as many as there are passages, got {count}"
        )
    kmeans = MiniBatchKMeans(count, random_state=seed, n_init=_RESTARTS, batch_size=4096).fit(embeddings)
    centres = kmeans.cluster_centers_.astype(np.float32)
    sizes = np.bincount(_nearest(embeddings, centres), minlength=count)
    centres = centres[np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]]
    words = top_words(texts, _nearest(embeddings, centres), len(centres))
    digits = len(str(len(centres)))
    names = [f"cluster:{number:0{digits}} {'-'.join(found)}".strip() for number, found in enumerate(words, 1)]
    return Clusters(names, centres)


def top_words(
    texts: Sequence[str], labels: Sequence[int] | np.ndarray, clusters: int, count: int = _NAMED_BY
) -> list[list[str]]:
    """For each cluster the words that set it apart from the others, at most `count`, the strongest first.

    Strength is the z-score of a word's log-odds against all other clusters, with the whole corpus as the prior
    (Monroe, Colaresi and Quinn 2008, equations 16 to 22); a word counts once a text. Left out are stop words, words of
    a single text of the cluster, and those that more than half of the clusters use more than the others do.
    """
    counters = [Counter[str]() for _ in range(clusters)]
    for text, label in zip(texts, labels, strict=True):
        counters[label].update({word.lower() for word in _WORD.findall(text)} - ENGLISH_STOP_WORDS)
    words = sorted(set().union(*counters))
    counts = np.array([[counter[word] for word in words] for counter in counters], dtype=np.float64)  # [K, W]
    counts = counts.reshape(clusters, len(words))
    everywhere = counts.sum(0)
    strength = np.stack([_log_odds(own, everywhere - own, everywhere) for own in counts])
    strength[:, (strength > 0).sum(0) > clusters / 2] = -np.inf
    strength[counts < 2] = -np.inf
    return [
        [words[place] for place in np.argsort(-row, kind="stable")[:count] if row[place] > 0]
        for row in strength
    ]


def _log_odds(own: np.ndarray, rest: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """z-scores [W] of the difference of log-odds between counts [W] of two corpora."""
    if prior.sum() == 0:
        return np.zeros_like(prior)
    one, two = own + prior, rest + prior
    difference = np.log(one / (one.sum() - one + 1e-9)) - np.log(two / (two.sum() - two + 1e-9))
    return difference / np.sqrt(1 / one + 1 / two)


def _nearest(embeddings: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the nearest centre, int64 [N]."""
    # |e - c|^2 without |e|^2, which is the same for all centres.
    return ((centres**2).sum(1) - 2 * embeddings @ centres.T).argmin(1)
