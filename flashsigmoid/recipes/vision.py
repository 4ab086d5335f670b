"""Classifiers of images, from the demo's to the paper's. Encoders that learn without labels are pretraining.py's.

Each is a sigmoid arm; run.with_attention("softmax") its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..models.vision import ViTConfig, initial_bias
from ..training.augment import AugmentConfig
from ..training.classification import ImageRun
from ..training.images import ImageConfig
from ..training.optim import OptimConfig


def digits() -> ImageRun:
    """The embedded handwritten digits, small enough that both arms train in a few minutes on two CPU cores.

    Paper: arXiv:2409.04431, its practices for vision at toy size. Command: flashsigmoid train digits. Hardware: 2 CPU
    cores. Wall time: one minute an arm. Expected: accuracy 0.888 to 0.904 over seeds 0, 1, 2, softmax 0.893 to 0.905
    (the most frequent digit has 0.117).
    """
    return ImageRun(
        name="digits",
        model=ViTConfig(
            name="vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=28, patch_size=4, dim=64, depth=4,
            nheads=4, layer_scale=0.1,
        ),
        augment=AugmentConfig(crop=(0.7, 1.0)),
        optim=OptimConfig(lr=2e-3, warmup=50, weight_decay=0.05),
        steps=1200,
        batch=64,
        val_every=200,
        save_every=200,
    )  # fmt: skip


def demo() -> ImageRun:
    """`digits` in two thirds of its steps, so that a pair takes less than three minutes on cores that others use too.

    Paper: arXiv:2409.04431. Command: flashsigmoid demo vision. Hardware: 2 CPU cores. Wall time: 2.7 minutes a pair
    beside two other processes. Expected: accuracy 0.845 to 0.852, softmax 0.860 to 0.867, two runs.
    """
    return replace(digits(), steps=800)


def cifar10() -> ImageRun:
    """CIFAR-10 by a small Vision Transformer of patches of 4 pixels, 7 M parameters, 200 epochs.

    Paper: arXiv:2409.04431, its practices for vision (LayerScale 1e-4, QK-norm, b = -log 65). Command: flashsigmoid
    train cifar10 --set data.root=FOLDER --set data.download=true. Hardware: 1 GPU. Wall time: not yet measured.
    Expected: not yet measured.
    """
    return ImageRun(
        name="cifar10",
        model=ViTConfig(
            name="vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4, dim=256, depth=9, nheads=4,
            drop_path=0.1,
        ),
        data=ImageConfig(source="cifar10", root="data"),
        augment=AugmentConfig(crop=(0.5, 1.0), flip=True, randaugment=2, mixup=0.2, cutmix=1.0),
        optim=OptimConfig(lr=1e-3, warmup=2000, final_lr=0.01, betas=(0.9, 0.99), weight_decay=0.05),
        label_smoothing=0.1,
        ema=0.9995,
        steps=39_000,
        batch=256,
        precision="bf16",
        val_every=1000,
        save_every=1000,
        log_every=50,
    )  # fmt: skip


def cifar10_fast() -> ImageRun:
    """CIFAR-10 in minutes, 100 epochs: a narrower model, compiled, lighter augmentation, LayerScale that begins at 0.1.

    Paper: arXiv:2409.04431, its practices for vision, LayerScale but for its first value. Command: flashsigmoid train
    cifar10_fast --set data.root=FOLDER --set data.download=true. Hardware: 1 GPU. Wall time: 7 minutes an arm with two
    others on the same H100. Expected: accuracy 0.897 to 0.902 over seeds 0, 1, 2, softmax 0.904 to 0.908.
    """
    run = cifar10()
    return replace(
        run,
        name="cifar10_fast",
        model=replace(run.model, dim=192, nheads=3, layer_scale=0.1, drop_path=0.0, position="sincos", pool="avg"),
        augment=replace(run.augment, randaugment=1),
        optim=replace(run.optim, warmup=1000),
        ema=0.999,
        steps=19_500,
        compile=True,
        cuda_graphs=True,
        val_every=1950,
        save_every=1950,
    )


def cifar10_short() -> ImageRun:
    """`cifar10_fast` for 30 epochs: the run of which the ablations are variants.

    Paper: arXiv:2409.04431. Command: flashsigmoid train cifar10_short --set data.root=FOLDER. Hardware: 1 GPU.
    Wall time: not yet measured. Expected: not yet measured.
    """
    run = cifar10_fast()
    optim = replace(run.optim, warmup=585)
    # an average over 30 epochs that remembers as large a share of them as that over 100 does
    return replace(run, name="cifar10_short", optim=optim, ema=0.997, steps=5850, val_every=585, save_every=585)


def paper_vit_b16() -> ImageRun:
    """The paper's ViT-B/16 on ImageNet, 300 epochs of 1.28 M images in batches of 4,096.

    Paper: arXiv:2409.04431, figure of the supervised runs; what it does not state (augmentation, rates) is DeiT's,
    arXiv:2012.12877. Command: flashsigmoid train paper_vit_b16 --set data.root=FOLDER with train/CLASS/*, val/CLASS/*.
    Hardware: GPUs of 80 GB, eight of them by --mesh dp=8; on one it takes weeks. Wall time: not yet measured. Expected:
    not yet measured (paper: parity with softmax).
    """
    return ImageRun(
        name="paper_vit_b16",
        model=ViTConfig(name="vit_base_patch16_224", drop_path=0.1),
        data=ImageConfig(source="folder", root="imagenet", img_size=224),
        augment=AugmentConfig(crop=(0.08, 1.0), flip=True, randaugment=2, mixup=0.8, cutmix=1.0),
        optim=OptimConfig(lr=4e-3, warmup=6250, final_lr=0.0025, betas=(0.9, 0.95), weight_decay=0.05),
        label_smoothing=0.1,
        ema=0.9999,
        steps=93_750,
        batch=256,
        accumulate=16,
        precision="bf16",
        workers=8,
        val_every=1250,
        save_every=1250,
        log_every=50,
    )


def paper_vit_l16() -> ImageRun:
    """The paper's ViT-L/16 on ImageNet.

    Paper: arXiv:2409.04431. Command: flashsigmoid train paper_vit_l16 --set data.root=FOLDER. Hardware: GPUs of 80 GB,
    by --mesh; on one it takes months. Wall time: not yet measured. Expected: not yet measured (paper: parity with
    softmax).
    """
    run = paper_vit_b16()
    model = ViTConfig(name="vit_large_patch16_224", drop_path=0.3)
    return replace(run, name="paper_vit_l16", model=model, batch=128, accumulate=32)


RECIPES: dict[str, Callable[[], ImageRun]] = {
    recipe.__name__: recipe for recipe in (digits, cifar10, cifar10_short, cifar10_fast, paper_vit_b16, paper_vit_l16)
}


def ablations(base: ImageRun) -> dict[str, ImageRun]:
    """A run as "base", and its variants by name: each has one practice more or less in the model's description.

    "bias-lower" is for QK-norm: scores N(0, 1) make a row's mass e^(1/2) times what b = -log n would have it.

    Source: arXiv:2409.04431 (its practices for vision; learnable b and temperature, multi-query).
    """
    b = initial_bias(base.model)
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "softmax": {"attention": "softmax"},
        "no-bias": {"sigmoid_bias": 0.0},
        "no-layer-scale": {"layer_scale": None},
        "no-qk-norm": {"qk_norm": False},
        "learnable-bias": {"bias_mode": "learnable"},
        "bias-per-head": {"bias_mode": "per_head"},
        "bias-lower": {"sigmoid_bias": b - 0.5},
        "out-norm": {"out_norm": True, "sigmoid_bias": b - 3.0},
        "learnable-temperature": {"learnable_temperature": True},
        "multi-query": {"nheads_k": 1},
        "sin-cos-positions": {"position": "sincos"},
        "average-pooling": {"pool": "avg"},
    }
    return {name: replace(base, model=replace(base.model, **change)) for name, change in changes.items()}
