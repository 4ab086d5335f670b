"""Runs on images, from the demo's to the paper's: classifiers; encoders pretrained without labels; probes of these.

Each is a sigmoid arm; run.with_attention("softmax") its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..models.vision import ViTConfig, initial_bias
from ..training.augment import AugmentConfig, ViewsConfig
from ..training.classification import ImageRun
from ..training.contrastive import ContrastiveRun
from ..training.images import ImageConfig
from ..training.masked import MaskedRun
from ..training.optim import OptimConfig
from ..training.pretraining import PretrainingRun


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
    beside two other processes. Expected: accuracy 0.852, softmax 0.860, one seed.
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

    Paper: arXiv:2409.04431. Command: flashsigmoid train paper_vit_l16 --set data.root=FOLDER. Hardware: 1 GPU of 80 GB,
    where it takes months. Wall time: not yet measured. Expected: not yet measured (paper: parity with softmax).
    """
    run = paper_vit_b16()
    model = ViTConfig(name="vit_large_patch16_224", drop_path=0.3)
    return replace(run, name="paper_vit_l16", model=model, batch=128, accumulate=32)


# the mean over patches: a class token has next to nothing of the image before LayerScale has grown, and BYOL little to
# predict
ENCODER_DIGITS = ViTConfig(
    name="vit_tiny_patch16_224", num_classes=0, in_chans=1, img_size=28, patch_size=7, dim=64, depth=4, nheads=4,
    layer_scale=1.0, pool="avg",
)  # fmt: skip
ENCODER_CIFAR10 = replace(cifar10_fast().model, num_classes=0)


def simclr_digits() -> ContrastiveRun:
    """SimCLR on the embedded digits, 16 patches of 7 pixels: the smallest pretraining.

    Paper: arXiv:2409.04431, its practices at toy size; method arXiv:2002.05709. Command: flashsigmoid train
    simclr_digits. Hardware: 2 CPU cores. Wall time: a minute (40 s of CPU time on
    one core). Expected: seen with one seed, kNN 72 % (softmax 77 %), 52 % before; a probe 75 % (79 %), random weights
    39 %.
    """
    return ContrastiveRun(
        name="simclr_digits",
        method="simclr",
        model=ENCODER_DIGITS,
        views=ViewsConfig(crop=(0.5, 1.0), flip=False),
        projection_hidden=128,
        projection_dim=64,
        temperature=0.1,
        optim=OptimConfig(lr=4e-3, warmup=20, weight_decay=0.05),
        steps=300,
        batch=128,
        val_every=100,
        save_every=100,
        knn_images=2000,
    )


def byol_digits() -> ContrastiveRun:
    """BYOL on the embedded digits.

    Paper: arXiv:2409.04431, its practices at toy size; method arXiv:2006.07733. Command: flashsigmoid train
    byol_digits. Hardware: 2 CPU cores. Wall time: two minutes (105 s of CPU time
    on one core). Expected: seen with one seed, kNN 57 % (softmax 57 %), 52 % before; a probe 49 % (44 %), random
    weights 39 %: so few steps teach it little.
    """
    return replace(
        simclr_digits(),
        name="byol_digits",
        method="byol",
        views=ViewsConfig(crop=(0.3, 1.0), flip=False),
        projection_hidden=512,
        momentum=0.99,
        optim=OptimConfig(lr=5e-4, warmup=20, weight_decay=0.05),
        steps=600,
    )


def mae_digits() -> MaskedRun:
    """MAE on the embedded digits: six patches of sixteen are seen.

    Paper: arXiv:2409.04431, its practices at toy size; method arXiv:2111.06377. Command: flashsigmoid train
    mae_digits. Hardware: 2 CPU cores. Wall time: a minute and a half (80 s of CPU
    time on one core). Expected: seen with one seed, kNN 68 % (softmax 58 %), 52 % before; a probe 66 % (53 %), random
    weights 39 %.
    """
    return MaskedRun(
        name="mae_digits",
        model=ENCODER_DIGITS,
        augment=AugmentConfig(crop=(0.7, 1.0)),
        mask_ratio=0.6,
        decoder_dim=32,
        decoder_depth=2,
        decoder_nheads=2,
        optim=OptimConfig(lr=2e-3, warmup=20, weight_decay=0.05),
        steps=1600,
        batch=128,
        val_every=400,
        save_every=400,
        knn_images=2000,
    )


def probe_digits() -> ImageRun:
    """A linear classifier of the digits on frozen features: of the pretraining at run.init, or of random weights.

    Paper: arXiv:2409.04431, its practices at toy size. Command: flashsigmoid train probe_digits --set
    init=runs/simclr_digits/sigmoid. Hardware: 2 CPU cores. Wall time: seconds. Expected:
    see the pretrainings; of random weights 39 % with one seed, the most frequent digit has 11.7 %.
    """
    return ImageRun(
        name="probe_digits",
        model=replace(ENCODER_DIGITS, num_classes=10),
        augment=AugmentConfig(crop=(0.7, 1.0)),
        train_only="head",
        head_norm=True,
        optim=OptimConfig(lr=1e-2, warmup=10, weight_decay=0.0, final_lr=0.0),
        steps=300,
        batch=256,
        val_every=100,
        save_every=100,
    )


def finetune_digits() -> ImageRun:
    """A classifier of the digits that begins with the pretraining at run.init, or with random weights.

    Paper: arXiv:2409.04431, its practices at toy size. Command: flashsigmoid train finetune_digits --set
    init=runs/simclr_digits/sigmoid. Hardware: 2 CPU cores. Wall time: seconds.
    Expected: seen with one seed, after SimCLR 84 % (softmax 88 %), BYOL 75 % (74 %), MAE 91 % (83 %), from random
    weights 77 % (77 %).
    """
    return replace(
        probe_digits(),
        name="finetune_digits",
        train_only="all",
        head_norm=False,
        layer_decay=0.75,
        optim=OptimConfig(lr=2e-3, warmup=20, weight_decay=0.05),
        batch=128,
    )


def simclr_cifar10() -> ContrastiveRun:
    """SimCLR on CIFAR-10 by the Vision Transformer of cifar10_fast, 41 epochs.

    Paper: arXiv:2409.04431, its practices for vision; method arXiv:2002.05709, without blur on 32 pixels. Command:
    flashsigmoid train simclr_cifar10 --set data.root=FOLDER --set data.download=true. Hardware: 1 GPU. Wall time: 7.5
    minutes beside four others on the same H100. Expected: kNN 0.674 to 0.679 over seeds 0, 1, 2, softmax 0.657 to
    0.666; a probe 0.719 to 0.725, softmax 0.707 to 0.711.
    """
    return ContrastiveRun(
        name="simclr_cifar10",
        method="simclr",
        model=ENCODER_CIFAR10,
        data=ImageConfig(source="cifar10", root="data"),
        projection_hidden=1024,
        projection_dim=128,
        temperature=0.2,
        optim=OptimConfig(lr=1e-3, warmup=400, final_lr=0.01, weight_decay=0.05),
        steps=4000,
        batch=512,
        precision="bf16",
        compile=True,
        cuda_graphs=True,
        val_every=1000,
        save_every=1000,
        log_every=50,
    )


def byol_cifar10() -> ContrastiveRun:
    """BYOL on CIFAR-10, 41 epochs.

    Paper: arXiv:2409.04431, its practices for vision; method arXiv:2006.07733, its momentum for 100 epochs, without
    blur on 32 pixels. Command: flashsigmoid train byol_cifar10 --set data.root=FOLDER. Hardware: 1 GPU. Wall time: 6
    minutes beside its twin and tests on the same H100. Expected: kNN 0.581 with one seed, softmax 0.561; a probe 0.612,
    softmax 0.595.
    """
    return replace(
        simclr_cifar10(),
        name="byol_cifar10",
        method="byol",
        views=ViewsConfig(solarize=(0.0, 0.2)),
        projection_hidden=2048,
        projection_dim=256,
        momentum=0.99,
        optim=OptimConfig(lr=5e-4, warmup=400, final_lr=0.01, weight_decay=0.05),
    )


def mae_cifar10() -> MaskedRun:
    """MAE on CIFAR-10, 16 patches of 64 seen, 164 epochs.

    Paper: arXiv:2409.04431, its practices for vision; method arXiv:2111.06377. Command: flashsigmoid train mae_cifar10
    --set data.root=FOLDER. Hardware: 1 GPU. Wall time: 7 minutes beside four others on the same H100. Expected: kNN
    0.589 with one seed, softmax 0.573; a probe 0.656, softmax 0.644.
    """
    return MaskedRun(
        name="mae_cifar10",
        model=ENCODER_CIFAR10,
        data=ImageConfig(source="cifar10", root="data"),
        decoder_dim=128,
        decoder_depth=4,
        decoder_nheads=4,
        optim=OptimConfig(lr=1.5e-3, warmup=800, final_lr=0.01, weight_decay=0.05),
        steps=8000,
        batch=1024,
        precision="bf16",
        compile=True,
        cuda_graphs=True,
        val_every=1000,
        save_every=1000,
        log_every=50,
    )


def probe_cifar10() -> ImageRun:
    """A linear classifier of CIFAR-10 on frozen features: of the pretraining at run.init, or of random weights.

    Paper: arXiv:2409.04431; BatchNorm before the head as in arXiv:2111.06377. Command: flashsigmoid train
    probe_cifar10 --set init=runs/simclr_cifar10/sigmoid --set data.root=FOLDER. Hardware: 1 GPU. Wall time: a minute
    beside others on the same H100. Expected: see the pretrainings; of random weights 0.316 to 0.325 over seeds 0, 1, 2,
    softmax 0.305 to 0.310.
    """
    return ImageRun(
        name="probe_cifar10",
        model=replace(ENCODER_CIFAR10, num_classes=10),
        data=ImageConfig(source="cifar10", root="data"),
        augment=AugmentConfig(crop=(0.5, 1.0), flip=True),
        train_only="head",
        head_norm=True,
        optim=OptimConfig(lr=3e-3, warmup=100, weight_decay=0.0, final_lr=0.0),
        steps=1500,
        batch=512,
        precision="bf16",
        val_every=500,
        save_every=500,
        log_every=50,
    )


def finetune_cifar10() -> ImageRun:
    """A classifier of CIFAR-10 that begins with the pretraining at run.init, or with random weights, 13 epochs.

    Paper: arXiv:2409.04431, its practices for vision. Command: flashsigmoid train finetune_cifar10 --set
    init=runs/simclr_cifar10/sigmoid --set data.root=FOLDER. Hardware: 1 GPU. Wall time: 1.5 minutes beside others on
    the same H100. Expected: after SimCLR 0.813 to 0.817 over seeds 0, 1, 2, softmax 0.809 to 0.813; after MAE 0.818
    with one seed, softmax 0.803.
    """
    run = cifar10_fast()
    return replace(
        run,
        name="finetune_cifar10",
        model=replace(ENCODER_CIFAR10, num_classes=10, drop_path=0.1),
        layer_decay=0.75,
        optim=replace(run.optim, warmup=250),
        steps=2500,
        val_every=500,
        save_every=500,
    )


def paper_simclr_vit_b16() -> ContrastiveRun:
    """The paper's SimCLR of a ViT-B/16 on ImageNet, 300 epochs.

    Paper: arXiv:2409.04431, figure of the self-supervised runs; what it does not state (rates, temperature, batch) is
    MoCo v3's, arXiv:2104.02057. Images are compared within a micro-batch of 512. Command: flashsigmoid train
    paper_simclr_vit_b16 --set data.root=FOLDER with train/CLASS/*, val/CLASS/*. Hardware: 1 GPU of 80 GB, where it
    takes weeks: pretraining does not shard over devices yet. Wall time: not yet measured. Expected: not yet measured
    (paper: parity with softmax).
    """
    return ContrastiveRun(
        name="paper_simclr_vit_b16",
        method="simclr",
        model=ViTConfig(name="vit_base_patch16_224", num_classes=0),
        data=ImageConfig(source="folder", root="imagenet", img_size=224),
        views=ViewsConfig(crop=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=(0.5, 0.5)),
        projection_hidden=4096,
        projection_dim=256,
        temperature=0.2,
        optim=OptimConfig(lr=2.4e-3, warmup=12_500, final_lr=0.0, weight_decay=0.1),
        steps=93_750,
        batch=512,
        accumulate=8,
        precision="bf16",
        workers=8,
        val_every=1250,
        save_every=1250,
        log_every=50,
        knn_images=65_536,
    )


def paper_byol_vit_b16() -> ContrastiveRun:
    """The paper's BYOL of a ViT-B/16 on ImageNet, 600 epochs.

    Paper: arXiv:2409.04431, figure of the self-supervised runs; what it does not state is arXiv:2006.07733's (views,
    momentum) and MoCo v3's (rates). Command: flashsigmoid train paper_byol_vit_b16 --set data.root=FOLDER. Hardware:
    1 GPU of 80 GB, where it takes months. Wall time: not yet measured. Expected: not yet measured (paper: parity with
    softmax).
    """
    return replace(
        paper_simclr_vit_b16(),
        name="paper_byol_vit_b16",
        method="byol",
        views=ViewsConfig(crop=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2)),
        momentum=0.996,
        steps=187_500,
    )


def paper_mae_vit_l16() -> MaskedRun:
    """The paper's MAE of a ViT-L/16 on ImageNet, 400 epochs; 49 patches of 196 are seen.

    Paper: arXiv:2409.04431, figure of the self-supervised runs; what it does not state is arXiv:2111.06377's. Command:
    flashsigmoid train paper_mae_vit_l16 --set data.root=FOLDER. Hardware: 1 GPU of 80 GB, where it takes weeks.
    Wall time: not yet measured. Expected: not yet measured (paper: parity with softmax).
    """
    return MaskedRun(
        name="paper_mae_vit_l16",
        model=ViTConfig(name="vit_large_patch16_224", num_classes=0),
        data=ImageConfig(source="folder", root="imagenet", img_size=224),
        decoder_dim=512,
        decoder_depth=8,
        decoder_nheads=16,
        optim=OptimConfig(lr=2.4e-3, warmup=12_500, final_lr=0.0, weight_decay=0.05),
        steps=125_000,
        batch=512,
        accumulate=8,
        precision="bf16",
        workers=8,
        val_every=1250,
        save_every=1250,
        log_every=50,
        knn_images=65_536,
    )


RECIPES: dict[str, Callable[[], ImageRun | PretrainingRun]] = {
    recipe.__name__: recipe
    for recipe in (
        *(digits, simclr_digits, byol_digits, mae_digits, probe_digits, finetune_digits),
        *(cifar10, cifar10_short, cifar10_fast),
        *(simclr_cifar10, byol_cifar10, mae_cifar10, probe_cifar10, finetune_cifar10),
        *(paper_vit_b16, paper_vit_l16, paper_simclr_vit_b16, paper_byol_vit_b16, paper_mae_vit_l16),
    )
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
