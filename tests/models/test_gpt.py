"""The language model: causal to the bit, every parameter alive, the bias a constant, sizes and memory as stated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rounding import LAYER, assert_rounded

from flashsigmoid.models.gpt import (
    GPT,
    GPTConfig,
    gpt_1b,
    gpt_7b,
    gpt_40m,
    gpt_85m,
    gpt_demo,
    memory_estimate,
    parameter_count,
)
from flashsigmoid.nn import SigmoidAttention

# torch lists its factories when a device context is first used; conftest.py replaces torch.empty in every test, so let
# that be now: a list with the replacement would build the 7B model on the CPU
with torch.device("meta"):
    torch.empty(0)

SMALL = GPTConfig(vocab_size=61, seqlen=24, nlayers=2, dim=32, nheads=4)
VARIANTS = {
    "plain": SMALL,
    "softmax": replace(SMALL, attention="softmax"),
    "rope": replace(SMALL, position="rope"),
    "hybrid": replace(SMALL, norm="hybrid"),
    "gqa, gate, window": replace(SMALL, nheads_k=2, gate=True, window_size=(5, None)),
    "gelu, LayerScale, no QK-norm": replace(SMALL, mlp="gelu", layer_scale=0.1, qk_norm=False),
    "no bias": replace(SMALL, sigmoid_bias=0.0),
    "normed heads": replace(SMALL, out_norm=True, sigmoid_bias=-6.0, nheads_k=2, gate=True),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


@variants
def test_every_parameter_gets_a_gradient(config):
    model = GPT(config)
    model(torch.randint(61, (2, 24))).logsumexp(-1).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


@variants
def test_a_future_token_changes_no_past_logit(config):
    """To the bit: the rows of the past are computed from the same numbers in the same order."""
    model, tokens = GPT(config).eval(), torch.randint(61, (2, 24))
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13], after[:, 13])
    # and position 14 sees token 13 through attention alone
    assert not torch.equal(before[:, 14], after[:, 14])


def test_the_arms_differ_in_nothing_but_attention():
    torch.manual_seed(0)
    sigmoid = GPT(SMALL)
    torch.manual_seed(0)
    softmax = GPT(replace(SMALL, attention="softmax"))
    a, b = sigmoid.state_dict(), softmax.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    tokens = torch.randint(61, (1, 24))
    assert not torch.equal(sigmoid(tokens), softmax(tokens))


def test_the_bias_is_the_training_contexts_whatever_the_input():
    for config, bias in ((SMALL, -math.log(24)), (replace(SMALL, sigmoid_bias=-1.5), -1.5)):
        layers = [m for m in GPT(config).modules() if isinstance(m, SigmoidAttention)]
        assert [layer.sigmoid_bias for layer in layers] == [bias, bias]
    # so a prefix alone has the logits it has inside the whole
    model, tokens = GPT(SMALL).double().eval(), torch.randint(61, (1, 24))
    alone, inside = model(tokens[:, :9]), model(tokens)[:, :9]
    assert_rounded(alone, inside, 4 * LAYER)  # two layers of an attention and an MLP


@pytest.mark.parametrize("bias", [-math.inf, None])
def test_without_attention_only_the_last_token_counts(bias):
    """b = -inf: what the bigram floor is the floor of. With the usual bias the past does count."""
    model = GPT(replace(SMALL, sigmoid_bias=bias)).eval()
    tokens = torch.randint(61, (1, 24))
    other = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)
    with torch.no_grad():
        same = torch.equal(model(tokens)[:, -1], model(other)[:, -1])
    assert same == (bias is not None)


def test_the_first_loss_is_nearly_uniform():
    config = replace(SMALL, vocab_size=1000, dim=128)
    tokens = torch.randint(1000, (8, 25))
    logits = GPT(config)(tokens[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert math.log(1000) - 0.05 < loss < math.log(1000) + 0.3


def test_dropout_only_in_training():
    model, tokens = GPT(replace(SMALL, dropout_p=0.5)), torch.randint(61, (1, 24))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"seqlen": 2.5}, "seqlen must be an integer, got 2.5"),
        ({"mlp_dim": -1}, "mlp_dim must be a positive integer, got -1"),
        ({"nheads": 5}, "dim must be a multiple of nheads=5, got 32"),
        ({"nheads_k": 3}, "nheads must be a multiple of nheads_k=3, got 4"),
        ({"dim": 36, "position": "rope"}, "must be even for position='rope', got 9"),
        ({"position": "learned"}, "position must be one of"),
        ({"norm": "post"}, "norm must be one of"),
        ({"mlp": "relu"}, "mlp must be one of"),
        ({"attention": "linear"}, "attention must be one of"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"window_size": (4, 4)}, "window_size must be"),
        ({"window_size": (-1, None)}, "window_size must be"),
        ({"window_size": (4,)}, "window_size must be"),
        ({"sigmoid_bias": math.nan}, "sigmoid_bias must be a number below inf, or None, got nan"),
        ({"sigmoid_bias": math.inf}, "sigmoid_bias must be a number below inf, or None, got inf"),
    ],
)
def test_bad_configs(change, rule):
    with pytest.raises(ValueError, match=rule):
        replace(SMALL, **change)


@pytest.mark.parametrize("shape", [(24,), (1, 25)])
def test_bad_tokens(shape):
    with pytest.raises(ValueError, match="tokens must be"):
        GPT(SMALL)(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "shape", "outside_embeddings"),
    [
        # of the paper: 12 dim^2 a layer, mlp_dim rounded up to 64
        (gpt_85m(), (12, 768, 12, 2048), 12 * (4 * 768**2 + 3 * 768 * 2048)),
        (gpt_1b(), (24, 2048, 32, 4096), 24 * (4 * 2048**2 + 3 * 2048 * 5504)),
        (gpt_7b(), (32, 4096, 32, 4096), 32 * (4 * 4096**2 + 3 * 4096 * 10944)),
        (gpt_40m(), (8, 512, 8, 1024), 8 * (4 * 512**2 + 3 * 512 * 1408)),
        (gpt_demo(), (4, 128, 4, 128), 4 * (4 * 128**2 + 3 * 128 * 384)),
    ],
    ids=["85m", "1b", "7b", "40m", "demo"],
)
def test_sizes_on_the_meta_device(config, shape, outside_embeddings):
    assert (config.nlayers, config.dim, config.nheads, config.seqlen) == shape
    with torch.device("meta"):
        model = GPT(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert matrices == outside_embeddings
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert vectors < 1e-3 * matrices or config == gpt_demo()
    assert parameter_count(config) == matrices + vectors + 2 * config.vocab_size * config.dim


def test_the_named_sizes_have_the_size_they_are_named_after():
    assert 38e6 < parameter_count(gpt_40m()) < 46e6
    for config, size in ((gpt_85m(), 85e6), (gpt_1b(), 1.2e9), (gpt_7b(), 6.5e9)):
        assert abs(parameter_count(config) - 2 * config.vocab_size * config.dim - size) < 0.03 * size
        assert (config.position, config.qk_norm, config.mlp) == ("alibi", True, "swiglu")
    assert (gpt_1b().norm, gpt_7b().norm) == ("hybrid", "hybrid")


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_estimate_is_what_autograd_keeps(config, dtype):
    """Distinct storages that the forward of a training step saves, parameters aside, within 3 % of the estimate."""
    config = replace(config, dim=64, seqlen=64, vocab_size=300)
    model, tokens = GPT(config, attention_fn=lean_attention), torch.randint(300, (4, 65))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and x.dtype.is_floating_point:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    estimate = memory_estimate(config, 4, dtype=dtype)
    assert abs(sum(kept.values()) / estimate.activations_bytes - 1.0) < 0.03
    p = parameter_count(config)
    assert (estimate.weights_bytes, estimate.gradients_bytes, estimate.optimizer_bytes) == (4 * p, 4 * p, 8 * p)
    assert estimate.total_bytes == 16 * p + estimate.activations_bytes


class _Lean(torch.autograd.Function):
    """Saves q, k, v and nothing else, as a fused attention does; its values do not matter here."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).contiguous()

    @staticmethod
    def backward(ctx, dout):
        raise AssertionError("only the forward is measured")


def lean_attention(q, k, v, **options):
    """Attention that keeps its three inputs."""
    return _Lean.apply(q, k, v)


def test_checkpointed_layers_keep_less():
    config = gpt_85m()
    assert (
        memory_estimate(config, 8, checkpointed=True).activations_bytes
        < memory_estimate(config, 8).activations_bytes / 2
    )
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        memory_estimate(config, 0)
