"""The specification against three lines of loops, against finite differences, and in its limits."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded

from flashsigmoid import sigmoid_attention
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import make_qkv

DOUBLE = {"dtype": torch.float64}


def loop(q, k, v, *, bias, scale, band, slopes, q_offset):
    """out, element by element, with math.exp: nothing shared with the package."""
    batch, seqlen_q, nheads, _ = q.shape
    _, seqlen_k, nheads_k, head_dim_v = v.shape
    out = torch.zeros(batch, seqlen_q, nheads, head_dim_v, **DOUBLE)
    for b in range(batch):
        for i in range(seqlen_q):
            for h in range(nheads):
                for j in range(seqlen_k):
                    key = h // (nheads // nheads_k)
                    distance = i + q_offset - j
                    if not -band[1] <= distance <= band[0]:
                        continue
                    s = (
                        scale * float(q[b, i, h] @ k[b, j, key])
                        + float(bias[b, h, i])
                        - float(slopes[b, h]) * abs(distance)
                    )
                    out[b, i, h] += v[b, j, key] / (1.0 + math.exp(-s))
    return out


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(4, 6), (6, 4), (1, 3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(None, None), (2, 1), (0, 0)])
@pytest.mark.parametrize("nheads_k", [4, 2, 1])
def test_equals_a_loop(seqlen_q, seqlen_k, causal, window, nheads_k) -> None:
    q, k, v, _ = make_qkv(2, seqlen_q, seqlen_k, 4, nheads_k, 8, 5, **DOUBLE)
    bias, slopes = torch.randn(2, 4, seqlen_q, **DOUBLE), torch.rand(2, 4, **DOUBLE)
    left, right = (math.inf if side is None else side for side in window)
    band = (left, min(right, 0) if causal else right)
    expected = loop(q, k, v, bias=bias, scale=0.3, band=band, slopes=slopes, q_offset=seqlen_k - seqlen_q)
    out = sigmoid_attention(
        q,
        k,
        v,
        sigmoid_bias=bias,
        scale=0.3,
        causal=causal,
        window_size=window,
        alibi_slopes=slopes,
        backend="reference",
    )
    assert_rounded(out, expected)


@pytest.mark.parametrize("q_offset", [-3, 0, 2, 100])
def test_q_offset_equals_a_loop(q_offset) -> None:
    q, k, v, _ = make_qkv(1, 5, 6, 2, 2, 4, **DOUBLE)
    zeros = torch.zeros(1, 2, 5, **DOUBLE)
    expected = loop(q, k, v, bias=zeros - 1, scale=0.5, band=(math.inf, 0), slopes=zeros[..., 0], q_offset=q_offset)
    out = sigmoid_attention_shard(q, k, v, sigmoid_bias=-1.0, q_offset=q_offset, causal=True, backend="reference")
    assert_rounded(out, expected)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_shape", [(), (4,), (2, 4), (2, 4, 3)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(backend, causal, bias_shape, dropout_p) -> None:
    q, k, v, _ = make_qkv(2, 3, 5, 4, 2, 3, 2, **DOUBLE)
    bias, slopes = torch.randn(bias_shape, **DOUBLE), torch.rand(4, **DOUBLE)
    seed = torch.tensor([5])

    def call(q, k, v, bias, slopes):
        return sigmoid_attention_shard(
            q, k, v, sigmoid_bias=bias, q_offset=2, causal=causal, window_size=(3, None), alibi_slopes=slopes,
            dropout_p=dropout_p, seed=seed, backend=backend,
        )  # fmt: skip

    leaves = [x.requires_grad_() for x in (q, k, v, bias, slopes)]
    assert torch.autograd.gradcheck(call, leaves)


def test_gradgradcheck() -> None:
    q, k, v, _ = make_qkv(1, 3, 4, 2, 1, 3, 2, **DOUBLE)
    bias, slopes = torch.randn(2, **DOUBLE), torch.rand(2, **DOUBLE)

    def call(q, k, v, bias, slopes):
        return sigmoid_attention(q, k, v, sigmoid_bias=bias, causal=True, alibi_slopes=slopes, backend="reference")

    assert torch.autograd.gradgradcheck(call, [x.requires_grad_() for x in (q, k, v, bias, slopes)])
