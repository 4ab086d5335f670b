"""The speech encoder: padding changes nothing, every position encoding tells order, pairs differ in attention only."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from rounding import assert_rounded

from flashsigmoid.models.speech import SpeechConfig, SpeechEncoder, parameter_count, speech_255m, speech_small
from flashsigmoid.nn import SigmoidAttention, SoftmaxAttention
from flashsigmoid.testing import assert_within_budget

TINY = SpeechConfig(vocab_size=5, seqlen=8, nlayers=2, dim=16, nheads=2, mels=6, layer_scale=1.0)


def config_positions(lengths: torch.Tensor) -> torch.Tensor:
    return torch.tensor([TINY.positions(n) for n in lengths.tolist()])


positions = pytest.mark.parametrize("position", ["cape", "sincos", "rope", "alibi"])
BY_SLOPE = {"position": "alibi", "alibi_bias": True}
NORMED = {"position": "alibi", "out_norm": True, "sigmoid_bias": -6.0}
practices = pytest.mark.parametrize(
    "change", [*({"position": name} for name in ("cape", "sincos", "rope", "alibi")), BY_SLOPE, NORMED], ids=str
)
attentions = pytest.mark.parametrize("attention", ["sigmoid", "softmax"])


@practices
@attentions
def test_an_utterance_gets_in_a_padded_batch_what_it_gets_alone(change, attention) -> None:
    model = SpeechEncoder(replace(TINY, **change, attention=attention)).double().eval()
    lengths = torch.tensor([37, 18, 1, 20])
    features = torch.randn(4, 37, 6, dtype=torch.float64)  # beyond the end it is no zero
    logits, out_lengths = model(features, lengths)
    assert out_lengths.tolist() == [TINY.positions(n) for n in lengths.tolist()] == [10, 5, 1, 5]
    assert logits.shape == (4, 10, 5)
    assert torch.isfinite(logits).all()
    for i, (n, m) in enumerate(zip(lengths.tolist(), out_lengths.tolist(), strict=True)):
        alone, (length,) = model(features[i : i + 1, :n], lengths[i : i + 1])
        assert length == m == alone.shape[1]
        assert_rounded(logits[i, :m], alone[0])


@practices
@attentions
@pytest.mark.parametrize("fault", [None, "longer"])
def test_packed_utterances_get_what_padded_ones_get(change, attention, fault) -> None:
    check_packing(replace(TINY, **change, attention=attention), fault)


def test_packed_utterances_get_the_b_of_their_slopes() -> None:
    """One b for all heads, in the packed batch only, is seen."""
    check_packing(replace(TINY, **BY_SLOPE), "b for all")


def check_packing(config: SpeechConfig, fault: str | None) -> None:
    """Logits and gradients, against float64, with the error of the padded batch as the witness; a fault is seen."""
    lengths = torch.tensor([37, 18, 1, 20])
    features, weight = torch.randn(4, 37, 6), torch.randn(4, 10, 5)
    model = SpeechEncoder(config).eval()
    found = []
    for dtype, packing in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        by_slope = None if fault == "b for all" and packing else config.alibi_bias
        twin = SpeechEncoder(replace(config, packing=packing, alibi_bias=by_slope)).eval()
        twin.load_state_dict(model.state_dict())
        of = lengths + 1 if fault == "longer" and packing else lengths
        logits, _ = twin.to(dtype)(features.to(dtype), of.clamp(max=37))
        within = (torch.arange(10) < config_positions(lengths)[:, None])[..., None]
        logits = logits.masked_fill(~within, 0.0)
        (logits * weight).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
        found.append((logits.detach(), grads))
    oracle, witness, actual = found
    for name, o, w, a in zip(("logits", "gradients"), oracle, witness, actual, strict=True):
        if fault is None:
            assert_within_budget(name, a, o, w)
        else:
            with pytest.raises(AssertionError, match=f"{name} must be inside the error budget"):
                assert_within_budget(name, a, o, w)


@practices
def test_packing_trains(change) -> None:
    """With dropout and CAPE drawing: every parameter gets a gradient, as without packing."""
    config = replace(TINY, **change, packing=True, dropout_p=0.1)
    model = SpeechEncoder(config).train()
    logits, lengths = model(torch.randn(3, 30, 6), torch.tensor([30, 7, 12]))
    assert lengths.tolist() == [8, 2, 3]
    logits.logsumexp(-1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    assert not logits[1, 2:].any()


def test_packing_with_an_injected_attention_is_one_clear_error() -> None:
    model = SpeechEncoder(replace(TINY, packing=True), attention_fn=lambda q, k, v, **options: v)
    with pytest.raises(ValueError, match="packing needs the module's own attention_fn"):
        model(torch.randn(2, 12, 6), torch.tensor([12, 5]))


@attentions
def test_padding_gets_no_gradient(attention) -> None:
    model = SpeechEncoder(replace(TINY, attention=attention)).double()
    features = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    logits, lengths = model(features, torch.tensor([20, 9]))
    logits[1, : lengths[1]].sum().backward()
    assert features.grad[1, :9].abs().sum() > 0
    assert not features.grad[1, 9:].any()
    assert not features.grad[0].any()


@positions
def test_the_blocks_know_where_a_position_is(position) -> None:
    """The same frames everywhere: with positions the inner ones differ all the same; without them they would not."""
    config = replace(TINY, position=position)
    model = SpeechEncoder(config).double().eval()
    logits, _ = model(torch.ones(1, 80, 6, dtype=torch.float64), torch.tensor([80]))
    inner = logits[0, 3:-3]
    spread = (inner - inner.mean(0)).abs().max()
    if position == "rope":  # it tells apart keys, and these are the same but at the rim
        assert spread > 1e-8
    else:
        assert spread > 1e-3


def test_a_pair_differs_in_attention_only() -> None:
    torch.manual_seed(0)
    ours = SpeechEncoder(TINY)
    torch.manual_seed(0)
    twin = SpeechEncoder(replace(TINY, attention="softmax"))
    assert ours.state_dict().keys() == twin.state_dict().keys()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [type(block.attention) for block in ours.blocks] == [SigmoidAttention] * 2
    assert [type(block.attention) for block in twin.blocks] == [SoftmaxAttention] * 2


def test_b_is_a_constant_of_the_training_context() -> None:
    model = SpeechEncoder(TINY)
    assert {block.attention.sigmoid_bias for block in model.blocks} == {-math.log(8)}
    assert replace(TINY, sigmoid_bias=-3.0).bias == -3.0


@pytest.mark.parametrize("longest", [12, 50])
def test_by_alibi_bias_a_head_has_the_b_of_its_slope_whatever_the_length(longest) -> None:
    """-log of what its slope lets through on both sides of the middle of seqlen positions."""
    seen, config = [], replace(TINY, seqlen=9, **BY_SLOPE)

    def attend(q, k, v, **options):
        seen.append((options["sigmoid_bias"], options["alibi_slopes"]))
        return v

    model = SpeechEncoder(config, attention_fn=attend).eval()
    model(torch.randn(2, longest, 6), torch.tensor([longest, 5]))
    distance = (torch.arange(9, dtype=torch.float64) - 4).abs()
    assert len(seen) == 2
    for bias, slopes in seen:
        keys = (-slopes.double()[:, None] * distance).exp().sum(-1)
        assert_rounded(bias, -keys.log().float())
        assert bias[0] > bias[1] > -math.log(9)  # the first head's slope is the steepest
    assert model.state_dict().keys() == SpeechEncoder(TINY).state_dict().keys()


def test_alibi_bias_has_no_effect_on_the_softmax_twin() -> None:
    torch.manual_seed(0)
    model = SpeechEncoder(replace(TINY, **BY_SLOPE, attention="softmax")).eval()
    plain = SpeechEncoder(replace(model.config, alibi_bias=None)).eval()
    plain.load_state_dict(model.state_dict())
    features, lengths = torch.randn(2, 30, 6), torch.tensor([30, 11])
    assert torch.equal(model(features, lengths)[0], plain(features, lengths)[0])


def test_an_injected_attention_is_called_with_zeroed_values() -> None:
    seen = []

    def attend(q, k, v, **options):
        seen.append((v, options["sigmoid_bias"]))
        return v

    model = SpeechEncoder(TINY, attention_fn=attend).eval()
    model(torch.randn(2, 12, 6), torch.tensor([12, 5]))
    assert [bias for _, bias in seen] == [-math.log(8)] * 2
    for v, _ in seen:
        assert v.shape == (2, 3, 2, 8)
        assert not v[1, 2:].any()
        assert v[1, :2].all()


def test_the_papers_size() -> None:
    assert parameter_count(speech_255m()) == pytest.approx(255e6, rel=0.01)
    assert speech_255m().positions(1500) == 500
    assert parameter_count(speech_small()) == pytest.approx(15.5e6, rel=0.02)
    assert speech_small().positions(250) == 63


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": ()}, r"strides must be positive integers, at least one, got \(\)"),
        ({"strides": (2, 0)}, r"strides must be positive integers, at least one, got \(2, 0\)"),
        ({"kernel": 4}, "kernel must be odd, got 4"),
        ({"nheads": 3}, "dim must be even and a multiple of nheads=3, got 16"),
        ({"position": "learned"}, "position must be one of .*, got 'learned'"),
        ({"attention": "linear"}, "attention must be one of .*, got 'linear'"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"sigmoid_bias": math.nan}, "sigmoid_bias must be a number below inf, or None, got nan"),
        ({"alibi_bias": True}, "position must be 'alibi' with alibi_bias=True, got 'cape'"),
        ({**BY_SLOPE, "sigmoid_bias": 0.5}, "sigmoid_bias must be -log n .* with alibi_bias=True, got 0.5"),
    ],
)
def test_bad_fields_are_one_clear_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_features_of_another_shape_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"features must be \(batch, frames, 6\) .*, got \(1, 9, 5\) and \(1,\)"):
        SpeechEncoder(TINY)(torch.zeros(1, 9, 5), torch.tensor([9]))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([3.5, 4.0]), "lengths must be integers, got torch.float32"),
        (torch.tensor([True, False]), "lengths must be integers, got torch.bool"),
        (torch.tensor([-3, 4]), "lengths must be from 0 to frames=8, got -3"),
        (torch.tensor([8, 9]), "lengths must be from 0 to frames=8, got 9"),
    ],
)
def test_lengths_that_are_none_are_an_error(lengths, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SpeechEncoder(TINY)(torch.randn(2, 8, 6), lengths)


def test_lengths_elsewhere_are_not_read() -> None:
    """Reading them would make the host wait for a GPU; the meta device stands for one, whose values nobody has."""
    model = SpeechEncoder(TINY).to("meta")
    logits, _ = model(torch.empty(2, 8, 6, device="meta"), torch.tensor([8, 9], device="meta"))
    assert logits.shape == (2, 2, 5)
    with pytest.raises(ValueError, match="lengths must be integers"):
        model(torch.empty(2, 8, 6, device="meta"), torch.empty(2, device="meta"))
