"""SDPA's masks by every backend, lengths that a compiler traces as symbols, and explain beside the op's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from backends.here import FUSED, double
from integrations.test_sdpa import BATCH, MASKS, NHEADS, SEQLEN_Q, boolean, floating, inputs, spec
from rounding import assert_rounded
from torch.nn.attention.bias import causal_lower_right

from flashsigmoid import explain
from flashsigmoid.backends import hopper, problem
from flashsigmoid.integrations.flash_attn import flash_attn_func, flash_attn_qkvpacked_func
from flashsigmoid.integrations.sdpa import explain_sdpa, scaled_dot_product_sigmoid_attention


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", [name for name, (_, is_fast) in MASKS.items() if is_fast])
def test_what_is_no_mask_to_a_backend_is_right_by_each(backend, name) -> None:
    """With a tensor of b beside it, scale, and the gradient of a float mask."""
    dtype = double(backend)["dtype"]
    *leaves, dout = inputs(BATCH, dtype=dtype)
    mask, b = MASKS[name][0], (torch.randn(NHEADS, dtype=dtype) - 2.0).requires_grad_()
    if mask.is_floating_point() and "expanded" not in name:
        mask = mask.to(dtype).requires_grad_()
        leaves.append(mask)
    keywords = {"sigmoid_bias": b, "scale": 0.3, "backend": backend}
    out = scaled_dot_product_sigmoid_attention(*leaves[:3], mask, **keywords)
    grads = torch.autograd.grad(out, [*leaves, b], dout)
    exact = [x.detach().double().requires_grad_() for x in (*leaves, b)]
    given = exact[3] if len(leaves) == 4 else mask
    expected = spec(*exact[:3], given, b=exact[-1], scale=0.3)
    assert_rounded(out.double(), expected, dtype=dtype)
    expected_grads = torch.autograd.grad(expected, exact, dout.double())
    size = max(x.abs().max().item() for x in expected_grads)  # a bias is the sum of all dS, and they cancel
    for mine, theirs in zip(grads, expected_grads, strict=True):
        assert_rounded(mine.double(), theirs, dtype=dtype, of=size)


SYMBOLS = {
    "causal, dropout": lambda n: {"is_causal": True, "dropout_p": 0.2},
    "keys": lambda n: {"attn_mask": boolean(BATCH, 1, 1, n)},
    "keys, expanded": lambda n: {"attn_mask": boolean(BATCH, 1, 1, n).expand(BATCH, NHEADS, SEQLEN_Q, n)},
    "scores, dropout": lambda n: {"attn_mask": boolean(SEQLEN_Q, n), "dropout_p": 0.2},
    "float": lambda n: {"attn_mask": floating(BATCH, 1, SEQLEN_Q, n)},
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("causal, dropout", "keys") else pytest.param(name, marks=pytest.mark.long) for name in SYMBOLS],
)
def test_compiles_whole_with_a_changing_length_and_the_default_bias(name) -> None:
    torch.compiler.reset()
    compiled = torch.compile(scaled_dot_product_sigmoid_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 9):
        results = []
        for attend in (compiled, scaled_dot_product_sigmoid_attention):
            *leaves, dout = inputs(BATCH, seqlen_k=n)
            torch.manual_seed(3)
            out = attend(*leaves, **SYMBOLS[name](n))
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        for traced, eager in zip(*results, strict=True):
            assert_rounded(traced, eager)


def test_flash_attn_compiles_whole_with_a_changing_length() -> None:
    torch.compiler.reset()

    def attend(qkv):
        first = flash_attn_qkvpacked_func(qkv, causal=True, window_size=(qkv.shape[1] // 2, -1))
        return flash_attn_func(first, *qkv.unbind(2)[1:], 0.2, None, True, (-1, 3), sigmoid_bias=None)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 9):
        qkv, results = torch.randn(2, n, 3, 4, 8, dtype=torch.float64, requires_grad=True), []
        for function in (compiled, attend):
            torch.manual_seed(3)
            out = function(qkv)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        for traced, eager in zip(*results, strict=True):
            assert_rounded(traced, eager)


def test_a_causal_bias_is_a_causal_mask_to_explain() -> None:
    *leaves, _ = inputs(BATCH)
    told = explain_sdpa(*leaves, causal_lower_right(SEQLEN_Q, leaves[1].shape[-2]), backend="blocked")
    assert (told.backend, told.problem.causal, told.problem.q_offset) == ("blocked", True, 2)


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without contents are on an sm_90, whose kernels nobody loads."""
    monkeypatch.setattr(problem, "_arch", lambda device: "sm_90" if device.type == "meta" else device.type)
    monkeypatch.setattr(hopper, "_without_gluon", lambda: None)
    problem._remembered.cache_clear()
    yield
    problem._remembered.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("wide", "backend"), [(136, "hopper"), (129, "blocked")])
def test_explain_says_what_the_op_says_of_the_same_tensors(is_causal, wide, backend, on_paper) -> None:
    """Of rows that the hardware loads, and of those that begin between its 16 bytes."""
    rows = torch.empty(4, 4096, 16, wide, dtype=torch.bfloat16, device="meta")[..., :128]
    heads = rows.transpose(1, 2)
    told, expected = explain_sdpa(heads, heads, heads, is_causal=is_causal), explain(rows, rows, rows, causal=is_causal)
    assert (told.backend, told.backward) == (expected.backend, expected.backward) == (backend, backend)
    assert (told.reasons, told.backward_reasons) == (expected.reasons, expected.backward_reasons)
    if backend != "hopper":
        assert told.reasons["hopper"].startswith("rows must begin at multiples of 16 bytes")
