"""The decode kernel in Triton's interpreter: every form of a cache inside the error budget; planted faults.

Lengths, caches and pages are those of test_kvcache.py: NaN stands wherever nothing may be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends.here import IS_INTERPRETED
from rounding import assert_rounded
from test_kvcache import BIAS, CAPACITY, OPTIONS, assert_is_attention, filled, paged
from torch import Tensor

from flashsigmoid import BackendUnsupported, sigmoid_attention_with_kvcache, sigmoid_attention_with_prefix
from flashsigmoid.backends import cached, decode
from flashsigmoid.backends.problem import Problem
from flashsigmoid.kvcache import explain_with_kvcache
from flashsigmoid.testing import assert_within_budget, errors_over_budget, make_qkv, oracle, witness

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")
# nothing, less than the queries, a block of keys and a part of one, all of the capacity
LENGTHS = (0, 3, 50, CAPACITY)


def attend(*tensors: Any, **options: Any) -> Tensor:
    return sigmoid_attention_with_kvcache(*tensors, **{"sigmoid_bias": BIAS, "backend": "triton", **options})


@pytest.mark.parametrize("num_splits", [1, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_in_any_number_of_parts(options, num_splits):
    q, k_cache, v_cache, _, whole = filled(LENGTHS, seqlen_q=7)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    out = attend(q, k_cache, v_cache, cache_seqlens=lengths, num_splits=num_splits, **options)
    assert out.is_contiguous()
    assert_is_attention(out, q, whole, **options)


@pytest.mark.parametrize("page_size", [16, 32])  # less than a block of keys, and as many
@pytest.mark.parametrize("options", [{}, {"window_size": (20, None)}], ids=["plain", "window"])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_pages_are_the_contiguous_cache_bit_for_bit(page_size, options, num_splits):
    q, k_cache, v_cache, (k, v), whole = filled((0, 15, 16, 61), new=5, seqlen_q=5)
    k_pages, v_pages, table = paged(k_cache, v_cache, page_size)
    options = {"cache_seqlens": torch.tensor([0, 15, 16, 61]), "num_splits": num_splits, **options}
    out = attend(q, k_cache, v_cache, k, v, **options)
    used = (torch.tensor([[0], [15], [16], [61]]) + 5 + page_size - 1) // page_size
    # what is beyond a length names no page
    table = table.long().masked_fill(torch.arange(table.shape[1]) >= used, -7)
    assert torch.equal(attend(q, k_pages, v_pages, k, v, page_table=table, **options), out)
    assert_is_attention(out, q, whole, **{name: x for name, x in options.items() if name == "window_size"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("nheads", "nheads_k", "head_dim", "head_dim_v"),
    [(4, 4, 40, 24), (4, 2, 64, 64), (6, 2, 16, 128), (8, 1, 111, 72), (3, 1, 256, 256)],
)
def test_heads_and_dims(dtype, nheads, nheads_k, head_dim, head_dim_v):
    sizes = {"nheads": nheads, "nheads_k": nheads_k, "head_dim": head_dim, "head_dim_v": head_dim_v}
    q, k_cache, v_cache, (k, v), whole = filled((1, 17, 80), new=1, dtype=dtype, **sizes)
    out = attend(q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor([1, 17, 80], dtype=torch.int32))
    assert out.dtype == dtype
    assert_is_attention(out, q, whole)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(None, None), (9, 2)])
def test_more_rows_than_a_block_has(causal, window_size):
    """By its name the kernel also takes a chunk of prefill; blocks of rows see different keys."""
    q, k_cache, v_cache, _, whole = filled((15, 70), seqlen_q=18)
    options = {"causal": causal, "window_size": window_size}
    out = attend(q, k_cache, v_cache, cache_seqlens=torch.tensor([15, 70]), num_splits=2, **options)
    assert_is_attention(out, q, whole, **options)


def test_both_reductions_add_and_the_deterministic_one_is_taken_when_asked_for(monkeypatch):
    from flashsigmoid.backends.triton import decode_launch

    q, k_cache, v_cache, _, whole = filled(LENGTHS, seqlen_q=3)
    call = {"cache_seqlens": torch.tensor(LENGTHS), "num_splits": 3}
    parts = attend(q, k_cache, v_cache, **call)
    monkeypatch.setattr(decode_launch, "REDUCTION", "atomic")
    asked: list[str] = []
    plan = decode_launch._plan
    monkeypatch.setattr(decode_launch, "_plan", lambda *args: asked.append(args[4]) or plan(*args))
    assert_is_attention(attend(q, k_cache, v_cache, **call), q, whole)
    half = [x.half() for x in (q, k_cache, v_cache)]
    assert attend(*half, **call).dtype == torch.float16
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(attend(q, k_cache, v_cache, **call), parts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == ["atomic", "atomic", "parts"]


def strided(x: Tensor) -> Tensor:
    """With NaN between the channels."""
    return x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)[..., ::2].copy_(x)


def test_any_strides():
    q, k_cache, v_cache, (k, v), _ = filled((5, 60), new=2, seqlen_q=2)
    lengths = torch.tensor([5, 60])
    out = attend(q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=lengths)
    other = attend(*map(strided, (q, k_cache, v_cache, k, v)), cache_seqlens=lengths)
    assert torch.equal(out, other)


@pytest.mark.parametrize("rotary", [None, False, True], ids=["plain", "halves", "interleaved"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_appending_is_that_of_plain_torch(rotary, page_size):
    """In place, at each length, with RoPE of a part of the channels; nothing else is touched."""
    lengths = torch.tensor([0, 31, CAPACITY - 5], dtype=torch.int32)
    q, k_cache, v_cache, (k, v), _ = filled((0, 31, CAPACITY - 5), new=5, seqlen_q=3, nheads=10, head_dim=24)
    table = None
    if page_size:
        k_cache, v_cache, table = paged(k_cache, v_cache, page_size)
    angle = torch.arange(CAPACITY + 4)[:, None] * 100.0 ** (-torch.arange(9) / 9)
    tables = {} if rotary is None else {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    options = {"cache_seqlens": lengths, "page_table": table, "rotary_interleaved": bool(rotary), **tables}
    ours, theirs = (k_cache.clone(), v_cache.clone()), (k_cache.clone(), v_cache.clone())
    out = attend(q, *ours, k, v, **options)
    expected = attend(q, *theirs, k, v, backend="reference", **options)
    for mine, other, before in zip(ours, theirs, (k_cache, v_cache), strict=True):
        assert_rounded(mine, other)
        is_old = (mine == before) | (mine.isnan() & before.isnan())
        assert (~is_old).any(-1).sum() == 3 * 5 * 2  # sequences, tokens, heads
    assert_rounded(out, expected)
    assert lengths.tolist() == [0, 31, CAPACITY - 5]


PREFIXED = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window_size": (40, 3)},
    "alibi": {"alibi_slopes": torch.linspace(0.01, 0.4, 12).reshape(3, 4)},
    "bias of rows": {"sigmoid_bias": torch.linspace(-5.0, -1.0, 36).reshape(3, 4, 3)},
}


@pytest.mark.parametrize("options", PREFIXED.values(), ids=PREFIXED)
@pytest.mark.parametrize("backend", ["triton", "blocked", "beside"])
def test_a_shared_prefix_is_every_sequence_with_those_keys_in_front(options, backend, monkeypatch):
    if backend == "beside":
        monkeypatch.setattr(cached, "on_host", lambda x: False)
    # fewer keys of its own than queries, which then stand in the prefix
    lengths = (0, 2, 40)
    q, k_cache, v_cache, _, own = filled(lengths, seqlen_q=3)
    _, k, v, _ = make_qkv(1, 1, 50, 4, 2, 16, seed=1)
    whole = [(torch.cat((k, a), 1), torch.cat((v, b), 1)) for a, b in own]
    out = sigmoid_attention_with_prefix(
        q, k[0], v[0], k_cache, v_cache, cache_seqlens=torch.tensor(lengths), num_splits=2,
        backend=backend.replace("beside", "auto"), **{"sigmoid_bias": BIAS, **options},
    )  # fmt: skip
    assert out.dtype == q.dtype
    assert_is_attention(out, q, whole, **options)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_behind_a_prefix_tokens_are_turned_at_their_positions(backend):
    lengths, n = (0, 31), 20
    q, k_cache, v_cache, (k, v), _ = filled(lengths, new=4, seqlen_q=2)
    _, k_prefix, v_prefix, _ = make_qkv(1, 1, n, 4, 2, 16, seed=1)
    angle = torch.arange(CAPACITY + n)[:, None] * 100.0 ** (-torch.arange(8) / 8)
    table = torch.arange(2 * CAPACITY // 16).reshape(2, -1)
    pages = [x.reshape(-1, 16, 2, 16).clone() for x in (k_cache, v_cache)]
    call = {"sigmoid_bias": BIAS, "rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    out = sigmoid_attention_with_prefix(
        q, k_prefix[0], v_prefix[0], *pages, k, v, cache_seqlens=torch.tensor(lengths), page_table=table,
        backend=backend, **call,
    )  # fmt: skip
    joined = [torch.cat((x.expand(2, -1, -1, -1), y), 1) for x, y in ((k_prefix, k_cache), (v_prefix, v_cache))]
    expected = sigmoid_attention_with_kvcache(q, *joined, k, v, cache_seqlens=torch.tensor(lengths) + n, **call)
    assert_rounded(out, expected)
    assert_rounded(pages[0].reshape(2, CAPACITY, 2, 16), joined[0][:, n:])


def test_a_prefix_that_does_not_fit_is_one_clear_error():
    q, k_cache, v_cache, _, _ = filled((3,))
    _, k, v, _ = make_qkv(1, 1, 5, 4, 2, 16)
    for (k_prefix, v_prefix), rule in (
        ((k, v[0]), r"k_prefix must be \(seqlen_prefix, nheads_k, head_dim\)"),
        ((k[0, :, :1], v[0]), "k_prefix must be"),
        ((k[0], v[0, :4]), "v_prefix must be"),
        ((k[0].double(), v[0]), "k_prefix must be a tensor of torch.float32"),
    ):
        with pytest.raises(ValueError, match=rule):
            sigmoid_attention_with_prefix(
                q, k_prefix, v_prefix, k_cache, v_cache, cache_seqlens=3, sigmoid_bias=BIAS
            )  # fmt: skip


def test_the_ops_pass_opcheck():
    q, k_cache, v_cache, (k, v), _ = filled((5, 60), new=2, seqlen_q=2)
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()  # opcheck compares, and NaN is not NaN
    lengths = torch.tensor([5, 60])
    sides = (None, torch.rand(4), BIAS, None, True, 20, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    inputs = (q, k_cache, v_cache, lengths, None, *sides, 0, 2, False, torch.float32)
    torch.library.opcheck(torch.ops.flashsigmoid.decode, inputs, test_utils=checks)
    angle = torch.rand(CAPACITY, 4)
    for turned in ((q, angle, angle), (None, None, None)):
        inputs = (k, v, k_cache, v_cache, lengths, None, *turned, False, 0)
        torch.library.opcheck(torch.ops.flashsigmoid.append, inputs, test_utils=checks)


def test_it_compiles_without_a_graph_break():
    torch.compiler.reset()
    q, k_cache, v_cache, (k, v), whole = filled((0, 5, 90), new=2, seqlen_q=2)
    call = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out = call(q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor([0, 5, 90]))
    assert_is_attention(out, q, whole)
    assert torch.equal(k_cache[2, 90:92], k[2])


def test_empty_sizes():
    q, k_cache, v_cache, (k, v), _ = filled((0, 0), new=1)
    call = {"cache_seqlens": torch.tensor([0, 0])}
    assert not attend(q, k_cache, v_cache, **call).any()
    assert attend(q[:, :0], k_cache, v_cache, **call).shape == (2, 0, 4, 16)
    assert not attend(q, k_cache[:, :0], v_cache[:, :0], **call).any()
    assert not attend(q, k_cache, v_cache, k[:, :0], v[:, :0], **call).any()


def test_who_computes_a_call_and_why_not_the_kernel():
    q, k_cache, v_cache, _, _ = filled((3,))
    told = explain_with_kvcache(q, k_cache, v_cache, sigmoid_bias=BIAS)
    assert (told.backend, told.reasons["decode kernel"]) == ("blocked", "device must be a GPU, got cpu")
    told = explain_with_kvcache(q, k_cache, v_cache, sigmoid_bias=BIAS, backend="triton")
    assert (told.backend, "decode kernel" in told.reasons) == ("triton", False)
    with pytest.raises(BackendUnsupported, match="triton: dtype must be float16, bfloat16 or float32, got float64"):
        attend(q.double(), k_cache.double(), v_cache.double(), cache_seqlens=3)


def gpu(**sizes: Any) -> Problem:
    given: dict[str, Any] = {
        "batch": 1, "seqlen_q": 1, "seqlen_k": 65536, "nheads": 32, "nheads_k": 8, "head_dim": 128, "head_dim_v": 128,
        "dtype": torch.bfloat16, "device": "cuda", "scale": 1.0, "sigmoid_bias": -8.0, "arch": "sm_90",
    }  # fmt: skip
    return Problem(**{**given, **sizes})


def test_auto_takes_the_kernel_for_few_queries_on_a_gpu():
    device = torch.device("cuda", 0)
    assert decode.unsupported(gpu(seqlen_q=16), "auto", device) is None
    reason = decode.unsupported(gpu(seqlen_q=17), "auto", device)
    assert reason == "seqlen_q must be at most 16 for the decode kernel, got 17"
    assert decode.unsupported(gpu(seqlen_q=17), "triton", device) is None
    reason = decode.unsupported(gpu(arch="sm_75"), "auto", device)
    assert reason == "compute capability must be at least 8.0, got sm_75"


@pytest.mark.parametrize("batch", [1, 3, 8, 25, 64, 700])
@pytest.mark.parametrize("capacity", [64, 4096, 65536])
def test_there_are_enough_parts_to_fill_the_gpu_and_no_more(batch, capacity):
    from flashsigmoid.backends.triton import decode_launch

    problem, units = gpu(batch=batch, seqlen_k=capacity), 132
    splits = decode_launch._choose_splits(problem, units, False)
    block = decode_launch._choose_tile(problem, units, False).block_n
    slots, programs = units, 8 * batch
    assert 1 <= splits <= -(-capacity // block)
    full = splits * programs / (-(-splits * programs // slots) * slots)
    assert full >= 0.8 or splits == -(-capacity // block)
    if splits * programs > slots:  # not all at once: none so long that the others wait for it
        assert -(-capacity // splits) <= decode_launch.LONGEST
    assert splits == 1 or splits * programs <= 7 * slots or splits == -(-capacity // decode_launch.LONGEST)


def planted(monkeypatch: pytest.MonkeyPatch, fault: str, seqlens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The lengths and the pages that the kernel is given with this fault."""
    from flashsigmoid.backends.triton import decode_launch

    if fault == "length off by one":
        return seqlens - 1, table
    if fault == "wrong page":
        return seqlens, table.roll(1, 1)
    if fault in ("a part dropped", "a part twice"):

        def faulty(*args: Any, kernel: Callable = decode_launch.launch, **kwargs: Any) -> None:
            if args[3] is decode_launch._sum_kernel:
                (parts,) = args[5]
                parts[1] = parts[0] if fault == "a part twice" else 0.0
            kernel(*args, **kwargs)

        monkeypatch.setattr(decode_launch, "launch", faulty)
    return seqlens, table


@pytest.mark.parametrize("fault", ["none", "length off by one", "wrong page", "a part dropped", "a part twice"])
def test_planted_faults_are_caught(fault, monkeypatch):
    """At n = 4096 and b = -log n, where outputs are small and one key is little."""
    from flashsigmoid.backends.triton import decode_launch

    monkeypatch.setattr(decode_launch, "_INTERPRETED", decode_launch.Tile(16, 128, 4, 1))
    n = 4096
    q, k, v, dout = make_qkv(1, 1, n, 2, 1, 64, dtype=torch.float16)
    options = {"sigmoid_bias": -math.log(n), "causal": True}
    exact, near = (f(q, k, v, dout, **options)["out"] for f in (oracle, witness))
    pages = [x.unflatten(1, (-1, 128))[0] for x in (k, v)]
    seqlens, table = planted(monkeypatch, fault, torch.tensor([n]), torch.arange(n // 128)[None])
    if fault == "wrong page":  # all pages of a whole cache, in another order, are the same sum
        seqlens = seqlens - 128
        k, v = k[:, :-128], v[:, :-128]
        exact, near = (f(q, k, v, dout, **options)["out"] for f in (oracle, witness))
    out = attend(q, *pages, cache_seqlens=seqlens, page_table=table, num_splits=8, **options)
    if fault == "none":
        assert_within_budget("out", out, exact, near)
    else:
        assert max(errors_over_budget(out, exact, near)) > 1.0
