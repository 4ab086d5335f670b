"""timm's Vision Transformers with our attention: the same parameters, the same function of them, and the pair."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import pytest
import timm
import torch
from rounding import assert_rounded
from safetensors.torch import save_file
from timm.layers.attention import Attention

from flashsigmoid.models.vision import VisionAttention, ViTConfig, build_vit, tokens

SMALL = ViTConfig(
    name="vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, dim=48, depth=2, nheads=4, layer_scale=0.1
)


def attentions(model: torch.nn.Module) -> list[VisionAttention]:
    return [module for module in model.modules() if isinstance(module, VisionAttention)]


def images(config: ViTConfig = SMALL, batch: int = 2) -> torch.Tensor:
    size = config.img_size or 224
    return torch.randn(batch, config.in_chans, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_a_pair_has_the_same_parameters_and_another_function(pool, position) -> None:
    config = dataclasses.replace(SMALL, pool=pool, position=position)
    torch.manual_seed(0)
    model = build_vit(config)
    twin = build_vit(dataclasses.replace(config, attention="softmax"))
    twin.load_state_dict(model.state_dict())
    out, other = (m.eval()(images()) for m in (model, twin))
    assert out.shape == other.shape == (2, 5)
    assert not torch.allclose(out, other)
    assert {a.kind for a in attentions(model)} == {"sigmoid"}
    assert tokens(model) == 16 + (pool == "token")
    assert {a.sigmoid_bias for a in attentions(model)} == {-math.log(tokens(model))}


def test_the_softmax_twin_is_timms_own_model() -> None:
    torch.manual_seed(0)
    twin = build_vit(dataclasses.replace(SMALL, attention="softmax")).eval()
    plain = timm.create_model(
        SMALL.name, num_classes=5, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, init_values=0.1,
        qk_norm=True,
    ).eval()  # fmt: skip
    plain.load_state_dict(twin.state_dict())
    assert_rounded(twin(images()), plain(images()))


def test_an_attention_is_the_equation() -> None:
    torch.manual_seed(0)
    attention = VisionAttention(48, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).double()
    attention.configure(sigmoid_bias=-2.0)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    q, k, v = (y.transpose(1, 2) for y in attention.qkv(x).unflatten(-1, (3, 4, 12)).unbind(2))
    a = torch.sigmoid(attention.q_norm(q) @ attention.k_norm(k).mT / math.sqrt(12) - 2.0)
    expected = attention.proj((a @ v).transpose(1, 2).flatten(2))
    assert_rounded(attention(x), expected)


def test_out_norm_is_the_equation_in_a_pair() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, out_norm=True, sigmoid_bias=-math.log(17) - 3.0)
    model, twin = build_vit(config), build_vit(dataclasses.replace(config, attention="softmax"))
    twin.load_state_dict(model.state_dict())
    attention = attentions(model)[0].double()
    torch.nn.init.uniform_(attention.out_norm.weight)
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    q, k, v = (y.transpose(1, 2) for y in attention.qkv(x).unflatten(-1, (3, 4, 12)).unbind(2))
    a = torch.sigmoid(attention.q_norm(q) @ attention.k_norm(k).mT / math.sqrt(12) + config.sigmoid_bias)
    heads = a @ v
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-12).sqrt() * attention.out_norm.weight
    assert_rounded(attention(x), attention.proj(heads.transpose(1, 2).flatten(2)))
    attention.configure(sigmoid_bias=-2.0)
    assert "out_norm.weight" not in attention.state_dict()


def test_a_mask_removes_keys() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 48)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, 6:] = False
    for kind in ("sigmoid", "softmax"):
        attention = VisionAttention(48, num_heads=4)
        attention.configure(kind)
        masked = attention(x, attn_mask=keep[:, None, None])
        assert_rounded(masked[:1, :6], attention(x[:1, :6]))
        assert_rounded(masked[1:], attention(x[1:]))
        for wrong in (keep, keep[:, None, None].float(), torch.ones(2, 1, 9, 9, dtype=torch.bool)):
            with pytest.raises(ValueError, match="attn_mask must be bool, of shape"):
                attention(x, attn_mask=wrong)


def test_causal_tokens_do_not_see_the_future() -> None:
    attention = VisionAttention(48, num_heads=4)
    x = torch.randn(1, 9, 48)
    other = x.clone()
    other[:, 5:] = 0.0
    assert_rounded(attention(x, is_causal=True)[:, :5], attention(other, is_causal=True)[:, :5])


@pytest.mark.parametrize(("mode", "shape"), [("learnable", ()), ("per_head", (4,))])
def test_a_learnable_bias_starts_at_minus_log_n_and_learns(mode, shape) -> None:
    model = build_vit(dataclasses.replace(SMALL, bias_mode=mode))
    fixed = build_vit(SMALL)
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in fixed.named_parameters()}
    assert names == {f"blocks.{i}.attn.sigmoid_bias" for i in range(2)}
    b = attentions(model)[0].sigmoid_bias
    assert isinstance(b, torch.nn.Parameter)
    assert b.shape == shape
    assert_rounded(b.detach(), torch.full(shape, -math.log(17)))
    model(images()).square().sum().backward()
    assert b.grad is not None
    assert b.grad.abs().min() > 0
    missing, unexpected = fixed.load_state_dict(model.state_dict(), strict=False)
    assert (missing, set(unexpected)) == ([], names)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("nheads_k", [1, 2])
def test_query_heads_share_key_heads(kind, nheads_k) -> None:
    """The same as every head having a copy of the key and value head that it reads."""
    shared, whole = (
        build_vit(dataclasses.replace(SMALL, attention=kind, nheads_k=n)).double().eval() for n in (nheads_k, None)
    )
    assert {a.nheads_k for a in attentions(shared)} == {nheads_k}
    assert shared.state_dict()["blocks.0.attn.qkv.weight"].shape == (48 + 2 * nheads_k * 12, 48)
    copies = torch.arange(4) // (4 // nheads_k)
    rows = torch.cat([torch.arange(4), 4 + copies, 4 + nheads_k + copies])
    state = {
        name: x.unflatten(0, (-1, 12))[rows].flatten(0, 1) if ".qkv." in name else x
        for name, x in shared.state_dict().items()
    }
    whole.load_state_dict(state)
    assert_rounded(shared(images().double()), whole(images().double()))
    shared(images().double()).sum().backward()
    assert all(a.qkv.weight.grad.abs().sum() > 0 for a in attentions(shared))


def test_shared_key_heads_begin_as_those_of_the_whole_model() -> None:
    models = []
    for nheads_k in (None, 1):
        torch.manual_seed(0)
        models.append(build_vit(dataclasses.replace(SMALL, nheads_k=nheads_k)).state_dict())
    for name, x in models[0].items():
        if ".qkv." in name:  # all queries; the first head of the keys and of the values
            x = torch.cat([x[:48], x[48:60], x[96:108]])
        assert torch.equal(models[1][name], x), name


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_a_learnable_temperature_starts_at_the_default_and_multiplies_the_scores(kind) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, attention=kind, learnable_temperature=True)
    warm, plain = build_vit(config).eval(), build_vit(dataclasses.replace(SMALL, attention=kind)).eval()
    missing, extra = plain.load_state_dict(warm.state_dict(), strict=False)
    assert (missing, set(extra)) == ([], {f"blocks.{i}.attn.log_temperature" for i in range(2)})
    assert torch.equal(warm(images()), plain(images()))
    warm(images()).square().sum().backward()
    for attention in attentions(warm):
        assert attention.log_temperature is not None
        assert attention.log_temperature.grad is not None
        assert attention.log_temperature.grad.abs().min() > 0
    with torch.no_grad():
        for attention, other in zip(attentions(warm), attentions(plain), strict=True):
            assert attention.log_temperature is not None
            attention.log_temperature.fill_(math.log(3.0))
            other.scale *= 3.0
    assert_rounded(warm(images()), plain(images()))
    assert not torch.allclose(build_vit(config).eval()(images()), warm(images()))


def test_positions_of_sines_are_fixed_and_differ() -> None:
    model = build_vit(dataclasses.replace(SMALL, position="sincos"))
    assert model.pos_embed is not None
    assert not model.pos_embed.requires_grad
    assert model.pos_embed.shape == (1, 16, 48)
    assert torch.unique(model.pos_embed[0], dim=0).shape[0] == 16


def test_a_model_is_copied_saved_and_compiled() -> None:
    model = build_vit(dataclasses.replace(SMALL, bias_mode="per_head", learnable_temperature=True, nheads_k=2)).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert_rounded(other(images()), model(images()))


def test_papers_sizes_on_the_meta_device() -> None:
    for name, parameters in (("vit_base_patch16_224", 86.6e6), ("vit_large_patch16_224", 304.3e6)):
        with torch.device("meta"):
            model = build_vit(ViTConfig(name=name))
            assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)
        assert attentions(model)[0].sigmoid_bias == -math.log(197)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vit_smal_patch16_224"}, "name must be a model of timm, such as vit_small_patch16_224"),
        ({"name": "?"}, r"name must be a model of timm, such as vit_base_patch16_224, got \?"),
        ({"name": "resnet18"}, "name must be a VisionTransformer of timm"),
        (
            {"name": "vit_base_patch16_xp_224"},
            "name must be a VisionTransformer of timm whose blocks take another attention, got "
            "vit_base_patch16_xp_224, of ParallelScalingBlock",
        ),
        (
            {"name": "deit_tiny_distilled_patch16_224", "position": "sincos"},
            "position='sincos' must be of a model whose positions are those of patches alone, got one with 18 for 16",
        ),
        ({"attention": "linear"}, "attention must be one of"),
        ({"pool": "max"}, "pool must be one of"),
        ({"position": "rope"}, "position must be one of"),
        ({"bias_mode": "both"}, "bias_mode must be one of"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"sigmoid_bias": math.nan}, "sigmoid_bias must be a number below inf, or None, got nan"),
        ({"nheads_k": 0}, "nheads_k must be a positive integer, got 0"),
        ({"nheads_k": 3}, "nheads_k must be a divisor of the key heads, 4, got 3"),
        ({"pretrained": True}, "dim must be None with pretrained weights, whose own it is, got 48"),
        (
            {"pretrained": "a.npz", "dim": None, "depth": None, "nheads": None, "nheads_k": 1},
            "nheads_k must be None with",
        ),
        ({"nheads": 5}, "name must be a VisionTransformer of timm that takes these fields"),
        ({"position": "sincos", "dim": 50, "nheads": 5}, "dim must be a multiple of 4 for position='sincos', got 50"),
    ],
)
def test_bad_fields_are_one_clear_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_vit(dataclasses.replace(SMALL, **change))


def test_bad_settings_are_one_clear_error() -> None:
    attention = VisionAttention(48, num_heads=4)
    assert isinstance(attention, Attention)
    for settings, message in (
        ({"sigmoid_bias": float("nan")}, r"sigmoid_bias must be a number below \+inf, or None, got nan"),
        ({"kind": "linear"}, "kind must be 'sigmoid' or 'softmax', got 'linear'"),
        ({"bias_mode": "both"}, "bias_mode must be 'fixed', 'learnable' or 'per_head', got 'both'"),
        ({"bias_mode": "per_head"}, "sigmoid_bias must be given with bias_mode='per_head'"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.configure(**settings)


@pytest.mark.parametrize("name", ["test_vit2", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize(("value", "count"), [(None, 0), (0.3, 1)])
def test_layer_scale_is_the_configs_whatever_the_name_has(name, value, count) -> None:
    config = ViTConfig(name=name, layer_scale=value, img_size=28, patch_size=14, dim=32, nheads=2, depth=1)
    gammas = [x for key, x in build_vit(config).state_dict().items() if key.endswith("ls1.gamma")]
    assert len(gammas) == count
    assert all(torch.equal(x, torch.full((32,), value)) for x in gammas)


PLAIN = ViTConfig(name="test_vit", attention="softmax", qk_norm=False, layer_scale=None)


def weights_of(name: str, path) -> torch.nn.Module:
    """timm's model of this name with random weights, which are in the file."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), path)
    return model


def test_pretrained_weights_are_timms(tmp_path) -> None:
    """From a file, as from the hub by timm's loader: the twin is timm's model, and sigmoid has the same weights."""
    path = tmp_path / "weights.safetensors"
    theirs = weights_of("test_vit", path)
    x = torch.randn(2, 3, *theirs.default_cfg["input_size"][1:])
    config = dataclasses.replace(PLAIN, pretrained=str(path))
    assert_rounded(build_vit(config).eval()(x), theirs(x))
    ours = build_vit(dataclasses.replace(config, attention="sigmoid")).state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.state_dict().items())


def test_pretrained_weights_lack_what_our_practices_add(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    theirs = weights_of("test_vit", path).state_dict()
    config = ViTConfig(name="test_vit", pretrained=str(path), num_classes=3, pool="avg", out_norm=True)
    ours = build_vit(config).state_dict()
    fresh = {name for name in ours if name not in theirs}
    assert {name.split(".")[-2] for name in fresh} == {"q_norm", "k_norm", "ls1", "ls2", "out_norm", "fc_norm"}
    assert all(torch.equal(ours[name], torch.full((64,), 1e-4)) for name in fresh if name.endswith("gamma"))
    kept = [name for name in theirs if name.startswith("blocks.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    assert torch.equal(ours["pos_embed"], theirs["pos_embed"][:, 1:])  # no class token
    small = build_vit(dataclasses.replace(config, pool="token", img_size=64, in_chans=1)).state_dict()
    assert torch.equal(small["cls_token"], theirs["cls_token"])
    assert torch.equal(small["pos_embed"][:, :1], theirs["pos_embed"][:, :1])
    assert small["pos_embed"].shape[1] == 17
    assert torch.equal(small["patch_embed.proj.bias"], theirs["patch_embed.proj.bias"])
    fixed = build_vit(dataclasses.replace(config, position="sincos")).state_dict()
    assert not torch.allclose(fixed["pos_embed"], ours["pos_embed"])


def test_pretrained_weights_that_do_not_fit_are_one_clear_error(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(
        ValueError, match=r"pretrained weights must be there .*, got .*weights.safetensors: FileNotFound"
    ):
        build_vit(dataclasses.replace(PLAIN, pretrained=str(path)))
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"got .*weights.safetensors: .*header"):
        build_vit(dataclasses.replace(PLAIN, pretrained=str(path)))
    weights_of("test_vit2", path)  # with LayerScale, and of another depth
    with pytest.raises(ValueError, match=r"got .*weights.safetensors: Error.* in loading state_dict") as error:
        build_vit(dataclasses.replace(PLAIN, pretrained=str(path)))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"a place for each pretrained weight, .*, got none for blocks.0.ls1.gamma"):
        build_vit(dataclasses.replace(PLAIN, name="test_vit2", pretrained=str(path)))
