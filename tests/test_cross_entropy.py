"""rd.CrossEntropyLoss gives torch.nn.CrossEntropyLoss's numbers on class indices."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rd_kernels as rd

SHAPES = [
    ((7,), ()),
    ((5, 7), (5,)),
    ((4, 7, 3), (4, 3)),
    ((2, 7, 3, 2), (2, 3, 2)),
    ((0, 7), (0,)),
    ((3, 1), (3,)),
]


def compare(logits, target, rtol=2e-6, atol=2e-7, backend="auto", **options):
    """Loss and gradient of ours and torch's on the same input; returns ours."""
    ours, theirs = (logits.detach().clone().requires_grad_() for _ in range(2))
    loss = rd.CrossEntropyLoss(**options, backend=backend)(ours, target)
    expected = torch.nn.CrossEntropyLoss(**options)(theirs, target)
    assert loss.dtype == expected.dtype
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol, equal_nan=True)
    cotangent = torch.randn_like(expected)
    loss.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=atol, equal_nan=True)
    return loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_torch(backend, reduction, smoothing, weighted):
    for shape, target_shape in SHAPES:
        classes = shape[0] if len(shape) == 1 else shape[1]
        logits = 2 * torch.randn(shape)
        target = torch.randint(classes, target_shape)
        if target.numel() > 2:
            target.view(-1)[0] = -100
        weight = torch.rand(classes) if weighted else None
        compare(
            logits, target, backend=backend, weight=weight, reduction=reduction, label_smoothing=smoothing,
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 9),
    classes=st.integers(1, 40),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    ignore_index=st.integers(-3, 3),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 1 << 30),
)
def test_matches_torch_for_any_options(
    rows, classes, reduction, smoothing, weighted, ignore_index, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.2] = ignore_index
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    compare(logits, target, 1e-9, 1e-9, label_smoothing=smoothing, **options)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_low_precision_is_closer_to_float64_than_torch(dtype, eps):
    """torch rounds log-softmax to the input's dtype; this op accumulates in float32 and rounds once."""
    logits = (4 * torch.randn(64, 1000)).to(dtype)
    target = torch.randint(1000, (64,))
    exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    ours = rd.functional.cross_entropy(logits, target, reduction="none")
    theirs = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert ours.dtype == theirs.dtype == dtype
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()
    compare(logits, target, rtol=eps, atol=eps, reduction="mean")


def test_all_targets_ignored_as_torch():
    target = torch.full((4,), -100)
    for reduction in ("mean", "sum", "none"):
        compare(torch.randn(4, 6), target, reduction=reduction)
    assert rd.CrossEntropyLoss()(torch.randn(4, 6), target).isnan()


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_targets(target_dtype):
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    ours = rd.functional.cross_entropy(logits, target.to(target_dtype))
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, target))


def test_autocast_returns_float32_as_torch():
    logits, target = torch.randn(6, 5).bfloat16(), torch.randint(5, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = rd.CrossEntropyLoss()(logits, target), torch.nn.CrossEntropyLoss()(logits, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=2**-8)


def test_state_dict_is_interchangeable_with_torch():
    weight = torch.rand(5)
    ours, theirs = rd.CrossEntropyLoss(torch.ones(5)), torch.nn.CrossEntropyLoss(weight)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, weight)


def test_gradcheck():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, -100, 3, 4, 2])
    weight = torch.rand(5, dtype=torch.float64)
    for reduction, smoothing, w in itertools.product(("mean", "sum", "none"), (0.0, 0.2), (None, weight)):
        assert torch.autograd.gradcheck(
            lambda z, r=reduction, s=smoothing, w=w: rd.functional.cross_entropy(
                z, target, w, reduction=r, label_smoothing=s, backend="reference"
            ),
            logits,
        )


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"target": torch.tensor([0, 9])}, ValueError, r"labels: 1 .*\[0, 4\)"),
        ({"target": torch.tensor([0, -1])}, ValueError, "labels: 1 "),
        ({"target": torch.rand(2)}, TypeError, "class probabilities are not supported"),
        ({"target": torch.tensor([0])}, ValueError, r"target must have shape \[2\]"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"weight": torch.rand(3)}, ValueError, r"weight must have shape \[4\]"),
        ({"input": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "input must be floating point"),
        ({"input": torch.tensor(1.0)}, ValueError, "got a scalar"),
        ({"input": torch.ones(2, 0)}, ValueError, "at least one class"),
        ({"input": torch.ones(2, 4, device="meta")}, ValueError, "target is on cpu, but input is on meta"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    call = {"input": torch.randn(2, 4), "target": torch.tensor([0, 1])} | kwargs
    with pytest.raises(error, match=message):
        rd.functional.cross_entropy(**call)
