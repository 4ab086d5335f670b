"""softmax_attention, the twin's function, against its formula written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from nn.formula import visible
from rounding import assert_rounded
from torch.nn import functional as F

from flashsigmoid.nn import alibi_slopes, softmax_attention


def softmax_written_out(q, k, v, keep, slopes):
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if slopes is not None:
        offset = k.shape[1] - q.shape[1]
        distance = torch.tensor([[abs(i + offset - j) for j in range(k.shape[1])] for i in range(q.shape[1])])
        scores = scores - slopes[:, None, None] * distance
    weights = scores.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("seqlens", [(7, 7), (3, 8), (8, 3), (1, 5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(None, None), (2, None), (1, 1)])
@pytest.mark.parametrize("nheads_k", [4, 2])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_sees_what_sigmoid_attention_sees(seqlens, causal, window_size, nheads_k, alibi, masked):
    seqlen_q, seqlen_k = seqlens
    q, k, v = (
        torch.randn(2, seqlen, heads, dim, dtype=torch.float64, requires_grad=True)
        for seqlen, heads, dim in ((seqlen_q, 4, 6), (seqlen_k, nheads_k, 6), (seqlen_k, nheads_k, 5))
    )
    slopes = alibi_slopes(4).double() if alibi else None
    key_mask = torch.rand(2, seqlen_k) < 0.6 if masked else None
    offset = seqlen_k - seqlen_q
    keep = torch.tensor(
        [[visible(i + offset, j, causal, window_size) for j in range(seqlen_k)] for i in range(seqlen_q)]
    )[None, None]
    if key_mask is not None:
        keep = keep & key_mask[:, None, None]
    options = {"causal": causal, "window_size": window_size, "alibi_slopes": slopes, "key_mask": key_mask}
    actual = softmax_attention(q, k, v, **options)
    expected = softmax_written_out(q, k, v, keep, slopes)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, (q, k, v), dout)
    seen = keep.any(-1).mT[..., None]
    # the oracle's own gradient is NaN in rows without keys; their dout reaches nothing
    safe = softmax_written_out(q, k, v, keep | ~keep.any(-1, keepdim=True), slopes)
    expected_gradients = torch.autograd.grad(safe, (q, k, v), dout * seen)
    assert_rounded(actual, expected)
    for name, a, e in zip("qkv", gradients, expected_gradients, strict=True):
        assert_rounded(a, e, name=f"d{name}")


@pytest.mark.parametrize(
    ("causal", "seqlen_q", "options", "plain"),
    [
        (False, 6, {}, True),
        (False, 4, {}, True),
        (True, 6, {}, True),
        (True, 4, {}, False),
        (True, 6, {"window_size": (1, None)}, False),
        (True, 6, {"alibi_slopes": alibi_slopes(2)}, False),
        (True, 6, {"key_mask": torch.ones(1, 6, dtype=torch.bool)}, False),
    ],
    ids=str,
)
def test_no_mask_tensor_where_torch_has_a_fast_kernel(monkeypatch, causal, seqlen_q, options, plain):
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: calls.append(kw) or sdpa(*a, **kw))
    q, kv = torch.randn(1, seqlen_q, 2, 8), torch.randn(1, 6, 2, 8)
    softmax_attention(q, kv, kv, causal=causal, **options)
    assert [call.get("attn_mask") is None for call in calls] == [plain]
    if plain:
        assert calls[0]["is_causal"] is causal


def test_a_row_that_sees_nothing_is_zero_whatever_torchs_kernel_leaves_there(monkeypatch):
    """cuDNN's leaves something else than zero."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **kw: torch.ones(*q.shape[:3], v.shape[3]))
    q, kv = torch.randn(1, 5, 2, 8), torch.randn(1, 2, 2, 8)
    out = softmax_attention(q, kv, kv, causal=True)
    assert (out[:, :3] == 0).all()
    assert (out[:, 3:] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": (-1, -1)}, r"window_size must be non-negative integers, None for unlimited, got \(-1, -1\)"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"alibi_slopes": torch.ones(1)}, r"alibi_slopes must have shape .*, got \(1,\)"),
        ({"dropout_p": -1.0}, r"dropout_p must be in \[0, 1\), got -1.0"),
        ({"k": torch.zeros(1, 5, 2, 8)}, "k must share batch and head_dim of q"),
        (
            {"key_mask": torch.ones(2, 1, dtype=torch.bool)},
            r"key_mask must be bool .* = \(2, 5\), got torch.bool \(2, 1\)",
        ),
        ({"key_mask": torch.ones(2, 5)}, r"key_mask must be bool .*, got torch.float32 \(2, 5\)"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    """A window of -1, as flash-attn says unlimited, saw nothing and gave zeros."""
    call = {"q": torch.zeros(2, 5, 4, 8), "k": torch.zeros(2, 5, 2, 8), "v": torch.zeros(2, 5, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        softmax_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
