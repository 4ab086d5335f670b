"""probes.py: the numbers against loops, both arms against their layers, and a model left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor, nn

from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics import (
    attention_norm,
    effective_keys,
    probe_attention,
    row_mass,
    saturation,
    sdpa_weights,
    sink_mass,
    softmax_weights,
)
from flashsigmoid.nn import SigmoidAttention, SoftmaxAttention, alibi_slopes, softmax_attention

ARMS = {"sigmoid": SigmoidAttention, "softmax": SoftmaxAttention}


class Model(nn.Module):
    """Two attention layers that run in the opposite order of their registration."""

    def __init__(self, arm: str, **options: Any) -> None:
        super().__init__()
        self.second = ARMS[arm](24, 4, **options)
        self.first = ARMS[arm](24, 4, **options)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.second(self.dropout(self.first(x, key_mask)), key_mask)


def test_attention_norm_is_a_mean_over_tokens_of_concatenated_heads() -> None:
    out = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = sum(
        math.sqrt(sum(out[b, i, h, d] ** 2 for h in range(4) for d in range(5))) for b in range(2) for i in range(3)
    )
    assert_rounded(attention_norm(out).item(), expected / 6, 16)


def test_row_mass_and_sink_mass_by_hand() -> None:
    # (1, 1, 3, 2): the second row sees nothing
    weights = torch.tensor([[[[0.3, 0.1], [0.0, 0.0], [0.0, 0.5]]]], dtype=torch.float64)
    assert_rounded(row_mass(weights).item(), (0.4 + 0.0 + 0.5) / 3, 16)
    assert_rounded(sink_mass(weights).item(), (0.75 + 0.0) / 2, 16)
    assert math.isnan(sink_mass(torch.zeros(1, 1, 2, 2)).item())


def test_effective_keys_and_saturation_by_hand() -> None:
    # one key, two even ones, three even ones, no mass: left out
    rows = [[0.7, 0.0, 0.0], [0.0, 0.2, 0.2], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]
    weights = torch.tensor([[rows]], dtype=torch.float64)
    assert_rounded(effective_keys(weights).item(), (1 + 2 + 3) / 3, 16)
    assert math.isnan(effective_keys(weights[:, :, 3:]).item())
    a = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    expected = sum(
        math.exp(-sum(w / sum(row) * math.log(w / sum(row)) for w in row)) for row in a.flatten(0, 2).tolist()
    )
    assert_rounded(effective_keys(a).item(), expected / 30, 16)

    weights = torch.tensor([[[[0.995, 0.5], [0.99, 0.99], [1.0, 1.0], [0.0, 0.0]]]], dtype=torch.float64)
    assert_rounded(saturation(weights).item(), (0.995 / 1.495 + 0.0 + 1.0) / 3, 16)
    assert saturation(weights, above=0.4).item() == 1.0
    assert math.isnan(saturation(weights[:, :, 3:]).item())


def test_even_causal_weights_give_the_documented_sink() -> None:
    n = 7
    zeros = torch.zeros(1, n, 1, 4)
    expected = sum(1 / i for i in range(1, n + 1)) / n
    assert_rounded(sink_mass(attention_weights(zeros, zeros, causal=True)).item(), expected, 16, dtype=torch.float32)
    assert_rounded(sink_mass(softmax_weights(zeros, zeros, causal=True)).item(), expected, 16, dtype=torch.float32)


@pytest.mark.parametrize("measure", [attention_norm, effective_keys, row_mass, saturation, sink_mass])
def test_half_precision_is_measured_in_float32(measure: Any) -> None:
    x = torch.rand(2, 3, 4, 300, dtype=torch.bfloat16)
    assert measure(x).dtype == torch.float32
    assert measure(x).item() == measure(x.float()).item()


@pytest.mark.parametrize("nheads_k", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(None, None), (2, 1)])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 5), (3, 7), (7, 3)])
def test_softmax_weights_are_those_of_softmax_attention(
    nheads_k: int,
    causal: bool,
    window_size: tuple[int | None, int | None],
    alibi: bool,
    masked: bool,
    seqlen_q: int,
    seqlen_k: int,
) -> None:
    q = torch.randn(2, seqlen_q, 4, 8, dtype=torch.float64)
    k = torch.randn(2, seqlen_k, nheads_k, 8, dtype=torch.float64)
    # values that read the weights out: out = A I, for one head at a time
    v = torch.eye(seqlen_k, dtype=torch.float64)[None, :, None, :].expand(2, -1, nheads_k, -1)
    options: dict[str, Any] = {"scale": 0.7, "causal": causal, "window_size": window_size}
    if alibi:
        options["alibi_slopes"] = alibi_slopes(4)
    if masked:
        options["key_mask"] = torch.rand(2, seqlen_k) > 0.4
    weights = softmax_weights(q, k, **options)
    assert_rounded(weights.transpose(1, 2), softmax_attention(q, k, v, **options))
    rows = weights.sum(-1)
    assert torch.all(torch.isclose(rows, torch.ones_like(rows)) | (rows == 0))


@pytest.mark.parametrize("arm", ["sigmoid", "softmax"])
@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_probes_agree_with_weights_taken_by_hand(arm: str, position: str | None) -> None:
    n = 9
    model = Model(arm, causal=True, position=position, nheads_k=2, sigmoid_bias=-1.0)
    x = torch.randn(3, n, 24)
    probes = probe_attention(model, x)
    assert [(p.layer, p.name, p.attention) for p in probes] == [(0, "first", arm), (1, "second", arm)]

    layer = model.first
    q = layer.rope(layer.q_norm(layer.q_proj(x).unflatten(-1, (4, 6))))
    k = layer.rope(layer.k_norm(layer.k_proj(x).unflatten(-1, (2, 6)))).repeat_interleave(2, 2)
    v = layer.v_proj(x).unflatten(-1, (2, 6)).repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(6)
    if position == "alibi":
        i = torch.arange(n)
        scores = scores - alibi_slopes(4)[:, None, None] * (i[:, None] - i).abs()
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    if arm == "sigmoid":
        a = torch.sigmoid(scores - 1.0).masked_fill(hidden, 0.0)
    else:
        a = scores.masked_fill(hidden, -math.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", a, v)

    first = probes[0]
    assert_rounded(first.attention_norm, out.flatten(2).norm(dim=-1).mean().item(), dtype=torch.float32)
    assert_rounded(first.row_mass, a.sum(-1).mean().item(), dtype=torch.float32)
    assert_rounded(first.sink_mass, (a[..., 0] / a.sum(-1)).mean().item(), dtype=torch.float32)
    assert_rounded(first.max_weight, a.max().item(), dtype=torch.float32)
    share = a / a.sum(-1, keepdim=True)
    assert_rounded(first.effective_keys, torch.special.entr(share).sum(-1).exp().mean().item(), dtype=torch.float32)
    assert_rounded(first.saturation, (a * (a > 0.99)).sum(-1).div(a.sum(-1)).mean().item(), dtype=torch.float32)


def test_padded_keys_weigh_nothing_in_softmax() -> None:
    model = Model("softmax")
    key_mask = torch.tensor([[False, True, True, True]])
    assert all(probe.sink_mass == 0.0 for probe in probe_attention(model, torch.randn(1, 4, 24), key_mask=key_mask))


@pytest.mark.parametrize("arm", ["sigmoid", "softmax"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(arm: str, fails: bool) -> None:
    model = Model(arm, causal=True, dropout_p=0.3).train()
    model.first.q_proj.eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    functions = [model.first.attention_fn, model.second.attention_fn]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 5, 24, requires_grad=True)
    random = torch.get_rng_state()

    if fails:
        model.second.out_proj.register_forward_pre_hook(lambda *_: torch.rand(1) and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            probe_attention(model, x)
    else:
        without_dropout = Model(arm, causal=True).eval()
        without_dropout.load_state_dict(state)
        torch.set_rng_state(random)
        assert probe_attention(model, x) == probe_attention(without_dropout, x)
    assert [module.training for module in model.modules()] == modes
    assert [model.first.attention_fn, model.second.attention_fn] == functions
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("arm", ["sigmoid", "softmax"])
def test_weights_are_float32_under_autocast(arm: str) -> None:
    seen = []

    def attention_fn(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q, k, options))
        return softmax_attention(q, k, v, **options)

    model = Model(arm, causal=True, sigmoid_bias=-2.0, attention_fn=attention_fn)
    with torch.autocast("cpu", torch.bfloat16):
        probes = probe_attention(model, torch.randn(2, 33, 24))
    q, k, options = seen[0]
    assert q.dtype == torch.bfloat16
    if arm == "sigmoid":
        weights = attention_weights(q.float(), k.float(), sigmoid_bias=-2.0, scale=options["scale"], causal=True)
    else:
        weights = softmax_weights(q.float(), k.float(), scale=options["scale"], causal=True)
    assert probes[0].max_weight == weights.max().item()


def test_a_model_without_attention_is_refused() -> None:
    message = "must have run a SigmoidAttention, a SoftmaxAttention or torch's .*, got Linear without"
    with pytest.raises(ValueError, match=message):
        probe_attention(nn.Linear(2, 2), torch.randn(1, 2))


def test_sinks_of_several_keys() -> None:
    weights = torch.tensor([[[[0.2, 0.1, 0.1], [0.0, 0.4, 0.4]]]])
    assert sink_mass(weights, keys=2).item() == pytest.approx((0.75 + 0.5) / 2)


@pytest.mark.parametrize(
    ("masked", "is_causal"),
    [("no", False), ("no", True), ("bool", False), ("float", False)],  # torch takes one
)
@pytest.mark.parametrize("nheads_k", [4, 2])
@pytest.mark.parametrize("seqlen_q", [5, 3])
def test_sdpa_weights_are_those_of_torch(masked: str, is_causal: bool, nheads_k: int, seqlen_q: int) -> None:
    q, k = torch.randn(2, 4, seqlen_q, 8).double(), torch.randn(2, nheads_k, 5, 8).double()
    eye = torch.eye(5).double().expand(2, nheads_k, 5, 5)
    mask = None if masked == "no" else torch.rand(2, 1, seqlen_q, 5) > 0.3
    if masked == "float":
        mask = torch.randn(2, 1, seqlen_q, 5).double()
    elif mask is not None:
        mask[..., 0] = True
    options: dict[str, Any] = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": nheads_k != 4}
    expected = nn.functional.scaled_dot_product_attention(q, k, eye, mask, **options)
    assert_rounded(sdpa_weights(q, k, mask, **options), expected)


def timm_model() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    timm = pytest.importorskip("timm", reason="models of timm need the extra vision")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
    return vit, (torch.randn(2, 3, 32, 32),), ["blocks.0.attn", "blocks.1.attn"]


def llama() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    transformers = pytest.importorskip("transformers", reason="models of transformers need the extra hf")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    return transformers.LlamaForCausalLM(config), (torch.randint(0, 50, (2, 7)),), names


def torch_encoder() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    return encoder, (torch.randn(2, 5, 16),), ["layers.0.self_attn", "layers.1.self_attn"]


def torch_attention() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    x = torch.randn(2, 5, 16)
    return nn.MultiheadAttention(16, 4, batch_first=True), (x, x, x), [""]


FOREIGN = pytest.mark.parametrize("make", [timm_model, llama, torch_encoder, torch_attention])


@FOREIGN
def test_models_of_others_are_seen_and_give_what_they_gave(make: Any) -> None:
    model, inputs, names = make()
    model.eval()
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(*inputs)
    probes = probe_attention(model, *inputs)
    assert [(p.layer, p.name, p.attention) for p in probes] == [(i, name, "softmax") for i, name in enumerate(names)]
    for probe in probes:
        assert_rounded(probe.row_mass, 1.0, dtype=torch.float32)
        assert 0.0 < probe.sink_mass < 1.0
        assert probe.attention_norm > 0.0
    plain, probed = (out[0] if isinstance(out, tuple) else getattr(out, "logits", out) for out in seen)
    assert_rounded(probed, plain)  # torch's encoder has a fast path without probes
    assert nn.functional.scaled_dot_product_attention is SDPA


SDPA = nn.functional.scaled_dot_product_attention


def test_numbers_of_torchs_attention_are_its_own_weights() -> None:
    attention, (x, *_), _ = torch_attention()
    attention.eval()
    with torch.no_grad():
        _, weights = attention(x, x, x, average_attn_weights=False)
        v = nn.functional.linear(x, attention.in_proj_weight[32:], attention.in_proj_bias[32:]).unflatten(-1, (4, 4))
        out = torch.einsum("bhij,bjhd->bihd", weights, v)
    for keywords in ({}, {"need_weights": False}):
        (probe,) = probe_attention(attention, x, x, x, **keywords)
        assert_rounded(probe.sink_mass, sink_mass(weights).item(), dtype=torch.float32)
        assert_rounded(probe.max_weight, weights.max().item(), dtype=torch.float32)
        assert_rounded(probe.attention_norm, out.flatten(2).norm(dim=-1).mean().item(), dtype=torch.float32)


def test_causal_weights_of_llama() -> None:
    """The first row sees one key: with equal tokens every row is even, as documented of a sink."""
    model, _, _ = llama()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)  # RoPE would turn equal tokens apart
    n = 7
    probes = probe_attention(model, torch.full((1, n), 3))
    expected = sum(1 / i for i in range(1, n + 1)) / n
    assert_rounded(probes[0].sink_mass, expected, 16, dtype=torch.float32)
    assert probes[0].max_weight == 1.0


@pytest.mark.parametrize("arm", ["sigmoid", "softmax"])
def test_a_layer_of_ours_is_seen_once(arm: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ours = ARMS[arm](24, 4, causal=True, sigmoid_bias=-1.0)
            self.theirs = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.ours(x)
            return self.theirs(x, x, x, need_weights=False)[0]

    model = Both()
    assert [p.name for p in probe_attention(model, torch.randn(2, 5, 24))] == ["ours", "theirs"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("how", ["whole", "in place", "a part in place"])
def test_a_compiled_model_is_probed_as_it_is_without(how: str) -> None:
    torch.manual_seed(0)
    model = Model("sigmoid", causal=True, sigmoid_bias=-1.0)
    x = torch.randn(2, 5, 24)
    expected = probe_attention(model, x)

    compilations = []

    def backend(graph: Any, _: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    if how == "whole":
        compiled: Any = torch.compile(model, backend=backend)
    else:
        compiled = model
        (model if how == "in place" else model.first).compile(backend=backend)
    assert probe_attention(compiled, x) == expected
    assert compilations == []
    with torch.no_grad():
        compiled(x)
    assert compilations  # it is compiled as before, afterwards


def test_eager_attention_of_others_is_not_seen_and_said_so() -> None:
    model, inputs, _ = llama()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="got LlamaForCausalLM without"):
        probe_attention(model, *inputs)
