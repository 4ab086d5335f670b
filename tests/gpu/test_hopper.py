"""The Hopper kernels on a Hopper GPU, called directly: no backend selects them yet."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from flashsigmoid.backends.problem import make_problem
from flashsigmoid.testing import assert_within_budget, make_qkv, oracle, witness

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
SIZES = [(1, 1), (64, 64), (100, 333), (257, 257), (1000, 64), (640, 1024)]
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 30)},
    "causal window": {"causal": True, "window_size": (70, None)},
    "offset": {"causal": True, "q_offset": -40},
    "slopes": {"causal": True, "alibi_slopes": (4,)},
    "rows": {"sigmoid_bias": (2, 4, "rows"), "causal": True},
    "heads": {"sigmoid_bias": (4,)},
    "b = 0": {"sigmoid_bias": 0.0},
    "wide": {"sigmoid_bias": -5.0},
}


def compute(q, k, v, dout, options: dict[str, Any], sigmoid: str) -> dict[str, torch.Tensor]:
    """out, and dq, dk, dv where there is a backward."""
    from flashsigmoid.backends.hopper import launch

    b = options.get("sigmoid_bias", -math.log(k.shape[1]))
    bias = b if isinstance(b, torch.Tensor) else None
    left, right = options.get("window_size", (None, None))
    slopes = options.get("alibi_slopes")
    problem = make_problem(
        q, k, v, bias=bias, slopes=slopes, sigmoid_bias=None if bias is not None else b, scale=None,
        causal=options.get("causal", False), window_left=left, window_right=right, q_offset=options.get("q_offset"),
        dropout_p=0.0, origin=(0, 0, 0, 0), sigmoid=sigmoid,
    )  # fmt: skip
    assert launch.unsupported(problem) is None
    results = {"out": launch.forward(problem, q, k, v, bias, slopes)}
    if launch.unsupported_backward(problem) is None:
        results |= zip(("dq", "dk", "dv"), launch.backward(problem, dout, q, k, v), strict=True)
    return results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_backward(name, head_dim, dtype) -> None:
    """Every size and formula of a class of options; GQA of two."""
    for (seqlen_q, seqlen_k), sigmoid in itertools.product(SIZES, ("auto", "exact", "fast")):
        q, k, v, dout = make_qkv(2, seqlen_q, seqlen_k, 4, 2, head_dim, dtype=dtype, device=DEVICE)
        options = dict(OPTIONS[name])
        for key, spread in (("alibi_slopes", torch.rand), ("sigmoid_bias", torch.randn)):
            if isinstance(options.get(key), tuple):
                shape = [seqlen_q if n == "rows" else n for n in options[key]]
                options[key] = spread(*shape, device=DEVICE) - (5.0 if key == "sigmoid_bias" else 0.0)
        options.setdefault("sigmoid_bias", -math.log(seqlen_k))
        expected, seen = oracle(q, k, v, dout, **options), witness(q, k, v, dout, draws=8, **options)
        for tensor, result in compute(q, k, v, dout, options, sigmoid).items():
            what = f"{tensor} of {name}, {seqlen_q} x {seqlen_k}, {sigmoid}"
            assert_within_budget(what, result, expected[tensor], seen[tensor])


def test_long_rows() -> None:
    q, k, v, dout = make_qkv(1, 300, 40_000, 2, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    options = {"sigmoid_bias": -math.log(40_000), "causal": True}
    expected, seen = oracle(q, k, v, dout, **options), witness(q, k, v, dout, **options)
    for tensor, result in compute(q, k, v, dout, options, "auto").items():
        assert_within_budget(tensor, result, expected[tensor], seen[tensor])
