"""Pretraining: each method learns, resumes to the same bits, says what its features are worth, and hands them on."""

from __future__ import annotations

import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from lightly.utils.scheduler import cosine_schedule
from rounding import assert_rounded
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training.digits import digits, few_images
from training.test_classification import numbers, quiet, remains
from training.tiny import differences

from flashsigmoid.models.vision import VisionAttention, ViTConfig, build_vit, tokens
from flashsigmoid.record import read_records
from flashsigmoid.training import classification, pretraining
from flashsigmoid.training.augment import AugmentConfig, ViewsConfig
from flashsigmoid.training.callbacks import Interrupted, Progress
from flashsigmoid.training.checkpoint import MANIFEST, TRAINER, WEIGHTS, find_checkpoint
from flashsigmoid.training.classification import ImageBatch, ImageRun
from flashsigmoid.training.contrastive import BYOLModule, ContrastiveRun
from flashsigmoid.training.images import ImageConfig
from flashsigmoid.training.masked import MaskedModule, MaskedRun
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
methods = pytest.mark.parametrize("run", METHODS.values(), ids=METHODS.keys())
PROBE = ImageRun(
    name="probe",
    model=replace(MODEL, num_classes=10),
    data=SIMCLR.data,
    train_only="head",
    head_norm=True,
    **{name: getattr(SIMCLR, name) for name in ("optim", "steps", "batch", "val_every", "save_every", "log_every")},
)


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """Of the embedded digits the first 40 and 30."""

    for module in (classification, pretraining):
        monkeypatch.setattr(module, "load_images", lambda config: few_images(config, 40, 30))


def images(count: int = 12) -> torch.Tensor:
    return torch.stack([digits(SIMCLR.data).train[i][0] for i in range(count)])


def batch(count: int = 12) -> ImageBatch:
    return ImageBatch(images(count), torch.zeros(count).long(), {})


def encoder_weights(out_dir) -> dict[str, torch.Tensor]:
    weights = load_file(find_checkpoint(out_dir) / WEIGHTS)
    return {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}


@pytest.mark.parametrize(
    ("run", "signum", "step"),
    [
        (SIMCLR, signal.SIGINT, 3),
        (BYOL, signal.SIGTERM, 4),
        (MAE, signal.SIGINT, 3),
        pytest.param(SIMCLR, signal.SIGTERM, 4, marks=pytest.mark.long),
        pytest.param(BYOL, signal.SIGINT, 3, marks=pytest.mark.long),
        pytest.param(MAE, signal.SIGTERM, 4, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_resuming_ends_with_the_same_bits(tmp_path, run, signum, step) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == step and not progress.validated:
            os.kill(os.getpid(), signum)

    whole = run.train(tmp_path / "whole", device="cpu", show=quiet)
    with pytest.raises(Interrupted) as stopped:
        run.train(tmp_path / "halves", device="cpu", show=stop)
    assert stopped.value.step == step
    assert run.train(tmp_path / "halves", resume=True, device="cpu", show=quiet) == whole
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "halves")) == []
    for name in ("train/loss", "val/loss", "val/knn_accuracy", "attn_norm/layer_1"):
        assert numbers(tmp_path / "whole", name) == numbers(tmp_path / "halves", name)
    assert [step for step, _ in numbers(tmp_path / "whole", "val/knn_accuracy")] == [0, 4, 8]
    assert set(whole) == {
        *("val/knn_accuracy", "val/knn_accuracy_se", "val/loss", "val/feature_spread", "baseline/majority"),
    }


@pytest.mark.parametrize(
    ("run", "attention"),
    [
        (SIMCLR, "sigmoid"),
        (BYOL, "softmax"),
        (MAE, "sigmoid"),
        pytest.param(SIMCLR, "softmax", marks=pytest.mark.long),
        pytest.param(BYOL, "sigmoid", marks=pytest.mark.long),
        pytest.param(MAE, "softmax", marks=pytest.mark.long),
    ],
)
def test_the_loss_falls(tmp_path, run, attention) -> None:
    run = replace(
        run.with_attention(attention), steps=60, batch=40, accumulate=1, val_every=60, log_every=60,
        optim=OptimConfig(lr=5e-3, warmup=5),
    )  # fmt: skip
    run.train(tmp_path / "run", device="cpu", show=quiet)
    (_, first), (_, last) = numbers(tmp_path / "run", "val/loss")
    # chance, log 59 = 4.1 and 0, and the variance of the pixels, 1, are where they begin
    assert last < {"simclr": 3.7, "byol": -0.5}.get(getattr(run, "method", "mae"), 0.9)
    assert last < first - 0.1
    ((_, spread),) = numbers(tmp_path / "run", "val/feature_spread")[1:]
    if not isinstance(run, MaskedRun):  # whose features nothing drives apart or together
        assert spread > 0.05  # 0 is a collapse, 1 is every direction alike


def test_the_spread_of_constant_features_is_nothing_and_of_random_ones_all() -> None:
    module = SIMCLR.module(digits(SIMCLR.data))
    generator = torch.Generator().manual_seed(0)
    for features, expected in ((torch.ones(50, 16), 0.0), (torch.randn(5000, 16, generator=generator), 1.0)):
        x, labels = F.normalize(features), torch.zeros(len(features)).long()
        module._loss = (0.0, 1)
        module._features, module._labels = ([x[:9]], [x]), ([labels[:9]], [labels])
        spread = {name: value for name, value, _ in module.validated()}["val/feature_spread"]
        assert spread == pytest.approx(expected, abs=1e-2)


def test_neighbours_are_counted(monkeypatch) -> None:
    """Features that are the class have the neighbours of the class; features of no relation do not."""
    data = digits(SIMCLR.data)
    module = replace(SIMCLR, knn_images=200).module(data)
    bank, val = module.val_dataloader()
    seen = [torch.cat([batch.labels for batch in feed]) for feed in (bank, val)]
    every = 8000 // 200
    assert torch.equal(seen[0], data.train.labels[::every])  # pyright: ignore
    assert torch.equal(seen[1], data.val.labels)  # pyright: ignore
    module._loss = (0.0, 1)
    for features, low, high in (
        ([F.one_hot(labels, 10).float() for labels in seen], 1.0, 1.0),
        ([F.normalize(torch.randn(len(labels), 10)) for labels in seen], 0.05, 0.15),
    ):
        module._features = tuple([x] for x in features)  # pyright: ignore
        module._labels = tuple([x] for x in seen)  # pyright: ignore
        accuracy = {name: value for name, value, _ in module.validated()}["val/knn_accuracy"]
        assert low <= accuracy <= high


def test_the_target_follows_the_model(tmp_path) -> None:
    """After each step target = m target + (1 - m) model, with m along a cosine to 1."""
    run = replace(BYOL, steps=3, val_every=3, save_every=1, keep_last=3, accumulate=1)
    run.train(tmp_path / "run", device="cpu", show=quiet)
    name, models, targets = "0.patch_embed.proj.weight", [], []
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        models.append(load_file(path / WEIGHTS)["encoder.patch_embed.proj.weight"])
        targets.append(torch.load(path / TRAINER, weights_only=True)["state_dict"][f"target.{name}"])
    momenta = [cosine_schedule(step, 3, 0.9, 1.0) for step in range(3)]
    assert momenta[0] == pytest.approx(0.9)
    assert momenta[1] == pytest.approx(0.95)
    expected = momenta[1] * targets[0] + (1 - momenta[1]) * models[1]
    assert_rounded(targets[1], expected, 4)
    assert not torch.allclose(targets[1], targets[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(targets[2], targets[1])  # m = 1 at the last step
    assert not torch.equal(models[2], targets[2])


def test_the_target_has_no_gradient() -> None:
    torch.manual_seed(0)
    module = BYOL.module(digits(SIMCLR.data))
    assert isinstance(module, BYOLModule)
    module.batch_loss(batch()).backward()
    assert all(p.grad is None for p in module.target.parameters())
    assert all(p.grad is not None for p in module.model.parameters())


def test_simclr_s_loss_is_the_equation() -> None:
    torch.manual_seed(0)
    module = SIMCLR.module(digits(SIMCLR.data)).double()
    x = torch.randn(2, 5, 1, 14, 14, dtype=torch.float64)
    module.views.forward = lambda images, part: tuple(x)  # pyright: ignore
    z = F.normalize(module.part("projection")(module.encoder(x.flatten(0, 1))))
    losses = []
    for i in range(10):
        similarity = (z @ z[i] / SIMCLR.temperature).exp()
        losses.append(-torch.log(similarity[(i + 5) % 10] / (similarity.sum() - similarity[i])))
    # similarities are float32 there, whatever the model
    assert_rounded(module.batch_loss(batch(5)).double(), torch.stack(losses).mean(), dtype=torch.float32)


def mae(run: MaskedRun = MAE) -> MaskedModule:
    torch.manual_seed(0)
    return run.module(digits(SIMCLR.data)).eval()


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


@pytest.mark.parametrize("head_norm", [False, True])
def test_a_probe_leaves_the_encoder_and_learns_a_head(tmp_path, head_norm) -> None:
    SHORT.train(tmp_path / "pretrained", device="cpu", show=quiet)
    run = replace(PROBE, init=str(tmp_path / "pretrained"), head_norm=head_norm)
    run.train(tmp_path / "probe", device="cpu", show=quiet)
    after, before = load_file(find_checkpoint(tmp_path / "probe") / WEIGHTS), encoder_weights(tmp_path / "pretrained")
    head = {name for name in after if name.startswith("head.")}
    assert differences(before, {name: x for name, x in after.items() if name not in head}) == []
    assert head == ({"head.weight", "head.bias"} if not head_norm else {
        *("head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias"),
    })  # fmt: skip
    first, last = (value for _, value in numbers(tmp_path / "probe", "val/loss")[::2])
    assert last < first
    if head_norm:
        assert int(after["head.0.num_batches_tracked"]) == 8


@pytest.mark.parametrize("attention", ["sigmoid", pytest.param("softmax", marks=pytest.mark.long)])
def test_a_short_pretraining_is_worth_more_than_random_weights(tmp_path, monkeypatch, attention) -> None:
    """120 steps of SimCLR: five to ten points of a probe were seen on 1,000 images, whose standard error is 1.6."""

    for module in (classification, pretraining):
        monkeypatch.setattr(module, "load_images", lambda config: few_images(config, 2000, 1000))
    model = replace(MODEL, dim=32, img_size=28, pool="avg", attention=attention)
    pretrained = replace(
        SIMCLR, model=model, data=ImageConfig(), views=ViewsConfig(crop=(0.5, 1.0), flip=False), temperature=0.1,
        projection_hidden=64, projection_dim=32, optim=OptimConfig(lr=5e-3, warmup=10, weight_decay=0.05), steps=120,
        batch=64, accumulate=1, val_every=120, save_every=120, log_every=20, knn_images=1000, knn_k=20,
    ).train(tmp_path / "pretrained", device="cpu", show=quiet)  # fmt: skip
    probe = replace(
        PROBE, model=replace(model, num_classes=10), data=ImageConfig(), steps=100, batch=128, val_every=100,
        save_every=100, log_every=20, optim=OptimConfig(lr=1e-2, warmup=5, weight_decay=0.0, final_lr=0.0),
    )  # fmt: skip
    learned = replace(probe, init=str(tmp_path / "pretrained")).train(tmp_path / "learned", device="cpu", show=quiet)
    random = probe.train(tmp_path / "random", device="cpu", show=quiet)
    assert learned["val/accuracy"] > random["val/accuracy"] + 0.03
    ((_, knn_before), _) = numbers(tmp_path / "pretrained", "val/knn_accuracy")
    assert pretrained["val/knn_accuracy"] > knn_before + 0.03
    assert random["val/accuracy"] > random["baseline/majority"]


def test_a_frozen_encoder_does_not_draw() -> None:
    """Stochastic depth is off in it, and its head is in training mode."""
    data = digits(SIMCLR.data)
    module = classification.ClassificationModule(replace(PROBE, model=replace(PROBE.model, drop_path=0.9)), data)
    module.train()
    x = torch.randn(4, 1, 14, 14)
    assert torch.equal(module.model.forward_features(x), module.model.forward_features(x))  # pyright: ignore
    assert module.model.head.training  # pyright: ignore
    assert not module.model.training
    assert {name for name, p in module.model.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}


@pytest.mark.parametrize("run", [SIMCLR, pytest.param(BYOL, marks=pytest.mark.long), MAE])
def test_fine_tuning_begins_with_the_encoder_and_resumes_without_it(tmp_path, run) -> None:
    replace(run, steps=2, val_every=2).train(tmp_path / "pretrained", device="cpu", show=quiet)
    tuned = replace(
        PROBE, init=str(tmp_path / "pretrained"), train_only="all", head_norm=False, layer_decay=0.5, ema=0.9
    )

    def stop(progress: Progress) -> None:
        if progress.step == 3 and not progress.validated:
            os.kill(os.getpid(), signal.SIGINT)

    whole = tuned.train(tmp_path / "whole", device="cpu", show=quiet)
    with pytest.raises(Interrupted):
        tuned.train(tmp_path / "halves", device="cpu", show=stop)
    checkpoint = find_checkpoint(tmp_path / "pretrained")
    file = read_records(tmp_path / "halves" / "records.jsonl")
    (record,) = (r for r in file.records if r.name == "init")
    assert record.tags["checkpoint"] == str(checkpoint)
    assert len(str(record.tags["sha256"])) == 64
    assert file.settings["init"].startswith("tiny step-00000002 ")
    shutil.rmtree(tmp_path / "pretrained")
    assert tuned.train(tmp_path / "halves", resume=True, device="cpu", show=quiet) == whole
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "halves")) == []
    with pytest.raises(ValueError, match=r"run\.init must stay as the run began to resume it"):
        replace(tuned, init=None).train(tmp_path / "halves", resume=True, device="cpu", show=quiet)


def test_early_layers_learn_more_slowly(tmp_path) -> None:
    """One step of AdamW moves a weight by its learning rate: 1, 1/2, 1/4, 1/8 of it from the head down."""
    run = replace(
        PROBE, train_only="all", head_norm=False, layer_decay=0.5, steps=1, optim=OptimConfig(lr=1e-2, warmup=0,
        weight_decay=0.0, clip=math.inf),
    )  # fmt: skip
    torch.manual_seed(run.seed)
    before = build_vit(run.model).state_dict()
    run.train(tmp_path / "run", device="cpu", show=quiet)
    after = load_file(find_checkpoint(tmp_path / "run") / WEIGHTS)
    for name, scale in (
        *(("head.weight", 1.0), ("blocks.1.mlp.fc2.weight", 0.5), ("blocks.0.mlp.fc2.weight", 0.25)),
        ("cls_token", 0.125),
    ):
        moved = (after[name] - before[name]).abs()
        # g / (|g| + 1e-8) with gradients above 1e-5
        assert moved.median().item() == pytest.approx(scale * 1e-2, rel=1e-3)


def test_both_arms_and_all_seeds_begin_with_the_same_origin(tmp_path) -> None:
    """It is a setting of the records: a pair differs in nothing else, and seeds are joined."""
    origins = {}
    for name, run in {
        "sigmoid": SIMCLR, "softmax": SIMCLR.with_attention("softmax"), "seed": replace(SIMCLR, seed=1),
        "warm": replace(SIMCLR, temperature=0.5), "byol": BYOL,
    }.items():  # fmt: skip
        run = replace(run, steps=1, val_every=1)
        run.train(tmp_path / name, device="cpu", show=quiet)
        origins[name] = classification.load_encoder(tmp_path / name, run.model).origin
    assert origins["sigmoid"] == origins["softmax"] == origins["seed"]
    assert len(set(origins.values())) == 3


def test_what_cannot_be_begun_with_says_why(tmp_path) -> None:
    SHORT.train(tmp_path / "pretrained", device="cpu", show=quiet)

    def error(match: str, **changes) -> None:
        run = replace(replace(PROBE, init=str(tmp_path / "pretrained")), **changes)
        with pytest.raises(ValueError, match=match):
            run.train(tmp_path / "run", device="cpu", show=quiet)
        assert not (tmp_path / "run").exists()

    error(
        "model.attention must be that of the encoder in .*step-00000002, 'sigmoid', got 'softmax'",
        model=replace(PROBE.model, attention="softmax"),
    )
    error("model.depth must be that of the encoder in .*, 2, got 3", model=replace(PROBE.model, depth=3))
    error("model.pool must be that of the encoder", model=replace(PROBE.model, pool="avg"))
    error("a checkpoint, or a run with one, must be at the path, got nowhere", init="nowhere")
    error("model.num_classes must be that of the data, 10, got 7", model=replace(PROBE.model, num_classes=7))
    with pytest.raises(ValueError, match="init must be None with timm's weights"):
        replace(PROBE, init="x", model=replace(PROBE.model, pretrained=True))
    weights = find_checkpoint(tmp_path / "pretrained") / WEIGHTS
    whole = load_file(weights)
    (weights.parent / MANIFEST).unlink()  # which would tell of what follows
    save_file({k: v for k, v in whole.items() if k != "encoder.cls_token"}, weights)
    error("init must hold this encoder's weights and no others, got .*: cls_token")
    save_file({**whole, "encoder.cls_token": torch.zeros(1, 1, 3)}, weights)
    error("init must hold this encoder's weights, got .*: size mismatch for cls_token")
    weights.write_bytes(b"broken")
    error("init must be a whole checkpoint, got")


def test_a_classifier_is_begun_with_too(tmp_path) -> None:
    """Its encoder, without its head."""
    supervised = replace(PROBE, train_only="all", head_norm=False)
    supervised.train(tmp_path / "supervised", device="cpu", show=quiet)
    data = digits(SIMCLR.data)
    initial = classification.load_encoder(tmp_path / "supervised", PROBE.model)
    assert not any(name.startswith("head") for name in initial.weights)
    torch.manual_seed(1)
    module = classification.ClassificationModule(replace(PROBE, seed=1), data, initial)
    weights = load_file(find_checkpoint(tmp_path / "supervised") / WEIGHTS)
    assert torch.equal(module.model.state_dict()["cls_token"], weights["cls_token"])
    assert not torch.equal(module.model.state_dict()["head.1.weight"], weights["head.weight"])


@pytest.mark.parametrize(
    ("run", "change", "message"),
    [
        (SIMCLR, {"method": "moco"}, "method must be 'simclr' or 'byol', got 'moco'"),
        (SIMCLR, {"temperature": 0.0}, "temperature must be at least 0.001, got 0.0"),
        (SIMCLR, {"momentum": 1.1}, r"momentum must be in \[0, 1\], got 1.1"),
        (SIMCLR, {"projection_dim": 0}, "projection_dim must be at least 1, got 0"),
        (SIMCLR, {"batch": 1}, "batch must be at least 2, images are compared with one another, got 1"),
        (SIMCLR, {"knn_k": 0}, "knn_k must be at least 1, got 0"),
        (SIMCLR, {"model": PROBE.model}, "model.num_classes must be 0 in a pretraining, got 10"),
        (SIMCLR, {"workers": -1}, "workers must be at least 0, got -1"),
        (MAE, {"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\), got 1.0"),
        (MAE, {"decoder_dim": 6}, "decoder_dim must be a multiple of 4, for its positions, got 6"),
        (MAE, {"decoder_depth": 0}, "decoder_depth must be at least 1, got 0"),
        (MAE, {"augment": AugmentConfig(mixup=0.2)}, "augment.cutmix must be 0 without labels, got 0.2"),
        (PROBE, {"train_only": "tail"}, "train_only must be 'all' or 'head', got 'tail'"),
        (PROBE, {"layer_decay": 0.5}, "layer_decay must be 1 with train_only='head', got 0.5"),
        (PROBE, {"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        (PROBE, {"cuda_graphs": True}, "cuda_graphs needs compile=True and accumulate=1, got False, 1"),
        (PROBE, {"cuda_graphs": True, "compile": True, "accumulate": 2}, "accumulate=1, got True, 2"),
    ],
)
def test_bad_fields_are_one_clear_error(run, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(run, **change)


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


@methods
def test_compiled_it_is_the_same_loss_without_a_break_and_validated_as_it_is(run, monkeypatch) -> None:
    """By the compiler's first half, which would name what it cannot take; a run of the second half takes minutes."""
    calls = []

    def compiled(function, **options):
        fast = torch._dynamo.optimize("aot_eager", nopython=True)(function)
        return lambda *tensors: calls.append(1) or fast(*tensors)

    monkeypatch.setattr(torch, "compile", compiled)
    data = digits(run.data)
    run = replace(run, model=replace(run.model, depth=1))
    plain, fast = (replace(run, compile=each).module(data) for each in (False, True))
    fast.load_state_dict(plain.state_dict())
    for module in (plain, fast):
        module.train()
        torch.manual_seed(0)
        module.batch_loss(batch()).backward()
    assert calls
    for (name, a), (_, b) in zip(plain.model.named_parameters(), fast.model.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert_rounded(a.grad, b.grad)
    del calls[:]
    fast.eval()
    with torch.no_grad():
        fast.batch_loss(batch())
    assert calls == []
