"""Attention exchanged in timm models: weights stay, softmax gives timm's own numbers, and nothing is left half done."""

from __future__ import annotations

import pytest
import timm
import torch
from rounding import assert_rounded

from flashsigmoid import sigmoid_attention
from flashsigmoid.integrations.timm import swap_attention
from flashsigmoid.models.vision import VisionAttention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}


def model(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL, **options).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "init_values": 1e-4}, {"scale_attn_norm": True}], ids=str)
def test_weights_stay_and_softmax_is_timms(options) -> None:
    vit = model(**options)
    weights, expected = vit.state_dict(), vit(images())
    assert swap_attention(vit) == 3
    assert vit.state_dict().keys() == weights.keys()
    assert not torch.allclose(vit(images()), expected)
    assert swap_attention(vit, "softmax") == 3
    assert_rounded(vit(images()), expected)


def test_a_learnable_bias_comes_and_goes() -> None:
    vit = model()
    swap_attention(vit, sigmoid_bias=-2.0, bias_mode="per_head")
    assert vit.state_dict()["blocks.1.attn.sigmoid_bias"].tolist() == [-2.0] * 4
    with_parameter = vit(images())
    swap_attention(vit, sigmoid_bias=-2.0)
    assert "blocks.1.attn.sigmoid_bias" not in vit.state_dict()
    assert_rounded(vit(images()), with_parameter)


def test_an_injected_attention_is_called() -> None:
    seen = []

    def attend(q, k, v, **options):
        seen.append(options)
        return sigmoid_attention(q, k, v, **options)

    vit = model()
    swap_attention(vit, sigmoid_bias=-1.0, attention_fn=attend)
    vit(images())
    assert [options["sigmoid_bias"] for options in seen] == [-1.0] * 3


def test_hooks_stay() -> None:
    vit, shapes = model(), []
    vit.blocks[0].attn.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    swap_attention(vit)
    vit(images())
    assert shapes == [(2, 17, 48)]


def test_what_cannot_be_exchanged_says_so_and_stays() -> None:
    resnet = timm.create_model("resnet10t")
    with pytest.raises(ValueError, match=r"attentions of the class timm.layers.Attention only, got none$"):
        swap_attention(resnet)
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(
        ValueError, match=r"got timm.models.swin_transformer.WindowAttention at layers.0.blocks.0.attn$"
    ):
        swap_attention(swin)
    vit = model()
    expected = vit(images())
    with pytest.raises(ValueError, match="kind must be 'sigmoid' or 'softmax', got 'linear'"):
        swap_attention(vit, "linear")
    assert not any(isinstance(module, VisionAttention) for module in vit.modules())
    assert_rounded(vit(images()), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beit_base_patch16_224", r"got timm.models.beit.Attention at blocks.0.attn$"),
        ("eva02_tiny_patch14_224", r"got timm.models.eva.EvaAttention at blocks.0.attn$"),
        (
            "vit_relpos_small_patch16_224",
            r"got timm.models.vision_transformer_relpos.RelPosAttention at blocks.0.attn$",
        ),
        ("convit_tiny", r"got timm.models.convit.GPSA at blocks.0.attn$"),
        ("cait_xxs24_224", r"got timm.models.cait.TalkingHeadAttn at blocks.0.attn$"),
        ("crossvit_9_240", r"got timm.models.crossvit.CrossAttention at blocks.0.fusion.0.attn; a part"),
        ("vit_base_patch16_siglip_224", r"got timm.layers.attention_pool.AttentionPoolLatent at attn_pool; a part"),
    ],
)
def test_what_would_stay_softmax_is_named(name, message) -> None:
    """Also beside attentions that could be exchanged, which then stay as well."""
    with torch.device("meta"):
        other = timm.create_model(name)
    with pytest.raises(ValueError, match=message):
        swap_attention(other)
    assert not any(isinstance(module, VisionAttention) for module in other.modules())
    if name.endswith("siglip_224"):
        assert swap_attention(other.blocks) == 12


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deit_tiny_distilled_patch16_224", 12),
        ("vit_small_patch14_reg4_dinov2", 12),
        ("vit_small_patch16_18x2_224", 36),
        ("pit_ti_224", 12),
        ("mobilevit_xxs", 9),
        ("naflexvit_base_patch16_gap", 12),
    ],
)
def test_other_models_of_timms_attention_are_exchanged_whole(name, count) -> None:
    with torch.device("meta"):
        other = timm.create_model(name)
        assert swap_attention(other) == count
        assert other(torch.empty(2, *other.default_cfg["input_size"])).shape[0] == 2
