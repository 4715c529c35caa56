"""Batches for the tests of the objectives' mathematics. Letters: G groups."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

import rd_kernels as rd

BATCHES = st.lists(
    st.tuples(st.integers(0, 9), st.floats(0, 12, allow_subnormal=False)), min_size=1, max_size=7
).filter(lambda groups: any(count for count, _ in groups))
BASES = st.sampled_from(["rows", "groups"])


def arrays(groups):
    """Counts and mean losses, float64 [G]."""
    counts, means = (np.array(column, dtype=np.float64) for column in zip(*groups, strict=True))
    return counts, means


def batch_of(counts, means, adjustment=None):
    """With half of each mean loss as the excess."""
    counts, means = (torch.as_tensor(each, dtype=torch.float64) for each in (counts, means))
    sums = torch.where(counts > 0, counts * means, 0)
    return rd.Batch(sums, counts, sums / 2, adjustment)


def start(objective, num_groups):
    """q and memory before the first batch."""
    q = torch.full((num_groups,), 1 / num_groups, dtype=torch.float64)
    return q, objective.initial_memory(num_groups)


def weights_of(objective, counts, means):
    """Of an objective without state, float64 [G]."""
    weights, q, memory = objective.update(batch_of(counts, means), *start(objective, len(counts)))
    assert q is None or torch.equal(q, start(objective, len(counts))[0])
    assert memory is None
    return weights.numpy()


def base(counts, kind):
    size = counts if kind == "rows" else (counts > 0).astype(float)
    return size / size.sum()
