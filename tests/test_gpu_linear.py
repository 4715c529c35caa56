"""What both GPU backends do between the linear op's matrix products, and the padded products themselves."""

import pytest
import torch

import rd_kernels as rd
from rd_kernels.backends.registry import get
from tests.oracles import eager_group_dro
from tests.test_linear import EPSILON

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "extra"), [(1, 1, 0), (5, 16, 0), (37, 520, 0), (9, 33, 7), (0, 8, 0)]
)
def test_scaled_rows(kernels, dtype, rows, width, extra):
    """Rounded once; 0 where the scale is 0, whatever stands there; in place too; rows may lie apart."""
    x = torch.randn(rows, width + extra).to(dtype)[:, :width]
    scale = torch.randn(rows)
    scale[::3] = 0
    x[::3] = float("nan")
    expected = torch.where(scale[:, None] == 0, 0, x.float() * scale[:, None]).to(dtype)
    out = torch.full((rows, width), float("nan"), dtype=dtype)
    assert torch.equal(kernels.scale_rows(x, scale, out), expected)
    assert torch.equal(kernels.scale_rows(x, scale, x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "extra"), [(1, 1, 0), (5, 61, 3), (300, 1100, 4), (0, 8, 0)])
def test_column_sums(kernels, dtype, rows, columns, extra):
    """Added to what is there; error at most that of torch's matrix-vector product, plus one rounding."""
    x = torch.randn(rows, columns + extra).to(dtype)[:, :columns]
    scale, total = torch.randn(rows), torch.randn(columns)
    truth = total.double() + x.double().t() @ scale.double()
    plain = total + torch.mv(x.t(), scale.to(dtype))
    kernels.add_column_sums(x, scale, total)
    allowed = (plain - truth).abs().max() if rows else torch.zeros((), dtype=torch.float64)
    assert (total - truth).abs().max() <= allowed + 2.0**-22 * (1 + truth.abs().max())


def test_triton_sums_columns_past_nan_rows_of_weight_0():
    x, scale, total = torch.randn(9, 40), torch.rand(9), torch.zeros(40)
    x[4], scale[4] = float("nan"), 0
    get("triton").add_column_sums(x, scale, total)
    torch.testing.assert_close(total, x[scale > 0].t() @ scale[scale > 0])


@pytest.mark.parametrize("budget", [1 << 30, 20 * (2080 * 4 + 16 * 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_products(kernels, dtype, bias, budget):
    """V = 2050 becomes 2080 (2-byte dtypes) or 2064: results and gradients are those of 2050 classes."""
    rows, vocabulary, width = 37, 2050, 16
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) / 2).to(dtype)
    offset = torch.randn(vocabulary).to(dtype) if bias else torch.zeros(vocabulary, dtype=dtype)
    labels, groups = torch.randint(vocabulary, (rows,)), torch.rand(rows, 3) < 0.5
    labels[::5] = -100
    labels[1] = vocabulary - 1

    def leaves(dtype):
        return [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, offset)]

    ours, q = leaves(dtype), torch.full((3,), 1 / 3)
    loss = rd.functional.linear_group_dro_cross_entropy(
        ours[0], ours[1], labels, groups, q, rd.GroupDRO(STEP), bias=ours[2] if bias else None,
        backend=kernels.name, memory_budget=budget,
    )  # fmt: skip
    ours = ours if bias else ours[:2]
    gradients = torch.autograd.grad(loss, ours)
    results = []
    for kind in (torch.float64, dtype):
        plain = leaves(kind)
        value, _ = eager_group_dro(
            torch.nn.functional.linear(*plain),
            labels,
            groups,
            torch.full((3,), 1 / 3).to(torch.float64),
            STEP,
        )
        results.append((value.detach(), torch.autograd.grad(value, plain)))
    (exact_loss, exact), (eager_loss, eager) = results
    assert abs(loss - exact_loss) <= abs(eager_loss - exact_loss) + 2 * EPSILON[dtype] * exact_loss
    for value, truth, baseline in zip(gradients, exact, eager, strict=False):
        allowed = 4 * EPSILON[dtype] * float(truth.abs().max())
        assert value.shape == truth.shape
        assert (value - truth).abs().max() <= (baseline - truth).abs().max() + allowed


def test_a_label_in_the_padding_is_out_of_range(kernels):
    call = {
        "hidden": torch.randn(3, 8), "weight": torch.randn(2050, 8), "labels": torch.tensor([0, 2050, 1]),
        "groups": torch.zeros(3, dtype=torch.int64), "group_weights": torch.ones(1), "backend": kernels.name,
    }  # fmt: skip
    if call["hidden"].device.type == "cpu":
        with pytest.raises(ValueError, match=r"labels: 1 of them .* \[0, 2050\)"):
            rd.functional.linear_group_dro_cross_entropy(**call)
    else:
        assert rd.functional.linear_group_dro_cross_entropy(**call).isnan()
