"""Tiny pretrainings of each method, a probe, and what their tests share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training.digits import digits, few_images

from flashsigmoid.models.vision import ViTConfig
from flashsigmoid.training import classification, pretraining
from flashsigmoid.training.augment import AugmentConfig, ViewsConfig
from flashsigmoid.training.checkpoint import WEIGHTS, find_checkpoint
from flashsigmoid.training.classification import ImageBatch, ImageRun
from flashsigmoid.training.contrastive import ContrastiveRun
from flashsigmoid.training.images import ImageConfig
from flashsigmoid.training.masked import MaskedRun
from flashsigmoid.training.optim import OptimConfig

MODEL = ViTConfig(
    name="vit_tiny_patch16_224", num_classes=0, in_chans=1, img_size=14, patch_size=7, dim=16, depth=2, nheads=2,
    layer_scale=None,
)  # fmt: skip
SIMCLR = ContrastiveRun(
    name="tiny",
    method="simclr",
    model=MODEL,
    data=ImageConfig(img_size=14),
    views=ViewsConfig(crop=(0.5, 1.0), blur=(0.5, 0.1), solarize=(0.0, 0.2)),
    projection_hidden=16,
    projection_dim=8,
    optim=OptimConfig(lr=3e-3, warmup=2),
    steps=8,
    batch=8,
    accumulate=2,
    val_every=4,
    save_every=2,
    log_every=1,
    knn_images=25,
    knn_k=5,
)
SHORT = replace(SIMCLR, steps=2, val_every=2)  # an encoder to begin with
BYOL = replace(SIMCLR, method="byol", momentum=0.9)
MAE = MaskedRun(
    name="tiny",
    model=MODEL,
    data=SIMCLR.data,
    augment=AugmentConfig(crop=(0.5, 1.0), flip=True),
    mask_ratio=0.5,
    decoder_dim=8,
    decoder_depth=1,
    decoder_nheads=2,
    **{
        name: getattr(SIMCLR, name)
        for name in (
            *("optim", "steps", "batch", "accumulate", "val_every", "save_every", "log_every", "knn_images", "knn_k"),
        )
    },
)
METHODS = {"simclr": SIMCLR, "byol": BYOL, "mae": MAE}
PROBE = ImageRun(
    name="probe",
    model=replace(MODEL, num_classes=10),
    data=SIMCLR.data,
    train_only="head",
    head_norm=True,
    **{name: getattr(SIMCLR, name) for name in ("optim", "steps", "batch", "val_every", "save_every", "log_every")},
)


def use_few(monkeypatch: pytest.MonkeyPatch, train: int, val: int) -> None:
    """Of the embedded digits the first, so many."""
    for module in (classification, pretraining):
        monkeypatch.setattr(module, "load_images", lambda config: few_images(config, train, val))


def images(count: int = 12) -> torch.Tensor:
    return torch.stack([digits(SIMCLR.data).train[i][0] for i in range(count)])


def batch(count: int = 12) -> ImageBatch:
    return ImageBatch(images(count), torch.zeros(count).long(), {})


def encoder_weights(out_dir) -> dict[str, torch.Tensor]:
    weights = load_file(find_checkpoint(out_dir) / WEIGHTS)
    return {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
