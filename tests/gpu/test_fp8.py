"""The float8 kernel on a GPU: inside the error budget of a witness that rounds its weights as the kernel does."""

from __future__ import annotations

import math

import pytest
import torch

from flashsigmoid import sigmoid_attention_fp8
from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.testing import assert_within_budget, make_qkv

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)
FP8 = torch.float8_e4m3fn


def rounded(a: torch.Tensor, block: int, shift: float) -> torch.Tensor:
    """Weights (batch, nheads, queries, keys) in e4m3, each row of a block of keys scaled to [128, 256) * shift."""
    parts = []
    for part in a.split(block, dim=-1):
        factor = shift * torch.exp2(7 - part.amax(-1, keepdim=True).clamp(min=1e-30).log2().floor())
        parts.append((part * factor).float().to(FP8).double() / factor)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(113, 203), (1024, 1024), (300, 4097)])
@pytest.mark.parametrize("bias", ["-log n", "zero", "rows"])
def test_inside_the_budget(head_dim, causal, seqlen_q, seqlen_k, bias) -> None:
    q, k, v, _ = (x.to(FP8) for x in make_qkv(2, seqlen_q, seqlen_k, 4, 2, head_dim, device="cuda"))
    slopes = torch.rand(4, device="cuda") * 0.01
    b = {"-log n": -math.log(seqlen_k), "zero": 0.0, "rows": torch.randn(2, 4, seqlen_q, device="cuda") - 5.0}[bias]
    scales = 0.7, torch.rand(2, device="cuda") + 0.5, torch.rand(2, 2, device="cuda") + 0.5
    out = sigmoid_attention_fp8(
        q, k, v, *scales, sigmoid_bias=b, causal=causal, alibi_slopes=slopes, out_dtype=torch.float32, backend="triton"
    )
    exact_k = k.double() * scales[1][:, None]
    exact_v = (v.double() * scales[2][:, None, :, None]).repeat_interleave(2, dim=2).transpose(1, 2)
    side = b.double() if isinstance(b, torch.Tensor) else b
    a = attention_weights(
        q.double() * 0.7, exact_k, sigmoid_bias=side, causal=causal, alibi_slopes=slopes.double()
    )  # fmt: skip
    expected = (a @ exact_v).transpose(1, 2)
    # another shift rounds the same weights otherwise, by as much
    draws = [(block, shift) for block in (64, 128) for shift in (0.9, 1.0, 1.07, 1.15, 1.26, 1.38, 1.5, 1.65)]
    witness = torch.stack([(rounded(a, *draw) @ exact_v).transpose(1, 2) for draw in draws])
    assert_within_budget("out", out, expected, witness)
