"""MultiheadAttention against torch's own code with its softmax exchanged for a sigmoid."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from nn.multihead import DIM, FORMS, HEADS, assert_agree, assert_same, inputs, padding, pair
from rounding import assert_rounded
from torch.utils.checkpoint import checkpoint

import flashsigmoid
from flashsigmoid import BackendUnsupported, backends
from flashsigmoid.nn import MultiheadAttention


def test_signatures_are_torchs():
    for ours, theirs in (
        (MultiheadAttention.__init__, torch.nn.MultiheadAttention.__init__),
        (MultiheadAttention.forward, torch.nn.MultiheadAttention.forward),
        (MultiheadAttention.explain, torch.nn.MultiheadAttention.forward),
    ):
        ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        shared, extra = ours[: len(theirs)], ours[len(theirs) :]
        assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs]
        assert all(p.kind is p.KEYWORD_ONLY for p in extra)
    assert not issubclass(MultiheadAttention, torch.nn.MultiheadAttention)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_initialisation_is_torchs_and_state_dicts_load_strictly_both_ways(form):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(DIM, HEADS, **form)
    torch.manual_seed(0)
    ours = MultiheadAttention(DIM, HEADS, **form)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float64])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_agrees_with_padding_and_weights(form, mask, need_weights):
    oracle, ours = pair(form, batch_first=True)
    call = {"need_weights": need_weights, "average_attn_weights": mask is None}
    if mask is not None:
        call["key_padding_mask"] = padding(dtype=mask)
    assert_agree(oracle, ours, inputs(form), **call)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("seqlens", [(6, 6), (4, 7), (9, 7), (1, 7), (7, 1)])
@pytest.mark.parametrize("form", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_is_causal_is_top_left(form, seqlens, need_weights, padded):
    """As in torch: query i sees keys up to i; the extra keys are seen by all; the mask itself is not read."""
    seqlen_q, seqlen_k = seqlens
    oracle, ours = pair(form, batch_first=True)
    tensors = inputs(form, seqlen_q, seqlen_k)
    call = {
        "need_weights": need_weights,
        "is_causal": True,
        "attn_mask": torch.ones(seqlen_q, seqlen_k).triu(1).bool(),
    }
    if padded:
        call["key_padding_mask"] = padding(seqlen_k=7)[:, :seqlen_k]
    assert_agree(oracle, ours, tensors, **call)
    call["attn_mask"] = None
    assert_agree(oracle, ours, tensors, **call)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("form", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_a_general_mask_is_added_to_the_scores(form, dims, dtype, need_weights, padded):
    oracle, ours = pair(form, batch_first=True)
    mask = torch.randn((5, 7) if dims == 2 else (3 * HEADS, 5, 7), dtype=torch.float64)
    # soft values and forbidden places together
    mask = mask > 0 if dtype == torch.bool else mask.masked_fill(mask > 0.7, -math.inf)
    call = {"need_weights": need_weights, "attn_mask": mask, "average_attn_weights": False}
    if padded:
        call["key_padding_mask"] = padding(dtype=dtype)
    assert_agree(oracle, ours, inputs(form), **call)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", [{}, {"kdim": 10, "vdim": 7}], ids=str)
def test_layouts_agree(form, padded, need_weights):
    """Sequence first, and no batch at all, for which batch_first means nothing."""
    call = {"need_weights": need_weights, "average_attn_weights": False}
    if padded:
        call["key_padding_mask"] = padding()
    assert_agree(*pair(form), inputs(form, batch_first=False), **call)
    unbatched = [x[0].detach().requires_grad_() for x in inputs(form)]
    call["attn_mask"] = torch.rand(HEADS, 5, 7) < 0.3
    if padded:
        call["key_padding_mask"] = padding()[2]
    for batch_first in (False, True):
        assert_agree(*pair(form, batch_first=batch_first), unbatched, **call)


@pytest.mark.parametrize("same", [1, 2, 3])
def test_query_key_and_value_may_be_one_tensor(same):
    oracle, ours = pair(batch_first=True)
    x, y, z = inputs(seqlen_q=6, seqlen_k=6)
    args = {1: (x, y, z), 2: (x, y, y), 3: (x, x, x)}[same]
    assert_same(ours(*args), oracle(*args))


def test_a_given_bias_is_used_as_it_is():
    oracle, ours = pair(sigmoid_bias=-1.5, batch_first=True)
    for need_weights in (False, True):
        assert_agree(oracle, ours, inputs(), key_padding_mask=padding(), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_row_does_not_depend_on_its_batch(need_weights):
    _, ours = pair(batch_first=True)
    query, key, value = inputs()
    out, weights = ours(query, key, value, padding(), need_weights)
    alone, weights_alone = ours(query[1:2], key[1:2, :4], value[1:2, :4], None, need_weights)
    assert_rounded(out[1:2], alone)
    if need_weights:
        assert_rounded(weights[1:2, :, :4], weights_alone)
        assert (weights[1, :, 4:] == 0).all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_sequence_of_padding_only_gives_the_output_bias(need_weights):
    _, ours = pair(batch_first=True)
    query, key, value = inputs()
    ignore = padding()
    ignore[0] = True
    out, _ = ours(query, key, value, ignore, need_weights)
    assert torch.equal(out[0], ours.out_proj.bias.expand_as(out[0]))
    assert torch.autograd.grad(out.sum(), value)[0].isfinite().all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_soft_float_padding_mask_is_an_error(need_weights):
    _, ours = pair(batch_first=True)
    with pytest.raises(RuntimeError, match=r"a float key_padding_mask must hold 0 .* and -inf"):
        ours(*inputs(), torch.full((3, 7), -0.5, dtype=torch.float64), need_weights)


def test_dropout_is_the_same_with_and_without_weights_and_off_in_eval():
    _, ours = pair(dropout=0.5, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    tensors = inputs()
    results = []
    for need_weights in (False, True):
        torch.manual_seed(11)
        results.append(ours(*tensors, padding(), need_weights, average_attn_weights=False))
    assert_rounded(results[0][0], results[1][0])
    weights = results[1][1]
    assert 0.3 < (weights[0] == 0).double().mean() < 0.6
    assert not torch.equal(ours(*tensors, need_weights=False)[0], ours(*tensors, need_weights=False)[0])
    ours.eval()
    plain = pair(batch_first=True, add_bias_kv=True, add_zero_attn=True)[1]
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(*tensors, need_weights=False)[0], plain(*tensors, need_weights=False)[0])


def test_explain_tells_what_forward_does(monkeypatch):
    _, ours = pair(batch_first=True)
    tensors = inputs()
    fused = []
    shard = flashsigmoid.functional.sigmoid_attention_shard
    monkeypatch.setattr(
        flashsigmoid.functional,
        "sigmoid_attention_shard",
        lambda *a, **kw: fused.append(kw) or shard(*a, **kw),
    )
    mask = torch.zeros(5, 7, dtype=torch.bool)
    for call, reason in (
        ({"need_weights": False}, None),
        ({"need_weights": False, "key_padding_mask": padding()}, None),
        ({"need_weights": False, "is_causal": True, "attn_mask": mask}, None),
        ({"need_weights": True}, "need_weights=True"),
        ({}, "need_weights=True"),
        ({"need_weights": False, "attn_mask": mask}, "attn_mask"),
    ):
        fused.clear()
        told = ours.explain(*tensors, **call)
        ours(*tensors, **call)
        assert bool(fused) is (reason is None)
        assert (told.backend == "reference") is (reason is not None)
        if reason:
            assert set(told.reasons) == set(backends.NAMES) - {"reference"}
            assert reason in str(told)
            assert "O(seqlen_q * seqlen_k)" in str(told)


@pytest.mark.parametrize("form", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_an_explicit_fused_backend_computes_or_raises(form):
    oracle, ours = pair(form, batch_first=True, backend="blocked")
    tensors, mask = inputs(form), torch.zeros(5, 7, dtype=torch.bool)
    for call in ({}, {"key_padding_mask": padding()}, {"is_causal": True}):
        assert_agree(oracle, ours, tensors, need_weights=False, **call)
        assert ours.explain(*tensors, need_weights=False, **call).backend == "blocked"
    for run in (ours, ours.explain):
        with pytest.raises(BackendUnsupported, match="blocked: need_weights=True"):
            run(*tensors)
        with pytest.raises(BackendUnsupported, match="blocked: attn_mask"):
            run(*tensors, need_weights=False, attn_mask=mask)
    reference = pair(form, backend="reference")[1]
    reference.load_state_dict(ours.state_dict())
    reference.batch_first = True
    assert_rounded(reference(*tensors)[0], ours(*tensors, need_weights=False)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "embed_dim must be a positive multiple of num_heads, got embed_dim=24, num"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"sigmoid_bias": math.nan}, r"sigmoid_bias must be a number below \+inf, or None, got nan"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"backend": "cuda"}, "backend must be one of auto, .* got 'cuda'"),
    ],
    ids=str,
)
def test_wrong_options_are_one_clear_error(options, words):
    with pytest.raises(ValueError, match=words):
        MultiheadAttention(**{"embed_dim": DIM, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.randn(3, 5, 9)}, "query, key and value must have .24, 24, 24. channels"),
        ({"query": torch.randn(5, DIM)}, "query, key, value must have 3 dimensions, or 2 .* got .2, 3, 3."),
        ({"value": torch.randn(3, 6, DIM)}, "key and value must share batch and seqlen"),
        ({"query": torch.randn(2, 5, DIM)}, "key and value must share batch and seqlen, and query the batch"),
        ({"key_padding_mask": torch.zeros(3, 5).bool()}, "key_padding_mask must have one of the shapes"),
        ({"key_padding_mask": torch.zeros(3, 7).int()}, "key_padding_mask must be bool or floating point"),
        ({"attn_mask": torch.zeros(7, 5)}, "attn_mask must have one of the shapes"),
        ({"attn_mask": torch.zeros(3, 5, 7)}, "attn_mask must have one of the shapes"),
        ({"attn_mask": torch.zeros(5, 7).int()}, "attn_mask must be bool or floating point"),
    ],
)
def test_wrong_inputs_are_one_clear_error(change, words):
    call = {
        "query": torch.randn(3, 5, DIM),
        "key": torch.randn(3, 7, DIM),
        "value": torch.randn(3, 7, DIM),
    } | change
    with pytest.raises(ValueError, match=words):
        MultiheadAttention(DIM, HEADS, batch_first=True)(**call)


@pytest.mark.parametrize(
    ("need_weights", "mask"), [(False, None), (False, torch.bool), (False, torch.float32), (True, torch.float32)]
)
def test_compiles_whole(need_weights, mask):
    torch.compiler.reset()
    ours = MultiheadAttention(DIM, HEADS, batch_first=True, add_bias_kv=True)
    x = torch.randn(3, 7, DIM, requires_grad=True)
    call = {"need_weights": need_weights, "is_causal": True}
    if mask is not None:
        call["key_padding_mask"] = padding(dtype=mask)
    expected = ours(x, x, x, **call)
    actual = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, x, x, **call)
    assert_same(actual, expected)
    gradients = [torch.autograd.grad(out[0].square().sum(), (x, *ours.parameters())) for out in (expected, actual)]
    for e, a in zip(*gradients, strict=True):
        assert_rounded(a, e)


@pytest.mark.parametrize("need_weights", [False, True])
def test_bf16_autocast(need_weights):
    ours = MultiheadAttention(DIM, HEADS, batch_first=True, add_bias_kv=True)
    x = torch.randn(3, 7, DIM)
    expected, expected_weights = ours(x, x, x, padding(), need_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = ours(x, x, x, padding(), need_weights)
    assert out.dtype == torch.bfloat16
    # bfloat16 has 2 ** -8 of relative precision
    assert (out.float() - expected).norm() < 4 * 2**-8 * expected.norm()
    if need_weights:
        assert (weights.float() - expected_weights).norm() < 4 * 2**-8 * expected_weights.norm()
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("need_weights", [False, True])
def test_meta_tensors_give_the_shapes(need_weights):
    x = torch.empty(2, 5, DIM, device="meta")
    out, weights = MultiheadAttention(DIM, HEADS, batch_first=True, device="meta")(x, x, x, need_weights=need_weights)
    assert out.shape == x.shape
    assert weights is None or weights.shape == (2, 5, 5)


def test_scores_are_not_rounded_under_autocast():
    """Scores of 10 rounded to bfloat16 would be off by 1 % of a weight; a rounded output is off by 0.2 %."""
    ours = MultiheadAttention(64, 1, batch_first=True, sigmoid_bias=-20.0)
    x = torch.randn(2, 65, 64)
    with torch.no_grad():
        ours.in_proj_weight[:128] *= 3.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, _ = ours(x, x, x, need_weights=False)
        reference, _ = ours(x, x, x, need_weights=True)
    assert (fused - reference).norm() < 2**-8 * fused.norm()


@pytest.mark.parametrize("need_weights", [False, True])
def test_checkpointing_gives_equal_gradients_with_dropout(need_weights):
    _, ours = pair(dropout=0.3, batch_first=True)
    tensors = inputs()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        args = (*tensors, padding(), need_weights)
        out, _ = checkpoint(ours, *args, use_reentrant=False) if checkpointed else ours(*args)
        results.append(torch.autograd.grad(out.square().sum(), (*tensors, *ours.parameters())))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_deepcopy_is_equal_and_independent():
    _, ours = pair(batch_first=True)
    tensors = inputs()
    before = ours(*tensors)[0]
    other = copy.deepcopy(ours)
    assert torch.equal(other(*tensors)[0], before)
    with torch.no_grad():
        other.in_proj_weight.zero_()
    assert torch.equal(ours(*tensors)[0], before)
