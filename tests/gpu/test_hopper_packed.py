"""Packed sequences by the Hopper kernels on a Hopper GPU: by name, since "auto" does not take them unmeasured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.cases import DEVICE, HALF, time_is_left
from gpu.machine import captured, nothing_waits
from gpu.packed import LENGTHS, check_packed, check_random_lengths, compute_by_hopper, packed_tensors
from torch import Tensor
from varlen import cumulated, dense_options, oracle_and_witness, sequences

from flashsigmoid import backends, sigmoid_attention, sigmoid_attention_varlen
from flashsigmoid.backends import BackendUnsupported, hopper
from flashsigmoid.backends.hopper import launch
from flashsigmoid.testing import Options, assert_within_budget, make_qkv, oracle, witness

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (70, 20)},
    "slopes": {"causal": True, "alibi_slopes": (8, 4)},
    "rows": {"sigmoid_bias": ("rows", 4), "window_size": (90, None), "alibi_slopes": (4,)},
    "heads": {"sigmoid_bias": (4,), "causal": True},
    "sequences": {"sigmoid_bias": (8, 4)},
    "exact": {"sigmoid": "exact"},
    "b = 0": {"sigmoid_bias": 0.0},
}
# of the forward; the backward has those of its table
TILES: dict[str, dict[str, Any]] = {
    "one block each": {"is_persistent": False},
    "from the end": {"is_persistent": False, "is_from_end": True},
    "turns": {"is_persistent": True, "is_from_end": True},
    "two places": {"own_out": False, "is_persistent": True, "places": 2},
}
MANY = tuple((0, 1, 17, 64, 333, 1000, 200, 65, 5, 130)[i % 10] for i in range(60))


def tensors_of(options: dict[str, Any], rows: int) -> dict[str, Any]:
    made = {"sigmoid_bias": -5.0} | options
    generator = torch.Generator().manual_seed(0)
    for name, shift, factor in (("sigmoid_bias", 4.0, 1.0), ("alibi_slopes", 0.0, 0.1)):
        if isinstance(made.get(name), tuple):
            shape = [rows if n == "rows" else n for n in made[name]]
            x = torch.rand(shape, generator=generator) if shift == 0.0 else torch.randn(shape, generator=generator)
            made[name] = (x * factor - shift).to(DEVICE)
    return made


def cumulated_pair(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, Tensor]:
    return {"cu_seqlens_q": cumulated(lengths[0], DEVICE), "cu_seqlens_k": cumulated(lengths[1], DEVICE)}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_inside_the_budget(name, head_dim, dtype) -> None:
    tensors = packed_tensors(*LENGTHS, (4, 2), (head_dim, head_dim), dtype, spare=150)
    options: Any = tensors_of(OPTIONS[name], tensors[0].shape[0])
    sigmoid = options.pop("sigmoid", "auto")
    check_packed(f"{name}, {head_dim}, {dtype}", tensors, *LENGTHS, options, sigmoid, backend="hopper")


@pytest.mark.parametrize("tile", [None, *TILES])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_each_sequence_has_the_bits_of_its_own_call(monkeypatch, causal, head_dim, tile) -> None:
    """More blocks than multiprocessors; but dQ, which is added in no order."""
    if tile is not None:
        choose = launch.choose_tile

        def other(problem, direction):
            one = choose(problem, direction)
            is_able = direction == "forward" and not (one.is_split and "places" in TILES[tile])
            return replace(one, **TILES[tile]) if is_able else one

        monkeypatch.setattr(launch, "choose_tile", other)
    lengths = (MANY, MANY[::-1])
    tensors = packed_tensors(*lengths, (6, 2), (head_dim, head_dim), torch.bfloat16, spare=77)
    options: Any = {"sigmoid_bias": -5.0, "causal": causal}
    found = compute_by_hopper(*tensors, **cumulated_pair(lengths), **options)
    q, k, v, dout = tensors
    whole = {name: torch.zeros_like(x) for name, x in zip(("out", "dq", "dk", "dv"), (dout, q, k, v), strict=True)}
    for index, rows, keys in sequences(*lengths):
        dense: Any = dense_options(Options(**options), index, rows, *q.shape[:2])
        dense.pop("origin")
        leaves = [x[None, part].detach().requires_grad_() for x, part in ((q, rows), (k, keys), (v, keys))]
        out = sigmoid_attention(*leaves, **dense, backend="hopper")
        grads = torch.autograd.grad(out, leaves, dout[None, rows])
        for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
            whole[name][rows if name in ("out", "dq") else keys] = x[0].detach()
    for name, x in found.items():
        if name != "dq":
            assert torch.equal(x, whole[name]), name


@pytest.mark.parametrize("dtype", HALF)
def test_random_lengths_until_the_time_is_up(dtype) -> None:
    for rng in time_is_left():
        check_random_lengths(rng, dtype, backend="hopper")


def test_thousands_of_sequences() -> None:
    """3,000 sequences of four tokens are a dense batch."""
    tensors = make_qkv(3000, 4, 4, 2, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    options = Options(sigmoid_bias=torch.randn(3000, 2, device=DEVICE) - 1.0, causal=True)
    flat = [x.flatten(0, 1) for x in tensors]
    results = compute_by_hopper(*flat, **cumulated_pair(((4,) * 3000,) * 2), **options)
    expected, seen = oracle(*tensors, **options), witness(*tensors, draws=2, **options)
    for name, result in results.items():
        assert_within_budget(name, result.view(expected[name].shape), expected[name], seen[name])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("value", [100.0, math.nan, math.inf])
def test_one_sequence_does_not_reach_another(value, head_dim, dtype) -> None:
    """Of out, dK and dV not a bit; dQ is inside the budget."""
    lengths = (70, 50, 200), (200, 90, 120)
    tensors = packed_tensors(*lengths, (2, 1), (head_dim, head_dim), dtype)
    options: Any = {"causal": True, "sigmoid_bias": torch.randn(3, 2, device=DEVICE) - 6.0}
    clean = compute_by_hopper(*tensors, **cumulated_pair(lengths), **options)
    exact, seen = oracle_and_witness(*tensors, *lengths, 16, Options(**options))
    rows, keys = slice(70, 120), slice(200, 290)
    for x, part in zip(tensors, (rows, keys, keys, rows), strict=True):
        x[part] = value
    dirty = compute_by_hopper(*tensors, **cumulated_pair(lengths), **options)
    for name, result in dirty.items():
        where = rows if name in ("out", "dq") else keys
        assert (result[where] != clean[name][where]).any(), name
        for x in (result, clean[name], exact[name]):
            x[where] = 0.0
        seen[name][:, where] = 0.0
        assert name == "dq" or torch.equal(result, clean[name]), name
        assert_within_budget(name, result, exact[name], seen[name])


@pytest.mark.parametrize("lengths", [((0, 0), (3, 2)), ((3, 2), (0, 0)), ((0, 2), (3, 0)), ((0,), (7,))])
def test_empty_sequences_give_zeros(lengths) -> None:
    tensors = packed_tensors(*lengths, (2, 1), (64, 64), torch.bfloat16, spare=200)
    results = compute_by_hopper(*tensors, **cumulated_pair(lengths), causal=True, sigmoid_bias=0.0)
    assert len(results) == 4
    assert not any(x.any() for x in results.values())


@pytest.mark.parametrize("causal", [False, True])
def test_replays_in_a_graph_with_other_lengths_and_never_waits(causal) -> None:
    q, k, v, dout = packed_tensors(*LENGTHS, (4, 2), (64, 64), torch.bfloat16, spare=64)
    cu = cumulated_pair(LENGTHS)
    options: Any = {"causal": causal, "sigmoid_bias": -5.0}
    compute_by_hopper(q, k, v, dout, **cu, **options)
    with nothing_waits():
        compute_by_hopper(q, k, v, dout, **cu, **options)
    graph, results = captured(lambda: compute_by_hopper(q, k, v, dout, **cu, **options))
    others = tuple(lengths[::-1] for lengths in LENGTHS)
    for x, y in zip(cu.values(), others, strict=True):
        x.copy_(cumulated(y, DEVICE))
    graph.replay()
    again = compute_by_hopper(q, k, v, dout, **cu, **options)
    assert all(torch.equal(results[name], again[name]) for name in ("out", "dk", "dv"))
    expected, seen = oracle_and_witness(q, k, v, dout, *others, 16, Options(**options))
    assert_within_budget("dq", results["dq"], expected["dq"], seen["dq"])


def test_a_backward_that_it_lacks_is_tritons(monkeypatch) -> None:
    """As "auto" does it once packed sequences are measured; by name it says what it lacks."""
    tensors = packed_tensors(*LENGTHS, (4, 2), (256, 256), torch.bfloat16)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    options: Any = {"causal": True, "sigmoid_bias": -5.0, **cumulated_pair(LENGTHS)}
    backends._remembered.cache_clear()
    out = sigmoid_attention_varlen(*leaves, **options, backend="hopper")
    with pytest.raises(BackendUnsupported, match="backward of packed sequences must have a head_dim of at most 128"):
        out.backward(tensors[3])
    by_triton = sigmoid_attention_varlen(*leaves, **options, backend="triton")
    expected = torch.autograd.grad(by_triton, leaves, tensors[3])
    monkeypatch.setattr(hopper, "slower", lambda problem, direction: None)
    mixed = sigmoid_attention_varlen(*leaves, **options)
    assert torch.equal(mixed, out)
    grads = torch.autograd.grad(mixed, leaves, tensors[3])
    backends._remembered.cache_clear()
    assert all(map(torch.equal, grads, expected))
