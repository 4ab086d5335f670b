"""Masked autoencoders: what is seen, what is drawn, and by which bias."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch
from rounding import assert_rounded
from safetensors.torch import save_file
from training.digits import digits
from training.encoders import MAE, MODEL, use_few
from training.test_classification import quiet

from flashsigmoid.models.vision import VisionAttention, ViTConfig, build_vit, tokens
from flashsigmoid.training.masked import MaskedModule, MaskedRun


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    use_few(monkeypatch, 40, 30)


def mae(run: MaskedRun = MAE) -> MaskedModule:
    torch.manual_seed(0)
    return run.module(digits(run.data)).eval()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_only_masked_patches_are_targets_and_only_visible_ones_are_seen(pool) -> None:
    module = mae(replace(MAE, model=replace(MODEL, pool=pool), norm_pixels=False))
    prefix = int(pool == "token")
    x = torch.randn(2, 1, 14, 14)
    visible, hidden = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[2, 3], [1, 3]])
    if prefix:
        visible, hidden = (torch.cat([torch.zeros(2, 1).long(), visible + 1], 1), hidden + 1)
    predicted, targets = module.predicted(x, visible, hidden), module.targets(x, hidden)
    assert predicted.shape == targets.shape == (2, 2, 49)
    corners = [x[:, 0, r : r + 7, c : c + 7].flatten(1) for r in (0, 7) for c in (0, 7)]
    assert torch.equal(targets[0], torch.stack([corners[2][0], corners[3][0]]))
    assert torch.equal(targets[1], torch.stack([corners[1][1], corners[3][1]]))
    other = x.clone()
    other[:, :, 7:, 7:] += 1.0  # hidden in both images
    assert torch.equal(module.predicted(other, visible, hidden), predicted)
    other = x.clone()
    other[:, :, :7, :7] += 1.0  # visible in both
    assert not torch.allclose(module.predicted(other, visible, hidden), predicted)
    assert torch.equal(module.targets(other, hidden), targets)


def test_normalised_targets_have_mean_0_and_variance_1_in_each_patch() -> None:
    targets = mae().targets(torch.randn(3, 1, 14, 14) * 5 + 2, torch.tensor([[1, 4]] * 3))
    assert_rounded(targets.mean(-1), torch.zeros(3, 2), 49, of=1.0)
    assert_rounded(targets.var(-1), torch.ones(3, 2), 49)


def test_the_bias_follows_the_tokens_that_are_seen() -> None:
    """-log of the visible tokens in training, of all when the features are judged; the decoder's is constant."""
    assert MAE.settings()["sigmoid_bias"] == pytest.approx(-math.log(3))  # two patches and the class token
    module = mae()
    encoder, decoder = module.encoder, module.part("decoder")
    kinds = {m.kind for part in (encoder, decoder) for m in part.modules() if isinstance(m, VisionAttention)}
    assert kinds == {"sigmoid"}
    assert {m.sigmoid_bias for m in encoder.modules() if isinstance(m, VisionAttention)} == {None}
    assert {m.sigmoid_bias for m in decoder.modules() if isinstance(m, VisionAttention)} == {-math.log(5)}
    x = torch.randn(2, 1, 14, 14)
    plain = build_vit(MODEL).eval()
    plain.load_state_dict(encoder.state_dict())
    assert_rounded(encoder(x), plain(x))
    three = build_vit(replace(MODEL, sigmoid_bias=-math.log(3))).eval()
    three.load_state_dict(encoder.state_dict())
    fixed = mae(replace(MAE, model=replace(MODEL, sigmoid_bias=-math.log(3))))
    fixed.load_state_dict(module.state_dict())
    visible, hidden = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[3, 4]] * 2)
    for decoder in (m for m in fixed.part("decoder").modules() if isinstance(m, VisionAttention)):
        decoder.sigmoid_bias = -math.log(5)
    assert_rounded(module.predicted(x, visible, hidden), fixed.predicted(x, visible, hidden))
    assert not torch.allclose(three(x), plain(x))
    softmax = mae(MAE.with_attention("softmax"))
    assert {m.kind for m in softmax.modules() if isinstance(m, VisionAttention)} == {"softmax"}
    assert tokens(encoder) == 5  # pyright: ignore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 0.9}, "mask_ratio must leave and hide at least one of 4 patches, got 0.9"),
        (
            {"model": replace(MODEL, name="vit_small_patch14_reg4_dinov2")},
            "model must be without registers in a masked pretraining, got vit_small_patch14_reg4_dinov2",
        ),
        ({"model": replace(MODEL, in_chans=3)}, "model.in_chans must be that of the data, 1, got 3"),
    ],
)
def test_a_model_that_does_not_fit_says_so_and_leaves_nothing(tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MAE, **change).train(tmp_path / "run", device="cpu", show=quiet)
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_the_decoder_of_a_pretrained_encoder_is_fresh(tmp_path) -> None:
    """timm's weights are the encoder's alone: the decoder has another shape."""
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = ViTConfig(
        name="test_vit", num_classes=0, in_chans=1, img_size=32, pretrained=str(tmp_path / "weights.safetensors")
    )
    module = mae(replace(MAE, model=model, data=replace(MAE.data, img_size=32)))
    name = "blocks.3.mlp.fc1.weight"
    assert torch.equal(module.encoder.state_dict()[name], weights[name])
    assert module.part("decoder").state_dict()["blocks.0.mlp.fc1.weight"].shape[1] == 8
