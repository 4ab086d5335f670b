"""8-bit attention: the reference path to the letter, the kernel in Triton's interpreter, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from backends.here import IS_INTERPRETED
from rounding import assert_rounded

from flashsigmoid import BackendUnsupported, sigmoid_attention, sigmoid_attention_fp8
from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.testing import assert_within_budget, make_qkv

FP8 = torch.float8_e4m3fn
BACKENDS = ("auto", "reference", *(["triton"] if IS_INTERPRETED else []))
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (40, None)},
    "number": {"sigmoid_bias": -2.0, "scale": 0.3},
    "rows": {"sigmoid_bias": torch.linspace(-6, -2, 2 * 4 * 70).view(2, 4, 70), "alibi_slopes": torch.rand(4) * 0.1},
    "heads": {"sigmoid_bias": torch.tensor([-3.0, float("-inf"), -1.0, 0.0]), "window_size": (20, 10)},
}


def sample(head_dim: int = 32, head_dim_v: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, _ = make_qkv(2, 70, 150, 4, 2, head_dim, head_dim_v)
    return q.to(FP8), k.to(FP8), v.to(FP8)


def interpreted(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 8 bits as Triton's interpreter does, which loses a carry into an odd exponent."""
    import triton.language as tl
    from triton.runtime import interpreter

    nearest = interpreter._ir.ROUNDING_MODE.RTNE
    bits = interpreter._convert_float(x.float().contiguous().numpy(), tl.float32, tl.float8e4nv, nearest)
    return torch.from_numpy(bits.astype("u1").reshape(x.shape)).view(FP8).double()


def assert_as_good(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> None:
    """Within the budget of weights that are rounded so, each row of a block of keys scaled to [128, 256)."""
    a = attention_weights(q, k, **options)
    v = v.repeat_interleave(2, dim=2).transpose(1, 2)
    witness = []
    for block in (64, 128):
        factors = [torch.exp2(7 - x.amax(-1, True).clamp(min=1e-30).log2().floor()) for x in a.split(block, -1)]
        parts = [interpreted(x * f) / f for x, f in zip(a.split(block, -1), factors, strict=True)]
        witness.append((torch.cat(parts, -1) @ v).transpose(1, 2))
    assert_within_budget("out", out, (a @ v).transpose(1, 2), torch.stack(witness))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_op_on_scaled_inputs(backend, options) -> None:
    q, k, v = sample()
    scales = 0.5, torch.tensor([1.5, 0.7]), torch.rand(2, 2) + 0.5
    exact = [
        x.double() * factor
        for x, factor in zip((q, k, v), (0.5, scales[1][:, None], scales[2][:, None, :, None]), strict=True)
    ]
    double = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = sigmoid_attention(*exact, backend="reference", **double)
    out = sigmoid_attention_fp8(q, k, v, *scales, out_dtype=torch.float32, backend=backend, **options)
    assert out.shape == (2, 70, 4, 64)
    assert out.dtype == torch.float32
    if backend == "triton":
        assert_as_good(out, *exact, **double)
        with pytest.raises(AssertionError, match="out must be inside the error budget"):
            assert_as_good(1.2 * out, *exact, **double)
    else:
        assert_rounded(out.double(), expected, dtype=torch.float32)
    if "heads" in options:
        assert not out[:, :, 1].any()


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")
def test_weights_near_1_over_n_are_not_flushed_to_zero() -> None:
    """At b = -20 every weight is 2e-9, below all that e4m3 holds."""
    q, k, v = sample()
    call = {"sigmoid_bias": -20.0, "out_dtype": torch.float32}
    out = sigmoid_attention_fp8(q, k, v, 1.0, 1.0, 1.0, backend="triton", **call)
    assert 0 < out.abs().max() < 2e-6
    assert_as_good(out, q.double(), k.double(), v.double(), sigmoid_bias=-20.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sizes_and_rows_that_see_nothing(backend) -> None:
    q, k, v = sample()
    call = {"causal": True, "sigmoid_bias": 0.0, "backend": backend}
    assert not sigmoid_attention_fp8(q, k[:, :10], v[:, :10], 1.0, 1.0, 1.0, **call)[:, :60].any()
    assert sigmoid_attention_fp8(q[:, :0], k, v, 1.0, 1.0, 1.0, **call).shape == (2, 0, 4, 64)
    assert not sigmoid_attention_fp8(q, k[:, :0], v[:, :0], 1.0, 1.0, 1.0, **call).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_asked_for(backend, out_dtype) -> None:
    out = sigmoid_attention_fp8(*sample(), 1.0, 1.0, 1.0, out_dtype=out_dtype, backend=backend)
    assert out.dtype == out_dtype


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    match layout:
        case "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "channels first":
            return x.transpose(1, 3).contiguous().transpose(1, 3)
        case "one head":
            return x[:, :, :1].expand_as(x)
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    return (wide[..., 1 : x.shape[-1] + 1] if layout == "off by one channel" else wide[..., ::2]).copy_(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layout", "is_aligned"),
    [("heads first", True), ("channels first", False), ("off by one channel", False), ("every other channel", False),
     ("one head", False)],
)  # fmt: skip
def test_any_strides_do_or_are_one_clear_error(backend, layout, is_aligned) -> None:
    """Of q, of k and of v, each by itself; the kernel has v copied."""
    tensors = sample()
    for index, x in enumerate(tensors):
        given = [*tensors[:index], in_layout(x, layout), *tensors[index + 1 :]]
        call = {"causal": True, "out_dtype": torch.float32, "backend": backend}
        if backend == "triton" and not is_aligned and index < 2:
            with pytest.raises(BackendUnsupported, match=r"^triton: rows of q and k must begin at multiples of 16"):
                sigmoid_attention_fp8(*given, 1.0, 1.0, 1.0, **call)
            continue
        out = sigmoid_attention_fp8(*given, 1.0, 1.0, 1.0, **call)
        same = sigmoid_attention_fp8(*(x.contiguous() for x in given), 1.0, 1.0, 1.0, **call)
        if backend == "triton":
            assert torch.equal(out, same)
        else:
            assert_rounded(out, same)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")
def test_it_compiles() -> None:
    q, k, v = sample()

    def call(q, k, v):
        return sigmoid_attention_fp8(q, k, v, 1.0, 1.0, 1.0, backend="triton") * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))
    with pytest.raises(BackendUnsupported, match="triton: rows of q and k must begin at multiples of 16 bytes"):
        compiled(in_layout(q, "off by one channel"), k, v)  # which is not seen when it is traced


Q, K, V = sample()


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Q.float(), K, V, 1.0, 1.0, 1.0), {}, "q must be float8_e4m3fn, got torch.float32"),
        ((Q, K, V.to(torch.float8_e5m2), 1.0, 1.0, 1.0), {}, "v must be float8_e4m3fn, got torch.float8_e5m2"),
        ((Q, K[:, :, :1], V, 1.0, 1.0, 1.0), {}, "v must share batch, seqlen and nheads of k"),
        ((Q, K, V, 1.0, torch.ones(4), 1.0), {}, r"k_scale must be a number or float32 of shape .*, got \(4,\)"),
        ((Q, K, V, "1", 1.0, 1.0), {}, "q_scale must be a number, got '1'"),
        ((Q, K, V, 1.0, float("nan"), 1.0), {}, "k_scale must be finite, got nan"),
        ((Q, K, V, 1.0, 1.0, torch.ones(2).double()), {}, r"v_scale must be .*, got \(2,\) torch.float64"),
        ((Q, K, V, 1.0, 1.0, 1.0), {"out_dtype": torch.float64}, "out_dtype must be float16, bfloat16 or float32, got"),
        ((Q, K, V, 1.0, 1.0, 1.0), {"backend": "blocked"}, "backend must be one of auto, triton, reference, got 'bl"),
        (
            (Q, K, V, 1.0, 1.0, 1.0),
            {"alibi_slopes": torch.zeros(4, requires_grad=True)},
            "alibi_slopes must not require a gradient",
        ),
        ((Q, K, V, 1.0, torch.ones(2, requires_grad=True), 1.0), {}, "k_scale must not require a gradient"),
        ((Q.clone().requires_grad_(), K, V, 1.0, 1.0, 1.0), {}, "q must not require a gradient"),
    ],
)
def test_bad_input_is_one_clear_error(args, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_attention_fp8(*args, **options)


def test_the_kernel_says_what_it_cannot(monkeypatch) -> None:
    narrow = sample(head_dim=24)
    with pytest.raises(BackendUnsupported, match="triton: head_dim must be a multiple of 16, got 24 and 64"):
        sigmoid_attention_fp8(*narrow, 1.0, 1.0, 1.0, backend="triton")
    assert sigmoid_attention_fp8(*narrow, 1.0, 1.0, 1.0).isfinite().all()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnsupported, match=r"compute capability 9\.0 or later, got cpu"):
        sigmoid_attention_fp8(Q, K, V, 1.0, 1.0, 1.0, backend="triton")
