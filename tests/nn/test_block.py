"""Blocks, norms and feed-forwards: formulas, gradients everywhere, compile, checkpointing, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from rounding import assert_rounded
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flashsigmoid.nn import MLP, Block, LayerScale, RMSNorm, SigmoidAttention, SoftmaxAttention, SwiGLU

DIM = 24


def make(norm="pre", layer_scale=None, attention=SigmoidAttention, mlp=SwiGLU, **options):
    block = Block(attention(DIM, 4, **options), mlp(DIM), DIM, norm=norm, layer_scale=layer_scale)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def rms(x, weight, eps=1e-5):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_is_its_formula(dtype):
    norm = RMSNorm(7).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 7, dtype=dtype)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert norm.eps == 1e-5
    assert_rounded(norm(x), rms(x, norm.weight), 32)


def test_rms_norm_takes_the_wider_dtype():
    norm = RMSNorm(64)
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(norm(x), norm(x.float()))
    assert norm.bfloat16()(x).dtype == torch.bfloat16
    assert norm(x.float()).dtype == torch.float32


def test_layer_scale():
    scale = LayerScale(5, 0.25)
    assert torch.equal(scale(torch.ones(2, 5)), torch.full((2, 5), 0.25))
    assert torch.equal(LayerScale(3).weight, torch.full((3,), 1e-4))


def test_swiglu_is_its_formula_and_rounds_its_hidden_size():
    mlp = SwiGLU(DIM).double()
    x = torch.randn(3, DIM, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T
    assert_rounded(mlp(x), (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T)
    assert mlp.gate_proj.bias is None
    # 8/3 dim up to the next multiple: 64, 2048 exactly, 2304 from 2275.6
    assert [SwiGLU(dim).up_proj.out_features for dim in (24, 768)] == [64, 2048]
    assert SwiGLU(32, multiple_of=256).up_proj.out_features == 256
    assert SwiGLU(24, 50).up_proj.out_features == 50


def test_mlp_is_its_formula():
    mlp = MLP(DIM).double()
    x = torch.randn(3, DIM, dtype=torch.float64)
    hidden = F.gelu(x @ mlp.up_proj.weight.T + mlp.up_proj.bias)
    assert hidden.shape[-1] == 4 * DIM
    assert_rounded(mlp(x), hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias)


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: SwiGLU(8, 0), "hidden must be positive, got 0"),
        (lambda: SwiGLU(8, multiple_of=0), "multiple_of must be positive, got 0"),
        (lambda: MLP(8, -1), "hidden must be positive, got -1"),
        (lambda: Block(MLP(8), MLP(8), 8, norm="post"), "norm must be 'pre' or 'hybrid', got 'post'"),
    ],
)
def test_wrong_options_are_one_clear_error(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it()


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("norm", ["pre", "hybrid"])
def test_block_is_its_formula(norm, layer_scale):
    block = make(norm, layer_scale).double()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    key_mask = torch.tensor([[True] * 5, [True, True, False, True, False]])

    def end(branch, out_norm, scale):
        if norm == "hybrid":
            branch = rms(branch, out_norm.weight)
        return branch if layer_scale is None else branch * scale.weight

    attended = block.attention(rms(x, block.attention_norm.weight), key_mask)
    expected = x + end(attended, block.attention_out_norm, block.attention_scale)
    fed = block.mlp(rms(expected, block.mlp_norm.weight))
    expected = expected + end(fed, block.mlp_out_norm, block.mlp_scale)
    assert_rounded(block(x, key_mask), expected)
    assert not torch.allclose(block(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "hybrid", "layer_scale": 1e-4, "position": "alibi", "causal": True},
        {"position": "rope", "gate": True, "proj_bias": True, "nheads_k": 2, "mlp": MLP},
        {"sigmoid_bias": -2.0, "bias_mode": "per_head", "norm": "hybrid"},
        {"attention": SoftmaxAttention, "position": "rope", "causal": True},
    ],
    ids=str,
)
def test_backward_reaches_every_parameter(options):
    block = make(**options)
    block(torch.randn(2, 9, DIM)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("attention", "position", "masked"),
    [
        (SigmoidAttention, None, False),
        (SigmoidAttention, "rope", True),
        (SigmoidAttention, "alibi", False),
        (SoftmaxAttention, "rope", False),
        (SoftmaxAttention, "alibi", True),
    ],
)
def test_block_compiles_whole(attention, position, masked):
    torch.compiler.reset()
    block = make("hybrid", 0.5, attention, position=position, causal=True)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    key_mask = torch.rand(2, 9) < 0.7 if masked else None
    out = block(x, key_mask)
    gradients = torch.autograd.grad(out.sum(), (x, *block.parameters()))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        actual = compiled(x, key_mask)
        assert_rounded(actual, out)
        for a, e in zip(torch.autograd.grad(actual.sum(), (x, *block.parameters())), gradients, strict=True):
            assert_rounded(a, e)


def test_block_checkpoints_with_dropout():
    block = make(dropout_p=0.4, position="rope").double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(run(x).square().sum(), (x, *block.parameters())))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("norm", ["pre", "hybrid"])
def test_block_under_bf16_autocast_keeps_a_float32_stream(norm):
    block = make(norm, 0.5, position="rope")
    x = torch.randn(2, 9, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    change, expected = out - x, block(x) - x
    assert (change - expected).norm() < 4 * 2**-8 * expected.norm()


def test_state_dicts_load_strictly_between_the_twins_and_deepcopy_is_equal():
    sigmoid = make("hybrid", 0.1, position="alibi")
    softmax = make("hybrid", 0.1, SoftmaxAttention, position="alibi")
    softmax.load_state_dict(sigmoid.state_dict(), strict=True)
    x = torch.randn(1, 4, DIM)
    assert torch.equal(copy.deepcopy(softmax)(x), softmax(x))


def test_block_on_the_meta_device():
    weights = make("hybrid", 0.1, position="rope").state_dict()
    block = make("hybrid", 0.1, position="rope").to("meta")
    assert block(torch.randn(2, 9, DIM, device="meta")).shape == (2, 9, DIM)
    block.to_empty(device="cpu").load_state_dict(weights, strict=True)
    assert block(torch.randn(1, 3, DIM)).isfinite().all()
