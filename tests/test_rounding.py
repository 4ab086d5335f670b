"""What separates rounding from a fault, itself: sums in another order pass, a fault 100 times as large does not."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", [16, 256, 4096])
def test_a_sum_in_another_order_passes_and_a_fault_does_not(dtype, terms) -> None:
    x = torch.randn(200, terms, dtype=dtype)

    def one_by_one(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[:, 0])
        for column in x.T:
            total = total + column
        return total

    expected = one_by_one(x)
    assert_rounded(one_by_one(x.flip(1)), expected, terms)
    assert_rounded(one_by_one(x.flip(1)).double(), expected.double(), terms, dtype=dtype)
    wrong = expected * (1.0 + 200.0 * math.sqrt(terms) * torch.finfo(dtype).eps)
    with pytest.raises(AssertionError, match=r"it must be off by .* units of rounding at most, got "):
        assert_rounded(wrong, expected, terms)


def test_what_is_no_number_must_be_so_on_both_sides() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert_rounded(x, x.clone())
    for i, other in ((0, math.nan), (1, 0.0), (2, -math.inf), (3, 1.0)):
        wrong = x.clone()
        wrong[i] = other
        with pytest.raises(AssertionError, match="got inf"):
            assert_rounded(wrong, x)
    with pytest.raises(AssertionError, match=r"got inf|got nan"):
        assert_rounded(torch.full((2,), math.nan), torch.zeros(2))


def test_zero_shape_and_dtype() -> None:
    zero = torch.zeros(3)
    assert_rounded(zero, zero)
    assert_rounded(zero + 1e-7, zero, of=1.0)
    with pytest.raises(AssertionError, match="got inf"):
        assert_rounded(zero + 1e-30, zero)
    with pytest.raises(AssertionError, match="shape"):
        assert_rounded(zero, zero[:1])
    with pytest.raises(AssertionError, match=r"must be torch\.float32, got torch\.float64"):
        assert_rounded(zero.double(), zero)
    with pytest.raises(AssertionError, match="16 need a witness"):
        assert_rounded(zero.bfloat16(), zero.bfloat16())
