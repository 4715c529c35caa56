"""The linear op's Triton GEMMs: exponentials instead of logits, gradients from them, and tiles left out.

Errors are held against float64 and may be at most those of the same computation in eager torch at the same dtype.
Tiles are small, so that small problems have several in each direction.
"""

import pytest
import torch
from torch import Tensor

from rd_kernels.backends.interface import BAD_LABEL, HIT, IGNORED, MISS
from rd_kernels.backends.registry import get
from rd_kernels.backends.triton_backend import TritonBackend
from rd_kernels.backends.triton_gemm import GEMMTiles
from rd_kernels.linear import mean_logit_order
from tests.conftest import on_device_of

TILES = GEMMTiles(rows=16, columns=32, depth=16, warps=4, stages=2, processors=1, group=2)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
BFLOAT16 = torch.bfloat16
ACC_EPS = 2.0**-20  # of results in float32, relative to their size or 1


class SmallTiles(TritonBackend):
    tiles = TILES

    def gemm_tiles(self, device):
        return self.tiles


@pytest.fixture
def gemm():
    with on_device_of("triton"):
        yield SmallTiles()


class Problem:
    """Operands of N rows, V of Vp entries, D wide, and what exponentials() makes of them."""

    def __init__(self, gemm, dtype, N=37, V=200, Vp=208, D=32, has_bias=True, change=lambda p: None):
        self.V, self.dtype = V, dtype
        self.hidden = torch.randn(N, D).to(dtype)
        self.weight = (torch.randn(Vp, D) / D**0.5 * 3).to(dtype)
        self.bias = torch.randn(Vp).to(dtype) if has_bias else None
        self.labels = torch.randint(V, (N,))
        change(self)
        self.E = torch.full((N, Vp), float("nan"), dtype=dtype)
        self.results = gemm.exponentials(self.hidden, self.weight, self.bias, self.labels, -100, V, self.E)
        self.row_loss, self.normaliser, self.outcome, self.factor, self.tile_sums = self.results

    @property
    def counted(self) -> Tensor:
        return (self.labels >= 0) & (self.labels < self.V)

    def logits(self, dtype) -> Tensor:
        z = self.hidden.to(dtype) @ self.weight.to(dtype).t()
        return (z if self.bias is None else z + self.bias.to(dtype))[:, : self.V]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """-> row_loss, normaliser, U in float64, by the reference."""
        z, reference = self.logits(torch.float64), get("reference")
        row_loss, normaliser, _ = reference.row_forward(z, self.labels, None, 0.0, -100)
        U = reference.row_backward(None, None, z, self.labels, normaliser, None, 0.0, -100)
        return row_loss, normaliser, U.nan_to_num(0.0)

    def eager(self) -> tuple[Tensor, Tensor]:
        """-> row_loss, U as eager torch makes them: logits in the dtype, softmax in float32, U in the dtype."""
        z = self.logits(self.dtype).float()
        y = torch.where(self.counted, self.labels, 0)
        log_p = z.log_softmax(1)
        U = log_p.exp() - torch.nn.functional.one_hot(y, self.V)
        U = torch.where(self.counted[:, None], U, 0.0).to(self.dtype)
        return -log_p.gather(1, y[:, None])[:, 0], U

    def U(self) -> Tensor:
        return self.factor.double()[:, None] * self.E.double()[:, : self.V]


def largest(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0


def check_forward(p: Problem, shift: float = 0.0) -> None:
    """``shift``: what U may be off more than eager's. The factor makes it exact at the label and moves the rest of the
    row by the rounding there; it shows only where eager's 16-bit logits happen to be nearly exact."""
    ok = p.counted
    row_loss, normaliser, U = p.exact()
    eager_loss, eager_U = p.eager()
    error = ((p.row_loss - row_loss) / row_loss.abs().clamp_min(1))[ok]
    eager_error = ((eager_loss - row_loss) / row_loss.abs().clamp_min(1))[ok]
    assert largest(error) <= largest(eager_error) + ACC_EPS
    # Nothing between hidden and the statistics is rounded to 16 bits: float32 it must be, not only below eager.
    size = p.logits(torch.float64).abs().amax(1).clamp_min(1)
    assert largest(((p.normaliser - normaliser) / size)[:, ok]) <= 8 * ACC_EPS
    assert largest(error) <= 8 * ACC_EPS
    assert largest(p.U() - U) <= largest(eager_U.double() - U) + ACC_EPS + shift
    assert (p.E[:, p.V :] == 0).all()
    assert (p.E[~ok] == 0).all()
    assert (p.factor[~ok] == 0).all()
    sums = p.tile_sums.double().sum(0)[ok]
    rounding = torch.finfo(p.dtype).eps  # of E at the label, which the factor makes up for
    torch.testing.assert_close(sums * p.factor.double()[ok], torch.ones_like(sums), rtol=rounding, atol=0)
    at_label = torch.where(ok, p.labels, 0)[:, None]
    assert largest((p.U() - U).gather(1, at_label)) <= 8 * ACC_EPS * largest(size)


@DTYPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("N", "V", "Vp", "D"),
    [
        (37, 200, 208, 64),
        (1, 1, 1, 16),
        (33, 33, 33, 24),
        (16, 127, 127, 20),
        (50, 100, 163, 48),
        (0, 9, 9, 16),
    ],
)
def test_forward(gemm, poisoned, dtype, N, V, Vp, D, has_bias):
    p = Problem(gemm, dtype, N, V, Vp, D, has_bias)
    check_forward(p)
    assert p.tile_sums.shape == (-(-Vp // TILES.columns), N)


@DTYPES
def test_labels_that_do_not_count(gemm, poisoned, dtype):
    """Ignored rows and bad labels, among them one in the padding and a whole block of rows."""

    def change(p):
        p.labels[16:32] = -100
        p.labels[:4] = torch.tensor([-100, p.V, -1, 10**12])

    p = Problem(gemm, dtype, change=change)
    check_forward(p)
    expected = torch.where(p.labels == -100, IGNORED, torch.where(p.counted, MISS, BAD_LABEL))
    hits = p.counted & (p.logits(torch.float64).argmax(1) == p.labels)
    assert torch.equal(p.outcome, torch.where(hits, HIT, expected).to(torch.uint8))
    ignored, bad = p.labels == -100, ~p.counted & (p.labels != -100)
    assert (p.row_loss[ignored] == 0).all()
    assert (p.normaliser[:, ignored] == 0).all()
    assert p.row_loss[bad].isnan().all()
    assert p.normaliser[:, bad].isnan().all()
    assert (p.tile_sums[:, ~p.counted] == 0).all()


@DTYPES
def test_logits_far_above_the_labels(gemm, poisoned, dtype):
    """Tiles of one row need different powers of two, in all orders; the label's own tile needs none."""

    def change(p):
        p.bias[:8] = -500.0  # labels of most rows
        p.bias[70] = 300.0  # tile 2
        p.bias[150] = 296.0  # tile 4
        p.labels[:30] = torch.arange(30) % 8
        p.labels[30] = 70

    p = Problem(gemm, dtype, change=change)
    check_forward(p)
    assert (p.row_loss[:30] > 700).all()
    assert p.outcome[30] in (HIT, MISS)
    assert p.E.isfinite().all()


@DTYPES
def test_sum_beyond_what_the_dtype_holds(gemm, poisoned, dtype):
    """No tile needs a power of two, but in float16 the label's element, minus the row's sum, does."""

    def change(p):
        p.hidden *= 0.15
        p.bias.zero_()
        p.bias[p.labels] = -7.5

    p = Problem(gemm, dtype, N=5, change=change)
    U = p.exact()[2]
    assert (1 / U.gather(1, p.labels[:, None]).add(1) > 65504).all()
    check_forward(p, shift=torch.finfo(dtype).eps / 2 * U.amax())
    assert p.E.isfinite().all()


@DTYPES
def test_confident_rows(gemm, poisoned, dtype):
    """p -> 1 at the label: what is left of U is small, and the loss too."""

    def change(p):
        p.weight[p.labels] = (p.hidden.float() * 0.6).to(dtype)

    p = Problem(gemm, dtype, change=change)
    check_forward(p)
    assert (p.outcome == HIT).sum() > 30
    assert p.row_loss.median() < 1e-3


@DTYPES
def test_labels_of_logit_minus_infinity(gemm, poisoned, dtype):
    """The loss is infinite, the gradient is not; far below 0 the other logits need a negative power of two."""

    def change(p):
        p.bias[9] = -float("inf")
        p.labels[:5] = 9
        p.bias[64:96] = -float("inf")  # a whole tile

    for low in (0.0, -700.0):
        p = Problem(gemm, dtype, change=lambda p, low=low: (p.bias.add_(low), change(p)))
        z = p.logits(torch.float64)
        assert torch.equal(p.row_loss[:5], torch.full((5,), float("inf")))
        assert (p.outcome[:5] == MISS).all()
        assert largest(p.normaliser[0, :5] - z[:5].amax(1)) < 1e-4 * (1 - low)
        log_sum = (z[:5] - z[:5].amax(1, keepdim=True)).exp().sum(1).log()
        assert largest(p.normaliser[1, :5] - log_sum) < ACC_EPS * (8 - low)
        U = z.softmax(1)
        U[torch.arange(len(U)), p.labels] -= 1
        eager = p.eager()[1].double()
        assert largest((p.U() - U)[:5]) <= largest((eager - U)[:5]) + ACC_EPS


@DTYPES
def test_rows_without_a_finite_sum(gemm, poisoned, dtype):
    """NaN everywhere in a row: loss NaN, no hit, and no trace in E."""

    def change(p):
        p.hidden[3] = float("nan")

    p = Problem(gemm, dtype, change=change)
    assert p.row_loss.isnan().nonzero().tolist() == [[3]]
    assert p.outcome[3] == MISS
    assert p.factor[3].isnan()
    assert (p.E[3] == 0).all()
    assert p.tile_sums[:, 3].isnan().all()
    p.labels[3] = -100
    p.results = gemm.exponentials(p.hidden, p.weight, p.bias, p.labels, -100, p.V, p.E)
    assert p.results[0][3] == 0
    assert (p.E[3] == 0).all()


def test_rows_as_row_forward_sees_them(gemm, poisoned):
    """NaN, +inf, nothing but -inf, each in one row and away from its label, as triton's row pass on the logits."""
    big = 3e38

    def change(p):
        p.hidden[:, :3] = 0
        p.weight[:, :3] = 0
        p.labels[:] = torch.arange(37)
        p.weight[50, 0] = p.weight[51, 1] = big
        p.bias[51] = -float("inf")
        p.weight[:, 2] = -big
        p.hidden[4, 0] = 10  # +inf at 50
        p.hidden[5, 1] = 10  # NaN at 51
        p.hidden[6, 2] = 10  # nothing but -inf
        p.hidden[8, 0] = 10  # +inf at its label
        p.labels[8] = 50

    p = Problem(gemm, BFLOAT16, change=change)
    z = p.logits(torch.float32)
    assert z[5].isnan().sum() == 1
    assert (z[6] == -float("inf")).all()
    row_loss, normaliser, outcome = gemm.row_forward(z, p.labels, None, 0.0, -100)
    torch.testing.assert_close(p.row_loss, row_loss, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.normaliser, normaliser, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert torch.equal(p.outcome, outcome)
    assert p.factor[[4, 5, 6, 8]].isnan().all()
    assert (p.E[[4, 5, 6, 8]] == 0).all()


def test_same_bits_again(gemm):
    p = Problem(gemm, BFLOAT16)
    scale = torch.rand(37)
    first = [p.E.clone(), *p.results, *gradients(gemm, p, scale, eps=0.01)]
    again = gemm.exponentials(p.hidden, p.weight, p.bias, p.labels, -100, p.V, p.E)
    for x, y in zip(first, (p.E, *again, *gradients(gemm, p, scale, eps=0.01)), strict=True):
        assert torch.equal(x, y)


def gradients(gemm, p: Problem, row_scale: Tensor, live: Tensor | None = None, eps: float = 0.0):
    """-> d hidden, d weight, live"""
    scale = torch.where(row_scale == 0, 0, row_scale * p.factor)
    if live is None:
        live = gemm.live_tiles(p.tile_sums, p.labels, scale, p.E, eps)
    grad_hidden = gemm.grad_hidden(p.E, scale, p.weight, live)
    return grad_hidden, gemm.grad_weight(p.E, *gemm.scaled_hidden(p.hidden, scale), live), live


def exact_gradients(p: Problem, terms: Tensor) -> tuple[Tensor, Tensor]:
    """float64, from ``terms`` [N, V] = diag(row_scale) U"""
    return terms @ p.weight.double()[: p.V], terms.t() @ p.hidden.double()


@DTYPES
@pytest.mark.parametrize("processors", [1, 30], ids=["whole", "split"])
@pytest.mark.parametrize(("N", "V", "Vp", "D"), [(37, 100, 104, 40), (17, 33, 33, 24), (1, 1, 1, 16)])
def test_gradients(gemm, poisoned, dtype, processors, N, V, Vp, D):
    gemm.tiles = GEMMTiles(**{**vars(TILES), "processors": processors})
    p = Problem(gemm, dtype, N, V, Vp, D)
    row_scale = torch.rand(N) / N
    grad_hidden, grad_weight, live = gradients(gemm, p, row_scale)
    assert live.shape == (-(-N // TILES.rows), -(-Vp // TILES.columns))
    exact = exact_gradients(p, row_scale.double()[:, None] * p.exact()[2])
    eager = (row_scale[:, None] * p.eager()[1].float()).to(dtype)
    yardstick = (eager @ p.weight[:V], eager.t() @ p.hidden)
    for value, other, truth in zip((grad_hidden, grad_weight[:V]), yardstick, exact, strict=True):
        assert (value - truth).norm() <= (other - truth).norm() + ACC_EPS
    assert (grad_weight[V:] == 0).all()
    assert grad_hidden.dtype == grad_weight.dtype == dtype


@DTYPES
def test_only_live_tiles_count(gemm, poisoned, dtype):
    """Whatever is live: none in a line, some, all."""
    p = Problem(gemm, dtype)
    row_scale = torch.rand(37) / 37
    scale = row_scale * p.factor
    live = (torch.rand(3, 7) < 0.5).to(torch.uint8)
    live[1], live[:, 2] = 0, 0
    grad_hidden, grad_weight, _ = gradients(gemm, p, row_scale, live)
    mask = live.repeat_interleave(TILES.rows, 0)[:37].repeat_interleave(TILES.columns, 1)[:, :208]
    terms = scale.double()[:, None] * p.E.double() * mask
    rounding = 2 * torch.finfo(dtype).eps
    for value, truth in (
        (grad_hidden, terms @ p.weight.double()),
        (grad_weight, terms.t() @ p.hidden.double()),
    ):
        assert (value - truth).norm() <= rounding * truth.norm()
    assert (grad_hidden[16:32] == 0).all()
    assert (grad_weight[64:96] == 0).all()


@DTYPES
@pytest.mark.parametrize(("order", "seed"), [("plain", 0), ("by mean logit", 1)])
def test_what_is_left_out_stays_within_the_bound(gemm, poisoned, dtype, order, seed):
    def change(p):
        p.bias += torch.linspace(0, -12, len(p.bias)).to(dtype)[torch.randperm(len(p.bias))]
        p.weight[p.labels[:20]] = (p.hidden[:20].float() * 0.2).to(dtype)  # some rows are confident
        p.labels[3:5] = -100
        if order == "by mean logit":
            by_mean = mean_logit_order(p.hidden, p.weight, p.bias)
            by_mean = torch.cat([by_mean[by_mean < p.V], by_mean[by_mean >= p.V]])
            p.weight, p.bias = p.weight[by_mean], p.bias[by_mean]
            place = by_mean.argsort()
            p.labels = torch.where(p.labels < 0, p.labels, place[p.labels])

    torch.manual_seed(seed)
    p = Problem(gemm, dtype, change=change)
    row_scale = torch.rand(37) ** 8 / 37
    row_scale[7] = 0
    terms = row_scale.double()[:, None] * p.exact()[2]
    exact = exact_gradients(p, terms)
    total = float(terms.abs().sum())
    sizes = p.weight.double().norm(dim=1).max(), p.hidden.double().norm(dim=1).max()
    dense = gradients(gemm, p, row_scale, torch.ones(3, 7, dtype=torch.uint8))
    left_out = []
    for eps in (0.0, 0.02, 0.3):
        filtered = gradients(gemm, p, row_scale, eps=eps)
        for value, whole, truth, size in zip(filtered, dense, exact, sizes, strict=False):
            error, rounding = ((x[: len(truth)] - truth).norm(dim=1).sum() for x in (value, whole))
            assert error <= eps * total * size + rounding
            assert eps > 0 or torch.equal(value, whole)
        left_out.append(int((filtered[2] == 0).sum()))
    assert left_out == sorted(left_out)
    assert left_out[1] > 0


@DTYPES
def test_masses(gemm, dtype):
    """As much as is allowed is left out: one more tile would be too much."""
    p = Problem(gemm, dtype, change=lambda p: p.bias.add_(torch.linspace(0, -12, 208).to(dtype)))
    scale = torch.rand(37) * p.factor
    mass = (scale[:, None].double() * p.factor.reciprocal().double()[:, None] * p.exact()[2]).abs()
    mass = torch.nn.functional.pad(mass, (0, 24, 0, 11)).view(3, 16, 7, 32).sum((1, 3)).flatten()
    for eps in (2.0**-9, 0.05, 0.3, 0.9):
        live = gemm.live_tiles(p.tile_sums, p.labels, scale, p.E, eps).flatten() != 0
        allowed = eps * mass.sum()
        assert mass[~live].sum() <= allowed
        assert mass[~live].sum() + mass[live].min() > 0.98 * allowed


def test_tiles_without_weight_are_left_out_at_eps_0(gemm, poisoned):
    """Rows of weight 0, even NaN ones, and tiles whose exponentials are 0."""

    def change(p):
        p.bias[96:128] = -float("inf")
        p.labels[(p.labels >= 96) & (p.labels < 128)] = 5
        p.hidden[17] = float("nan")

    p = Problem(gemm, BFLOAT16, change=change)
    row_scale = torch.ones(37)
    row_scale[16:32] = 0
    grad_hidden, grad_weight, live = gradients(gemm, p, row_scale)
    expected = torch.ones_like(live)
    expected[1], expected[:, 3] = 0, 0
    assert torch.equal(live, expected)
    assert (grad_hidden[16:32] == 0).all()
    assert grad_weight.isfinite().all()


def test_everything_is_live_where_a_weight_is_not_finite(gemm, poisoned):
    p = Problem(gemm, BFLOAT16, change=lambda p: p.hidden[5].fill_(float("nan")))
    grad_hidden, grad_weight, live = gradients(gemm, p, torch.ones(37), eps=0.5)
    assert (live == 1).all()
    assert grad_hidden.isnan().any(1).nonzero().tolist() == [[5]]
    assert grad_weight.isnan().all()


def test_no_weight_at_all(gemm, poisoned):
    p = Problem(gemm, BFLOAT16)
    grad_hidden, grad_weight, live = gradients(gemm, p, torch.zeros(37))
    assert (live == 0).all()
    assert (grad_hidden == 0).all()
    assert (grad_weight == 0).all()


def test_no_rows(gemm, poisoned):
    p = Problem(gemm, BFLOAT16, N=0)
    grad_hidden, grad_weight, live = gradients(gemm, p, torch.zeros(0))
    assert grad_hidden.shape == (0, 32)
    assert live.shape == (0, 7)
    assert (grad_weight == 0).all()


def test_small_scales_keep_their_precision_in_float16(gemm):
    """1/s and the rows' number take the scales far below what float16 can hold."""
    hidden = torch.randn(40, 32).half()
    scale = torch.exp2(-30 - 12 * torch.rand(40))
    scaled, unit = gemm.scaled_hidden(hidden, scale)
    torch.testing.assert_close(
        scaled.double() * unit, hidden * scale.double()[:, None], rtol=2**-11, atol=float(unit) * 2**-25
    )


@pytest.mark.parametrize("which", ["grad_hidden", "grad_weight"])
def test_addresses_beyond_int32(gemm, which):
    """Of E, 4 GiB: only what is live is ever touched."""
    long = 2**26
    rows, padded = (33, long) if which == "grad_hidden" else (long, 33)
    E = torch.empty(rows, padded, dtype=BFLOAT16)
    live = torch.zeros(-(-rows // TILES.rows), -(-padded // TILES.columns), dtype=torch.uint8)
    live[-1, -1] = 1
    if which == "grad_hidden":
        E[32, -TILES.columns :] = 2
        other = torch.empty(padded, 16, dtype=BFLOAT16)
        other[-TILES.columns :] = 1
        value = gemm.grad_hidden(E, torch.ones(rows), other, live)
        assert (value[32] == 2 * TILES.columns).all()
        assert (value[:32] == 0).all()
    else:
        E[-TILES.rows :, 32] = 2
        other = torch.empty(rows, 16, dtype=BFLOAT16)
        other[-TILES.rows :] = 1
        value = gemm.grad_weight(E, other, None, live)
        assert (value[32] == 2 * TILES.rows).all()
        assert (value[:32] == 0).all()


def test_nothing_is_read_back(gemm, monkeypatch):
    """On tensors without values, reading one raises."""
    monkeypatch.setattr(gemm, "_launch", lambda *arguments, **options: None)
    with torch.device("meta"):
        p = Problem(gemm, BFLOAT16)
        row_scale = torch.empty(37)
        grad_hidden, grad_weight, _ = gradients(gemm, p, row_scale, eps=0.1)
        assert (grad_hidden.shape, grad_weight.shape) == ((37, 32), (208, 32))
        assert mean_logit_order(p.hidden, p.weight, p.bias).shape == (208,)


@DTYPES
def test_mean_logit_order(dtype):
    hidden, weight = torch.randn(50, 16).to(dtype), torch.randn(90, 16).to(dtype)
    bias = torch.randn(90)
    mean = (hidden.double() @ weight.double().t() + bias).mean(0)
    order = mean_logit_order(hidden, weight, bias)
    assert torch.equal(order.sort().values, torch.arange(90))
    assert (mean[order].diff() < 4 * torch.finfo(dtype).eps).all()
    assert torch.equal(mean_logit_order(hidden, weight, None), mean_logit_order(hidden, weight, bias * 0))
