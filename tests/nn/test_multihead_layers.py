"""MultiheadAttention inside torch's encoder and decoder layers, whose fast path is softmax."""

from __future__ import annotations

import copy

import pytest
import torch
from nn.multihead import DIM, HEADS, padding, pair
from rounding import assert_rounded

from flashsigmoid.nn import MultiheadAttention


def sentinel(monkeypatch):
    """Every way torch computes softmax from a layer's weights by itself now raises."""

    def reached(*args, **kwargs):
        raise AssertionError("torch's fast path was reached")

    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        monkeypatch.setattr(torch, name, reached)


def layer(attention=None, kind=torch.nn.TransformerEncoderLayer, **options):
    module = kind(DIM, HEADS, 40, dropout=0.0, batch_first=True, dtype=torch.float64, **options)
    if attention is not None:
        module.self_attn = attention
        if kind is torch.nn.TransformerDecoderLayer:
            module.multihead_attn = copy.deepcopy(attention)
    return module


def stacks(before, norm_first, nlayers=2):
    """Two equal encoders, one with the oracle and one with ours, exchanged before or after stacking."""
    oracle, ours = pair(batch_first=True)
    result = []
    for attention in (oracle, ours):
        torch.manual_seed(7)
        one = layer(attention if before else None, norm_first=norm_first)
        # torch warns where its own fast path is out from the start
        stack = torch.nn.TransformerEncoder(one, nlayers, enable_nested_tensor=not before and not norm_first)
        for each in stack.layers:
            each.self_attn = copy.deepcopy(attention)
        result.append(stack)
    return result


def test_the_sentinel_fires_on_torchs_own_attention(monkeypatch):
    """Else the tests below could not fail."""
    sentinel(monkeypatch)
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    for module in (layer(), torch.nn.TransformerEncoder(layer(), 2)):
        with torch.inference_mode(), pytest.raises(AssertionError, match="fast path was reached"):
            module.eval()(x)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", ["", "padding", "causal", "padding and causal"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_agrees_and_never_takes_the_fast_path(monkeypatch, norm_first, masked, training, grad_mode):
    sentinel(monkeypatch)
    oracle, ours = (stack.layers[0] for stack in stacks(True, norm_first, 1))
    x = torch.randn(3, 7, DIM, dtype=torch.float64)
    call = {}
    if "padding" in masked:
        call["src_key_padding_mask"] = padding(dtype=torch.bool)
    if "causal" in masked:
        call["src_mask"] = torch.ones(7, 7, dtype=torch.bool).triu(1)
        call["is_causal"] = True
    expected = oracle.train()(x, **call)
    with grad_mode():
        assert_rounded(ours.train(training)(x, **call), expected)
    # the same without the hint: a general mask
    if "causal" in masked:
        call["is_causal"] = False
        with grad_mode():
            assert_rounded(ours(x, **call), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", ["", "left aligned", "scattered", "causal", "padding and causal", "one empty"])
@pytest.mark.parametrize("before", [True, False], ids=["replaced before stacking", "replaced after stacking"])
def test_encoder_agrees_and_never_takes_the_fast_path(monkeypatch, before, masked, training, grad_mode):
    sentinel(monkeypatch)
    nested = []
    pack = torch._nested_tensor_from_mask
    monkeypatch.setattr(torch, "_nested_tensor_from_mask", lambda *a, **kw: nested.append(1) or pack(*a, **kw))
    oracle, ours = stacks(before, norm_first=False)
    x = torch.randn(3, 7, DIM, dtype=torch.float64)
    call = {}
    ignore = padding()
    if masked in ("left aligned", "one empty"):
        ignore[2] = torch.arange(7) >= (0 if masked == "one empty" else 2)
    if masked not in ("", "causal"):
        call["src_key_padding_mask"] = ignore
    if "causal" in masked:
        # no hint: the encoder finds out by itself that the mask is causal; both masks must be of one dtype
        if "padding" in masked:
            call["src_key_padding_mask"] = padding(dtype=torch.float64)
        call["mask"] = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    expected = oracle.train()(x, **call)
    with grad_mode():
        actual = ours.train(training)(x, **call)
    # a stack built with torch's attention packs left-aligned padding in eval; padded rows come back as 0
    packs = not before and not training and grad_mode is not torch.enable_grad
    assert bool(nested) is (packs and masked in ("left aligned", "one empty"))
    rows = ~ignore if nested else torch.ones(3, 7, dtype=torch.bool)
    assert_rounded(actual[rows], expected[rows])
    assert (actual[~rows] == 0).all()


def test_a_stack_built_around_it_says_that_it_will_not_pack():
    with pytest.warns(UserWarning, match="enable_nested_tensor is True, but self.use_nested_tensor is False"):
        torch.nn.TransformerEncoder(layer(MultiheadAttention(DIM, HEADS, batch_first=True)), 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer_agrees(monkeypatch, norm_first, causal, training):
    sentinel(monkeypatch)
    modules = []
    for attention in pair(batch_first=True):
        torch.manual_seed(7)
        modules.append(layer(attention, torch.nn.TransformerDecoderLayer, norm_first=norm_first).train(training))
    tgt, memory = (torch.randn(3, n, DIM, dtype=torch.float64) for n in (5, 7))
    call = {"memory_key_padding_mask": padding(), "tgt_key_padding_mask": padding()[:, :5]}
    if causal:
        call |= {"tgt_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "tgt_is_causal": True}
    with torch.no_grad():
        assert_rounded(modules[1](tgt, memory, **call), modules[0](tgt, memory, **call))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_inputs_other_than_torchs_own_are_one_clear_error():
    _, ours = pair(batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(n, DIM, dtype=torch.float64) for n in (2, 5)])
    out = ours(x, x, x, need_weights=False)[0]
    for one, other in zip(x.unbind(), out.unbind(), strict=True):
        assert_rounded(other, ours(one, one, one, need_weights=False)[0])
    y = torch.nested.nested_tensor(list(x.unbind()))
    for args, call in (((x, x, x), {}), ((x, y, y), {"need_weights": False})):
        with pytest.raises(ValueError, match="a nested query must be key and value too"):
            ours(*args, **call)
