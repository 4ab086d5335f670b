"""Two computations of one value differ by rounding and by nothing else: limits counted in roundings, never absolute.

Where a witness can be had, `flashsigmoid.testing.assert_within_budget` is the better question.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LAYER = 64  # an attention layer of these tests: 16 features in, 8 or 16 of a head, some 20 keys, 16 features out


def units(actual: Tensor | float, expected: Tensor | float, dtype: torch.dtype, of: float | None = None) -> float:
    """max |actual - expected|, in eps of the dtype times `of`, by default the largest |expected|."""
    found, exact = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    if not exact.numel():
        return 0.0
    size = torch.where(exact.isfinite(), exact, 0.0).abs().max().item() if of is None else of
    # equal infinities and two NaNs differ by nothing
    same = (found == exact) | (found.isnan() & exact.isnan())
    error = torch.where(same, 0.0, found - exact).abs().nan_to_num(math.inf).max().item()
    allowed = torch.finfo(dtype).eps * size
    return error / allowed if allowed else (math.inf if error else 0.0)


def assert_rounded(
    actual: Tensor | float,
    expected: Tensor | float,
    terms: int = LAYER,
    *,
    dtype: torch.dtype | None = None,
    of: float | None = None,
    name: str = "it",
) -> None:
    """Off by at most 2 sqrt(terms) eps of the largest |expected|: what `terms` roundings in a row leave, on both sides.

    A rounding is off by eps / 2 at most, eps / sqrt(12) in the root mean square, so that 2 * terms of them with
    independent signs have a standard deviation of sqrt(terms / 6) eps, of which the limit is 4.9. As for a kernel, it
    is the size of the sums that counts, so a small element has the limit of the largest; `of` is that size where all
    the sums cancel. `dtype` is the one it was computed in, where a result has been widened since.

    Raises:
        AssertionError: beyond it, or of another shape or dtype.
    """
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        assert actual.shape == expected.shape, f"{name} must have shape {expected.shape}, got {actual.shape}"
        assert dtype is not None or actual.dtype == expected.dtype, (
            f"{name} must be {expected.dtype}, got {actual.dtype}"
        )
    if dtype is None:
        dtype = expected.dtype if isinstance(expected, Tensor) else torch.float64
    assert torch.finfo(dtype).bits >= 32, f"{name} must have 32 bits or more, 16 need a witness, got {dtype}"
    found = units(actual, expected, dtype, of)
    limit = 2.0 * math.sqrt(terms)
    assert found <= limit, f"{name} must be off by {limit:.3g} units of rounding at most, got {found:.3g}"
