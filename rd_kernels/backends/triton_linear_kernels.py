"""Triton kernels between the linear op's matrix products: rows scaled, columns summed.

N rows, V vocabulary, D hidden. Sums are float32 in an order that depends on the shapes alone.
"""

import triton
import triton.language as tl

from rd_kernels.backends.triton_kernels import _rounded


@triton.jit(do_not_specialize=["N"])
def scale_rows(
    x,  # [N, D] float32, bfloat16 or float16
    scale,  # [N] acc
    out,  # [N, D] as x; may be x
    x_stride,
    out_stride,
    N,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """0 where the scale is 0, whatever x."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.load(scale + rows, mask=rows < N, other=0.0)[:, None]
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside & (factor != 0), other=0.0)
    values = _rounded(tl.where(factor == 0, 0.0, values.to(tl.float32) * factor), out.dtype.element_ty)
    tl.store(out + rows[:, None] * out_stride + columns[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["N"])
def column_partials(
    x,  # [N, V] float32, bfloat16 or float16
    scale,  # [N] acc
    partials,  # out [chunks, V] acc
    x_stride,
    N,
    V,
    CHUNK: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,  # at a time
    COLUMNS: tl.constexpr,
):
    """Program (tile, chunk): the sum of scale_i x_i over a chunk's rows. Rows of scale 0 are not read."""
    chunk = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < V
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = chunk * CHUNK + start + tl.arange(0, ROWS)
        factor = tl.load(scale + rows, mask=rows < N, other=0.0)[:, None]
        places = rows[:, None] * x_stride + columns[None, :]
        values = tl.load(x + places, mask=inside[None, :] & (factor != 0), other=0.0).to(tl.float32)
        total += tl.where(factor == 0, 0.0, values * factor)
    tl.store(partials + chunk * V + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def column_totals(
    partials,  # [chunks, V] acc
    total,  # [V] acc, added to
    chunks,
    V,
    COLUMNS: tl.constexpr,
):
    """Program (tile): the chunks' sums in their order."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < V
    result = tl.load(total + columns, mask=inside, other=0.0)
    places = partials + columns
    for _ in range(chunks):
        result += tl.load(places, mask=inside, other=0.0)
        places += V
    tl.store(total + columns, result, mask=inside)
