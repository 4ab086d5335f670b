"""Calls against a cache: the dense op on the keys of each sequence, in the error budget; pages, appending, errors.

"beside" is what runs where the host may not read lengths, as on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

from flashsigmoid import BackendUnsupported, sigmoid_attention, sigmoid_attention_with_kvcache
from flashsigmoid.backends import cached
from flashsigmoid.kvcache import explain_with_kvcache
from flashsigmoid.nn import RotaryEmbedding
from flashsigmoid.testing import assert_within_budget, make_qkv, oracle, witness

CAPACITY, BIAS = 96, -math.log(64)


@pytest.fixture(params=["host", "beside"])
def where(request, monkeypatch):
    """Sequence by sequence with lengths on the host, or all at once without reading them."""
    if request.param == "beside":
        monkeypatch.setattr(cached, "on_host", lambda x: False)
    return request.param


def filled(lengths, new=0, seqlen_q=1, nheads=4, nheads_k=2, head_dim=16, head_dim_v=None, dtype=torch.float32):
    """q, caches that are NaN beyond each length, new keys and values, all keys and values of each sequence."""
    batch = len(lengths)
    q, k, v, _ = make_qkv(batch, seqlen_q, CAPACITY, nheads, nheads_k, head_dim, head_dim_v, dtype=dtype)
    k_cache, v_cache = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    fresh = [x.new_zeros(batch, new, *x.shape[2:]) for x in (k, v)]
    whole = []
    for s, length in enumerate(lengths):
        k_cache[s, :length], v_cache[s, :length] = k[s, :length], v[s, :length]
        fresh[0][s], fresh[1][s] = k[s, length : length + new], v[s, length : length + new]
        whole.append((k[s : s + 1, : length + new], v[s : s + 1, : length + new]))
    return q, k_cache, v_cache, fresh if new else [None, None], whole


def paged(k_cache: Tensor, v_cache: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same cache in pages that lie in a random order, with NaN pages between."""
    batch, each = k_cache.shape[0], CAPACITY // page_size
    table = torch.randperm(batch * each + 3)[: batch * each].reshape(batch, each).int()
    pages = []
    for x in (k_cache, v_cache):
        pages.append(x.new_full((batch * each + 3, page_size, *x.shape[2:]), math.nan))
        pages[-1][table.long()] = x.unflatten(1, (each, page_size))
    return pages[0], pages[1], table


def part(x: Any, s: int) -> Any:
    return x[s : s + 1] if isinstance(x, Tensor) and x.dim() > 1 else x


def assert_is_attention(out: Tensor, q: Tensor, whole, **options: Any) -> None:
    """`out` of each sequence against the dense oracle over its keys."""
    for s, (k, v) in enumerate(whole):
        given = {"causal": True, "sigmoid_bias": BIAS, **options}
        given = {name: part(x, s) for name, x in given.items()}
        if k.shape[1] == 0:
            assert not out[s].any()
            continue
        tensors = q[s : s + 1], k, v, torch.zeros_like(out[s : s + 1])
        exact, near = oracle(*tensors, **given)["out"], witness(*tensors, **given)["out"]
        assert_within_budget(f"out[{s}]", out[s : s + 1], exact, near)


OPTIONS = {
    "plain": {},
    "not causal": {"causal": False},
    "scale": {"scale": 0.5},
    "window": {"window_size": (20, None)},
    "window of both sides": {"window_size": (20, 3), "causal": False},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])},
    "alibi of each": {"alibi_slopes": torch.linspace(0.01, 0.4, 16).reshape(4, 4)},
    "bias ()": {"sigmoid_bias": torch.tensor(-3.0)},
    "bias of heads": {"sigmoid_bias": torch.tensor([-5.0, -4.0, -3.0, -2.0])},
    "bias of sequences": {"sigmoid_bias": torch.linspace(-5.0, -1.0, 16).reshape(4, 4)},
    "bias of rows": {"sigmoid_bias": torch.linspace(-5.0, -1.0, 112).reshape(4, 4, 7)},
    "no weight": {"sigmoid_bias": -math.inf},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
def test_it_is_attention_to_the_keys_of_each_sequence(where, backend, options):
    # nothing, less than the queries, a part, all of the capacity
    lengths = (0, 3, 50, CAPACITY)
    q, k_cache, v_cache, _, whole = filled(lengths, seqlen_q=7)
    given = {"sigmoid_bias": BIAS, **options}
    out = sigmoid_attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor(lengths), backend=backend, **given
    )
    assert out.is_contiguous()
    assert_is_attention(out, q, whole, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("nheads_k", "head_dim", "head_dim_v"), [(4, 40, 24), (2, 64, 64), (1, 16, 128)])
def test_decoding_in_every_dtype_and_grouping(where, dtype, nheads_k, head_dim, head_dim_v):
    lengths = (1, 17, CAPACITY - 1)
    sizes = {"nheads_k": nheads_k, "head_dim": head_dim, "head_dim_v": head_dim_v}
    q, k_cache, v_cache, (k, v), whole = filled(lengths, new=1, dtype=dtype, **sizes)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    out = sigmoid_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, sigmoid_bias=BIAS)
    assert out.dtype == dtype
    assert_is_attention(out, q, whole)


def test_appending_is_in_place_and_touches_nothing_else(where):
    lengths = (0, 5, 90)
    q, k_cache, v_cache, (k, v), _ = filled(lengths, new=6, seqlen_q=6)
    before = k_cache.clone(), v_cache.clone()
    seqlens = torch.tensor(lengths)
    sigmoid_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, sigmoid_bias=BIAS)
    for cache, old, new in zip((k_cache, v_cache), before, (k, v), strict=True):
        for s, length in enumerate(lengths):
            old[s, length : length + 6] = new[s]
        assert torch.equal(cache.nan_to_num(9.0), old.nan_to_num(9.0))
    assert seqlens.tolist() == list(lengths)


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pages_are_the_contiguous_cache_bit_for_bit(where, page_size, backend):
    lengths = (0, 15, 16, 61)
    q, k_cache, v_cache, (k, v), whole = filled(lengths, new=20, seqlen_q=20)
    k_pages, v_pages, table = paged(k_cache, v_cache, page_size)
    options = {"cache_seqlens": torch.tensor(lengths), "sigmoid_bias": BIAS, "backend": backend}
    out = sigmoid_attention_with_kvcache(q, k_cache, v_cache, k, v, **options)
    same = sigmoid_attention_with_kvcache(q, k_pages, v_pages, k, v, page_table=table, **options)
    assert torch.equal(out, same)
    for cache, pages in ((k_cache, k_pages), (v_cache, v_pages)):
        assert torch.equal(pages[table.long()].flatten(1, 2).nan_to_num(9.0), cache.nan_to_num(9.0))
    assert_is_attention(out, q, whole)


def test_entries_of_the_page_table_beyond_the_length_are_not_used_and_a_prefix_is_shared(where):
    q, k, v, _ = make_qkv(2, 1, 48, 2, 2, 16)
    k[1, :32], v[1, :32] = k[0, :32], v[0, :32]
    pages = [torch.cat([x[0].unflatten(0, (3, 16)), x[1:, 32:]]) for x in (k, v)]
    table = torch.tensor([[0, 1, 2, -1], [0, 1, 3, -1]])
    seqlens = torch.tensor([48, 40])
    out = sigmoid_attention_with_kvcache(q, *pages, cache_seqlens=seqlens, page_table=table, sigmoid_bias=BIAS)
    assert_is_attention(out, q, [(k[:1], v[:1]), (k[1:, :40], v[1:, :40])])
    # an empty sequence has no page at all
    table[1] = -1
    out = sigmoid_attention_with_kvcache(
        q, *pages, cache_seqlens=torch.tensor([48, 0]), page_table=table, sigmoid_bias=BIAS
    )
    assert out[0].any()
    assert not out[1].any()


@pytest.mark.parametrize("options", [{}, {"window_size": (30, None)}, {"alibi_slopes": torch.tensor([0.3, 0.02])}])
def test_prefill_in_chunks_and_decoding_are_one_prefill(where, options):
    q, k, v, _ = make_qkv(2, CAPACITY, CAPACITY, 2, 1, 32)
    whole = [(k[s : s + 1], v[s : s + 1]) for s in range(2)]
    caches = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    outs, at = [], 0
    for size in (1, 40, 7, 1, 1, 45, 1):
        chunk = slice(at, at + size)
        outs += [
            sigmoid_attention_with_kvcache(
                q[:, chunk], *caches, k[:, chunk], v[:, chunk], cache_seqlens=at, sigmoid_bias=BIAS, **options
            )
        ]
        at += size
    assert at == CAPACITY
    assert_is_attention(torch.cat(outs, dim=1), q, whole, **options)


def test_a_sequence_is_the_same_alone_bit_for_bit():
    lengths = (9, 60, 33)
    q, k_cache, v_cache, _, _ = filled(lengths, seqlen_q=3)
    out = sigmoid_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=torch.tensor(lengths), sigmoid_bias=BIAS)
    for s, length in enumerate(lengths):
        one = slice(s, s + 1)
        alone = sigmoid_attention_with_kvcache(
            q[one], k_cache[one], v_cache[one], cache_seqlens=length, sigmoid_bias=BIAS
        )
        assert torch.equal(out[one], alone)


def test_halves_of_the_keys_add_up():
    """What a split over keys, or a shared prefix, relies on."""
    q, k, v, _ = make_qkv(1, 1, CAPACITY, 2, 2, 16, dtype=torch.float64)

    def attend(keys: slice) -> Tensor:
        n = keys.stop - keys.start
        return sigmoid_attention_with_kvcache(q, k[:, keys], v[:, keys], cache_seqlens=n, sigmoid_bias=BIAS)

    assert_rounded(attend(slice(0, 96)), attend(slice(0, 70)) + attend(slice(70, 96)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 12])
def test_rotary_turns_new_keys_and_queries_at_their_positions(where, interleaved, rotary_dim):
    lengths = (0, 31)
    q, k_cache, v_cache, (k, v), _ = filled(lengths, new=5, seqlen_q=3, head_dim=32)
    angle = torch.arange(CAPACITY)[:, None] * 100.0 ** (-torch.arange(rotary_dim // 2) / (rotary_dim // 2))

    def turn(x: Tensor, start: int) -> Tensor:
        """As complex numbers, one token after the other."""
        turned = x.clone()
        half = rotary_dim // 2
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
        for t in range(x.shape[0]):
            for i, (a, b) in enumerate(pairs):
                z = torch.complex(x[t, :, a], x[t, :, b]) * torch.polar(torch.ones(()), angle[start + t, i])
                turned[t, :, a], turned[t, :, b] = z.real, z.imag
        return turned

    expected = k_cache.clone()
    turned_q = q.clone()
    for s, length in enumerate(lengths):
        expected[s, length : length + 5] = turn(k[s], length)
        turned_q[s] = turn(q[s], length + 2)  # the last 3 of 5
    out = sigmoid_attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(lengths), sigmoid_bias=BIAS,
        rotary_cos=angle.cos(), rotary_sin=angle.sin(), rotary_interleaved=interleaved,
    )  # fmt: skip
    assert_rounded(k_cache, expected)
    assert not k_cache[0, :5].isnan().any()
    for s, length in enumerate(lengths):
        keys = slice(0, length + 5)
        dense = sigmoid_attention(
            turned_q[s : s + 1], expected[s : s + 1, keys], v_cache[s : s + 1, keys], causal=True, sigmoid_bias=BIAS
        )
        assert_rounded(out[s : s + 1], dense)


def test_rotary_in_halves_is_the_module_bit_for_bit():
    x = torch.randn(2, 9, 3, 16)
    angle = torch.arange(40, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2) / 16).double()
    position = torch.arange(9).expand(2, 9) + 20
    turned = cached.rotate(x, angle.cos().float(), angle.sin().float(), position, False)
    assert torch.equal(turned, RotaryEmbedding(16)(x, offset=20))


def test_it_compiles_without_a_graph_break():
    torch.compiler.reset()
    lengths = (0, 5, 90)
    q, k_cache, v_cache, (k, v), whole = filled(lengths, new=2, seqlen_q=2)
    call = torch.compile(sigmoid_attention_with_kvcache, fullgraph=True, backend="eager")
    out = call(q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(lengths), sigmoid_bias=BIAS)
    assert_is_attention(out, q, whole)


def call(**changed: Any) -> Tensor:
    q, k, v, _ = make_qkv(2, 1, 32, 2, 2, 16)
    given = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": torch.tensor([3, 8]), "sigmoid_bias": BIAS}
    return sigmoid_attention_with_kvcache(**{**given, **changed})


NEW, CACHE = torch.zeros(2, 1, 2, 16), torch.ones(2, 32, 2, 16)
TABLE = torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"sigmoid_bias": None}, "sigmoid_bias is required"),
        ({"sigmoid_bias": math.nan}, "sigmoid_bias must be a number below"),
        ({"q": torch.zeros(2, 2, 16)}, "q must be a dense tensor"),
        ({"q": torch.zeros(2, 1, 2, 8)}, "k_cache must be"),
        ({"q": torch.zeros(3, 1, 2, 16)}, "k_cache must be"),
        ({"q": torch.zeros(2, 1, 3, 16)}, "nheads must be a positive multiple"),
        ({"q": torch.zeros(2, 1, 2, 16).bfloat16()}, "k_cache must have the dtype and device of q"),
        ({"q": torch.zeros(2, 1, 2, 16, requires_grad=True)}, "q must not require a gradient"),
        ({"sigmoid_bias": torch.zeros((), requires_grad=True)}, "sigmoid_bias must not require a gradient"),
        ({"v_cache": torch.zeros(2, 31, 2, 16)}, "v_cache must share all but head_dim"),
        ({"k": NEW}, "k and v must be given together, got only k"),
        ({"k_cache": torch.zeros(1, 32, 2, 16).expand(2, -1, -1, -1), "k": NEW, "v": NEW}, "k_cache must have memory"),
        ({"k_cache": CACHE, "v_cache": CACHE, "k": NEW, "v": NEW}, "k_cache and v_cache must be two tensors where"),
        ({"k": NEW[:1], "v": NEW}, "k must be"),
        ({"k": NEW, "v": NEW[..., :8]}, "v must be"),
        ({"cache_seqlens": torch.tensor([3])}, "cache_seqlens must be an int32 or int64"),
        ({"cache_seqlens": torch.tensor([3.0, 8.0])}, "cache_seqlens must be an int32 or int64"),
        ({"cache_seqlens": True}, "cache_seqlens must be an int32 or int64"),
        ({"cache_seqlens": torch.tensor([3, 33])}, "cache_seqlens must be from 0 to capacity"),
        ({"cache_seqlens": torch.tensor([-1, 3])}, "cache_seqlens must be from 0 to capacity"),
        ({"cache_seqlens": 32, "k": NEW, "v": NEW}, "cache_seqlens must be from 0 to capacity - new keys = 32 - 1"),
        ({"page_table": TABLE.float()}, "page_table must be an int32 or int64"),
        ({"page_table": TABLE[:1]}, "page_table must be an int32 or int64"),
        ({"page_table": torch.tensor([[0], [2]])}, "page_table must name pages from 0 to 1"),
        ({"page_table": torch.tensor([[-1], [0]])}, "page_table must name pages from 0 to 1"),
        ({"page_table": torch.tensor([[0], [0]]), "cache_seqlens": 3, "k": NEW, "v": NEW}, "a place of its own"),
        (
            {"page_table": TABLE, "k_cache": torch.zeros(2, 24, 2, 16), "v_cache": torch.zeros(2, 24, 2, 16)},
            "page_size must be a power of two from 16, got 24",
        ),
        ({"rotary_cos": torch.zeros(32, 8)}, "rotary_cos and rotary_sin must be given together"),
        ({"rotary_cos": torch.zeros(32, 8), "rotary_sin": torch.zeros(32, 8)}, "got no k"),
        (
            {"rotary_cos": torch.zeros(31, 8), "rotary_sin": torch.zeros(31, 8), "k": NEW, "v": NEW},
            "rotary_cos must be .at least 32 positions",
        ),
        (
            {"rotary_cos": torch.zeros(32, 9), "rotary_sin": torch.zeros(32, 9), "k": NEW, "v": NEW},
            "rotary_dim / 2 <= 8",
        ),
        ({"rotary_interleaved": "no"}, "rotary_interleaved must be True or False, got 'no'"),
        ({"cache_seqlens": 2**70}, "cache_seqlens must be from 0 to capacity"),
        ({"causal": 1}, "causal must be True or False"),
        ({"window_size": (-1, 0)}, "window_size must be non-negative"),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes must have shape"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"num_splits": -1}, "num_splits must be a non-negative integer, got -1"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(changed, rule):
    tensors = [x for x in changed.values() if isinstance(x, Tensor) and x.is_floating_point()]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(ValueError, match=rule):
        call(**changed)
    assert all(torch.equal(x, old) for x, old in zip(tensors, before, strict=True))


def test_an_explanation_of_no_tensor_is_one_clear_error():
    with pytest.raises(ValueError, match=r"q must be a dense tensor .*, got int"):
        explain_with_kvcache(3, CACHE, CACHE, sigmoid_bias=BIAS)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("length", [-1, 32])
def test_a_length_that_is_a_number_is_looked_at_on_a_gpu_too(length, monkeypatch):
    monkeypatch.setattr(cached, "on_host", lambda x: False)
    with pytest.raises(ValueError, match=f"cache_seqlens must be from 0 to capacity - new keys = 32 - 1, got {length}"):
        call(cache_seqlens=length, k=NEW, v=NEW)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_page_table_chooses_rows_of_a_cache(backend):
    """What flash-attn calls cache_batch_idx: a page as long as the cache is one of its rows."""
    q, k_cache, v_cache, _ = make_qkv(3, 1, 32, 2, 1, 16)
    rows = torch.tensor([2, 0, 2])
    options = {"cache_seqlens": torch.tensor([5, 32, 9]), "sigmoid_bias": BIAS, "backend": backend}
    out = sigmoid_attention_with_kvcache(q, k_cache, v_cache, page_table=rows[:, None], **options)
    assert torch.equal(out, sigmoid_attention_with_kvcache(q, k_cache[rows], v_cache[rows], **options))


def test_a_named_backend_without_a_decode_kernel_says_so():
    with pytest.raises(BackendUnsupported, match="hopper: no decode kernel"):
        call(backend="hopper")
