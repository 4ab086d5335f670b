"""What begins with an encoder: probes and fine-tunings take its weights and no others, and outlive it."""

from __future__ import annotations

import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.digits import digits
from training.encoders import BYOL, MAE, MODEL, PROBE, SHORT, SIMCLR, encoder_weights, use_few
from training.test_classification import numbers, quiet, remains
from training.tiny import differences

from flashsigmoid.models.vision import build_vit
from flashsigmoid.record import read_records
from flashsigmoid.training import classification
from flashsigmoid.training.augment import ViewsConfig
from flashsigmoid.training.callbacks import Interrupted, Progress
from flashsigmoid.training.checkpoint import MANIFEST, WEIGHTS, find_checkpoint
from flashsigmoid.training.images import ImageConfig
from flashsigmoid.training.optim import OptimConfig


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    use_few(monkeypatch, 40, 30)


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
    use_few(monkeypatch, 2000, 1000)
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
        replace(PROBE, init="x", model=replace(PROBE.model, pretrained=True, dim=None, depth=None, nheads=None))
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
