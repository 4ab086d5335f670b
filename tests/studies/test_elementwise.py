"""Attention by any function of the scores: the op itself for the sigmoid, three-line loops for the others."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded
from torch.nn import functional as F

from flashsigmoid import nn, sigmoid_attention
from flashsigmoid.studies.elementwise import ACTIVATIONS, elementwise_attention
from flashsigmoid.testing import assert_within_budget, make_qkv, oracle, witness

# regimes: every shape of b, both offsets of causal, a window, ALiBi, GQA and MQA, dropout
CASES = {
    "full": ((33, 65, 4, 4), {"sigmoid_bias": -4.0}),
    "causal, fewer queries, GQA": ((33, 65, 4, 2), {"sigmoid_bias": "(h,)", "causal": True}),
    "causal, fewer keys, MQA": ((65, 33, 4, 1), {"sigmoid_bias": "()", "causal": True}),
    "window, ALiBi": ((63, 63, 2, 2), {"sigmoid_bias": "(b,h)", "window_size": (7, 3), "alibi_slopes": True}),
    "dropout": ((31, 40, 2, 1), {"sigmoid_bias": "(b,h,i)", "dropout_p": 0.3}),
}


def side(text, batch, nheads, seqlen_q):
    shapes = {"()": (), "(h,)": (nheads,), "(b,h)": (batch, nheads), "(b,h,i)": (batch, nheads, seqlen_q)}
    return text if isinstance(text, float) else -3.0 + 0.5 * torch.randn(shapes[text])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_sigmoid_is_the_op(case, dtype) -> None:
    torch.manual_seed(0)
    (seqlen_q, seqlen_k, nheads, nheads_k), options = CASES[case]
    q, k, v, dout = make_qkv(2, seqlen_q, seqlen_k, nheads, nheads_k, 32, 24, dtype=dtype)
    options = dict(options, sigmoid_bias=side(options["sigmoid_bias"], 2, nheads, seqlen_q))
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(nheads)
    leaves = {"dq": q, "dk": k, "dv": v}
    for name, option in (("db", "sigmoid_bias"), ("dslopes", "alibi_slopes")):
        if isinstance(options.get(option), torch.Tensor):
            leaves[name] = options[option].requires_grad_()
    for x in (q, k, v):
        x.requires_grad_()
    torch.manual_seed(1)
    out = elementwise_attention(torch.sigmoid)(q, k, v, **options)
    actual = {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))}
    if "dropout_p" in options:
        torch.manual_seed(1)
        options["seed"] = torch.randint(0, 2**63 - 1, (1,))
    exact, close = (f(q, k, v, dout, **options) for f in (oracle, witness))
    assert actual.keys() == exact.keys()
    for name, x in actual.items():
        assert x.dtype == leaves.get(name, q).dtype
        assert_within_budget(name, x, exact[name], close[name])


def test_a_function_that_is_a_little_off_is_caught() -> None:
    q, k, v, dout = make_qkv(2, 33, 65, 4, 4, 32)
    out = elementwise_attention(lambda s: torch.sigmoid(1.01 * s))(q, k, v, sigmoid_bias=-4.0)
    with pytest.raises(AssertionError, match="out must be inside the error budget"):
        assert_within_budget("out", out, *(f(q, k, v, dout, sigmoid_bias=-4.0)["out"] for f in (oracle, witness)))


ONE = {
    "relu": lambda s: max(s, 0.0),
    "relu2": lambda s: max(s, 0.0) ** 2,
    "gelu": lambda s: s * (1 + math.erf(s / math.sqrt(2))) / 2,
    "softplus": lambda s: math.log1p(math.exp(s)),
    "tanh": math.tanh,
    "identity": lambda s: s,
    "sigmoid": lambda s: 1 / (1 + math.exp(-s)),
}


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_is_its_equation(name, divide) -> None:
    """Causal, so that the masked weights of a function that is not 0 at 0 are seen to be 0."""
    q, k, v, _ = make_qkv(1, 3, 5, 2, 1, 4, dtype=torch.float64, score_std=2.0)
    attend = elementwise_attention(ACTIVATIONS[name], divide_by_seqlen=divide)
    out = attend(q, k, v, sigmoid_bias=-0.5, causal=True)
    expected = torch.zeros_like(out)
    for i in range(3):
        for h in range(2):
            for j in range(i + 3):  # bottom-right
                weight = ONE[name](float(q[0, i, h] @ k[0, j, 0]) / 2 - 0.5)
                expected[0, i, h] += weight * v[0, j, 0] / (5 if divide else 1)
    assert_rounded(out, expected)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, sigmoid_bias=-0.5, causal=True), leaves)


def test_without_b_it_is_minus_log_n_or_the_division() -> None:
    q, k, v, _ = make_qkv(1, 4, 6, 1, 1, 8, dtype=torch.float64)
    assert_rounded(elementwise_attention(torch.sigmoid)(q, k, v), sigmoid_attention(q, k, v))
    divided = elementwise_attention(torch.sigmoid, divide_by_seqlen=True)
    assert_rounded(divided(q, k, v), sigmoid_attention(q, k, v, sigmoid_bias=0.0) / 6)


@pytest.mark.parametrize("name", ["identity", "softplus"])
def test_a_row_that_sees_nothing_is_zero_and_nothing_is_no_keys(name) -> None:
    q, k, v, _ = make_qkv(1, 4, 2, 1, 1, 8)
    attend = elementwise_attention(ACTIVATIONS[name], divide_by_seqlen=True)
    out = attend(q, k, v, causal=True)
    assert out[0, :2].abs().max() == 0
    assert out[0, 2:].abs().min() > 0
    assert torch.equal(attend(q, k[:, :0], v[:, :0]), torch.zeros(1, 4, 1, 8))


def test_autocast_does_not_round_the_scores() -> None:
    q, k, v, _ = make_qkv(1, 9, 9, 2, 2, 16, dtype=torch.bfloat16)
    attend = elementwise_attention(F.relu, divide_by_seqlen=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(q.float(), k.float(), v.float())
    assert torch.equal(inside, attend(q, k, v))


def test_a_module_takes_it() -> None:
    """Key heads, ALiBi, and keys under a mask, whose values the module makes zero."""
    torch.manual_seed(0)
    options = {"nheads_k": 2, "position": "alibi", "sigmoid_bias": -2.0, "causal": True}
    ours = nn.SigmoidAttention(32, 4, **options)
    theirs = nn.SigmoidAttention(32, 4, **options, attention_fn=elementwise_attention(torch.sigmoid))
    theirs.load_state_dict(ours.state_dict())
    x, keep = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.bool)
    keep[0, 4:] = False
    assert_rounded(theirs(x, keep), ours(x, keep))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmoid_bias": math.nan}, r"sigmoid_bias must be a number below \+inf, got nan"),
        ({"sigmoid_bias": torch.zeros(3)}, r"sigmoid_bias must have shape \(\), \(nheads,\)"),
        ({"sigmoid_bias": -math.inf}, "sigmoid_bias must be finite for a function that does not end at 0, got -inf"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"window_size": (-1, None)}, "window_size must be non-negative integers"),
    ],
)
def test_bad_arguments_are_one_clear_error(options, message) -> None:
    q, k, v, _ = make_qkv(1, 4, 4, 2, 2, 8)
    with pytest.raises(ValueError, match=message):
        elementwise_attention(torch.tanh)(q, k, v, **options)


def test_a_bias_of_minus_infinity_is_zero_where_the_function_ends_there() -> None:
    q, k, v, _ = make_qkv(1, 4, 4, 2, 2, 8)
    assert elementwise_attention(F.softplus)(q, k, v, sigmoid_bias=-math.inf).abs().max() == 0
