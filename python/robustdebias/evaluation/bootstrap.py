"""How sure is a score? The same evaluation on items drawn anew, with replacement (the bootstrap; Efron 1979).

Texts are drawn from the held-out texts, StereoSet's items within their target term, CrowS-Pairs' pairs within their
bias type. The draws come from a fixed seed and depend on the number of items alone, so two models that were
evaluated on the same items get the same draws: the difference of their draws is a paired comparison.

R draws, N texts, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robustdebias.evaluation.stereoset import Term

__all__ = ["DRAWS", "FEWEST", "LEVEL", "draws", "interval", "values"]

DRAWS = 2000
FEWEST = 10
"""Of fewer items than this no draws are made: drawing the same few again and again looks surer than it is."""
LEVEL = 0.95
SEED = 0
_STEREOSET = ("ss", "lms", "icat")


def values(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Every score of an evaluation by a dotted name, those that are defined.

    ``mlm.overall``, ``mlm.worst``, ``mlm.gap`` (worst minus best), ``mlm.group.NAME``: losses in nats;
    ``stereoset.overall.ss`` (``lms``, ``icat``), ``stereoset.DOMAIN.ss``; ``crows_pairs.overall``, ``crows_pairs.TYPE``.
    """
    found: dict[str, float | None] = {}
    if mlm := evaluation.get("mlm"):
        losses = {name: stats["loss"] for name, stats in mlm["by_group"].items()}
        found["mlm.overall"] = mlm["overall"]["loss"]
        found["mlm.worst"] = losses.get(mlm["worst_group"])
        found["mlm.gap"] = mlm["gap"]["worst_minus_best"]
        found |= {f"mlm.group.{name}": loss for name, loss in losses.items()}
    if stereoset := evaluation.get("stereoset"):
        domains = {"overall": stereoset["overall"], **stereoset["by_domain"]}
        for score in _STEREOSET:
            found |= {f"stereoset.{domain}.{score}": scores[score] for domain, scores in domains.items()}
    if crows_pairs := evaluation.get("crows_pairs"):
        for kind, scores in {"overall": crows_pairs["overall"], **crows_pairs["by_type"]}.items():
            found[f"crows_pairs.{kind}"] = scores["score"]
    return {name: value for name, value in found.items() if value is not None}


def draws(evaluation: Mapping[str, Any], count: int = DRAWS) -> dict[str, np.ndarray]:
    """``count`` draws [R] of each score that :func:`values` names, where its items' outcomes are at hand.

    Left out: scores of fewer than FEWEST items; the worst group's loss if that group has fewer texts; the gap if
    the worst or the best group has.
    """
    result: dict[str, np.ndarray] = {}
    mlm, stereoset, crows_pairs = (evaluation.get(part) or {} for part in ("mlm", "stereoset", "crows_pairs"))
    if "per_text" in mlm:
        result |= _mlm(mlm, _Weights(count))
    if "per_term" in stereoset:
        result |= _stereoset([Term(**term) for term in stereoset["per_term"]], _Weights(count))
    if "outcomes" in crows_pairs:
        result |= _crows_pairs(crows_pairs["outcomes"], _Weights(count))
    return result


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of the draws. A draw that is not defined (no text of a group was drawn) is left out."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(samples, [tail, 100 - tail])
    return float(low), float(high)


class _Weights:
    """How often each item is drawn."""

    BLOCK = 4_000_000  # weights held at a time

    def __init__(self, count: int):
        self._count = count
        self._generator = np.random.default_rng(SEED)

    def apply(self, outcomes: np.ndarray) -> np.ndarray:
        """Sums of ``outcomes`` [items, K] over the items of each draw: [R, K]."""
        items = len(outcomes)
        sums, chance = [], np.full(items, 1 / items)
        rows = max(1, self.BLOCK // items)
        for first in range(0, self._count, rows):
            drawn = self._generator.multinomial(items, chance, size=min(rows, self._count - first))
            sums.append(drawn.astype(float) @ outcomes)
        return np.concatenate(sums)


def _mlm(mlm: Mapping[str, Any], weights: _Weights) -> dict[str, np.ndarray]:
    names = list(mlm["by_group"])
    overall = np.array(mlm["per_text"]["overall"], dtype=float).reshape(-1, 2)
    # Of each text: loss sum and token count, by group and, last, of all its tokens; both [N, G + 1].
    sums, counts = np.zeros((2, len(overall), len(names) + 1))
    sums[:, -1], counts[:, -1] = overall.T
    for text, group, total, tokens in mlm["per_text"]["by_group"]:
        sums[text, group], counts[text, group] = total, tokens
    texts = (counts > 0).sum(0)  # [G + 1]
    present = np.flatnonzero(texts[:-1])
    if not len(present):
        return {}
    means = sums.sum(0) / np.maximum(counts.sum(0), 1)
    worst, best = (int(pick(present, key=means.__getitem__)) for pick in (max, min))
    sums, counts = np.split(weights.apply(np.concatenate([sums, counts], axis=1)), 2, axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0: no token of the group was drawn
        losses = sums / counts  # [R, G + 1]
    # fmax and fmin pass over what is not defined.
    highest, lowest = (extreme.reduce(losses[:, present], axis=1) for extreme in (np.fmax, np.fmin))
    found = {
        "mlm.overall": (texts[-1], losses[:, -1]),
        "mlm.worst": (texts[worst], highest),
        "mlm.gap": (min(texts[worst], texts[best]), highest - lowest),
        **{f"mlm.group.{name}": (texts[group], losses[:, group]) for group, name in enumerate(names)},
    }
    return {name: sample for name, (items, sample) in found.items() if items >= FEWEST}


def _stereoset(terms: Sequence[Term], weights: _Weights) -> dict[str, np.ndarray]:
    """As ``score_terms``, for all draws at once."""
    drawn = [weights.apply(np.array([term.pro, term.related, np.ones(len(term.pro))]).T) for term in terms]
    result: dict[str, np.ndarray] = {}
    for domain in ["overall", *sorted({term.domain for term in terms})]:
        sums: dict[str, np.ndarray] = {}  # term -> pro, related, items [R, 3]
        for term, own in zip(terms, drawn, strict=True):
            if domain in ("overall", term.domain):
                sums[term.term] = sums.get(term.term, 0) + own
        ss, lms = np.mean([[100 * s[:, 0] / s[:, 2], 50 * s[:, 1] / s[:, 2]] for s in sums.values()], 0)
        if sum(s[0, 2] for s in sums.values()) >= FEWEST:
            columns = ss, lms, lms * np.minimum(ss, 100 - ss) / 50
            result |= {f"stereoset.{domain}.{name}": c for name, c in zip(_STEREOSET, columns, strict=True)}
    return result


def _crows_pairs(outcomes: Mapping[str, Sequence[int]], weights: _Weights) -> dict[str, np.ndarray]:
    wins = {kind: weights.apply(np.array(won)[:, None])[:, 0] for kind, won in sorted(outcomes.items())}
    pairs = {
        "overall": sum(map(len, outcomes.values())),
        **{kind: len(won) for kind, won in outcomes.items()},
    }
    wins = {"overall": np.sum(list(wins.values()), 0), **wins}
    return {
        f"crows_pairs.{kind}": 100 * won / pairs[kind] for kind, won in wins.items() if pairs[kind] >= FEWEST
    }
