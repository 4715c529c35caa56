"""The order of the training examples: a pure function of seed and epoch, so that a resumed run needs no state.

Group DRO lets a group lose weight in every batch that has nothing of it. With a batch drawn at random, a
group of 3% is absent from a third of all batches of 32, and its weight decays however large its loss. So each
epoch is laid out evenly: every group's examples are spread over it at equal distances, and a batch is a small
picture of the corpus. The distribution is untouched: each example comes once an epoch. N examples, G groups.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["BatchStream", "derived_seed"]


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BatchStream:
    """Batch number k of a training run, for any k: epoch after epoch of evenly laid out examples.

    Args:
        groups: membership [N, G] bool.
        batch_size: the last batch of an epoch may be smaller.
    """

    def __init__(self, groups: Tensor, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        # An example of several groups is laid out with its rarest one. [N], G where it is in none.
        rarity = torch.cat([groups.sum(0), torch.tensor([len(groups) + 1])])
        sizes = torch.where(groups, rarity[:-1], rarity[-1])
        self._stratum = torch.cat([sizes, rarity[-1:].expand(len(groups), 1)], dim=1).argmin(dim=1)
        self._epoch: tuple[int, Tensor] | None = None

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self._stratum) // self.batch_size)

    def batch(self, number: int) -> tuple[int, list[int]]:
        """The epoch that batch ``number`` belongs to, and the indices of its examples."""
        epoch, position = divmod(number, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        start = position * self.batch_size
        return epoch, self._epoch[1][start : start + self.batch_size].tolist()

    def _order(self, epoch: int) -> Tensor:
        draw = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        place = torch.empty(len(self._stratum), dtype=torch.float64)  # in [0, 1): where in the epoch
        for stratum in self._stratum.unique():
            members = (self._stratum == stratum).nonzero()[:, 0]
            shuffled = members[torch.randperm(len(members), generator=draw)]
            offset = torch.rand((), generator=draw, dtype=torch.float64)
            place[shuffled] = (torch.arange(len(members), dtype=torch.float64) + offset) / len(members)
        return place.argsort(stable=True)
