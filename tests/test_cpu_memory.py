"""The memory of large gradients on a CPU: used again, and never while anything can still see it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rd_kernels as rd
from rd_kernels.backends.cpu import CPUBackend

backend = CPUBackend()


class TestGradientMemory:
    """Large gradients get memory that is used again, and only when nothing can see it any more."""

    ROWS, VOCABULARY = 400, 30522  # 49 MB

    @pytest.fixture(autouse=True)
    def _empty_cache(self):
        rd.empty_cache()
        yield
        backend._native.set_cache_limit(1 << 30)
        rd.empty_cache()

    def gradient(self, dtype=torch.float32, rows=ROWS):
        torch.manual_seed(0)
        logits = torch.randn(rows, self.VOCABULARY).to(dtype)
        labels = torch.zeros(rows, dtype=torch.int64)
        _, normaliser, _ = backend.row_forward(logits, labels, None, 0.0, -100)
        return backend.row_backward(None, None, logits, labels, normaliser, None, 0.0, -100)

    def test_it_is_used_again_for_the_same_numbers(self):
        first = self.gradient()
        address, values = first.data_ptr(), first.clone()
        del first
        assert backend._native.cached_bytes() >= values.nbytes
        second = self.gradient()  # written past the cache, unlike the first
        assert second.data_ptr() == address
        assert torch.equal(second, values)
        assert backend._native.cached_bytes() == 0

    @pytest.mark.parametrize(
        "hold", [lambda g: g, lambda g: g[5:7], lambda g: g.detach(), lambda g: g.numpy()]
    )
    def test_not_while_anything_holds_it(self, hold):
        first = self.gradient()
        address, held = first.data_ptr(), hold(first)
        del first
        second = self.gradient()
        assert second.data_ptr() != address
        del held
        assert backend._native.cached_bytes() > 0

    def test_another_size_and_dtype(self):
        first = self.gradient()
        address = first.data_ptr()
        del first
        assert self.gradient(rows=self.ROWS - 40).data_ptr() == address  # wastes a tenth: fits
        assert self.gradient(torch.bfloat16, rows=2 * self.ROWS).data_ptr() == address
        assert self.gradient(rows=2 * self.ROWS).data_ptr() != address

    def test_the_limit(self):
        backend._native.set_cache_limit(60 << 20)
        held = [self.gradient() for _ in range(3)]
        del held
        assert 0 < backend._native.cached_bytes() <= 60 << 20
        backend._native.set_cache_limit(0)
        assert backend._native.cached_bytes() == 0
        self.gradient()
        assert backend._native.cached_bytes() == 0

    def test_empty_cache(self):
        self.gradient()
        assert backend._native.cached_bytes() > 0
        rd.empty_cache()
        assert backend._native.cached_bytes() == 0

    def test_small_gradients_are_ordinary_tensors(self):
        assert self.gradient(rows=2).untyped_storage().resizable()

    def test_autograd_may_accumulate_into_it(self):
        logits = torch.randn(self.ROWS, self.VOCABULARY, requires_grad=True)
        labels = torch.zeros(self.ROWS, dtype=torch.int64)
        for _ in range(2):
            rd.functional.cross_entropy(logits, labels, reduction="sum").backward()
        expected = torch.autograd.grad(2 * F.cross_entropy(logits, labels, reduction="sum"), logits)[0]
        torch.testing.assert_close(logits.grad, expected)
