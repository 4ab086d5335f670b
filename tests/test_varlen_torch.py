"""Packed sequences: what is refused, with one clear error, and torch: opcheck, compile, autocast, checkpointing."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends.here import FUSED, NAMES
from replay import assert_replayed
from rounding import assert_rounded
from torch import Tensor
from varlen import sample

from flashsigmoid import sigmoid_attention_varlen

(Q, K, V), DOUT, CU = sample()
BAD = [
    ({"q": Q[None]}, r"q must be a dense tensor \(total, nheads, head_dim\), got \(1, 17, 2, 8\)"),
    ({"k": 3}, r"k must be a dense tensor \(total, nheads, head_dim\), got int"),
    ({"v": V.half()}, r"q, k, v must share one dtype .*, got torch.float32, torch.float32, torch.float16"),
    ({"k": K.to("meta")}, r"q, k, v must be on one device, got cpu, meta, cpu"),
    ({"k": K[..., :4]}, r"k must share head_dim of q, got q \(17, 2, 8\) and k \(18, 1, 4\)"),
    ({"v": V[:9]}, r"v must share total and nheads of k, got k \(18, 1, 8\) and v \(9, 1, 6\)"),
    ({"k": Q}, r"v must share total and nheads of k, got k \(17, 2, 8\) and v \(18, 1, 6\)"),
    ({"q": K, "k": Q, "v": Q}, r"nheads must be a positive multiple of nheads_k, got nheads=1, nheads_k=2"),
    ({"v": V[..., :0]}, r"head_dim and head_dim_v must be at least 1, got 8 and 0"),
    ({"sigmoid_bias": None}, r"sigmoid_bias is required where sequences have different lengths, got None"),
    ({"sigmoid_bias": math.nan}, r"sigmoid_bias must be a number below \+inf, got nan"),
    (
        {"sigmoid_bias": torch.zeros(3, 2, 6)},
        r"sigmoid_bias must have shape \(\), \(nheads,\), \(batch, nheads\) or \(total_q, nheads\), got \(3, 2, 6\) "
        r"for q \(17, 2, 8\)",
    ),
    ({"sigmoid_bias": torch.zeros(2, 17)}, r"sigmoid_bias must have shape .*, got \(2, 17\)"),
    ({"alibi_slopes": torch.zeros(17, 2)}, r"alibi_slopes must have shape \(nheads,\) or .*, got \(17, 2\)"),
    ({"cu_seqlens_q": [0, 6, 6, 17]}, r"cu_seqlens_q must be an int32 tensor \(batch \+ 1,\), got \[0, 6, 6, 17\]"),
    (
        {"cu_seqlens_k": CU["cu_seqlens_k"].long()},
        r"cu_seqlens_k must be an int32 tensor \(batch \+ 1,\), got \(4,\) torch.int64",
    ),
    ({"cu_seqlens_q": CU["cu_seqlens_q"][:0]}, r"cu_seqlens_q must be an int32 tensor .*, got \(0,\) torch.int32"),
    ({"cu_seqlens_q": CU["cu_seqlens_q"][None]}, r"cu_seqlens_q must be an int32 tensor .*, got \(1, 4\) torch.int32"),
    ({"cu_seqlens_k": CU["cu_seqlens_k"].to("meta")}, r"cu_seqlens_k must be on the device of q, cpu, got meta"),
    ({"cu_seqlens_q": CU["cu_seqlens_q"][:3]}, r"cu_seqlens_q and cu_seqlens_k must have one length, got 3 and 4"),
    ({"max_seqlen_q": -1}, r"max_seqlen_q must be a non-negative integer, got -1"),
    ({"max_seqlen_q": 6.0}, r"max_seqlen_q must be a non-negative integer, got 6.0"),
    ({"max_seqlen_k": True}, r"max_seqlen_k must be a non-negative integer, got True"),
    ({"max_seqlen_k": torch.tensor(9)}, r"max_seqlen_k must be a non-negative integer, got tensor\(9\)"),
    ({"window_size": (-1, -1)}, r"window_size must be non-negative integers, .*, got \(-1, -1\)"),
    ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"backend": "cuda"}, r"backend must be one of auto, .*, got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_one_clear_error(change, message) -> None:
    call = {"q": Q, "k": K, "v": V, "sigmoid_bias": -1.0, **CU} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        sigmoid_attention_varlen(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize("backend", ["auto", *NAMES])
@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([1, 6, 6, 17], r"cu_seqlens_q must rise from 0 to at most 17, got \[1, 6, 6, 17\]"),
        ([0, 6, 5, 17], r"cu_seqlens_q must rise from 0 to at most 17, got \[0, 6, 5, 17\]"),
        ([0, 6, 6, 18], r"cu_seqlens_q must rise from 0 to at most 17, got \[0, 6, 6, 18\]"),
    ],
)
def test_lengths_that_the_host_reads_are_checked(backend, ends, message) -> None:
    cu = CU | {"cu_seqlens_q": torch.tensor(ends, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"^{message}"):
        sigmoid_attention_varlen(Q, K, V, sigmoid_bias=-1.0, backend=backend, **cu)


def arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of flashsigmoid::fwd that reach each optional tensor and each scalar of a packed call."""
    (q, k, v), _, cu = sample()
    leaf = [x.requires_grad_() for x in (q, k, v)]
    bias, slopes, seed = torch.randn(17, 2, requires_grad=True), torch.rand(3, 2, requires_grad=True), torch.tensor([7])
    ends = tuple(cu.values())
    tail = ((0, 0, 0, 0), "auto")
    yield *leaf, None, None, None, *ends, -2.0, None, False, None, None, None, 0.0, *tail, None, None, False, backend
    yield *leaf, bias, slopes, None, *ends, None, 0.3, True, 3, 1, None, 0.0, *tail, 11, 9, True, backend
    yield (
        *leaf,
        torch.zeros(3, 2),
        slopes,
        seed,
        *ends,
        None,
        None,
        False,
        None,
        2,
        None,
        0.5,
        *tail,
        99,
        1,
        True,
        backend,
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(("backend", "index"), [("blocked", 0), ("blocked", 2), *((name, 1) for name in FUSED)])
def test_opcheck(backend, index) -> None:
    args = list(arguments(backend))[index]
    torch.library.opcheck(torch.ops.flashsigmoid.fwd.default, args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(torch.ops.flashsigmoid.bwd.default, (torch.randn(17, 2, 6), *detached))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(backend, dynamic) -> None:
    torch.compiler.reset()  # the variants before this one count towards dynamo's limit of recompilations

    def call(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, slopes):
        return sigmoid_attention_varlen(
            q * 2, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sigmoid_bias=bias, alibi_slopes=slopes,
            max_seqlen_q=11, causal=True, window_size=(3, None), dropout_p=0.25, backend=backend,
        ).sin()  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths_q, lengths_k in (((6, 0, 5), (9, 4, 5)), ((3, 8, 1, 1), (6, 8, 0, 1))):
        tensors, dout, cu = sample(lengths_q, lengths_k)
        sides = torch.randn(sum(lengths_q), 2), torch.rand(2)
        leaves = [x.requires_grad_() for x in (*tensors, *sides)]
        results = []
        for function in (call, compiled):
            torch.manual_seed(1)
            out = function(*leaves[:3], *cu.values(), *leaves[3:])
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        for eager, traced in zip(*results, strict=True):
            assert_rounded(traced, eager)


@pytest.mark.parametrize("backend", NAMES)
def test_autocast_runs_in_its_dtype(backend) -> None:
    (q, k, v), dout, cu = sample()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    call = {"sigmoid_bias": -1.0, "backend": backend, **cu}
    with torch.autocast("cpu", torch.float16):
        out = sigmoid_attention_varlen(leaves[0], leaves[1].half(), leaves[2], **call)
    assert out.dtype == torch.float16
    assert torch.equal(out, sigmoid_attention_varlen(*(x.half() for x in leaves), **call))
    grads = torch.autograd.grad(out, leaves, dout.half())
    assert [x.dtype for x in grads] == [torch.float32] * 3
    if backend != "triton":
        with torch.autocast("cpu", torch.float16):
            assert sigmoid_attention_varlen(*(x.double() for x in leaves), **call).dtype == torch.float64


@pytest.mark.parametrize("backend", NAMES)
def test_activation_checkpointing_replays_dropout(backend) -> None:
    (q, k, v), dout, cu = sample()
    call = functools.partial(sigmoid_attention_varlen, sigmoid_bias=-1.0, dropout_p=0.5, backend=backend, **cu)
    assert_replayed(call, (q, k, v), dout)


@pytest.mark.parametrize("backend", NAMES)
def test_only_wanted_gradients(backend) -> None:
    leaf = V.clone().requires_grad_()
    call = {"sigmoid_bias": -1.0, "backend": backend, **CU}
    (dv,) = torch.autograd.grad(sigmoid_attention_varlen(Q, K, leaf, **call), leaf, DOUT)
    assert dv.isfinite().all()
    assert not sigmoid_attention_varlen(Q, K, V, **call).requires_grad


def test_meta_tensors_give_the_shape() -> None:
    q, k, v = (x.to("meta") for x in (Q, K, V))
    out = sigmoid_attention_varlen(q, k, v, sigmoid_bias=-1.0, **{name: x.to("meta") for name, x in CU.items()})
    assert (out.device.type, out.shape) == ("meta", (17, 2, 6))
