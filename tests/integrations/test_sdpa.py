"""SDPA's signature, layout and masks: against four lines of float64, and inside the budget where the op has a word."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from rounding import assert_rounded
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from flashsigmoid import BackendUnsupported, functional, sigmoid_attention
from flashsigmoid.integrations.sdpa import explain_sdpa, scaled_dot_product_sigmoid_attention
from flashsigmoid.testing import Options, assert_within_budget, make_qkv, oracle, witness

BATCH, NHEADS, SEQLEN_Q, SEQLEN_K = 2, 4, 5, 7
FULL = (BATCH, NHEADS, SEQLEN_Q, SEQLEN_K)


def inputs(*lead: int, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, nheads_k=NHEADS, dtype=torch.float64, grad=True):
    """query, key, value, dout in torch's layout."""
    q, k, v, dout = make_qkv(math.prod(lead), seqlen_q, seqlen_k, NHEADS, nheads_k, 8, 6, dtype=dtype)
    query, key, value, dout = (x.transpose(1, 2).reshape(*lead, *x.transpose(1, 2).shape[1:]) for x in (q, k, v, dout))
    return *(x.requires_grad_(grad) for x in (query, key, value)), dout


def spec(query, key, value, attn_mask=None, is_causal=False, b=None, scale=None):
    """The definition, in whatever dtype it is given."""
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    b = torch.as_tensor(-math.log(max(key.shape[-2], 1)) if b is None else b, dtype=query.dtype)
    s = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    s = s + (b[..., None] if b.shape[-1:] == query.shape[-2:-1] else b[..., None, None])  # seqlen_q is not nheads here
    if is_causal:
        attn_mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return torch.sigmoid(s) @ value
    if attn_mask.dtype == torch.bool:
        return (torch.sigmoid(s) * attn_mask) @ value
    return torch.sigmoid(s + attn_mask) @ value


def check(actual: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor], dout: torch.Tensor) -> None:
    """The same results and gradients, to float64's precision."""
    assert_rounded(actual, expected)
    grads = [torch.autograd.grad(x, leaves, dout) for x in (actual, expected)]
    size = max((x.abs().max().item() for x in grads[1] if x.numel()), default=0.0)
    for mine, theirs in zip(*grads, strict=True):
        assert_rounded(mine, theirs, of=size)  # a bias is the sum of all dS, and they cancel


def test_signature_is_that_of_torch() -> None:
    theirs = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
    ours = list(inspect.signature(scaled_dot_product_sigmoid_attention).parameters.values())
    for mine, argument in zip(ours, theirs, strict=False):
        assert mine.name == argument.name
        assert mine.default == (argument.default_value if argument.has_default_value() else mine.empty)
        assert (mine.kind is mine.KEYWORD_ONLY) == argument.kwarg_only
    assert [p.name for p in ours[len(theirs) :]] == ["sigmoid_bias", "backend"]
    assert list(inspect.signature(explain_sdpa).parameters.values()) == ours


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 7), (7, 5), (6, 6), (1, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_causal_is_top_left_and_the_bias_is_minus_log_seqlen_k(seqlen_q, seqlen_k, is_causal, scale) -> None:
    *leaves, dout = inputs(BATCH, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    actual = scaled_dot_product_sigmoid_attention(*leaves, is_causal=is_causal, scale=scale)
    check(actual, spec(*leaves, is_causal=is_causal, scale=scale), leaves, dout)
    assert "blocked" in str(explain_sdpa(*leaves, is_causal=is_causal, scale=scale))
    assert explain_sdpa(*leaves, is_causal=is_causal).problem.q_offset == 0


def boolean(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6


def floating(*shape: int) -> torch.Tensor:
    """Numbers, and some -inf."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.masked_fill(x > 1.0, -torch.inf) if x.dim() else x


# the mask, and whether any backend can do it, or only the maths of reference
MASKS = {
    "nothing hidden": (torch.ones(FULL, dtype=torch.bool), False),
    "all hidden": (torch.zeros(SEQLEN_Q, SEQLEN_K, dtype=torch.bool), False),
    "keys": (boolean(SEQLEN_K), True),
    "keys of each sequence": (boolean(BATCH, 1, 1, SEQLEN_K), True),
    "keys of each sequence, expanded": (boolean(BATCH, 1, 1, SEQLEN_K).expand(FULL), True),
    "keys of each head": (boolean(BATCH, NHEADS, 1, SEQLEN_K), True),
    "queries": (boolean(SEQLEN_Q, 1), True),
    "queries of each head": (boolean(BATCH, NHEADS, SEQLEN_Q, 1), True),
    "heads": (boolean(NHEADS, 1, 1), True),
    "one boolean": (boolean(), True),
    "queries and keys": (boolean(SEQLEN_Q, SEQLEN_K), False),
    "queries and keys of each sequence": (boolean(BATCH, 1, SEQLEN_Q, SEQLEN_K), False),
    "everything": (boolean(*FULL), False),
    "float of keys": (floating(BATCH, 1, 1, SEQLEN_K), False),
    "float of queries": (floating(SEQLEN_Q, 1), True),
    "float of queries of each sequence": (floating(BATCH, 1, SEQLEN_Q, 1), True),
    "float of heads": (floating(NHEADS, 1, 1), True),
    "float of sequences": (floating(BATCH, 1, 1, 1), True),
    "one float": (floating(), True),
    "float of queries and keys": (floating(SEQLEN_Q, SEQLEN_K), False),
    "float of queries and keys of each head": (floating(1, NHEADS, SEQLEN_Q, SEQLEN_K), False),
    "float of everything": (floating(*FULL), False),
    "float of queries, expanded": (floating(SEQLEN_Q, 1).expand(FULL), True),
}
masks = pytest.mark.parametrize("name", MASKS)
BIASES = {
    "default": None,
    "float": -1.5,
    "()": torch.tensor(-1.0, dtype=torch.float64),
    "(h,)": torch.linspace(-3.0, 0.0, NHEADS, dtype=torch.float64),
    "(b,h)": torch.linspace(-3.0, 0.0, BATCH * NHEADS, dtype=torch.float64).view(BATCH, NHEADS),
    "(b,h,i)": torch.linspace(-3.0, 0.0, BATCH * NHEADS * SEQLEN_Q, dtype=torch.float64).view(BATCH, NHEADS, -1),
}


@masks
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("nheads_k", [NHEADS, 2])
def test_masks_of_every_kind(name, bias, nheads_k) -> None:
    mask, is_fast = MASKS[name]
    *leaves, dout = inputs(BATCH, nheads_k=nheads_k)
    b = BIASES[bias]
    if isinstance(b, torch.Tensor):
        b = b.clone().requires_grad_()
        leaves.append(b)
    keywords = {"enable_gqa": nheads_k != NHEADS, "sigmoid_bias": b}
    actual = scaled_dot_product_sigmoid_attention(*leaves[:3], mask, **keywords)
    check(actual, spec(*leaves[:3], mask, b=b), leaves, dout)

    told = explain_sdpa(*leaves[:3], mask, **keywords)
    is_fast = is_fast and not (name == "keys of each head" and nheads_k != NHEADS)
    assert (told.backend != "reference") == is_fast
    if not is_fast:
        assert all("attn_mask" in reason and "memory" in reason for reason in told.reasons.values())
        for call in (explain_sdpa, scaled_dot_product_sigmoid_attention):
            with pytest.raises(BackendUnsupported, match=r"blocked: a (boolean|float) attn_mask that differs between"):
                call(*leaves[:3], mask, backend="blocked", **keywords)


@masks
def test_the_reference_agrees_on_every_mask(name) -> None:
    """What a fused backend makes of a mask, the specification makes too."""
    mask, _ = MASKS[name]
    *leaves, dout = inputs(BATCH)
    actual = scaled_dot_product_sigmoid_attention(*leaves, mask, scale=0.7, backend="reference")
    check(actual, spec(*leaves, mask, scale=0.7), leaves, dout)
    assert explain_sdpa(*leaves, mask, backend="reference").backend == "reference"


@pytest.mark.parametrize("name", [name for name, (mask, _) in MASKS.items() if mask.is_floating_point()])
def test_gradient_of_a_float_mask(name) -> None:
    mask = MASKS[name][0].clone().requires_grad_()
    *leaves, dout = inputs(BATCH)
    leaves.append(mask)
    check(scaled_dot_product_sigmoid_attention(*leaves), spec(*leaves), leaves, dout)


def test_an_expanded_mask_with_a_gradient_gets_one_in_every_place() -> None:
    mask = floating(SEQLEN_Q, 1).expand(SEQLEN_Q, SEQLEN_K).detach().requires_grad_()
    assert mask.stride() == (1, 0)
    *leaves, dout = inputs(BATCH)
    leaves.append(mask)
    check(scaled_dot_product_sigmoid_attention(*leaves), spec(*leaves), leaves, dout)
    assert explain_sdpa(*leaves).backend == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["boolean", "float", "padding", "top-left", "row"])
def test_within_the_budget(form, dtype) -> None:
    """Masks that the op has another word for, so that the oracle and the witness of the op apply."""
    q, k, v, dout = make_qkv(2, 47, 65, 4, 2, 32, dtype=dtype)
    query, key, value = (x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v))
    distance = torch.arange(47)[:, None] + 65 - 47 - torch.arange(65)
    options, expected_v = Options(sigmoid_bias=-math.log(65)), v
    keywords = {}
    match form:
        case "boolean":  # a window
            keywords["attn_mask"] = (distance <= 20) & (distance >= -3)
            options["window_size"] = (20, 3)
        case "float":  # ALiBi
            slopes = torch.tensor([0.3, 0.1, 0.03, 0.01])
            keywords["attn_mask"] = -slopes[:, None, None] * distance.abs()
            options["alibi_slopes"] = slopes
        case "padding":
            keywords["attn_mask"] = torch.arange(65) < torch.tensor([40, 65])[:, None, None, None]
            expected_v = v * keywords["attn_mask"].permute(0, 3, 1, 2)
        case "top-left":
            keywords["is_causal"] = True
            options["causal"], options["q_offset"] = True, 0
        case "row":
            rows = torch.randn(2, 4, 47) - 4.0
            keywords["attn_mask"] = rows[..., None] + math.log(65)
            options["sigmoid_bias"] = rows
    out = scaled_dot_product_sigmoid_attention(query, key, value, enable_gqa=True, **keywords)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, (query, key, value), dout.transpose(1, 2))
    actual = {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    expected = oracle(q, k, expected_v, dout, **options)
    seen = witness(q, k, expected_v, dout, **options)
    for name, result in actual.items():
        exact, draws = expected[name], seen[name]
        if form == "padding" and name == "dv":  # of the values before they were zeroed
            hidden = ~keywords["attn_mask"].permute(0, 3, 1, 2)
            exact, draws = exact.masked_fill(hidden, 0.0), draws.masked_fill(hidden, 0.0)
        assert_within_budget(f"{form} {name}", result.detach().transpose(1, 2), exact, draws)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_batch_dimensions(lead) -> None:
    *leaves, dout = inputs(*lead)
    for mask in (
        None,
        boolean(SEQLEN_Q, SEQLEN_K),
        boolean(*lead, 1, 1, SEQLEN_K),
        floating(*lead[:1], *lead[1:], NHEADS, 1, 1),
    ):
        actual = scaled_dot_product_sigmoid_attention(*leaves, mask)
        assert actual.shape == (*lead, NHEADS, SEQLEN_Q, 6)
        check(actual, spec(*leaves, mask), leaves, dout)
    for shape in ((), (NHEADS,), (*lead, NHEADS), (*lead, NHEADS, SEQLEN_Q)):
        b = (torch.randn(shape, dtype=torch.float64) - 2.0).requires_grad_()
        actual = scaled_dot_product_sigmoid_attention(*leaves, sigmoid_bias=b)
        check(actual, spec(*leaves, b=b), [*leaves, b], dout)


def test_a_mask_may_broadcast_over_some_batch_dimensions() -> None:
    *leaves, dout = inputs(2, 3)
    for shape in ((2, 1, 1, 1, SEQLEN_K), (3, 1, 1, SEQLEN_K), (2, 1, NHEADS, SEQLEN_Q, SEQLEN_K), (3, 1, SEQLEN_Q, 1)):
        check(
            scaled_dot_product_sigmoid_attention(*leaves, boolean(*shape)), spec(*leaves, boolean(*shape)), leaves, dout
        )


def test_nothing_is_copied_on_the_way_to_the_op(monkeypatch) -> None:
    seen = {}

    def capture(q, k, v, **options):
        seen.update(q=q, k=k, v=v, **options)
        return q

    monkeypatch.setattr(functional, "sigmoid_attention_shard", capture)
    query, key, value, _ = inputs(BATCH)
    scaled_dot_product_sigmoid_attention(query, key, value, is_causal=True)
    for name, given in (("q", query), ("k", key), ("v", value)):
        assert seen[name].data_ptr() == given.data_ptr()
        assert seen[name].shape == given.transpose(1, 2).shape
    assert (seen["causal"], seen["q_offset"]) == (True, 0)


def test_is_the_op_transposed() -> None:
    query, key, value, _ = inputs(BATCH, dtype=torch.float32)
    expected = sigmoid_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    out = scaled_dot_product_sigmoid_attention(query, key, value)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
def test_torchs_causal_biases(variant) -> None:
    *leaves, dout = inputs(BATCH)
    mask = variant(SEQLEN_Q, SEQLEN_K)
    expected = spec(
        *leaves, torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool).tril(0 if variant is causal_upper_left else 2)
    )
    check(scaled_dot_product_sigmoid_attention(*leaves, mask), expected, leaves, dout)
    assert explain_sdpa(*leaves, mask).backend != "reference"
    with pytest.raises(ValueError, match=r"a CausalBias must have the size \(5, 7\) of the scores, got \(5, 8\)"):
        scaled_dot_product_sigmoid_attention(*leaves, variant(SEQLEN_Q, SEQLEN_K + 1))


def test_what_is_hidden_may_be_nan_in_value() -> None:
    query, key, value, _ = inputs(BATCH, grad=False)
    mask = boolean(BATCH, 1, 1, SEQLEN_K)
    poisoned = value.masked_fill(~mask.mT, math.nan)
    out = scaled_dot_product_sigmoid_attention(query, key, poisoned, mask)
    assert_rounded(out, spec(query, key, value, mask))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("mask", [None, "keys", "scores"])
def test_empty_sequences_give_zeros(seqlen_q, seqlen_k, mask) -> None:
    *leaves, _ = inputs(BATCH, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    shape = {"keys": (seqlen_k,), "scores": (seqlen_q, seqlen_k)}.get(mask)
    mask = None if shape is None else torch.ones(shape, dtype=torch.bool)
    out = scaled_dot_product_sigmoid_attention(*leaves, mask)
    assert torch.equal(out, torch.zeros(BATCH, NHEADS, seqlen_q, 6, dtype=torch.float64))


@pytest.mark.parametrize("mask", [None, boolean(SEQLEN_K), boolean(SEQLEN_Q, SEQLEN_K), floating(SEQLEN_Q, SEQLEN_K)])
def test_dropout_is_that_of_the_op(mask) -> None:
    """The same weights are dropped with and without a mask, and torch's seed decides which."""
    *leaves, dout = inputs(BATCH, nheads_k=2)
    keywords = {"dropout_p": 0.3, "enable_gqa": True}
    torch.manual_seed(5)
    actual = scaled_dot_product_sigmoid_attention(*leaves, mask, **keywords)
    another = scaled_dot_product_sigmoid_attention(*leaves, mask, **keywords)
    assert not torch.equal(actual, another)
    torch.manual_seed(5)
    assert torch.equal(actual, scaled_dot_product_sigmoid_attention(*leaves, mask, **keywords))

    # value = identity shows the dropped weights of a call without a mask
    query, key, _ = leaves
    eye = torch.eye(SEQLEN_K, dtype=torch.float64).expand(BATCH, 2, SEQLEN_K, SEQLEN_K)
    torch.manual_seed(5)
    shown = scaled_dot_product_sigmoid_attention(query.detach(), key.detach(), eye, **keywords)
    keep = (shown != 0).double() / 0.7
    assert 0 < (shown == 0).sum() < shown.numel()
    every = eye.repeat_interleave(2, 1)
    weights = spec(query, key.repeat_interleave(2, 1), every, mask)
    check(actual, (weights * keep) @ leaves[2].repeat_interleave(2, 1), leaves, dout)


@pytest.mark.parametrize("mask", [None, boolean(SEQLEN_Q, SEQLEN_K), floating(SEQLEN_Q, SEQLEN_K).float()])
def test_autocast_casts_the_inputs_and_nothing_inside(mask) -> None:
    query, key, value, _ = inputs(BATCH, dtype=torch.float32, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_sigmoid_attention(query, key, value, mask)
    expected = scaled_dot_product_sigmoid_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["keys of each sequence", "float of queries", "everything", "float of everything"])
def test_compiles_whole(name) -> None:
    torch.compiler.reset()
    mask, _ = MASKS[name]
    *leaves, dout = inputs(BATCH)

    def attend(*args):
        return scaled_dot_product_sigmoid_attention(*args, scale=0.5)

    actual = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves, mask)
    check(actual, attend(*leaves, mask), leaves, dout)


def test_double_backward_through_a_mask() -> None:
    """The masked path is plain torch, differentiable twice like the reference."""
    query, key, value, _ = inputs(BATCH, seqlen_q=2, seqlen_k=3)
    mask = floating(2, 3).clamp(min=-2.0).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda *args: scaled_dot_product_sigmoid_attention(*args, sigmoid_bias=-1.0),
        [x[:1, :1].detach().requires_grad_() for x in (query, key, value)] + [mask],
    )


def test_explain_says_what_a_mask_costs() -> None:
    query, key, value, _ = inputs(BATCH)
    text = str(explain_sdpa(query, key, value, boolean(SEQLEN_Q, SEQLEN_K)))
    assert text.startswith("backend: reference\nformula: exact: torch.sigmoid in float64\n")
    assert (
        "not blocked: a boolean attn_mask that differs between queries and between keys: the maths of reference" in text
    )
    text = str(explain_sdpa(query, key, value, floating(SEQLEN_K)))
    assert "a float attn_mask that differs between keys, whose values are not read" in text
    text = str(explain_sdpa(query, key[:, :2], value[:, :2], boolean(NHEADS, 1, SEQLEN_K), enable_gqa=True))
    assert "a boolean attn_mask that differs between the query heads of one key head" in text


Q, K, V, _ = inputs(BATCH, grad=False)
BAD = [
    ({"attn_mask": boolean(SEQLEN_K), "is_causal": True}, r"attn_mask must be None when is_causal=True, got both"),
    ({"attn_mask": boolean(SEQLEN_Q)}, r"attn_mask must broadcast to .*got \(5,\) for \(2, 4, 5, 7\)"),
    ({"attn_mask": boolean(1, *FULL)}, r"attn_mask must broadcast to .*got \(1, 2, 4, 5, 7\) for \(2, 4, 5, 7\)"),
    ({"attn_mask": torch.ones(FULL, dtype=torch.int32)}, r"attn_mask must be a boolean or floating.*torch.int32"),
    ({"attn_mask": True}, r"attn_mask must be a boolean or floating-point tensor, got True"),
    ({"attn_mask": boolean(SEQLEN_K).to("meta")}, r"attn_mask must be on the device of query, cpu, got meta"),
    ({"query": Q[0, 0]}, r"query must be a dense tensor \(\.\.\., nheads, seqlen, head_dim\), got \(5, 8\)"),
    ({"value": 3}, r"value must be a dense tensor .*got int"),
    ({"query": Q[0]}, r"key must share batch and head_dim of query, got query \(4, 5, 8\), key \(2, 4, 7, 8\)"),
    ({"key": K[..., :4]}, r"key must share batch and head_dim of query"),
    ({"value": V[:, :, :6]}, r"value must share batch, nheads and seqlen of key"),
    ({"key": K[:, :2], "value": V[:, :2]}, r"key must share nheads of query unless enable_gqa=True"),
    (
        {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
        r"nheads must be a positive multiple of nheads_k, got nheads=4, nheads_k=3",
    ),
    ({"sigmoid_bias": torch.zeros(3)}, r"sigmoid_bias must have shape .*got \(3,\) for batch \(2,\), nheads=4"),
    ({"sigmoid_bias": math.nan}, r"sigmoid_bias must be a number below \+inf, got nan"),
    ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": None}, r"dropout_p must be a number, got None"),
    ({"dropout_p": "0.1"}, r"dropout_p must be a number, got '0.1'"),
    ({"backend": "cudnn"}, r"backend must be one of .*got 'cudnn'"),
    ({"scale": math.inf}, r"scale must be finite, got inf"),
    ({"is_causal": 1}, r"causal must be True or False, got 1"),
    ({"key": K.float()}, r"q, k, v must share one dtype"),
]


@pytest.mark.parametrize(("given", "rule"), BAD)
@pytest.mark.parametrize("function", [scaled_dot_product_sigmoid_attention, explain_sdpa])
def test_what_is_refused(function, given, rule) -> None:
    with pytest.raises(ValueError, match=rule):
        function(**{"query": Q, "key": K, "value": V, **given})


@pytest.mark.parametrize(
    ("given", "rule"), [case for case in BAD if not {"attn_mask", "is_causal", "query", "value"} & {*case[0]}]
)
@pytest.mark.parametrize("mask", [boolean(*FULL), boolean(SEQLEN_K), floating(SEQLEN_Q, 1)])
def test_the_same_is_refused_with_a_mask(mask, given, rule) -> None:
    with pytest.raises(ValueError, match=rule):
        scaled_dot_product_sigmoid_attention(**{"query": Q, "key": K, "value": V, "attn_mask": mask, **given})


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(4, 5, 8), torch.ones(4, 3, 8)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"query must be a dense tensor .*got NestedTensor"):
        scaled_dot_product_sigmoid_attention(nested, nested, nested)
