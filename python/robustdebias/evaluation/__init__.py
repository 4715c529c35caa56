"""What a model knows and what it prefers. One module for each metric, all of one shape (:class:`.metric.Part`).

Every ``evaluate`` returns a dictionary that JSON can hold. Besides the scores it carries the outcome of every item
(for confidence intervals) and a fingerprint of the items: two results may be compared where they agree in it.

An evaluation is a dictionary of such results by part. A part is named as in PARTS; ``mlm:NAME`` is the loss on a
further set of texts called NAME.
"""

from __future__ import annotations

from dataclasses import replace

from robustdebias.evaluation import (
    crows_pairs,
    crows_pairs_differing,
    downstream,
    mlm,
    pseudo_perplexity,
    seat,
    stereoset,
    stereoset_inter,
)
from robustdebias.evaluation.metric import Metric, Part

__all__ = ["PARTS", "metric_of", "module_of"]

# In the order in which people read them.
PARTS: dict[str, Part] = {
    "mlm": mlm,
    "stereoset": stereoset,
    "stereoset_inter": stereoset_inter,
    "crows_pairs": crows_pairs,
    "crows_pairs_differing": crows_pairs_differing,
    "seat": seat,
    "pseudo_perplexity": pseudo_perplexity,
    "downstream": downstream,
}


def module_of(part: str) -> Part:
    """Of ``mlm`` and of ``mlm:NAME`` alike. Raises ValueError for a part that there is not."""
    kind, _, text_set = part.partition(":")
    if kind not in PARTS or (text_set and kind != "mlm"):
        raise ValueError(f"part: must be one of {', '.join(PARTS)}, mlm:NAME; got {part!r}")
    return PARTS[kind]


def metric_of(name: str) -> Metric:
    """How the score ``PART.NAME`` is read."""
    part, _, rest = name.partition(".")
    found = module_of(part).metric(rest)
    text_set = part.partition(":")[2]
    if text_set:
        return replace(found, name=name, label=f"{text_set}: {found.label}", headline=False)
    return replace(found, name=name)
