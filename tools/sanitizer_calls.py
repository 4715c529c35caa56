"""Every kernel of a backend once, at small shapes and odd alignments: what compute-sanitizer watches.

``compute-sanitizer --tool memcheck python -m tools.sanitizer_calls``; results are compared with the reference backend,
so that a run that computes nothing does not pass. Inputs are made on the host: the fewer kernels, the faster the tool.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from rd_kernels import GroupDRO, functional
from rd_kernels.backends.interface import Backend
from rd_kernels.backends.registry import BACKENDS, get
from rd_kernels.rules import RULES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 127, 1000, 4099, 30522, 128256)  # the last two by clusters of blocks
LAYOUTS = ((0, 0), (1, 0), (3, 6), (7, 1))  # first column, padding: rows begin at any element of 16 bytes
FORMS = ("ids", "lists", "bits")  # of the groups
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a.cpu().double(), b.double(), rtol=tolerance, atol=tolerance / 10, equal_nan=True
        )


def rows(
    backend: Backend, device: str, dtype: torch.dtype, vocabulary: int, first: int, padding: int
) -> None:
    """Row losses, details and gradients: fresh, in place and into a view, plain, weighted, smoothed."""
    reference, count = get("reference"), 5
    memory = torch.randn(count, first + vocabulary + padding, dtype=dtype)
    host = memory[:, first : first + vocabulary]
    labels = torch.randint(vocabulary, (count,))
    labels[1], labels[3] = -100, vocabulary  # ignored; out of range
    logits, on_device = memory.clone().to(device)[:, first : first + vocabulary], labels.to(device)
    grad_out, scale = torch.rand(2 * count)[::2], torch.rand(count)
    told, details = torch.empty(2, count), torch.empty(2, count, device=device)
    for weight, smoothing in ((None, 0.0), (torch.rand(vocabulary), 0.1)):
        options = (None if weight is None else weight.to(device), smoothing, -100)
        expected = reference.row_forward(host, labels, weight, smoothing, -100, told)
        found = backend.row_forward(logits, on_device, *options)
        same(found, expected)
        same((*backend.row_forward(logits, on_device, *options, details), details), (*expected, told))
        truth = reference.row_backward(grad_out, scale, host, labels, expected[1], weight, smoothing, -100)
        arguments = (grad_out.to(device), scale.to(device), logits, on_device, found[1], *options)
        same((backend.row_backward(*arguments),), (truth,), TOLERANCE[dtype])
        out = torch.empty(count, vocabulary + 5, dtype=dtype, device=device)[:, 3 : 3 + vocabulary]
        same((backend.row_backward(*arguments, out=out),), (truth,), TOLERANCE[dtype])
    other = memory.clone().to(device)[:, first : first + vocabulary]
    backend.softmax_minus_onehot_(logits, on_device, -100)
    backend.softmax_minus_onehot_(other, on_device, -100, details)
    reference.softmax_minus_onehot_(host, labels, -100)
    same((details,), (told,))
    same((logits, other), (host, host), TOLERANCE[dtype])


def members_of(backend: Backend, device: str, count: int, num_groups: int, form: str) -> Tensor:
    """The groups of random rows in one of the forms; some lists name one twice."""
    if form != "bits":
        return torch.randint(-1, num_groups, (count,) if form == "ids" else (count, 5))
    mask = torch.rand(count, num_groups) < 0.4
    words = get("reference").pack_mask(mask)
    same((backend.pack_mask(mask.to(device)),), (words,), 0.0)
    return words


def groups(backend: Backend, device: str, count: int, num_groups: int, form: str) -> None:
    """Reduction, update and row factors, one by one and as the op starts them."""
    reference = get("reference")
    losses, outcome = torch.rand(count), torch.randint(3, (count,)).to(torch.uint8)
    members = members_of(backend, device, count, num_groups, form)
    own_losses, own_outcome, own_members = (tensor.to(device) for tensor in (losses, outcome, members))
    q, adjustment = torch.full((num_groups,), 1 / num_groups), torch.rand(num_groups)
    for bad in (0,) if form == "bits" else (0, 1):  # then some ids are out of range
        same(
            backend.group_reduce(own_losses, own_outcome, own_members + bad, num_groups),
            reference.group_reduce(losses, outcome, members + bad, num_groups),
        )
    for rule, extra in itertools.product(RULES, (None, adjustment)):
        state, own = q.clone(), q.clone().to(device)
        expected = reference.reduce_and_update(losses, outcome, members, state, rule, 0.1, extra)
        more = None if extra is None else extra.to(device)
        found = backend.reduce_and_update(own_losses, own_outcome, own_members, own, rule, 0.1, more)
        same((*found, own), (*expected, state), 1e-4)


def whole(backend: Backend, device: str, dtype: torch.dtype, count: int, form: str) -> None:
    """The forward as one call."""
    reference, (logits, labels) = (
        get("reference"),
        (torch.randn(count, 1003, dtype=dtype), torch.arange(count)),
    )
    labels[::3] = -100
    members = members_of(backend, device, count, 3, form)
    q = torch.full((3,), 1 / 3)
    z, y, own_members, own_q = (tensor.to(device) for tensor in (logits, labels, members, q.clone()))
    found = backend.grouped_forward(z, y, own_members, own_q, "group_dro", 0.1, None, -100)
    expected = reference.grouped_forward(logits, labels, members, q, "group_dro", 0.1, None, -100)
    same((*found, own_q), (*expected, q), 1e-4)


def packing(backend: Backend, device: str, dtype: torch.dtype, count: int, width: int, first: int) -> None:
    """Labelled rows picked and put back, rows scaled."""
    reference = get("reference")
    x = torch.randn(count, first + width, dtype=dtype)[:, first:]
    labels, scale = torch.randint(-1, 2, (count,)), torch.rand(count)
    expected = reference.compact(labels, -1, count // 2)
    found = backend.compact(labels.to(device), -1, count // 2)
    same(found, expected)
    packed = reference.gather_rows(x, expected[0])
    on_device = x.to(device)
    same((backend.gather_rows(on_device, found[0]),), (packed,), 0.0)
    same(
        (backend.gather_rows(packed.to(device), found[1]),),
        (reference.gather_rows(packed, expected[1]),),
        0.0,
    )
    scaled = reference.scale_rows(x, scale, torch.empty_like(x))
    same((backend.scale_rows(on_device, scale.to(device), on_device),), (scaled,), TOLERANCE[dtype])


def linear(backend: Backend, device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The linear op forward and backward: a padded vocabulary, rows that fit, overflow or are computed again."""
    count, vocabulary, width = 70, 2050, 48
    hidden, weight, bias = (
        torch.randn(count, width),
        torch.randn(vocabulary, width) / 4,
        torch.randn(vocabulary),
    )
    labels, members = torch.randint(vocabulary, (count,)), torch.arange(count) % 3
    labels[::3] = -100
    results = []
    for name, place, extra in (("reference", "cpu", {}), (backend.name, device, options)):
        leaves = [t.to(dtype).to(place).requires_grad_() for t in (hidden, weight, bias)]
        if name == "reference":
            leaves = [t.detach().double().requires_grad_() for t in leaves]
        q = torch.full((3,), 1 / 3, device=place)
        loss = functional.linear_group_dro_cross_entropy(
            leaves[0], leaves[1], labels.to(place), members.to(place), q, GroupDRO(0.1), bias=leaves[2],
            backend=name, **extra,
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for found, expected in zip(results[1], results[0], strict=True):
        error = (found.cpu().double() - expected).norm() / expected.norm()
        assert error <= 4 * TOLERANCE[dtype], f"{tuple(expected.shape)}: relative error {error:.3g}"


LINEAR: tuple[dict[str, Any], ...] = (
    {}, {"capacity": 50}, {"capacity": 20}, {"memory_budget": 20 * (2080 * 4 + 48 * 12)}, {"filter_eps": 1e-12},
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cuda", help="default: %(default)s")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    options = parser.parse_args()
    torch.manual_seed(0)
    backend = get(options.backend) if options.backend in BACKENDS else None
    reason = "this version does not have it" if backend is None else backend.missing()
    if backend is None or reason is not None:
        print(f"backend {options.backend!r}: {reason}", file=sys.stderr)
        return 2
    calls = 0
    served = [t for t in DTYPES if backend.refuses(torch.empty(1, 1, dtype=t, device=options.device)) is None]
    for dtype, vocabulary, layout in itertools.product(served, VOCABULARIES, LAYOUTS):
        rows(backend, options.device, dtype, vocabulary, *layout)
        calls += 1
    for count, num_groups, form in itertools.product((0, 1, 300), (1, 4, 70, 300), FORMS):
        groups(backend, options.device, count, num_groups, form)
        calls += 1
    for dtype, count, form in itertools.product(served, (1, 40), FORMS):
        whole(backend, options.device, dtype, count, form)
        calls += 1
    for dtype, count, width, first in itertools.product(served, (1, 1500), (5, 64), (0, 3)):
        packing(backend, options.device, dtype, count, width, first)
        calls += 1
    for dtype, extra in itertools.product(served, LINEAR):
        if "filter_eps" not in extra or backend.fusable(dtype):
            linear(backend, options.device, dtype, extra)
            calls += 1
    print(f"{calls} cases on {options.device} by {options.backend}: as the reference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
