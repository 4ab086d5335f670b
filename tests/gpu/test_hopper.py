"""The Hopper kernels on a Hopper GPU: every size, not only those for which "auto" takes them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.cases import BIASES, CASES, LOADABLE, Case, drawn, for_hopper, random_class, time_is_left
from gpu.machine import assert_faults_are_caught, sanitized
from torch import Tensor

from flashsigmoid import explain, sigmoid_attention
from flashsigmoid.backends import BackendUnsupported
from flashsigmoid.backends.hopper import launch, tiles
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import assert_within_budget, make_qkv, oracle, witness

DEVICE = "cuda"
HALF = (torch.float16, torch.bfloat16)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
# (batch, seqlen_q, seqlen_k, nheads, nheads_k); the last has more blocks than there are multiprocessors
SHAPES = [(2, 1, 1, 4, 4), (1, 100, 333, 4, 1), (2, 257, 257, 4, 2), (1, 1000, 64, 4, 2), (6, 260, 390, 12, 6)]
# a tuple is the shape of a tensor, "rows" the number of queries
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 30)},
    "causal window": {"causal": True, "window_size": (70, None)},
    "offset": {"causal": True, "q_offset": -40},
    "slopes": {"causal": True, "alibi_slopes": (4,)},
    "rows": {"sigmoid_bias": ("rows",), "causal": True, "alibi_slopes": (4,), "window_size": (200, None)},
    "heads": {"sigmoid_bias": (4,)},
    "heads and slopes": {"sigmoid_bias": (4,), "alibi_slopes": (4,), "window_size": (150, 60)},
    "b = 0": {"sigmoid_bias": 0.0},
    "exact": {"sigmoid": "exact"},
    "fast": {"sigmoid": "fast", "sigmoid_bias": -5.0},
}


def compute(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> dict[str, Tensor]:
    """out, and dq, dk, dv where there is a backward."""
    sides = [x for x in options.values() if isinstance(x, Tensor)]  # a backward takes those of a head, up to 128
    has_backward = not sides or (max(q.shape[-1], v.shape[-1]) <= 128 and all(x.dim() < 3 for x in sides))
    leaves = [x.detach().requires_grad_(has_backward) for x in (q, k, v)]
    attend = sigmoid_attention_shard if "q_offset" in options else sigmoid_attention
    out = attend(*leaves, **options, backend="hopper")
    results = {"out": out.detach()}
    if out.requires_grad:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)
    return results


def tensors_of(options: dict[str, Any], batch: int, rows: int, nheads: int) -> dict[str, Any]:
    """Options with their tensors made."""
    made = dict(options)
    if isinstance(made.get("alibi_slopes"), tuple):
        made["alibi_slopes"] = torch.rand(nheads, device=DEVICE)
    if isinstance(made.get("sigmoid_bias"), tuple):
        shape = (batch, nheads, rows) if made["sigmoid_bias"] == ("rows",) else (nheads,)
        made["sigmoid_bias"] = torch.randn(shape, device=DEVICE) - 5.0
    return made


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_inside_the_budget(name, head_dim, dtype) -> None:
    for batch, seqlen_q, seqlen_k, nheads, nheads_k in SHAPES:
        if name == "fast" and seqlen_q == 1:
            continue  # tanh is accurate where some weights are large
        tensors = make_qkv(batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, dtype=dtype, device=DEVICE)
        options = {"sigmoid_bias": -math.log(seqlen_k)} | tensors_of(OPTIONS[name], batch, seqlen_q, nheads)
        draws = 32 if seqlen_k == 1 else 16 if min(seqlen_q, seqlen_k) < 128 or "alibi_slopes" in options else 8
        plain = {key: x for key, x in options.items() if key != "sigmoid"}
        expected, seen = oracle(*tensors, **plain), witness(*tensors, draws=draws, **plain)
        for tensor, result in compute(*tensors, **options).items():
            what = f"{tensor} of {name}, {batch} x {seqlen_q} x {seqlen_k}"
            assert_within_budget(what, result, expected[tensor], seen[tensor])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", OPTIONS)
def test_two_places_for_q_change_no_bit(monkeypatch, name, head_dim) -> None:
    """Programs have several turns, some of them rows that see nothing or rows beyond the last."""
    shapes = [*SHAPES, (24, 700, 500, 12, 12), (3, 2000, 130, 40, 8)]
    choose, found = launch.choose_tile, []
    for places in (1, 2):
        changes = {"own_out": places == 1, "is_persistent": True, "places": places}
        monkeypatch.setattr(launch, "choose_tile", lambda *args, changes=changes: replace(choose(*args), **changes))
        torch.manual_seed(0)
        for batch, seqlen_q, seqlen_k, nheads, nheads_k in shapes:
            q, k, v, _ = make_qkv(
                batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, dtype=torch.bfloat16, device=DEVICE
            )
            options = OPTIONS[name]
            if nheads != 4:
                options = {x: (nheads,) if y == (4,) else y for x, y in options.items()}
            options = {"sigmoid_bias": -math.log(seqlen_k)} | tensors_of(options, batch, seqlen_q, nheads)
            attend = sigmoid_attention_shard if "q_offset" in options else sigmoid_attention
            found.append(attend(q, k, v, **options, backend="hopper"))
    half = len(found) // 2
    assert all(map(torch.equal, found[:half], found[half:]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["full", "causal", "window", "causal window", "offset", "b = 0", "exact"])
def test_dq_and_dk_of_wide_heads_in_one_kernel(name, dtype) -> None:
    """Again by itself, and in a kernel each inside the budget: added in another order, the last bits differ only."""
    q, k, v, dout = make_qkv(4, 1500, 1700, 12, 4, 256, dtype=dtype, device=DEVICE)  # more blocks than multiprocessors
    options = {"sigmoid_bias": -math.log(1700)} | OPTIONS[name]
    first, again = (compute(q, k, v, dout, **options) for _ in range(2))
    torch.use_deterministic_algorithms(True)
    try:
        test_inside_the_budget(name, 256, dtype)
        apart = compute(q, k, v, dout, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first["dk"], again["dk"])
    for x, y in (("dq", again["dq"]), ("dq", apart["dq"]), ("dk", apart["dk"])):
        change = (first[x].float() - y.float()).norm() / y.float().norm()
        assert change <= torch.finfo(dtype).eps / 2, (x, change)


def check(case: Case, seed: int) -> None:
    tensors, options = case.tensors(seed), case.options(seed)
    draws = 32 if min(case.seqlen_q, case.seqlen_k) < 16 else 16
    expected, seen = oracle(*tensors, **options), witness(*tensors, draws=draws, **options)
    for name, result in compute(*tensors, **options, sigmoid=case.sigmoid).items():
        assert_within_budget(f"{name} of {case}", result, expected[name], seen[name])


@pytest.mark.parametrize("index", range(CASES))
def test_drawn_cases(index) -> None:
    """Those of the Triton kernels, which have every pair of option values."""
    case = for_hopper(drawn()[index])
    if not case.is_legal:
        pytest.skip("tanh is not accurate there")
    check(case, index)


@pytest.mark.parametrize("dtype", HALF)
def test_random_problems_until_the_time_is_up(dtype) -> None:
    """A class of kernels, then eight problems of it."""
    for rng in time_is_left():
        kernels = random_class(rng, dtype)
        bias = rng.choice(BIASES)
        for _ in range(8):
            nheads_k, group = rng.randint(1, 3), rng.randint(1, 4)
            case = for_hopper(
                Case(
                    batch=rng.randint(1, 3), seqlen_q=rng.randint(33, 900), seqlen_k=rng.randint(33, 900),
                    heads=(nheads_k * group, nheads_k), q_offset=rng.choice((None, 0, rng.randint(-200, 300))),
                    bias=bias if isinstance(bias, str) else rng.choice((None, 0.0, rng.uniform(-7.0, 0.0))),
                    layout=rng.choice(LOADABLE), score_std=rng.choice((1.0, 3.0)), **kernels,
                )
            )  # fmt: skip
            if case.is_legal:
                check(case, rng.getrandbits(20))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(8, 8), (96, 96), (40, 128), (80, 16), (192, 200)])
def test_every_head_dim(head_dim, head_dim_v) -> None:
    for causal in (False, True):
        tensors = make_qkv(2, 300, 333, 4, 2, head_dim, head_dim_v, dtype=torch.bfloat16, device=DEVICE)
        options: dict[str, Any] = {"sigmoid_bias": -math.log(333), "causal": causal}
        expected, seen = oracle(*tensors, **options), witness(*tensors, draws=8, **options)
        for name, result in compute(*tensors, **options).items():
            assert_within_budget(name, result, expected[name], seen[name])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_rows(head_dim) -> None:
    tensors = make_qkv(1, 300, 40_000, 2, 1, head_dim, dtype=torch.bfloat16, device=DEVICE)
    options = {"sigmoid_bias": -math.log(40_000), "causal": True}
    expected, seen = oracle(*tensors, **options), witness(*tensors, **options)
    for name, result in compute(*tensors, **options).items():
        assert_within_budget(name, result, expected[name], seen[name])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_planted_fault_is_caught_in_every_tensor(head_dim, dtype, monkeypatch, record_property) -> None:
    label = f"hopper, head_dim {head_dim}"
    assert_faults_are_caught(
        "hopper", dtype, monkeypatch, record_property, label=label, head_dim=head_dim, has_sides=False
    )


@pytest.mark.large(3)
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool) -> None:
    printed = sanitized(tool, "hopper", timeout_s=500)
    assert printed.count("ok hopper") == 11, printed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_is_seen_by_those_who_see_it(value) -> None:
    q, k, v, _ = make_qkv(1, 600, 600, 2, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    clean = sigmoid_attention(q, k, v, causal=True, backend="hopper")
    v[0, 300, 0, 5] = value
    out = sigmoid_attention(q, k, v, causal=True, backend="hopper")
    assert torch.equal(out[:, :256], clean[:, :256])
    assert not out[0, 300:, 0, 5].isfinite().any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_replays_in_a_graph(head_dim, causal) -> None:
    """More blocks than multiprocessors, and the counter that hands out masked ones begins anew."""
    q, k, v, dout = make_qkv(5, 900, 900, 12, 4, head_dim, dtype=torch.bfloat16, device=DEVICE)
    compute(q, k, v, dout, causal=causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute(q, k, v, dout, causal=causal)
    for x in (q, k, v, dout):
        x.copy_(torch.randn_like(x))
    graph.replay()
    for name, result in compute(q, k, v, dout, causal=causal).items():
        assert name == "dq" or torch.equal(results[name], result), name
    options: dict[str, Any] = {"causal": causal, "sigmoid_bias": -math.log(900)}
    for index in range(5):  # dq is added in no order; one sequence at a time, for memory
        one = [x[index : index + 1] for x in (q, k, v, dout)]
        dq = results["dq"][index : index + 1]
        assert_within_budget("dq", dq, oracle(*one, **options)["dq"], witness(*one, draws=8, **options)["dq"])


def test_auto_takes_it_where_it_is_faster_and_says_why_not_elsewhere() -> None:
    one = torch.empty(2, 8192, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    chosen = explain(one, one, one)
    assert (chosen.backend, chosen.backward) == ("hopper", "hopper")
    assert explain(one[:, :100], one[:, :100], one[:, :100]).backend == "triton"
    with_slopes = explain(one, one, one, alibi_slopes=torch.ones(16, device=DEVICE))
    assert (with_slopes.backend, with_slopes.backward) == ("triton", "triton")
    assert "alibi_slopes beyond head_dim 64, is not measured yet" in str(with_slopes.backward_reasons)
    narrow = one[..., :64].contiguous()
    with_slopes = explain(narrow, narrow, narrow, alibi_slopes=torch.ones(16, device=DEVICE))
    assert (with_slopes.backend, with_slopes.backward) == ("triton", "hopper")
    torch.use_deterministic_algorithms(True)
    try:
        assert explain(one, one, one).backward == "triton"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", [{}, {"causal": True, "sigmoid_bias": ("rows",), "alibi_slopes": (6,)}], ids=str)
@pytest.mark.parametrize(("seqlen_q", "head_dim"), [(1, 64), (700, 64), (700, 128), (321, 256)])
def test_blocks_from_the_end(seqlen_q, head_dim, options, monkeypatch) -> None:
    """What the first block lacks in rows instead of the last."""
    table = {
        direction: {dim: tuple(replace(tile, is_from_end=True) for tile in both) for dim, both in rows.items()}
        for direction, rows in tiles._TILES.items()
    }
    monkeypatch.setattr(tiles, "_TILES", table)
    tensors = make_qkv(3, seqlen_q, 700, 6, 2, head_dim, dtype=torch.bfloat16, device=DEVICE)
    options = {"sigmoid_bias": -6.5} | tensors_of(options, 3, seqlen_q, 6)
    expected, seen = oracle(*tensors, **options), witness(*tensors, draws=8, **options)
    for name, result in compute(*tensors, **options).items():
        assert_within_budget(name, result, expected[name], seen[name])


def test_head_dim_256_is_deterministic() -> None:
    """Each gradient has a kernel of its own, which adds in one order."""
    q, k, v, dout = make_qkv(2, 700, 900, 8, 2, 256, dtype=torch.bfloat16, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (compute(q, k, v, dout, causal=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


def test_rows_that_the_hardware_cannot_load() -> None:
    wide = torch.randn(1, 200, 2, 65, dtype=torch.bfloat16, device=DEVICE)
    q = wide[..., 1:]
    with pytest.raises(BackendUnsupported, match="hopper: rows must begin at multiples of 16 bytes"):
        sigmoid_attention(q, q, q, backend="hopper")
    assert explain(q, q, q).backend == "triton"
