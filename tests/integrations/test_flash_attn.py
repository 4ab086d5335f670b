"""flash-attn's functions: their argument order, the budget of the op, packed forms without copies, and refusals."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from rounding import assert_rounded

from flashsigmoid import functional, sigmoid_attention
from flashsigmoid.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashsigmoid.testing import Options, assert_within_budget, make_qkv, oracle, witness

# argument order and defaults of flash-attn 2.5.6, read from its source; FlashSigmoid puts its own argument behind them
TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
HEADS = {
    flash_attn_func: ["q", "k", "v"],
    flash_attn_kvpacked_func: ["q", "kv"],
    flash_attn_qkvpacked_func: ["qkv"],
    flash_attn_varlen_func: ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
    flash_attn_varlen_kvpacked_func: ["q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
    flash_attn_varlen_qkvpacked_func: ["qkv", "cu_seqlens", "max_seqlen"],
}
DENSE = [flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func]
PACKED = [flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func]
functions = pytest.mark.parametrize("function", [*DENSE, *PACKED], ids=lambda function: function.__name__)

LENGTHS_Q, LENGTHS_K = (5, 0, 12, 1), (9, 4, 7, 1)


def cu_seqlens(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


CU_Q, CU_K = cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K)


def operands(function) -> tuple:
    """Arguments up to dropout_p, small ones."""
    if function in DENSE:
        q, k, v, _ = make_qkv(2, 6, 6, 4, 4, 8)
        packed = {
            flash_attn_func: (q, k, v),
            flash_attn_kvpacked_func: (q, torch.stack((k, v), 2)),
            flash_attn_qkvpacked_func: (torch.stack((q, k, v), 2),),
        }
        return packed[function]
    q, k, v, _ = make_qkv(1, 21, 21, 4, 4, 8)
    q, k, v = q[0], k[0], v[0]
    lengths = (CU_K, CU_K, 9, 9)
    packed = {
        flash_attn_varlen_func: (q, k, v, *lengths),
        flash_attn_varlen_kvpacked_func: (q, torch.stack((k, v), 1), *lengths),
        flash_attn_varlen_qkvpacked_func: (torch.stack((q, k, v), 1), CU_K, 9),
    }
    return packed[function]


def needed(function) -> dict:
    """The keywords without a default."""
    return {"sigmoid_bias": -2.0} if function in PACKED else {}


@functions
def test_argument_order_is_that_of_flash_attn(function) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    *theirs, ours = parameters
    assert [p.name for p in theirs] == [*HEADS[function], *TAIL]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in theirs)
    assert {p.name: p.default for p in theirs if p.default is not p.empty} == TAIL
    assert ours.name == "sigmoid_bias"
    if function in DENSE:
        assert ours.kind is ours.POSITIONAL_OR_KEYWORD
        assert ours.default == 0.0
    else:  # FlashSigmoid has no such function: nothing to be compatible with
        assert ours.kind is ours.KEYWORD_ONLY
        assert ours.default is ours.empty


CASES = [
    # FlashSigmoid's own test has these lengths and head dimensions
    (torch.float16, 113, 203, 6, 2, 59, {"causal": True}),
    (torch.bfloat16, 108, 256, 6, 1, 40, {"window_size": (31, 0)}),
    (torch.bfloat16, 256, 128, 6, 6, 32, {"causal": True, "alibi_slopes": "(b,h)"}),
    (torch.float32, 47, 65, 4, 2, 24, {"window_size": (-1, 5), "sigmoid_bias": "(h,)", "alibi_slopes": "(h,)"}),
    (torch.float32, 65, 47, 4, 4, 24, {"window_size": (9, -1), "sigmoid_bias": "(b,h,i)", "softmax_scale": 0.3}),
    (torch.float64, 33, 33, 2, 2, 16, {"causal": True, "window_size": (8, 3), "sigmoid_bias": "()"}),
]


@pytest.mark.parametrize(("dtype", "seqlen_q", "seqlen_k", "nheads", "nheads_k", "head_dim", "given"), CASES)
def test_results_and_gradients_are_inside_the_budget(
    dtype, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, given
) -> None:
    q, k, v, dout = make_qkv(2, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, dtype=dtype)
    side = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"()": (), "(h,)": (nheads,), "(b,h)": (2, nheads), "(b,h,i)": (2, nheads, seqlen_q)}
    given = dict({"sigmoid_bias": -math.log(seqlen_k)}, **given)
    for name, scale, shift in (("sigmoid_bias", 1.0, -4.0), ("alibi_slopes", 0.1, 0.2)):
        if given.get(name) in shapes:
            given[name] = torch.randn(shapes[given[name]], dtype=side) * scale + shift

    leaves = {"dq": q, "dk": k, "dv": v, "db": given["sigmoid_bias"], "dslopes": given.get("alibi_slopes")}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items() if isinstance(x, torch.Tensor)}
    call = dict(given)
    if "db" in leaves:
        call["sigmoid_bias"] = leaves["db"]
    if "dslopes" in leaves:
        call["alibi_slopes"] = leaves["dslopes"]
    out = flash_attn_func(leaves["dq"], leaves["dk"], leaves["dv"], **call)
    actual = {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))}

    options = Options(sigmoid_bias=given["sigmoid_bias"], causal=given.get("causal", False))
    left, right = given.get("window_size", (-1, -1))
    options["window_size"] = (None if left == -1 else left, None if right == -1 else right)
    if "alibi_slopes" in given:
        options["alibi_slopes"] = given["alibi_slopes"]
    if "softmax_scale" in given:
        options["scale"] = given["softmax_scale"]
    expected, seen = oracle(q, k, v, dout, **options), witness(q, k, v, dout, **options)
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert_within_budget(name, result.detach(), expected[name], seen[name])


def test_alibi_counts_the_distance_from_the_last_key_in_full() -> None:
    """-slope * |i + seqlen_k - seqlen_q - j|, with no shortcut for causal: a sigmoid sees a shift of the row."""
    q, k, v, _ = make_qkv(1, 3, 5, 2, 2, 4, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64)
    out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, sigmoid_bias=-1.0)
    expected = torch.zeros_like(out)
    for h in range(2):
        for i in range(3):
            for j in range(i + 5 - 3 + 1):
                score = q[0, i, h] @ k[0, j, h] / 2.0 - 1.0 - slopes[h] * abs(i + 5 - 3 - j)
                expected[0, i, h] += torch.sigmoid(score) * v[0, j, h]
    assert_rounded(out, expected)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 2), (3, -1), (3, 0), [2, 1], (None, -1), (None, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_minus_one_is_unlimited(window, causal) -> None:
    q, k, v, _ = make_qkv(1, 6, 9, 2, 2, 8)
    ours = tuple(None if side == -1 else side for side in window)
    expected = sigmoid_attention(q, k, v, sigmoid_bias=0.0, causal=causal, window_size=ours)
    assert torch.equal(flash_attn_func(q, k, v, causal=causal, window_size=window), expected)


def test_bias_is_zero_by_default_as_in_flashsigmoid_and_none_is_ours() -> None:
    q, k, v, _ = make_qkv(1, 6, 9, 2, 2, 8)
    assert torch.equal(flash_attn_func(q, k, v), sigmoid_attention(q, k, v, sigmoid_bias=0.0))
    ours = flash_attn_func(q, k, v, 0.0, None, False, (-1, -1), None, False, False, None)
    assert torch.equal(ours, sigmoid_attention(q, k, v))
    with pytest.raises(ValueError, match="sigmoid_bias is required"):
        flash_attn_varlen_func(*operands(flash_attn_varlen_func), sigmoid_bias=None)  # pyright: ignore


@functions
def test_packed_forms_pass_views_of_what_they_are_given(function, monkeypatch) -> None:
    """No copy before the op: the storage, and where in it each tensor begins, are those of the argument."""
    seen = {}

    def capture(q, k, v, **options):
        seen.update(q=q, k=k, v=v, **options)
        return q

    monkeypatch.setattr(functional, "sigmoid_attention", capture)
    monkeypatch.setattr(functional, "sigmoid_attention_varlen", capture)
    args = operands(function)
    function(*args, **needed(function))
    for names, given in zip(HEADS[function], args, strict=True):
        if set(names) <= set("qkv"):  # "kv" is k and v
            parts = given.unbind(-3) if len(names) > 1 else (given,)
            for name, part in zip(names, parts, strict=True):
                assert seen[name].data_ptr() == part.data_ptr()
                assert (seen[name].shape, seen[name].stride()) == (part.shape, part.stride())
    assert seen["scale"] is None
    assert seen["window_size"] == (None, None)


@pytest.mark.parametrize("function", [*DENSE[1:], *PACKED[1:]], ids=lambda function: function.__name__)
def test_packed_forms_equal_the_unpacked_with_gradients(function) -> None:
    args = operands(function)
    tensors = [x.requires_grad_() for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    rest = [x for x in args if not (isinstance(x, torch.Tensor) and x.is_floating_point())]
    keywords = {"causal": True, "window_size": (4, -1), "softmax_scale": 0.4, "sigmoid_bias": -1.5}
    out = function(*tensors, *rest, **keywords)
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, tensors, dout)

    parts = [part for x in tensors for part in (x.unbind(-3) if x.dim() > out.dim() else (x,))]
    plain = flash_attn_func if function in DENSE else flash_attn_varlen_func
    expected_out = plain(*parts, *(rest if len(rest) != 2 else [rest[0]] * 2 + [rest[1]] * 2), **keywords)
    assert torch.equal(out, expected_out)
    expected = torch.autograd.grad(expected_out, tensors, dout)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bias", ["float", "()", "(h,)", "(b,h)", "(t,h)"])
def test_varlen_is_dense_for_every_sequence(bias) -> None:
    nheads, nheads_k = 4, 2
    q, _, _, dout = make_qkv(1, sum(LENGTHS_Q), 1, nheads, 1, 8, 6, dtype=torch.float64)
    _, k, v, _ = make_qkv(1, 1, sum(LENGTHS_K), 1, nheads_k, 8, 6, dtype=torch.float64, seed=1)
    q, k, v, dout = q[0], k[0], v[0], dout[0]
    slopes = torch.rand(len(LENGTHS_Q), nheads, dtype=torch.float64)
    shape = {"()": (), "(h,)": (nheads,), "(b,h)": slopes.shape, "(t,h)": (sum(LENGTHS_Q), nheads)}.get(bias)
    b = -1.5 if shape is None else torch.randn(shape, dtype=torch.float64) - 2.0
    leaves = [x.requires_grad_() for x in (q, k, v, slopes, b) if isinstance(x, torch.Tensor)]
    keywords = {"causal": True, "window_size": (6, -1), "softmax_scale": 0.3}
    lengths = (CU_Q, CU_K, max(LENGTHS_Q), max(LENGTHS_K))
    out = flash_attn_varlen_func(q, k, v, *lengths, alibi_slopes=slopes, sigmoid_bias=b, **keywords)

    parts = []
    for s in range(len(LENGTHS_Q)):
        rows, columns = slice(*CU_Q[s : s + 2].tolist()), slice(*CU_K[s : s + 2].tolist())
        keywords["sigmoid_bias"] = b[s] if bias == "(b,h)" else b[rows].T[None] if bias == "(t,h)" else b
        keywords["alibi_slopes"] = slopes[s]
        parts.append(flash_attn_func(q[None, rows], k[None, columns], v[None, columns], **keywords)[0])
    expected = torch.cat(parts)
    assert_rounded(out, expected)
    grads = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    for mine, theirs in zip(*grads, strict=True):
        assert_rounded(mine, theirs)


@functions
def test_dropout_follows_torchs_seed(function) -> None:
    args, keywords = operands(function), {"dropout_p": 0.4, **needed(function)}
    torch.manual_seed(3)
    first, second = function(*args, **keywords), function(*args, **keywords)
    torch.manual_seed(3)
    assert torch.equal(first, function(*args, **keywords))
    assert not torch.equal(first, second)


@functions
def test_attention_probabilities_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"return_attn_probs must be False, got True.*reference\.attention_weights"):
        function(*operands(function), return_attn_probs=True, **needed(function))


@functions
def test_determinism_is_torchs_switch(function, monkeypatch) -> None:
    monkeypatch.setattr(functional, "sigmoid_attention", lambda q, k, v, **options: q)
    monkeypatch.setattr(functional, "sigmoid_attention_varlen", lambda q, k, v, **options: q)
    keywords = {"deterministic": True, **needed(function)}
    function(*operands(function), **keywords)  # a CPU is deterministic
    elsewhere = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in operands(function)]
    with pytest.raises(ValueError, match=r"deterministic=True needs torch\.use_deterministic_algorithms\(True\)"):
        function(*elsewhere, **keywords)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    function(*elsewhere, **keywords)


@functions
def test_gradients_on_a_cpu_repeat_bit_for_bit(function) -> None:
    args = operands(function)
    tensors = [x.requires_grad_() for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    out = function(*args, deterministic=True, **needed(function))
    again = function(*args, deterministic=True, **needed(function))
    dout = torch.randn_like(out)
    first, second = (torch.autograd.grad(x, tensors, dout) for x in (out, again))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("window", "rule"),
    [
        (3, r"window_size must be \(left, right\), -1 for unlimited, got 3"),
        ((1, 2, 3), r"window_size must be \(left, right\), -1 for unlimited, got \(1, 2, 3\)"),
        ((-2, 1), r"window_size must be non-negative integers, -1 for unlimited, got \(-2, 1\)"),
        ((1.5, 1), r"window_size must be non-negative integers"),
        ((True, 1), r"window_size must be non-negative integers"),
    ],
)
@functions
def test_windows_that_are_none(function, window, rule) -> None:
    with pytest.raises(ValueError, match=rule):
        function(*operands(function), window_size=window, **needed(function))


@pytest.mark.parametrize(
    ("function", "packed", "rule"),
    [
        (flash_attn_qkvpacked_func, torch.ones(2, 6, 2, 4, 8), r"qkv .*3, nheads.*got \(2, 6, 2, 4, 8\)"),
        (flash_attn_qkvpacked_func, torch.ones(6, 3, 4, 8), r"qkv must be a dense tensor .*got \(6, 3, 4, 8\)"),
        (flash_attn_qkvpacked_func, [1], r"qkv must be a dense tensor .*got list"),
        (
            flash_attn_varlen_qkvpacked_func,
            torch.ones(2, 6, 3, 4, 8),
            r"qkv must be .*\(total, 3.*got \(2, 6, 3, 4, 8\)",
        ),
    ],
)
def test_what_is_not_packed_so(function, packed, rule) -> None:
    rest = operands(function)[1:]
    with pytest.raises(ValueError, match=rule):
        function(packed, *rest, **needed(function))
    with pytest.raises(ValueError, match=r"kv must be .*2, nheads_k, head_dim\), got \(2, 6, 3, 4, 8\)"):
        flash_attn_kvpacked_func(torch.ones(2, 6, 4, 8), torch.ones(2, 6, 3, 4, 8))


def test_the_errors_of_the_op_are_errors_here() -> None:
    q, k, v, _ = make_qkv(1, 6, 9, 2, 2, 8)
    with pytest.raises(ValueError, match="alibi_slopes must be a tensor, got float"):
        # where flash-attn since 2.6 has softcap
        flash_attn_func(q, k, v, 0.0, None, False, (-1, -1), 0.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="q, k, v must share one dtype"):
        flash_attn_func(q, k.half(), v)


@functions
def test_compiles_whole(function) -> None:
    torch.compiler.reset()
    args, keywords = operands(function), {"causal": True, "deterministic": True, **needed(function)}
    tensors = [x.requires_grad_() for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*args, **keywords), function(*args, **keywords)
    assert torch.equal(actual, expected)
    dout = torch.randn_like(expected)
    grads = (torch.autograd.grad(x, tensors, dout) for x in (actual, expected))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*grads, strict=True))
