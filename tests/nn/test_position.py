"""Rotary embeddings, ALiBi slopes, sin-cos tables and CAPE against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded

from flashsigmoid.nn import CAPE, RotaryEmbedding, alibi_bias, alibi_slopes, sincos_positions


def test_a_rotated_product_depends_on_the_distance_only():
    rope = RotaryEmbedding(8)
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def product(i, j):
        return rope(q.expand(1, 1, 1, 8), offset=i).flatten() @ rope(k.expand(1, 1, 1, 8), offset=j).flatten()

    # an angle of 1003 is rounded to eps / 2 of itself
    assert_rounded(product(3, 1), product(1003, 1001), of=1003.0, terms=8)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_rotary_turns_along_seqlen_and_never_along_heads():
    x = torch.randn(1, 1, 1, 8).expand(2, 6, 3, 8)
    y = RotaryEmbedding(8)(x)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[:, :, 0], y[:, :, 1])
    assert (y[:, 0] != y[:, 1]).any()
    assert_rounded(y.norm(dim=-1), x.norm(dim=-1), 16)  # 4 roundings of each feature, a sum of 8 squares


def test_rotary_offset_continues_a_sequence_and_any_length_works():
    rope = RotaryEmbedding(8)
    for seqlen in (1, 5, 64, 65, 300, 3):
        x = torch.randn(1, seqlen, 2, 8)
        whole = rope(x)
        split = seqlen // 2
        assert torch.equal(torch.cat((rope(x[:, :split]), rope(x[:, split:], offset=split)), 1), whole)
    assert rope(torch.randn(2, 0, 2, 8)).shape == (2, 0, 2, 8)


def test_rotary_turns_bf16_in_float32():
    """Angles in bfloat16 would be off by radians at position 5000."""
    x = torch.randn(1, 2, 1, 16).bfloat16()
    rope = RotaryEmbedding(16)
    y = rope(x, offset=5000)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rope(x.double(), offset=5000).bfloat16())


def test_rotary_tables_are_exact_far_out():
    x = torch.zeros(1, 1, 1, 128)
    x[..., :64] = 1.0
    y = RotaryEmbedding(128)(x, offset=100_003)[0, 0, 0]
    angles = [100_003 * 10_000.0 ** (-i / 64) for i in range(64)]
    assert_rounded(y, torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]), 4)


@pytest.mark.parametrize("head_dim", [0, 7])
def test_rotary_needs_an_even_head_dim(head_dim):
    with pytest.raises(ValueError, match=f"head_dim must be positive and even .*, got {head_dim}"):
        RotaryEmbedding(head_dim)


@pytest.mark.parametrize("shape", [(5, 5, 8), (1, 5, 2, 6)])
def test_rotary_needs_the_dimensions_of_heads(shape):
    with pytest.raises(ValueError, match=r"x must be \(batch, seqlen, nheads, head_dim=8\), got \("):
        RotaryEmbedding(8)(torch.zeros(shape))


@pytest.mark.parametrize("base", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("make", [RotaryEmbedding, CAPE, lambda dim, base: sincos_positions(3, dim, base=base)])
def test_a_base_without_wavelengths_is_one_clear_error(make, base):
    with pytest.raises(ValueError, match=f"base must be positive and finite, got {base}"):
        make(4, base=base)


@pytest.mark.parametrize("nheads", [1, 2, 8, 16])
def test_alibi_slopes_are_geometric(nheads):
    assert_rounded(alibi_slopes(nheads), torch.tensor([2.0 ** (-8.0 * h / nheads) for h in range(1, nheads + 1)]), 1)


@pytest.mark.parametrize(("nheads", "power"), [(3, 2), (6, 4), (12, 8), (15, 8)])
def test_alibi_slopes_of_other_numbers_of_heads(nheads, power):
    """The slopes of the next lower power of two, then every second one of twice that power."""
    expected = alibi_slopes(power).tolist() + alibi_slopes(2 * power)[0::2].tolist()[: nheads - power]
    slopes = alibi_slopes(nheads)
    assert slopes.dtype == torch.float32
    assert_rounded(slopes, torch.tensor(expected), 1)
    assert len(set(expected)) == nheads


def test_alibi_slopes_error():
    with pytest.raises(ValueError, match="nheads must be positive, got 0"):
        alibi_slopes(0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 3, 129, 2049])
def test_alibi_bias_counts_the_keys_that_a_slope_lets_through(n, causal):
    # 0 lets all through, and a negative slope, which favours far keys, more than all
    slopes = torch.cat((alibi_slopes(6), torch.tensor([0.0, 1e-9, -(2.0**-6)])))
    distance = torch.arange(n, dtype=torch.float64) - (0 if causal else n // 2)
    expected = -torch.logsumexp(-slopes.double()[:, None] * distance.abs(), -1)
    assert_rounded(alibi_bias(slopes, n, causal=causal), expected.float(), 1)
    assert_rounded(alibi_bias(slopes, n, causal=causal)[6].item(), -math.log(n), 1, dtype=torch.float32)


@pytest.mark.parametrize("n", [2, 48, 512])
def test_alibi_bias_of_an_even_number_of_keys_is_between_its_neighbours(n):
    """An even n has no middle row: of those beside it, which see n/2 keys on one side and n/2 - 1 on the other."""
    m = torch.cat((alibi_slopes(4), alibi_slopes(16), torch.tensor([0.0]))).double()
    distance = torch.arange(n, dtype=torch.float64) - n // 2
    keys = (-m[:, None] * distance.abs()).exp().sum(-1)
    found = alibi_bias(m, n, causal=False)
    assert_rounded(found, -(keys + (-m * n / 2).exp() * (m / 4).tanh()).log().float(), 1)
    before, after = (alibi_bias(m, n + step, causal=False) for step in (-1, 1))
    assert (after <= found).all()
    assert (found <= before).all()


@pytest.mark.parametrize("n", [0.5, math.inf, math.nan])
def test_alibi_bias_errors(n):
    with pytest.raises(ValueError, match=f"seqlen must be at least 1 and finite, got {n}"):
        alibi_bias(alibi_slopes(4), n)


def test_sincos_1d():
    table = sincos_positions(5, 6, base=100.0)
    for p in range(5):
        for i in range(3):
            angle = p * 100.0 ** (-2 * i / 6)
            assert_rounded(table[p, [i, 3 + i]], torch.tensor([math.sin(angle), math.cos(angle)]), 4)


def test_sincos_2d_is_the_row_then_the_column():
    table = sincos_positions((3, 5), 8, dtype=torch.float64)
    assert table.shape == (15, 8)
    rows, columns = (sincos_positions(n, 4, dtype=torch.float64) for n in (3, 5))
    for r in range(3):
        for c in range(5):
            assert torch.equal(table[5 * r + c], torch.cat((rows[r], columns[c])))
    assert len(table.unique(dim=0)) == 15


@pytest.mark.parametrize(("size", "dim", "multiple"), [(4, 3, 2), ((2, 2), 6, 4), (4, 0, 2)])
def test_sincos_errors(size, dim, multiple):
    with pytest.raises(ValueError, match=f"dim must be a positive multiple of {multiple} .*, got {dim}"):
        sincos_positions(size, dim)


def test_cape_at_rest_is_sincos_around_the_middle():
    """Positions -3 to 3; a sequence padded to seven has the middle of its own five."""
    cape = CAPE(6, base=100.0).eval()
    table = sincos_positions(8, 6, base=100.0)
    out = cape(torch.zeros(2, 7, 6), torch.tensor([7, 5]))
    sine_is_odd = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    assert_rounded(out[0, 3:], table[:4], 4)
    assert_rounded(out[0, :3], table[1:4].flip(0) * sine_is_odd, 4)
    assert_rounded(out[1], torch.cat((table[1:3].flip(0) * sine_is_odd, table[:5])), 4)
    x = torch.randn(1, 7, 6)
    assert_rounded(cape(x) - x, out[:1], 4)


def test_cape_draws_what_its_equation_says():
    """Each source of change alone, with its bounds nearly reached by 4,000 sequences."""
    n, rest = 5, torch.arange(5) - 2.0
    alone = {"max_shift": 0.0, "max_jitter": 0.0, "max_scale": 1.0}

    def drawn(**changes):
        cape = CAPE(4, **{**alone, **changes}, step=2.0)
        return cape.positions(4000, n, None, torch.device("cpu"))

    assert torch.equal(drawn(), (2.0 * rest).expand(4000, n))
    shift = drawn(max_shift=3.0) - 2.0 * rest
    assert_rounded(shift, shift[:, :1].expand(-1, n), 4)
    jitter = drawn(max_jitter=0.5) - 2.0 * rest
    assert (jitter[:, 0] - jitter[:, 1]).abs().max() > 0.9
    for found, bound in ((shift, 3.0), (jitter, 0.5)):
        assert 0.98 * bound < found.max() <= bound + 1e-5
        assert -0.98 * bound > found.min() >= -bound - 1e-5
        assert found.mean().abs() < 0.05 * bound
    scale = drawn(max_scale=2.0)[:, 4] / 4.0
    assert 0.5 <= scale.min() < 0.51
    assert 1.97 < scale.max() <= 2.0
    assert scale.log().mean().abs() < 0.05  # uniform in its logarithm


def test_cape_is_still_in_eval_mode_and_keeps_the_dtype():
    cape, x = CAPE(4), torch.zeros(2, 9, 4)
    assert not torch.equal(cape(x), cape(x))
    assert torch.equal(cape.eval()(x), cape(x))
    assert cape(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 5}, "dim must be positive and even, got 5"),
        ({"max_shift": -1.0}, "max_shift must be at least 0 and finite, got -1.0"),
        ({"max_jitter": math.nan}, "max_jitter must be at least 0 and finite, got nan"),
        ({"max_scale": 0.9}, "max_scale must be at least 1 and finite, got 0.9"),
        ({"step": 0.0}, "step must be positive and finite, got 0.0"),
    ],
)
def test_cape_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        CAPE(**{"dim": 4, **arguments})
