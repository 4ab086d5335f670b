"""The Triton kernels in torch's machinery: graphs, inductor, autocast, checkpointing, opcheck, threads, two GPUs."""

from __future__ import annotations

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu.cases import DEVICE, DTYPES
from gpu.machine import captured, nothing_waits
from gpu.packed import LENGTHS, packed_tensors
from replay import assert_replayed
from rounding import assert_rounded
from torch import Tensor
from varlen import cumulated

from flashsigmoid import sigmoid_attention, sigmoid_attention_varlen
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv

NAMES = ("out", "dq", "dk", "dv", "db", "dslopes")


@pytest.mark.parametrize("bias", [-5.0, "()", "(h,)", "(b,h)", "(t,h)"])
def test_packed_calls_never_wait_for_the_gpu(bias) -> None:
    q, k, v, dout = packed_tensors(*LENGTHS, (4, 2), (64, 64), torch.bfloat16)
    shapes = {"()": (), "(h,)": (4,), "(b,h)": (8, 4), "(t,h)": (q.shape[0], 4)}
    call: dict[str, Any] = {"sigmoid_bias": bias, "causal": True, "dropout_p": 0.1, "backend": "auto"}
    call |= {"cu_seqlens_q": cumulated(LENGTHS[0], DEVICE), "cu_seqlens_k": cumulated(LENGTHS[1], DEVICE)}
    leaves = [x.requires_grad_() for x in (q, k, v, torch.rand(4, device=DEVICE))]
    if isinstance(bias, str):
        call["sigmoid_bias"] = torch.zeros(shapes[bias], device=DEVICE, requires_grad=True)
        leaves.append(call["sigmoid_bias"])

    def step() -> tuple[Tensor, ...]:
        out = sigmoid_attention_varlen(*leaves[:3], alibi_slopes=leaves[3], **call)
        return torch.autograd.grad(out, leaves, dout)

    step()
    with nothing_waits():
        grads = step()
    assert all(x.isfinite().all() for x in grads)


def test_dense_calls_never_wait_for_the_gpu() -> None:
    tensors = make_qkv(2, 130, 70, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    options = {"causal": True, "dropout_p": 0.1, "backend": "auto"}
    leaves = [x.requires_grad_() for x in (*tensors[:3], torch.zeros(4, device=DEVICE), torch.rand(4, device=DEVICE))]

    def step() -> tuple[Tensor, ...]:
        out = sigmoid_attention(*leaves[:3], sigmoid_bias=leaves[3], alibi_slopes=leaves[4], **options)
        return torch.autograd.grad(out, leaves, tensors[3])

    step()
    with nothing_waits():
        grads = step()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_replay_in_a_graph(dtype) -> None:
    """On new data, and with another seed of dropout, which is an input like any other."""
    q, k, v, dout = make_qkv(2, 300, 270, 4, 2, 64, dtype=dtype, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device=DEVICE))]
    seed = torch.tensor([5], device=DEVICE)

    def call() -> tuple[Tensor, ...]:
        out = sigmoid_attention_shard(
            *leaves[:3], sigmoid_bias=leaves[3], q_offset=-30, causal=True, dropout_p=0.2, seed=seed, backend="triton"
        )
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    graph, results = captured(call)
    before = [x.clone() for x in call()]
    with torch.no_grad():
        for x in (*leaves, dout):
            x.copy_(torch.randn_like(x))
        seed.fill_(2**50 + 1)
    graph.replay()
    for replayed, eager, old in zip(results, call(), before, strict=True):
        assert torch.equal(replayed, eager)
        assert not torch.equal(replayed, old)


def test_a_graph_replays_with_other_lengths() -> None:
    q, k, v, dout = packed_tensors(*LENGTHS, (4, 2), (64, 64), torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device=DEVICE))]
    cu_q, cu_k = (cumulated(lengths, DEVICE) for lengths in LENGTHS)

    def call() -> tuple[Tensor, ...]:
        out = sigmoid_attention_varlen(
            *leaves[:3], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sigmoid_bias=leaves[3], causal=True, backend="triton"
        )
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    graph, results = captured(call)
    cu_q.copy_(cumulated((300, 0, 1, 77, 5, 200, 0, 100), DEVICE))
    cu_k.copy_(cumulated((1, 3, 250, 77, 0, 300, 0, 100), DEVICE))
    graph.replay()
    for replayed, eager in zip(results, call(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_with_inductor(dynamic, autocast) -> None:
    attend = functools.partial(sigmoid_attention, causal=True, window_size=(90, None))
    dtype = torch.bfloat16 if autocast else torch.float32

    def call(q, k, v, bias, slopes):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = attend(q * 2, k, v, sigmoid_bias=bias, alibi_slopes=slopes)
        return out.float().sin()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for seqlen in (70, 130):
        q, k, v, dout = make_qkv(2, 150, seqlen, 4, 2, 64, device=DEVICE)
        leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device=DEVICE), torch.rand(4, device=DEVICE))]
        results = []
        for function in (call, compiled):
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        exact = [x.detach().to(dtype).double().requires_grad_() for x in leaves[:3]]
        exact += [x.detach().double().requires_grad_() for x in leaves[3:]]
        out = attend(exact[0] * 2, *exact[1:3], sigmoid_bias=exact[3], alibi_slopes=exact[4], backend="reference").sin()
        expected = out, *torch.autograd.grad(out, exact, dout.double())
        # the same kernels, so that eager mode is a witness of its own luck, also for the few sums of db and dslopes
        for name, x, eager, traced in zip(NAMES, expected, *results, strict=True):
            assert_within_budget(f"{name} of {seqlen} keys", traced, x, eager)


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_calls_compile_with_inductor(dynamic) -> None:
    def call(q, k, v, cu_seqlens_q, cu_seqlens_k, bias):
        return sigmoid_attention_varlen(
            q * 2, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sigmoid_bias=bias, causal=True
        ).sin()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for lengths_q, lengths_k in (((60, 0, 110), (90, 40, 50)), ((30, 80), (60, 80))):
        q, k, v, dout = packed_tensors(lengths_q, lengths_k, (4, 2), (64, 64), torch.float32)
        leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(sum(lengths_q), 4, device=DEVICE))]
        results = []
        for function in (call, compiled):
            out = function(*leaves[:3], cumulated(lengths_q, DEVICE), cumulated(lengths_k, DEVICE), leaves[3])
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        for eager, traced in zip(*results, strict=True):
            assert_rounded(traced, eager)


def test_autocast_runs_in_bfloat16() -> None:
    q, k, v, dout = make_qkv(2, 50, 70, 4, 2, 64, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = sigmoid_attention(*leaves)
        cu_q, cu_k = cumulated((50, 50), DEVICE), cumulated((70, 70), DEVICE)
        flat = [x.flatten(0, 1) for x in leaves]
        packed = sigmoid_attention_varlen(*flat, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sigmoid_bias=-math.log(70))
    assert out.dtype == packed.dtype == torch.bfloat16
    assert torch.equal(out, sigmoid_attention(*(x.bfloat16() for x in leaves), backend="triton"))
    assert [x.dtype for x in torch.autograd.grad(out, leaves, dout.bfloat16())] == [torch.float32] * 3


def test_activation_checkpointing_replays_dropout() -> None:
    q, k, v, dout = make_qkv(2, 150, 170, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE)

    def call(q, k, v):
        return sigmoid_attention(q, k, v, dropout_p=0.5, backend="triton")

    assert_replayed(call, (q, k, v), dout)


def arguments() -> list[tuple[Any, ...]]:
    """Arguments of flashsigmoid::fwd, dense and packed, that reach each optional tensor."""
    q, k, v, _ = make_qkv(2, 50, 70, 4, 2, 32, 48, device=DEVICE)
    leaf = [x.requires_grad_() for x in (q, k, v)]
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    ends = cumulated((30, 0, 70), DEVICE), cumulated((60, 5, 70), DEVICE)
    slopes, seed = torch.rand(4, device=DEVICE, requires_grad=True), torch.tensor([7], device=DEVICE)
    biases = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 4, 50), (100, 4))]
    tail, sums = (((0, 0, 0, 0), "auto", None, None, needed, "triton") for needed in (False, True))
    return [
        (*leaf, None, None, None, None, None, -2.0, None, False, None, None, None, 0.0, *tail),
        (*leaf, biases[0], slopes, seed, None, None, None, 0.3, True, 30, 1, 0, 0.5, *sums),
        (*flat, biases[1], slopes, seed, *ends, None, 0.3, True, 30, 1, None, 0.5, *sums),
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("index", range(3))
def test_opcheck(index) -> None:
    args = arguments()[index]
    torch.library.opcheck(torch.ops.flashsigmoid.fwd.default, args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    dout = torch.randn(*args[0].shape[:-1], 48, device=DEVICE)
    torch.library.opcheck(torch.ops.flashsigmoid.bwd.default, (dout, *detached))


def test_threads_of_their_own() -> None:
    """Each thread's first launch, forward and backward, is one with descriptors."""
    q, k, v, dout = make_qkv(2, 113, 203, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    options = Options(causal=True)
    expected = compute(q, k, v, dout, backend="triton", **options)
    for _ in range(2):  # the threads of the second pool may have the identifiers of the first
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(compute, q, k, v, dout, backend="triton", **options) for _ in range(24)]
        for call, name in itertools.product(calls, expected):
            assert torch.equal(call.result()[name], expected[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and torch finds fewer")
def test_two_gpus_in_one_process() -> None:
    expected: dict[str, Tensor] = {}
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        tensors = make_qkv(2, 113, 203, 4, 2, 64, dtype=torch.bfloat16, device=device)
        for name, result in compute(*tensors, backend="triton", causal=True).items():
            assert result.device == torch.device(device)
            assert torch.equal(result.cpu(), expected.setdefault(name, result.cpu())), name
