"""Softmax on FlexAttention is softmax, and who is sent there. On the CPU torch has its forward only."""

from __future__ import annotations

import pytest
import torch

from flashsigmoid.nn import alibi_slopes, softmax_attention
from flashsigmoid.nn.flex import flex_softmax, fused_softmax_attention, softmax_kernel
from flashsigmoid.testing import assert_within_budget


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window_size", [(None, None), (40, None), (20, 10)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("nheads_k", [4, 2])
def test_it_is_softmax(monkeypatch, window_size, causal, alibi, nheads_k) -> None:
    """Not compiled, which takes seconds each; the error of SDPA in float32 is the witness."""
    from flashsigmoid.nn import flex

    monkeypatch.setattr(flex, "_compiled_flex", flex._flex)
    q, k, v = (torch.randn(2, 150, heads, 32) for heads in (4, nheads_k, nheads_k))
    slopes = alibi_slopes(4) if alibi else None
    options = {"scale": 0.2, "causal": causal, "window_size": window_size, "alibi_slopes": slopes}
    oracle = softmax_attention(q.double(), k.double(), v.double(), **options)
    witness = softmax_attention(q, k, v, **options)
    assert_within_budget("out", flex_softmax(q, k, v, 0.2, causal, window_size, slopes), oracle, witness)


@pytest.mark.long  # a compiler takes its time
def test_compiled_it_is_softmax() -> None:
    q, k, v = (torch.randn(1, 256, 2, 32) for _ in range(3))
    options = {"scale": 0.2, "causal": True, "alibi_slopes": alibi_slopes(2)}
    oracle = softmax_attention(q.double(), k.double(), v.double(), **options)
    with torch.no_grad():
        actual = flex_softmax(q, k, v, 0.2, True, (None, None), alibi_slopes(2))
    assert_within_budget("out", actual, oracle, softmax_attention(q, k, v, **options))


def test_who_is_sent_there() -> None:
    assert softmax_kernel("cuda", square=True, alibi=True) == "flex"
    assert softmax_kernel("cuda", square=True, alibi=False, window_size=(8, None)) == "flex"
    assert softmax_kernel("cuda", square=True, alibi=False) == "sdpa"
    assert softmax_kernel("cuda", square=True, alibi=True, dropout_p=0.1) == "sdpa"
    assert softmax_kernel("cuda", square=False, alibi=True) == "sdpa"
    assert softmax_kernel("cpu", square=True, alibi=True) == "sdpa"
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    options = {"scale": 0.3, "causal": True, "alibi_slopes": alibi_slopes(2)}
    assert torch.equal(fused_softmax_attention(q, k, v, **options), softmax_attention(q, k, v, **options))


@pytest.mark.long  # a compiler takes its time
@pytest.mark.parametrize("nheads", [2, 6])
def test_slopes_that_the_compiled_graph_asks_for(nheads: int) -> None:
    """As a model that is compiled whole does; computed there they would leave FlexAttention without a kernel."""
    q, k, v = (torch.randn(1, 256, nheads, 32) for _ in range(3))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flex_softmax(q, k, v, 0.2, True, (None, None), alibi_slopes(nheads, q.device))

    options = {"scale": 0.2, "causal": True, "alibi_slopes": alibi_slopes(nheads)}
    oracle = softmax_attention(q.double(), k.double(), v.double(), **options)
    with torch.no_grad():
        actual = torch.compile(attend, fullgraph=True)(q, k, v)
    assert_within_budget("out", actual, oracle, softmax_attention(q, k, v, **options))
