"""The error budget holds for kernels that are as good as the witness, whatever their luck, and for no worse ones.

They are float32 and written here in a few lines, in ways in which no backend of ours rounds on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashsigmoid.testing import Options, errors_over_budget, make_qkv, oracle, witness

BIAS = -math.log(4096)


def times_over(seed: int, nheads: int, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """The output of a query and one key, as a cache has it at first."""
    tensors = make_qkv(1, 1, 1, nheads, nheads, 64, seed=seed)
    options = Options(sigmoid_bias=BIAS)
    exact, seen = oracle(*tensors, **options)["out"], witness(*tensors, draws=8, **options)["out"]
    return max(errors_over_budget(kernel(*tensors[:3]), exact, seen))


def by_powers_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """O = V / (1 + 2^-y) with y = log2(e) S, by one multiplication and addition: where a kernel rounds a score."""
    scale, b = (torch.tensor(x * math.log2(math.e), dtype=torch.float32) for x in (q.shape[-1] ** -0.5, BIAS))
    s = torch.einsum("bihd,bihd->bih", q, k)[..., None]
    y = (s.double() * scale.double() + b.double()).float()
    return 1.0 / (1.0 + torch.exp2(-y)) * v


def of_coarse_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores with four bits less than float32 has near b."""
    s = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5 + BIAS
    return torch.sigmoid((s * 2**16).round() / 2**16) * v


# of 0 to 299 those that were outside by 4 draws with their scores in one unit (three by 8), by up to 2.8; five others
@pytest.mark.parametrize("seed", [24, 160, 178, 212, 251, *range(5)])
def test_scores_that_a_kernel_rounds_elsewhere_have_no_bad_luck_with_one_key(seed: int) -> None:
    assert times_over(seed, 8, by_powers_of_two) <= 1.0


@pytest.mark.parametrize("nheads", [1, 8])
def test_coarse_scores_are_caught_with_one_key(nheads: int) -> None:
    caught = sum(times_over(seed, nheads, of_coarse_scores) > 1.0 for seed in range(20))
    assert caught >= (20 if nheads > 1 else 15), caught  # one score may be near a coarse one


def largest_weight(seed: int, dtype: torch.dtype, off: float = 0.0) -> float:
    """One key, eight heads, one of which has a weight a hundred times the others': the rms is that of its rounding.

    The draws round it at other places between two powers of two, as kernels do that scale their weights.
    """
    q, k, v, _ = make_qkv(1, 1, 1, 8, 8, 64, dtype=dtype, seed=seed)
    b = torch.full((8,), BIAS, dtype=torch.float64)
    b[3] += math.log(100.0)
    a = torch.sigmoid(torch.einsum("bihd,bihd->bih", q.double(), k.double()) * 64**-0.5 + b)[..., None]
    units = [2.0 ** (draw / 32) for draw in range(32)]
    seen = torch.stack([((a * unit).to(dtype).double() / unit * v.double()).to(dtype) for unit in units])
    out = ((a * (1.0 + off)).to(dtype).double() * v.double()).to(dtype)
    return max(errors_over_budget(out, a * v.double(), seen))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_that_decides_the_rms_has_no_bad_luck(dtype: torch.dtype) -> None:
    """A draw's rms is that of one rounding, which is up to sqrt(3) times what it is on average."""
    assert max(largest_weight(seed, dtype) for seed in range(100)) <= 1.0
    caught = sum(largest_weight(seed, dtype, 2.0 * torch.finfo(dtype).eps) > 1.0 for seed in range(100))
    assert caught == 100, caught


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [24, 22])
def test_one_accumulator_for_all_query_heads_of_a_key_head(seed: int, bits: int) -> None:
    """A large term and 799 small ones: with an accumulator for each head the witness allows half of what they round."""
    nheads, rows = 16, 50
    tensors = make_qkv(1, rows, 3, nheads, 1, 64, seed=seed)
    q, k, _, dout = tensors
    dout.mul_(0.01)[:, 0, 0, 0] += 3.0
    options = Options(sigmoid_bias=0.0, q_offset=0)
    exact, seen = oracle(*tensors, **options)["dv"], witness(*tensors, draws=8, **options)["dv"]
    a = torch.sigmoid(torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) * 64**-0.5)
    dv = torch.zeros(1, 3, 64)
    for head in range(nheads):
        for i in range(rows):
            dv += a[:, head, i, :, None] * dout[:, i, head, None]
            if bits < 24:
                dv = (dv * 2 ** (bits - 2)).round() / 2 ** (bits - 2)  # the largest are between 1 and 4
    assert (max(errors_over_budget(dv[:, :, None], exact, seen)) <= 1.0) == (bits == 24)


def test_how_often_a_maximum_is_outside_by_bad_luck() -> None:
    """The table at `witness`: of D draws of M normal errors each, integrated over the largest of all."""
    header, *rows = [
        line.split() for line in (witness.__doc__ or "").splitlines() if line.strip()[:3] in ("dra", "M =")
    ]
    largest = torch.linspace(0.0, 12.0, 1_000_001, dtype=torch.float64)
    below, twice = (torch.erf(x * largest / math.sqrt(2.0)) for x in (1.0, 2.0))
    shown = 0
    for row in rows:
        m = int(row[2])
        for draws, percent in zip(header[1:], row[3::2], strict=False):
            chance = torch.trapezoid(1.0 - twice**m, below ** (int(draws) * m)).item()
            assert float(percent) / 100 == pytest.approx(chance, rel=0.12)
            shown += 1
    assert shown == 14
