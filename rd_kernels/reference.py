"""The definition: cross-entropy, group reduction, objective and gradient in plain PyTorch.

Every kernel is held to this file. It takes any float dtype on any device; float16 and bfloat16 are
accumulated in float32, float64 in float64. Letters: N rows, V vocabulary, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS, Backend
from rd_kernels.groups import membership
from rd_kernels.rules import RULES

__all__ = ["ReferenceBackend"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class ReferenceBackend(Backend):
    name = "reference"

    def missing(self) -> str | None:
        return None

    def refuses(self, logits: Tensor) -> str | None:
        return None

    def row_forward(self, logits, labels, class_weight, label_smoothing, ignore_index, details=None):
        vocabulary = logits.shape[1]
        z = logits.to(accumulation_dtype(logits.dtype))
        ignored = labels == ignore_index
        bad = ~ignored & ((labels < 0) | (labels >= vocabulary))
        counted = ~ignored & ~bad
        y = torch.where(counted, labels, 0)
        maximum = z.amax(dim=1)
        # z - maximum is NaN for a row that is all -inf or holds +inf, as in torch's cross_entropy.
        log_sum = (z - maximum[:, None]).exp().sum(dim=1).log()
        z_y = z.gather(1, y[:, None])[:, 0]
        # Not (maximum + log_sum) - z_y: a small loss would inherit the rounding of a large maximum.
        row_loss = log_sum + (maximum - z_y)
        if class_weight is not None:
            row_loss = row_loss * class_weight[y]
        if label_smoothing > 0:
            w = z.new_ones(vocabulary) if class_weight is None else class_weight
            smooth = w.sum() * log_sum + ((maximum[:, None] - z) * w).sum(dim=1)
            row_loss = (1 - label_smoothing) * row_loss + label_smoothing / vocabulary * smooth
        outcome = torch.full_like(labels, MISS, dtype=torch.uint8)
        outcome[z_y >= maximum] = HIT
        outcome[ignored] = IGNORED
        outcome[bad] = BAD_LABEL
        if details is not None:
            centred = z - maximum[:, None]
            p = (centred - log_sum[:, None]).exp()
            entropy = log_sum - torch.where(p == 0, 0, p * centred).sum(dim=1)
            above = (~(z <= z_y[:, None])).sum(dim=1)
            details.copy_(_fill(torch.stack([entropy, above.to(entropy)]), ignored, bad))
        return _fill(row_loss, ignored, bad), _fill(torch.stack([maximum, log_sum]), ignored, bad), outcome

    def row_backward(
        self,
        grad_out,
        row_scale,
        logits,
        labels,
        normaliser,
        class_weight,
        label_smoothing,
        ignore_index,
        out=None,
    ):
        rows, vocabulary = logits.shape
        z = logits.to(normaliser.dtype)
        maximum, log_sum = normaliser[:, :, None]
        counted = (labels != ignore_index) & (labels >= 0) & (labels < vocabulary)
        y = torch.where(counted, labels, 0)
        scale = torch.ones_like(normaliser[0]) if grad_out is None else grad_out.expand(rows)
        if row_scale is not None:
            scale = scale * row_scale
        target = torch.zeros_like(z).scatter_(1, y[:, None], 1 - label_smoothing)
        if label_smoothing > 0:
            target += label_smoothing / vocabulary
        if class_weight is not None:
            hard = torch.zeros_like(z).scatter_(
                1, y[:, None], (1 - label_smoothing) * class_weight[y][:, None]
            )
            target = hard + label_smoothing / vocabulary * class_weight
        gradient = scale[:, None] * (
            target.sum(dim=1, keepdim=True) * ((z - maximum) - log_sum).exp() - target
        )
        gradient = gradient.masked_fill((~counted | (scale == 0))[:, None], 0).to(logits.dtype)
        return gradient if out is None else out.copy_(gradient)

    def group_reduce(self, row_loss, outcome, groups, num_groups):
        counted = (outcome == MISS) | (outcome == HIT)
        member, inside = membership(groups, num_groups)
        bad_groups = counted & ~inside
        member = member & counted[:, None]
        ungrouped = counted & ~member.any(dim=1) & inside
        columns = torch.cat([member, ungrouped[:, None], counted[:, None]], dim=1)  # [N, G+2]
        values = torch.stack([row_loss, torch.ones_like(row_loss), (outcome == HIT).to(row_loss)])  # [3, N]
        # where, not a product: 0 * NaN would spread one row's NaN to every group.
        picked = torch.where(columns[None], values[:, :, None], torch.zeros_like(row_loss)[None, :, None])
        stats = torch.cat([picked.sum(dim=1), row_loss.new_zeros(1, num_groups + 2)])
        return stats, torch.stack([(outcome == BAD_LABEL).sum(), bad_groups.sum()])

    def group_update(self, stats, status, q, rule, rate, adjustment):
        num_groups = q.numel()
        sums, counts, state = stats[0, :num_groups], stats[1, :num_groups], q.to(stats.dtype)
        coefficients, new_q, weights = RULES[rule](sums, counts, state, rate, adjustment)
        valid = (status == 0).all()
        coefficients = torch.where(valid, coefficients, torch.zeros_like(coefficients))
        stats[3, :num_groups] = torch.where(valid, weights, torch.zeros_like(weights))
        stats[3, num_groups] = 0
        stats[3, num_groups + 1] = stats[3, :num_groups].sum()
        q.copy_(torch.where(valid, new_q.to(q.dtype), q))
        parts = torch.where(counts > 0, coefficients * sums, torch.zeros_like(sums))
        return torch.where(valid, parts.sum(), parts.sum() + torch.nan), coefficients

    def row_scale(self, coefficients, outcome, groups):
        counted = (outcome == MISS) | (outcome == HIT)
        member, _ = membership(groups, coefficients.numel())
        # Not a product, which autocast would round to 16 bits.
        return torch.where(member & counted[:, None], coefficients, 0).sum(dim=1)


def _fill(values: Tensor, ignored: Tensor, bad: Tensor) -> Tensor:
    return values.masked_fill(ignored, 0).masked_fill(bad, torch.nan)
