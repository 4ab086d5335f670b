"""torch's MultiheadAttention with its softmax exchanged for a sigmoid, and how ours is compared with it."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded
from torch.nn import functional as F

from flashsigmoid.nn import MultiheadAttention

DIM, HEADS = 24, 4


FORMS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 10, "vdim": 7},
    {"kdim": 10, "vdim": 7, "bias": False, "add_bias_kv": True},
]


class TorchWithSigmoid(torch.nn.Module):
    """torch.nn.MultiheadAttention, its O(n^2) path, with sigmoid(scores + b) where its softmax stands."""

    def __init__(self, *args, sigmoid_bias=None, **options):
        super().__init__()
        self.torch_mha = torch.nn.MultiheadAttention(*args, **options)
        self.batch_first = self.torch_mha.batch_first
        self.sigmoid_bias = sigmoid_bias
        # what torch's layers read before they leave for the fast path
        self._qkv_same_embed_dim, self.in_proj_bias, self.num_heads = False, 0, HEADS

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):  # fmt: skip
        sequence = 0 if query.dim() == 2 or not self.batch_first else 1
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(query.shape[sequence], key.shape[sequence], dtype=torch.bool).triu(1)
        seqlen_k = torch.tensor([key.shape[sequence]])
        if key_padding_mask is not None:
            padding = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask != 0
            seqlen_k = (~torch.atleast_2d(padding)).sum(-1)
            if attn_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
                attn_mask = F._canonical_mask(attn_mask, "", None, "", query.dtype, False)
                key_padding_mask = F._canonical_mask(key_padding_mask, "", None, "", query.dtype, False)
        n = seqlen_k + (self.torch_mha.bias_k is not None) + self.torch_mha.add_zero_attn
        b = -n.clamp(min=1).to(query.dtype).log()[:, None, None].repeat_interleave(HEADS, 0)
        if len(n) == 1:
            b = b[:1]
        if self.sigmoid_bias is not None:
            b = self.sigmoid_bias
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "softmax", lambda scores, dim: torch.sigmoid(scores + b))
            # never its fast path: weights are wanted
            training = self.torch_mha.training
            self.torch_mha.train()
            out = self.torch_mha(query, key, value, key_padding_mask, True, attn_mask, average_attn_weights)
            self.torch_mha.train(training)
        return out if need_weights else (out[0], None)


def pair(form=None, **options):
    """The oracle and ours, with the same random weights, in float64."""
    form = dict(form or {}, **options)
    torch_form = {name: value for name, value in form.items() if name != "backend"}
    oracle = TorchWithSigmoid(DIM, HEADS, **torch_form, dtype=torch.float64)
    weights = oracle.torch_mha.state_dict()
    for weight in weights.values():
        torch.nn.init.normal_(weight, std=0.4)
    ours = MultiheadAttention(DIM, HEADS, **form, dtype=torch.float64)
    ours.load_state_dict(weights, strict=True)
    return oracle, ours


def inputs(form=None, seqlen_q=5, seqlen_k=7, batch=3, batch_first=True):
    form = form or {}
    sizes = ((seqlen_q, DIM), (seqlen_k, form.get("kdim", DIM)), (seqlen_k, form.get("vdim", DIM)))
    shapes = [(batch, n, d) if batch_first else (n, batch, d) for n, d in sizes]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same(actual, expected):
    """(out, weights or None) of two computations."""
    assert (actual[1] is None) == (expected[1] is None)
    for name, a, e in zip(("out", "weights"), actual, expected, strict=True):
        if e is not None:
            assert_rounded(a, e, name=name)


def assert_agree(oracle, ours, tensors, **call):
    """Outputs, weights and every gradient."""
    (expected, expected_weights), (actual, actual_weights) = oracle(*tensors, **call), ours(*tensors, **call)
    assert_same((actual, actual_weights), (expected, expected_weights))
    dout = torch.randn_like(expected)
    results = []
    for module, out in ((oracle.torch_mha, expected), (ours, actual)):
        names, parameters = zip(*module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(out, (*tensors, *parameters), dout, allow_unused=True)
        results.append(dict(zip(("query", "key", "value", *names), gradients, strict=True)))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert gradient is not None, name
        assert_rounded(results[1][name], gradient, name=name)


def padding(batch=3, seqlen_k=7, dtype=torch.bool):
    """Nothing, the right end, and scattered keys ignored."""
    mask = torch.zeros(batch, seqlen_k, dtype=torch.bool)
    mask[1, 4:] = True
    mask[2, [0, 3]] = True
    return mask if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -math.inf)
