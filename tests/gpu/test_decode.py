"""The decode kernel on a GPU: real sizes inside the error budget, no synchronisation, CUDA graphs, compiled.

`python -m pytest tests/gpu/test_decode.py -n 8 --gpu-record gpu-tests-decode.jsonl`. Speed is
`flashsigmoid bench decode`.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from gpu.machine import captured, nothing_waits
from torch import Tensor

from flashsigmoid import sigmoid_attention_with_kvcache, sigmoid_attention_with_prefix
from flashsigmoid.kvcache import explain_with_kvcache
from flashsigmoid.testing import assert_within_budget, errors_over_budget

DEVICE = "cuda"


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=DEVICE)


def results(
    q: Tensor, k: Tensor, v: Tensor, *, sigmoid_bias: Any, causal: bool = True, window_size: Any = (None, None),
    alibi_slopes: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of one sequence, q (seqlen_q, nheads, head_dim): the exact result, and witnesses that sum in several orders.

    As `testing.witness`, on the GPU and with few Python steps for many keys: weights rounded, sums of parts of the keys
    in float32, rounded once. A sequence of one key has one rounding of a score and of a weight: each draw adds its
    scores in another order, and rounds both at another place between two powers of two, so that no draw's luck is the
    witness. Of few weights there are more draws, by the table at `testing.witness`.
    """
    (seqlen_q, _, head_dim), (n, nheads_k, _) = q.shape, k.shape
    qd = q.double().transpose(0, 1).unflatten(0, (nheads_k, -1))  # (nheads_k, group, seqlen_q, head_dim)
    kd, vd = (x.double().transpose(0, 1) for x in (k, v))

    def weights(dtype: torch.dtype, channels: Any = slice(None), unit: float = 1.0) -> Tensor:
        qc, kc = (x[..., channels].to(dtype) for x in (qd, kd))
        s = torch.einsum("kgid,kjd->kgij", qc, kc).flatten(0, 1)  # (nheads, seqlen_q, n)
        b = sigmoid_bias
        if isinstance(b, Tensor):
            b = b.to(dtype)[:, None, None] if b.dim() == 1 else b.to(dtype)[..., None]
        distance = torch.arange(seqlen_q, device=DEVICE)[:, None] + n - seqlen_q - torch.arange(n, device=DEVICE)
        s = s * (unit * (head_dim**-0.5 if scale is None else scale)) + unit * b
        if alibi_slopes is not None:
            s = s - unit * alibi_slopes.to(dtype)[:, None, None] * distance.abs()
        left, right = window_size
        if causal:
            right = 0 if right is None else min(0, right)
        a = 1.0 / (1.0 + torch.exp(s.double() / -unit).to(dtype))
        for cut in ([] if left is None else [distance > left]) + ([] if right is None else [distance < -right]):
            a = a.masked_fill(cut, 0.0)
        return a.unflatten(0, (nheads_k, -1))

    def product(a: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("kgij,kjd->ikgd", a, x).flatten(1, 2)  # (seqlen_q, nheads, head_dim)

    exact = product(weights(torch.float64), vd)
    vf, witnesses = vd.float(), []
    draws = 32 if n * q.shape[0] * q.shape[1] <= 2**10 else 4
    for draw in range(draws):
        generator, unit = torch.Generator().manual_seed(draw), 2.0 ** (draw / draws)
        shift = unit if q.dtype.itemsize == 2 else 1.0
        order, channels = (torch.randperm(size, generator=generator).to(DEVICE) for size in (n, head_dim))
        a = (weights(torch.float32, channels, unit) * shift).to(q.dtype).float() / shift
        # one accumulator takes the parts one after the other
        total = sum((product(a[..., part], vf[:, part]) for part in order.chunk(64)), torch.zeros_like(exact).float())
        witnesses.append(total.to(q.dtype))
    return exact, torch.stack(witnesses)


def check(
    out: Tensor, q: Tensor, keys: list[tuple[Tensor, Tensor]], what: object = "", sequences: Any = None, **options: Any
) -> None:
    for s in range(q.shape[0]) if sequences is None else sequences:
        k, v = keys[s]
        given = {x: y[s] if isinstance(y, Tensor) and y.dim() > 1 else y for x, y in options.items()}
        if k.shape[0] == 0:
            assert not out[s].any()
            continue
        assert_within_budget(f"out[{s}] {what}", out[s], *results(q[s], k, v, **given))


def cached(lengths: list[int], capacity: int, nheads_k: int, head_dim: int, dtype: torch.dtype, page_size: int = 0):
    """(k_cache, v_cache, page_table, the keys and values of each sequence), NaN beyond each length."""
    batch = len(lengths)
    k, v = (normal(batch, capacity, nheads_k, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    for s, length in enumerate(lengths):
        k[s, length:] = v[s, length:] = math.nan
    whole = [(k[s, :length].clone(), v[s, :length].clone()) for s, length in enumerate(lengths)]
    if not page_size:
        return k, v, None, whole
    each = capacity // page_size
    order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k, v))
    k, v = (torch.empty_like(x).index_copy_(0, order, x) for x in (k, v))
    return k, v, order.view(batch, each).int(), whole


def draw(index: int) -> dict[str, Any]:
    """A call at random: every value of every option comes often enough in 60 of them."""
    rng = random.Random(f"decode {index}")
    nheads, nheads_k = rng.choice([(8, 8), (32, 8), (8, 1), (6, 2)])
    batch = rng.choice([1, 3, 9])
    seqlen_q = rng.choice([1, 1, 1, 2, 5, 16])
    capacity = rng.choice([512, 4096, 16384])
    lengths = [rng.choice([0, 1, 17, capacity // 3, capacity - 1, capacity]) for _ in range(batch)]
    return {
        "heads": (nheads, nheads_k), "batch": batch, "seqlen_q": seqlen_q, "capacity": capacity, "lengths": lengths,
        "head_dim": rng.choice([64, 128, 128, 256, 40, 96, 192]), "dtype": DTYPES[index % 3],
        "page_size": rng.choice([0, 0, 16, 64, 256]), "num_splits": rng.choice([0, 0, 1, 3, 40]),
        "causal": rng.random() < 0.7, "window_size": rng.choice([(None, None), (None, None), (100, None), (1000, 20)]),
        "slopes": rng.choice([None, None, "h", "bh"]), "bias": rng.choice([None, None, "h", "bh", "rows"]),
    }  # fmt: skip


def drawn_param(index: int) -> Any:
    """Its index, marked where the caches, their copies and one sequence's witness in float32 and 64 take gigabytes."""
    case = draw(index)
    elements = case["capacity"] * case["heads"][1] * case["head_dim"]
    gib = elements * (case["batch"] * (6 if case["page_size"] else 4) * case["dtype"].itemsize + 34) / 2**30
    return pytest.param(index, marks=[pytest.mark.large(math.ceil(gib))] if gib > 1.5 else [])


@pytest.mark.parametrize("index", [drawn_param(index) for index in range(60)])
def test_drawn_calls(index) -> None:
    case = draw(index)
    nheads, nheads_k = case["heads"]
    batch, seqlen_q, dtype = case["batch"], case["seqlen_q"], case["dtype"]
    if dtype == torch.float32:
        case["head_dim"] = min(case["head_dim"], 128)
    k, v, table, whole = cached(case["lengths"], case["capacity"], nheads_k, case["head_dim"], dtype, case["page_size"])
    q = normal(batch, seqlen_q, nheads, case["head_dim"], dtype=dtype)
    shapes = {"h": (nheads,), "bh": (batch, nheads), "rows": (batch, nheads, seqlen_q)}
    bias: Any = -math.log(case["capacity"])
    if case["bias"]:
        bias = bias + normal(*shapes[case["bias"]], dtype=torch.float32, seed=3)
    options = {"causal": case["causal"], "window_size": case["window_size"], "sigmoid_bias": bias}
    if case["slopes"]:
        options["alibi_slopes"] = normal(*shapes[case["slopes"]], dtype=torch.float32, seed=4).abs() * 0.1
    out = sigmoid_attention_with_kvcache(
        q, k, v, cache_seqlens=torch.tensor(case["lengths"], dtype=torch.int32, device=DEVICE), page_table=table,
        num_splits=case["num_splits"], backend="triton", **options,
    )  # fmt: skip
    check(out, q, whole, case, range(min(batch, 4)), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "capacity"), [
    (1, 4096), (1, 65536),
    # both caches, their copies, and as much as eight of a sequence's for its witness
    pytest.param(1, 524288, marks=pytest.mark.large(24)), pytest.param(8, 65536, marks=pytest.mark.large(7)),
    pytest.param(64, 4096, marks=pytest.mark.large(3)),
])  # fmt: skip
def test_sizes_that_are_benchmarked(dtype, batch, capacity) -> None:
    k, v, _, whole = cached([capacity] * batch, capacity, 8, 128, dtype)
    q = normal(batch, 1, 32, 128, dtype=dtype)
    b = -math.log(capacity)
    told = explain_with_kvcache(q, k, v, sigmoid_bias=b)
    assert (told.backend, "decode kernel" in told.reasons) == ("triton", False)
    out = sigmoid_attention_with_kvcache(q, k, v, cache_seqlens=capacity, sigmoid_bias=b)
    check(out, q, whole, "", [0, batch - 1], sigmoid_bias=b)
    short = sigmoid_attention_with_kvcache(q, k, v, cache_seqlens=capacity - 1, sigmoid_bias=b)
    if capacity <= 4096:  # of more keys one is less than what 16 bits round
        assert max(errors_over_budget(short[0], *results(q[0], *whole[0], sigmoid_bias=b))) > 1.0


def step_of(batch: int = 4, capacity: int = 4096, new: int = 1, dtype: torch.dtype = torch.bfloat16):
    """A step with appending and RoPE of a batch with room for more: (call, its tensors)."""
    lengths = torch.tensor([100 * s for s in range(batch)], dtype=torch.int32, device=DEVICE)
    k_cache, v_cache, _, _ = cached([100 * s for s in range(batch)], capacity, 8, 128, dtype)
    q = normal(batch, new, 32, 128, dtype=dtype)
    k, v = (normal(batch, new, 8, 128, dtype=dtype, seed=seed) for seed in (5, 6))
    angle = torch.arange(capacity, device=DEVICE)[:, None] * 1e4 ** (-torch.arange(64, device=DEVICE) / 64)
    cos, sin = angle.cos(), angle.sin()

    def call(backend: str = "auto") -> Tensor:
        return sigmoid_attention_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, sigmoid_bias=-8.0, rotary_cos=cos, rotary_sin=sin,
            backend=backend,
        )  # fmt: skip

    return call, (q, k_cache, v_cache, k, v, lengths)


def exact_of(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What a step gives by the reference in float64 of the same values, and by plain torch."""
    q, k_cache, v_cache, k, v, lengths = tensors
    capacity = k_cache.shape[1]
    angle = torch.arange(capacity, device=DEVICE)[:, None] * 1e4 ** (-torch.arange(64, device=DEVICE) / 64)
    outs = []
    for dtype, backend in ((torch.float64, "reference"), (q.dtype, "blocked")):
        given = [x.to(dtype).clone() for x in (q, k_cache, v_cache, k, v)]
        outs.append(
            sigmoid_attention_with_kvcache(
                *given,
                cache_seqlens=lengths,
                sigmoid_bias=-8.0,
                rotary_cos=angle.cos(),
                rotary_sin=angle.sin(),
                backend=backend,
            )
        )
    return outs[0], outs[1]


@pytest.mark.parametrize("new", [1, 4])
def test_a_step_in_a_cuda_graph_follows_its_tensors(new) -> None:
    call, tensors = step_of(new=new)
    q, _, _, _, _, lengths = tensors
    graph, out = captured(call)
    for step in range(3):
        lengths += new
        q.copy_(normal(*q.shape, dtype=q.dtype, seed=10 + step))
        graph.replay()
        exact, near = exact_of(tensors)
        assert_within_budget(f"out of step {step}", out, exact, near)


def test_nothing_waits_for_the_gpu() -> None:
    call, tensors = step_of()
    q, k_cache, v_cache, *_ = tensors
    prefix = [normal(500, 8, 128, dtype=q.dtype, seed=seed) for seed in (7, 8)]
    options = {"cache_seqlens": tensors[5], "sigmoid_bias": -8.0}
    together = lambda: sigmoid_attention_with_prefix(q, *prefix, k_cache, v_cache, **options)  # noqa: E731
    call(), together()
    torch.cuda.synchronize()
    with nothing_waits():
        call(), together()


@pytest.mark.parametrize("new", [1, 3])
def test_compiled_by_inductor(new) -> None:
    torch.compiler.reset()
    call, tensors = step_of(new=new)
    compiled = torch.compile(call, fullgraph=True)
    exact, near = exact_of(tensors)
    before = tensors[1].clone()
    assert_within_budget("out", compiled(), exact, near)
    assert not torch.equal(before.nan_to_num(9.0), tensors[1].nan_to_num(9.0))  # appended in place


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_the_kernels_of_a_step_are_few() -> None:
    """Appending with RoPE, the parts, their sum: no more launches than that."""
    call, _ = step_of()
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    # launches have names too; the tests fill new memory with NaN
    names = [x.key for x in profile.key_averages() if "_kernel" in x.key and "Fill" not in x.key]
    ours = [name for name in names if any(part in name for part in ("_append_", "_decode_", "_sum_kernel"))]
    assert len(ours) == len(names) == 3, names


@pytest.mark.large(4)
@pytest.mark.parametrize("reduction", ["parts", "atomic"])
def test_both_reductions_and_which_of_them_repeats(reduction, monkeypatch) -> None:
    from flashsigmoid.backends.triton import decode_launch

    monkeypatch.setattr(decode_launch, "REDUCTION", reduction)
    decode_launch._plan.cache_clear()
    k, v, _, whole = cached([65536, 300], 65536, 8, 128, torch.bfloat16)
    q = normal(2, 1, 32, 128, dtype=torch.bfloat16)
    lengths = torch.tensor([65536, 300], device=DEVICE)
    call = lambda: sigmoid_attention_with_kvcache(q, k, v, cache_seqlens=lengths, sigmoid_bias=-11.0)  # noqa: E731
    out = call()
    check(out, q, whole, sigmoid_bias=-11.0)
    torch.use_deterministic_algorithms(True)
    try:
        same = call()
        assert all(torch.equal(call(), same) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window_size": (20_000, None)}, {"causal": False}], ids=str)
def test_a_shared_prefix(dtype, options) -> None:
    batch, n, seqlen_q = 16, 16384 + 7, 2
    lengths = [0, 1, 100, *range(200, 200 + batch - 3)]
    k, v, _, own = cached(lengths, 512, 8, 64, dtype)
    prefix = [normal(n, 8, 64, dtype=dtype, seed=seed) for seed in (7, 8)]
    q = normal(batch, seqlen_q, 32, 64, dtype=dtype)
    given = {"sigmoid_bias": -9.0, "alibi_slopes": torch.full((32,), 1e-5, device=DEVICE), **options}
    out = sigmoid_attention_with_prefix(
        q, *prefix, k, v, cache_seqlens=torch.tensor(lengths, device=DEVICE), backend="triton", **given
    )
    keys = [tuple(torch.cat(pair) for pair in zip(prefix, x, strict=True)) for x in own]
    check(out, q, keys, "", [0, 1, 2, batch - 1], **given)


def test_a_chunk_of_prefill_goes_the_dense_way() -> None:
    k, v, _, whole = cached([600, 512], 1024, 8, 64, torch.bfloat16)
    q = normal(2, 512, 8, 64, dtype=torch.bfloat16)
    told = explain_with_kvcache(q, k, v, sigmoid_bias=-7.0)
    assert told.reasons["decode kernel"] == "seqlen_q must be at most 16 for the decode kernel, got 512"
    lengths = torch.tensor([600, 512], device=DEVICE)
    check(
        sigmoid_attention_with_kvcache(q, k, v, cache_seqlens=lengths, sigmoid_bias=-7.0), q, whole, sigmoid_bias=-7.0
    )
