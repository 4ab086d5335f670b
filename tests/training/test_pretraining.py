"""Pretraining: each method learns, resumes to the same bits, and says what its features are worth."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from lightly.utils.scheduler import cosine_schedule
from rounding import assert_rounded
from safetensors.torch import load_file
from torch.nn import functional as F
from training.digits import digits
from training.encoders import BYOL, MAE, METHODS, PROBE, SIMCLR, batch, use_few
from training.test_classification import numbers, quiet, remains
from training.tiny import differences

from flashsigmoid.training.augment import AugmentConfig
from flashsigmoid.training.callbacks import Interrupted, Progress
from flashsigmoid.training.checkpoint import TRAINER, WEIGHTS
from flashsigmoid.training.contrastive import BYOLModule
from flashsigmoid.training.masked import MaskedRun
from flashsigmoid.training.optim import OptimConfig

methods = pytest.mark.parametrize("run", METHODS.values(), ids=METHODS.keys())


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    use_few(monkeypatch, 40, 30)


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
