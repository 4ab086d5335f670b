"""Modules in float32 and bfloat16 inside the error budget: float64 oracle, kernel-like witness."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from flashsigmoid.backends import reference
from flashsigmoid.nn import MultiheadAttention, SigmoidAttention, SoftmaxAttention
from flashsigmoid.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]


def kernel_like(q, k, v, *, sigmoid_bias, scale, causal, window_size, alibi_slopes, **unused):
    """Scores, sigmoid and sums in float32, A and the result rounded to the dtype of q, as a good kernel does."""
    options = {"scale": scale, "causal": causal, "window_size": window_size, "alibi_slopes": alibi_slopes}
    a = reference.attention_weights(q, k, sigmoid_bias=sigmoid_bias, **options)
    return weighted(a, v)


def softmax_kernel_like(q, k, v, *, scale, causal, **unused):
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide))
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return weighted(scores.softmax(-1), v)


def weighted(a, v):
    v_ = v.to(a.dtype).repeat_interleave(a.shape[1] // v.shape[2], 2)
    return torch.einsum("bhij,bjhd->bihd", a.to(v.dtype).to(a.dtype), v_).to(v.dtype)


def results(module, dtype, run, *inputs):
    """Output, gradients of the inputs and of the matrices, from the same rounded numbers whatever the dtype."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = run(module, *inputs)
    named = {name: p for name, p in module.named_parameters() if p.dim() == 2}
    leaves = {**{f"d{i}": x for i, x in enumerate(inputs)}, **named}
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)
    return {
        "out": out,
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True)),
    }


def assert_module_within_budget(module, witness_module, dtype, run, witness_run, *inputs):
    module, witness_module = module.to(dtype), witness_module.to(dtype)
    inputs = [x.to(dtype) for x in inputs]
    actual = results(module, dtype, run, *inputs)
    witness = results(witness_module, dtype, witness_run, *inputs)
    oracle = results(witness_module, torch.float64, witness_run, *inputs)
    assert actual.keys() == oracle.keys()
    for name in oracle:
        assert actual[name].dtype == dtype
        assert_within_budget(name, actual[name], oracle[name], witness[name])


# 1: one key; 33 and 127: ends inside a block; heads 5/5, 6/2, 4/1 and head_dim 8, 10, 40
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "seqlen", "options"),
    [
        (40, 1, {"nheads": 5}),
        (40, 127, {"nheads": 5}),
        (60, 33, {"nheads": 6, "nheads_k": 2, "position": "rope", "causal": True}),
        (60, 127, {"nheads": 6, "nheads_k": 2, "position": "alibi", "causal": True, "gate": True}),
        (160, 65, {"nheads": 4, "nheads_k": 1, "window_size": (9, 3), "sigmoid_bias": -3.0}),
    ],
    ids=str,
)
def test_sigmoid_attention(dim, seqlen, options, dtype, masked):
    module = SigmoidAttention(dim, **options)
    witness = SigmoidAttention(dim, **options, attention_fn=kernel_like)
    witness.load_state_dict(module.state_dict())
    key_mask = torch.rand(3, seqlen) < 0.7 if masked and seqlen > 1 else None
    run = lambda module, x: module(x, key_mask)  # noqa: E731
    assert_module_within_budget(module, witness, dtype, run, run, torch.randn(3, seqlen, dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seqlen", "options"),
    [(33, {}), (127, {"causal": True, "position": "rope"})],
    ids=str,
)
def test_softmax_attention(seqlen, options, dtype):
    module = SoftmaxAttention(60, 6, **options)
    witness = SoftmaxAttention(60, 6, **options, attention_fn=softmax_kernel_like)
    witness.load_state_dict(module.state_dict())
    run = lambda module, x: module(x)  # noqa: E731
    assert_module_within_budget(module, witness, dtype, run, run, torch.randn(3, seqlen, 60))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seqlens", "form", "call"),
    [
        ((1, 1), {}, {}),
        ((33, 127), {"kdim": 24, "vdim": 16}, {}),
        ((65, 65), {"add_bias_kv": True, "add_zero_attn": True}, {"is_causal": True}),
        ((63, 40), {}, {"padded": True}),
    ],
    ids=str,
)
def test_multihead_attention(seqlens, form, call, dtype, need_weights):
    seqlen_q, seqlen_k = seqlens
    module = MultiheadAttention(40, 5, batch_first=True, **form)
    call = dict(call)
    padding = torch.rand(3, seqlen_k) < 0.4 if call.pop("padded", False) else None

    def run(module, query, key, value):
        return module(query, key, value, padding, need_weights, **call)[0]

    def witness_run(module, query, key, value):
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        biases = module.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        q, k, v = (torch.nn.functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        bias = torch.full((3, 5), -math.log(seqlen_k), dtype=torch.promote_types(q.dtype, torch.float32))
        if padding is not None:
            v = v.masked_fill(padding[..., None], 0.0)
            bias = -(~padding).sum(-1, keepdim=True).to(bias.dtype).log().expand(3, 5)
        if module.bias_k is not None:
            k, v = (torch.cat((x.expand(3, -1, -1), y), 1) for x, y in ((module.bias_k, k), (module.bias_v, v)))
            bias = torch.full_like(bias, -math.log(seqlen_k + 2))
        q, k, v = (x.unflatten(-1, (5, 8)) for x in (q, k, v))
        out = kernel_like(
            q,
            k,
            v,
            sigmoid_bias=bias,
            scale=None,
            causal=call.get("is_causal", False),
            window_size=(None, None),
            alibi_slopes=None,
        )
        return module.out_proj(out.flatten(2))

    inputs = (torch.randn(3, n, d) for n, d in ((seqlen_q, 40), (seqlen_k, module.kdim), (seqlen_k, module.vdim)))
    assert_module_within_budget(module, copy.deepcopy(module), dtype, run, witness_run, *inputs)
