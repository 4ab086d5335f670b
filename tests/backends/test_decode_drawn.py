"""Calls against a cache with every option drawn at random, so that options meet: each way to compute them, in budget.

What the caches hold beyond a length is NaN, pages lie in any order, entries of the table beyond a length name no page.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from backends.here import IS_INTERPRETED
from test_kvcache import assert_is_attention
from torch import Tensor

from flashsigmoid import sigmoid_attention_with_kvcache, sigmoid_attention_with_prefix
from flashsigmoid.backends import cached
from flashsigmoid.testing import make_qkv

WAYS = ["host", "beside", "reference", *(["triton"] if IS_INTERPRETED else [])]


def draw(index: int) -> dict[str, Any]:
    """Sizes and options of one call."""
    rng = random.Random(f"cache {index}")
    new = rng.choice([0, 0, 1, 1, 3, 7, 20])
    has_rotary = new > 0 and rng.random() < 0.5
    page_size = rng.choice([0, 0, 16, 32, 64])
    capacity = rng.choice([64, 128, 192])
    head_dim = rng.choice([16, 40, 64, 96, 128, 256])
    return {
        "heads": rng.choice([(4, 4), (4, 2), (6, 2), (5, 1)]), "head_dim": head_dim, "page_size": page_size,
        "dtype": rng.choice([torch.float16, torch.bfloat16, torch.float32]), "capacity": capacity, "new": new,
        "head_dim_v": rng.choice([head_dim, head_dim, 1, 24, 80]), "has_rotary": has_rotary,
        "lengths": [rng.choice([0, 1, capacity // 3, capacity - new]) for _ in range(rng.choice([1, 2, 4]))],
        "seqlen_q": rng.choice([n for n in (1, 1, 2, 5, 17) if not has_rotary or n <= new]),
        "interleaved": rng.random() < 0.5, "rotary_dim": rng.choice([head_dim // 2, head_dim // 4]) * 2,
        "prefix": rng.choice([None, None, 0, 1, 50]), "causal": rng.random() < 0.6, "scale": rng.choice([None, 0.3]),
        "window_size": rng.choice([(None, None), (None, None), (0, 0), (20, None), (None, 5), (9, 3)]),
        "slopes": rng.choice([None, None, "h", "bh"]), "bias": rng.choice([None, "", "h", "bh", "bhq"]),
        "num_splits": rng.choice([0, 1, 2, 7, 1000]), "integer": rng.choice([torch.int32, torch.int64]),
    }  # fmt: skip


def in_pages(k: Tensor, v: Tensor, page_size: int, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The caches in pages, and a table that names no page beyond each length."""
    batch, each = k.shape[0], k.shape[1] // page_size
    table = torch.randperm(batch * each + 3)[: batch * each].reshape(batch, each)
    pages = []
    for x in (k, v):
        pages.append(x.new_full((batch * each + 3, page_size, *x.shape[2:]), math.nan))
        pages[-1][table] = x.unflatten(1, (each, page_size))
    used = -(-lengths[:, None] // page_size)
    return pages[0], pages[1], table.masked_fill(torch.arange(each) >= used, -5)


def check(index: int, way: str, *, fault: str = "") -> None:
    case = draw(index)
    if way == "triton" and case["dtype"] == torch.bfloat16:
        case["dtype"] = torch.float16  # Triton's interpreter has no bfloat16
    (nheads, nheads_k), dtype, new, n = case["heads"], case["dtype"], case["new"], case["prefix"] or 0
    batch, seqlen_q, capacity = len(case["lengths"]), case["seqlen_q"], case["capacity"]
    dims = (nheads, nheads_k, case["head_dim"], case["head_dim_v"])
    q, k, v, _ = make_qkv(batch, seqlen_q, capacity, *dims, dtype=dtype, seed=index)
    _, *prefix, _ = make_qkv(1, 1, max(1, n), *dims, dtype=dtype, seed=index + 1000)
    prefix = [x[0, :n] for x in prefix]
    half = case["rotary_dim"] // 2
    angle = torch.arange(capacity + n)[:, None] * 100.0 ** (-torch.arange(half) / half)
    tables = (angle.cos(), angle.sin())
    turned_q, whole, lengths = q.clone(), [], torch.tensor(case["lengths"])
    k_cache, v_cache, k_new, v_new = (x.clone() for x in (k, v, k[:, :new], v[:, :new]))
    for s, length in enumerate(case["lengths"]):
        k_new[s], v_new[s] = k[s, length : length + new], v[s, length : length + new]
        k_cache[s, length:] = v_cache[s, length:] = math.nan
        one, end, keys = slice(s, s + 1), length + new, k[s : s + 1].clone()
        if case["has_rotary"]:
            position = torch.arange(n + length, n + end)[None]
            keys[:, length:end] = cached.rotate(keys[:, length:end], *tables, position, case["interleaved"])
            turned_q[one] = cached.rotate(q[one], *tables, position[:, new - seqlen_q :], case["interleaved"])
        joined = zip(prefix, (keys, v[one]), strict=True)
        whole.append(tuple(torch.cat((x[None], y[:, :end]), 1) for x, y in joined))

    shapes = {"": (), "h": (nheads,), "bh": (batch, nheads), "bhq": (batch, nheads, seqlen_q)}
    options = {name: case[name] for name in ("causal", "window_size", "scale")}
    options["sigmoid_bias"] = -4.0 if case["bias"] is None else torch.randn(shapes[case["bias"]]) - 4.0
    if case["slopes"]:
        options["alibi_slopes"] = torch.rand(shapes[case["slopes"]]) * 0.1
    given = {**options, "cache_seqlens": lengths.to(case["integer"]), "num_splits": case["num_splits"]}
    if case["page_size"]:
        k_cache, v_cache, table = in_pages(k_cache, v_cache, case["page_size"], lengths + new)
        given["page_table"] = table.to(case["integer"])
    if new:
        given |= {"k": k_new, "v": v_new}
    if case["has_rotary"]:
        given |= {"rotary_cos": tables[0], "rotary_sin": tables[1], "rotary_interleaved": case["interleaved"]}
    if fault == "window":
        given["window_size"] = (21, None)
    elif fault == "interleaved":
        given["rotary_interleaved"] = not case["interleaved"]
    given["backend"] = {"host": "auto", "beside": "auto"}.get(way, way)
    if case["prefix"] is None:
        out = sigmoid_attention_with_kvcache(q, k_cache, v_cache, **given)
    else:
        out = sigmoid_attention_with_prefix(q, *prefix, k_cache, v_cache, **given)
    assert out.dtype == dtype
    assert_is_attention(out, turned_q, whole, **options)


@pytest.mark.parametrize("index", range(24))
@pytest.mark.parametrize("way", WAYS)
def test_drawn_calls(way, index, monkeypatch):
    if way == "beside":
        monkeypatch.setattr(cached, "on_host", lambda x: False)
    check(index, way)


def test_every_option_is_drawn_together_with_pages_and_new_keys():
    cases = [draw(index) for index in range(24)]
    for name in ("has_rotary", "slopes", "bias", "prefix"):
        assert any(case[name] and case["page_size"] and case["new"] for case in cases), name
    assert any(case["window_size"] != (None, None) and case["slopes"] and case["page_size"] for case in cases)
    assert {case["head_dim"] for case in cases} == {16, 40, 64, 96, 128, 256}


@pytest.mark.parametrize("fault", ["window", "interleaved"])
def test_another_window_or_pairing_is_seen(fault):
    sees = {"window": ("window_size", (20, None)), "interleaved": ("has_rotary", True)}
    name, value = sees[fault]
    index = next(i for i in range(1000) if (case := draw(i))[name] == value and max(case["lengths"]) > 21)
    check(index, "host")
    with pytest.raises(AssertionError):
        check(index, "host", fault=fault)
