"""SigmoidAttention and its softmax twin against formulas written out a second time, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nn.formula import DIM, NHEADS, sigmoid_weights, slope_bias, softmax_weights, written_out
from rounding import assert_rounded
from torch.utils.checkpoint import checkpoint

from flashsigmoid import sigmoid_attention
from flashsigmoid.nn import SigmoidAttention, SoftmaxAttention, alibi_slopes
from flashsigmoid.nn.attention import Packing

# one feature at a time, then together; seqlen 1 (one key), 7 and 65 (no multiple of any block)
OPTIONS = [
    {},
    {"qk_norm": False},
    {"causal": True},
    {"window_size": (3, 1)},
    {"causal": True, "window_size": (4, None)},
    {"nheads_k": 2},
    {"nheads_k": 1, "head_dim": 10},
    {"position": "rope"},
    {"position": "alibi"},
    {"gate": True, "proj_bias": True},
    {"sigmoid_bias": -3.5},
    {"sigmoid_bias": -2.0, "bias_mode": "learnable"},
    {"sigmoid_bias": -2.0, "bias_mode": "per_head"},
    {
        "nheads_k": 2,
        "position": "rope",
        "rope_base": 100.0,
        "causal": True,
        "gate": True,
        "sigmoid_bias": -4.0,
        "bias_mode": "per_head",
    },
    {"nheads_k": 1, "position": "alibi", "causal": True, "window_size": (20, None), "proj_bias": True},
    {"position": "alibi", "sigmoid_bias": -math.log(65), "alibi_bias": True},
    {"position": "alibi", "causal": True, "nheads_k": 2, "sigmoid_bias": -math.log(64), "alibi_bias": True},
    {"position": "alibi", "sigmoid_bias": -2.0, "alibi_bias": True, "bias_mode": "per_head"},
    {"out_norm": True},
    {"out_norm": True, "sigmoid_bias": -math.log(65) - 3.0, "position": "alibi", "causal": True, "gate": True},
]


def make(cls, **options):
    module = cls(DIM, NHEADS, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def outputs_and_gradients(module, function, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = function(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"out": out, "dx": x.grad} | {
        name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("seqlen", [1, 7, 65])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sigmoid_attention_is_its_formula(options, seqlen):
    module = make(SigmoidAttention, **options)
    x = torch.randn(2, seqlen, DIM, dtype=torch.float64)
    actual = outputs_and_gradients(module, module, x)
    weights = sigmoid_weights(module, options)
    expected = outputs_and_gradients(module, lambda x: written_out(module, x, options, weights), x)
    assert actual.keys() == expected.keys() == {"out", "dx", *dict(module.named_parameters())}
    size = max(x.abs().max().item() for x in expected.values())  # of one key, and of what a norm undoes, all cancels
    for name in expected:
        assert_rounded(actual[name], expected[name], of=size, name=name)


@pytest.mark.parametrize("seqlen", [1, 7, 65])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_softmax_attention_is_its_formula(options, seqlen):
    module = make(SoftmaxAttention, **options)
    x = torch.randn(2, seqlen, DIM, dtype=torch.float64)
    actual = outputs_and_gradients(module, module, x)
    expected = outputs_and_gradients(module, lambda x: written_out(module, x, options, softmax_weights), x)
    # a shift of the scores does not reach the output of a softmax
    assert actual.keys() == expected.keys() == {"out", "dx", *dict(module.named_parameters())} - {"sigmoid_bias"}
    size = max(x.abs().max().item() for x in expected.values())  # of one key, and of what a norm undoes, all cancels
    for name in expected:
        assert_rounded(actual[name], expected[name], of=size, name=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_twins_differ_in_the_attention_alone(options):
    sigmoid, softmax = make(SigmoidAttention, **options), make(SoftmaxAttention, **options)
    softmax.load_state_dict(sigmoid.state_dict(), strict=True)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    assert not torch.equal(sigmoid(x), softmax(x))
    softmax.attention_fn = sigmoid.attention_fn
    assert torch.equal(sigmoid(x), softmax(x))


@pytest.mark.parametrize("cls", [SigmoidAttention, SoftmaxAttention])
@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_a_padded_sequence_is_that_sequence_alone(cls, position):
    """Left, right and inner padding; whatever stands in the padding, and whatever else is in the batch."""
    module = make(cls, position=position)
    x = torch.randn(4, 9, DIM, dtype=torch.float64)
    key_mask = torch.ones(4, 9, dtype=torch.bool)
    key_mask[0, 6:] = False
    key_mask[1, :4] = False
    key_mask[2, 1:8] = False
    out = module(x, key_mask)
    assert_rounded(out[0, :6], module(x[:1, :6])[0])
    # RoPE and ALiBi are relative, so a shift of all tokens changes nothing
    assert_rounded(out[1, 4:], module(x[1:2, 4:])[0])
    assert_rounded(out[3], module(x[3:])[0])
    if position is None:
        assert_rounded(out[2, [0, 8]], module(x[2:3, [0, 8]])[0])
    noise = torch.where(key_mask[..., None], x, 1e3 * torch.randn_like(x))
    assert_rounded(module(noise, key_mask)[key_mask], out[key_mask])


@pytest.mark.parametrize("cls", [SigmoidAttention, SoftmaxAttention])
def test_a_sequence_without_keys_gives_zeros_and_no_nan(cls):
    module = make(cls)
    key_mask = torch.tensor([[True, True, False], [False, False, False]])
    result = outputs_and_gradients(module, lambda x: module(x, key_mask), torch.randn(2, 3, DIM, dtype=torch.float64))
    assert all(x.isfinite().all() for x in result.values())
    assert (result["out"][1] == 0).all()
    assert (result["dx"][1] == 0).all()
    assert (result["out"][0] != 0).all()


@pytest.mark.parametrize("mode", ["fixed", "per_head"])
@pytest.mark.parametrize("causal", [True, False])
def test_by_alibi_bias_every_head_begins_with_a_row_mass_of_one(causal, mode):
    """Queries of zero: a row of head h is sum_d sigmoid(b_h - m_h d). With one b the steepest head has a fourteenth."""
    n, masses = 129, {}
    for by_slope in (False, True):
        options = {"position": "alibi", "sigmoid_bias": -math.log(n), "bias_mode": mode, "causal": causal}
        module = SigmoidAttention(DIM, NHEADS, alibi_bias=by_slope, **options).double()
        q, v = torch.zeros(1, n, NHEADS, 6), torch.ones(1, n, NHEADS, 1)
        out = sigmoid_attention(
            q,
            q,
            v,
            sigmoid_bias=module.bias(q.device).float() if by_slope else -math.log(n),
            causal=causal,
            alibi_slopes=alibi_slopes(NHEADS),
            backend="reference",
        )
        masses[by_slope] = out[0, n - 1 if causal else n // 2, :, 0].tolist()
    for h, mass in enumerate(masses[True]):
        keys = math.exp(-slope_bias(h, n, causal))
        assert keys / (keys + 1) < mass < 1.0
        row = [math.exp(-(2.0 ** (-8.0 * (h + 1) / NHEADS)) * abs((n - 1 if causal else n // 2) - j)) for j in range(n)]
        assert_rounded(mass, sum(1 / (1 + keys / x) for x in row), dtype=torch.float32)
    assert masses[False][0] < 0.08


def test_alibi_bias_is_a_constant_that_no_checkpoint_holds_and_no_cast_rounds():
    options = {"position": "alibi", "sigmoid_bias": -math.log(48), "causal": True}
    module, plain = (SigmoidAttention(DIM, NHEADS, alibi_bias=by_slope, **options) for by_slope in (True, False))
    assert module.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 48, DIM)
    assert not torch.equal(module(x), plain(x))
    assert torch.equal(module.bias(x.device), copy.deepcopy(module).bfloat16().bias(x.device))
    assert torch.equal(module(x[:, :20]), module(x)[:, :20])  # that of training at every length


def test_a_fixed_bias_is_not_changed_by_a_key_mask():
    module = make(SigmoidAttention, sigmoid_bias=-2.0)
    seen = []
    module.attention_fn = lambda q, k, v, **kw: seen.append(kw["sigmoid_bias"]) or sigmoid_attention(q, k, v, **kw)
    module(torch.randn(2, 5, DIM, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool))
    assert seen == [-2.0]


@pytest.mark.parametrize("cls", [SigmoidAttention, SoftmaxAttention])
def test_attention_fn_gets_the_agreed_arguments(cls):
    seen = {}

    def attention_fn(q, k, v, *, sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p):
        seen.update(locals())
        return q

    module = cls(
        DIM,
        NHEADS,
        nheads_k=2,
        position="alibi",
        causal=True,
        window_size=(2, None),
        dropout_p=0.25,
        sigmoid_bias=-1.0,
        attention_fn=attention_fn,
    )
    module(torch.randn(3, 5, DIM))
    assert seen["q"].shape == (3, 5, NHEADS, 6)
    assert seen["k"].shape == seen["v"].shape == (3, 5, 2, 6)
    assert (seen["sigmoid_bias"], seen["scale"], seen["causal"]) == (-1.0, 6**-0.5, True)
    assert (seen["window_size"], seen["dropout_p"]) == ((2, None), 0.25)
    assert torch.equal(seen["alibi_slopes"], alibi_slopes(NHEADS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.eval()(torch.randn(3, 5, DIM))
    assert seen["dropout_p"] == 0.0
    assert seen["q"].dtype == seen["k"].dtype == seen["v"].dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [SigmoidAttention, SoftmaxAttention])
def test_dropout_acts_in_training_only(cls):
    module = make(cls, dropout_p=0.5)
    x = torch.randn(1, 40, DIM, dtype=torch.float64)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nheads_k": 3}, "nheads must be a positive multiple of nheads_k, got nheads=4, nheads_k=3"),
        ({"nheads_k": 0}, "nheads_k=0"),
        ({"position": "learned"}, "position must be 'rope', 'alibi' or None, got 'learned'"),
        ({"position": "rope", "head_dim": 5}, "head_dim must be positive and even .* got 5"),
        ({"bias_mode": "free"}, "bias_mode must be .* got 'free'"),
        ({"bias_mode": "learnable"}, "sigmoid_bias must be given with bias_mode='learnable'.* got None"),
        ({"bias_mode": "per_head"}, "sigmoid_bias must be given with bias_mode='per_head'.* got None"),
        ({"alibi_bias": True, "sigmoid_bias": -3.0}, "position must be 'alibi' with alibi_bias=True, got None"),
        ({"alibi_bias": True, "position": "alibi"}, "sigmoid_bias must be -log n .* got None"),
        ({"alibi_bias": True, "position": "alibi", "sigmoid_bias": 0.1}, "sigmoid_bias must be -log n .* got 0.1"),
        (
            {"alibi_bias": True, "position": "alibi", "sigmoid_bias": -math.inf},
            "sigmoid_bias must be -log n .* got -inf",
        ),
        (
            {"alibi_bias": True, "position": "alibi", "sigmoid_bias": -3.0, "bias_mode": "learnable"},
            "bias_mode must be 'fixed' or 'per_head' with alibi_bias=True, got 'learnable'",
        ),
        ({"head_dim": 0}, "head_dim must be a positive integer, got 0"),
        ({"head_dim": 8.0}, "head_dim must be a positive integer, got 8.0"),
        ({"position": "rope", "rope_base": 0.0}, "base must be positive and finite, got 0.0"),
        ({"bias_mode": "per_head", "sigmoid_bias": math.nan}, r"sigmoid_bias must be a number below \+inf, got nan"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_wrong_options_are_one_clear_error(options, words):
    with pytest.raises(ValueError, match=words):
        SigmoidAttention(DIM, NHEADS, **options)


def test_a_dim_that_does_not_divide_is_one_clear_error():
    with pytest.raises(ValueError, match=r"dim must be positive, and a multiple of nheads .* got dim=25, nheads=4"):
        SigmoidAttention(25, 4)
    for dim in (0, "24"):
        with pytest.raises(ValueError, match=rf"dim must be positive, .* got dim={dim!r}, nheads=4"):
            SigmoidAttention(dim, 4)
    assert SigmoidAttention(25, 4, head_dim=8)(torch.randn(1, 2, 25)).shape == (1, 2, 25)


@pytest.mark.parametrize("shape", [(5, DIM), (2, 5, DIM + 1)])
def test_a_wrong_x_is_one_clear_error(shape):
    with pytest.raises(ValueError, match=rf"x must be \(batch, seqlen, dim={DIM}\), got"):
        SigmoidAttention(DIM, NHEADS)(torch.randn(shape))


@pytest.mark.parametrize("key_mask", [torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool)])
def test_a_wrong_key_mask_is_one_clear_error(key_mask):
    with pytest.raises(ValueError, match=r"key_mask must be bool \(batch, seqlen\) = \(2, 5\), got"):
        SigmoidAttention(DIM, NHEADS)(torch.randn(2, 5, DIM), key_mask)


@pytest.mark.parametrize("cls", [SigmoidAttention, SoftmaxAttention])
@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_bf16_autocast_and_cast_modules_work(cls, position):
    """float32 weights under autocast, and a module cast as a whole, beside the same in float32."""
    module = cls(DIM, NHEADS, position=position, causal=True)
    x = torch.randn(2, 33, DIM)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    cast = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert cast.dtype == torch.bfloat16
    for actual in (out, cast):
        error = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        # bfloat16 has 2 ** -8 of relative precision
        assert error < 4 * 2**-8


def test_positions_survive_inference_mode_casts_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for position in ("rope", "alibi"):
        # sizes of its own, so that no other test has filled the cache
        module = SigmoidAttention(DIM, 3, position=position, rope_base=77.0)
        assert not list(module.buffers())
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(torch.empty(1, 6, DIM))
        with torch.inference_mode():
            module(torch.randn(1, 6, DIM))
        module(torch.randn(1, 6, DIM)).sum().backward()
        out = copy.deepcopy(module).bfloat16().float()(torch.ones(1, 6, DIM))
        assert out.isfinite().all()


@pytest.mark.parametrize("cls", [SigmoidAttention, SoftmaxAttention])
def test_checkpointing_gives_equal_gradients_with_dropout(cls):
    module = make(cls, dropout_p=0.3, position="rope", causal=True)
    x = torch.randn(2, 17, DIM, dtype=torch.float64)
    torch.manual_seed(5)
    plain = outputs_and_gradients(module, module, x)
    torch.manual_seed(5)
    again = outputs_and_gradients(module, lambda x: checkpoint(module, x, use_reentrant=False), x)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_deepcopy_is_equal_and_independent():
    module = make(SigmoidAttention, position="rope", sigmoid_bias=-1.0, bias_mode="per_head")
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    before = module(x)
    other = copy.deepcopy(module)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.sigmoid_bias.zero_()
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("attention_class", [SigmoidAttention, SoftmaxAttention])
def test_packing_beside_a_mask_or_another_row_is_one_clear_error(attention_class):
    attention = attention_class(16, 2, sigmoid_bias=-2.0)
    packing = Packing(torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    x, key_mask = torch.randn(1, 7, 16), torch.ones(1, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="packing must be alone, got a key_mask or a cache beside it"):
        attention(x, key_mask, packing=packing)
    with pytest.raises(ValueError, match=r"x must be one row \(1, total, dim\) with packing, got \(2, 7, 16\)"):
        attention(x.expand(2, -1, -1), packing=packing)
    assert attention(x, packing=packing).shape == x.shape
