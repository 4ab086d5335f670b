"""Training image classifiers: it learns, resumes to the same bits with everything on, and says what does not fit."""

from __future__ import annotations

import itertools
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training.digits import digits, few_images
from training.test_images import draw
from training.tiny import differences

from flashsigmoid.models.vision import ViTConfig
from flashsigmoid.record import read_records
from flashsigmoid.training.augment import AugmentConfig
from flashsigmoid.training.callbacks import Interrupted, Progress
from flashsigmoid.training.checkpoint import TRAINER, WEIGHTS, checkpoints, find_checkpoint
from flashsigmoid.training.classification import ClassificationModule, ImageRun, train_classifier
from flashsigmoid.training.images import ImageConfig
from flashsigmoid.training.optim import OptimConfig
from flashsigmoid.training.part import Order

MODEL = ViTConfig(
    name="vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=14, patch_size=7, dim=16, depth=2, nheads=2,
    layer_scale=None, drop_path=0.2,
)  # fmt: skip
RUN = ImageRun(
    name="tiny",
    model=MODEL,
    data=ImageConfig(img_size=14),
    augment=AugmentConfig(crop=(0.5, 1.0), flip=True, randaugment=2, mixup=0.2, cutmix=1.0),
    optim=OptimConfig(lr=3e-3, warmup=2),
    label_smoothing=0.1,
    ema=0.9,
    steps=8,
    batch=8,
    accumulate=2,
    val_every=4,
    save_every=2,
    log_every=1,
)


def quiet(progress: Progress) -> None:
    """Show nothing."""


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """Of the embedded digits the first 40 and 30: an epoch is two and a half steps."""
    from flashsigmoid.training import classification

    monkeypatch.setattr(classification, "load_images", lambda config: few_images(config, 40, 30))


def remains(out_dir):
    path = find_checkpoint(out_dir)
    trainer = torch.load(path / TRAINER, weights_only=True)
    del trainer["flashsigmoid"]["time_s"]
    return {"name": path.name, "weights": load_file(path / WEIGHTS), "trainer": trainer}


def numbers(out_dir, name):
    return [(r.step, r.value) for r in read_records(out_dir / "records.jsonl").records if r.name == name]


@pytest.mark.parametrize(("signum", "step", "code"), [(signal.SIGINT, 3, 130), (signal.SIGTERM, 4, 143)])
def test_a_signal_saves_and_resuming_ends_with_the_same_bits(tmp_path, signum, step, code) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == step and not progress.validated:
            os.kill(os.getpid(), signum)

    whole = train_classifier(RUN, tmp_path / "whole", device="cpu", show=quiet)
    with pytest.raises(Interrupted) as stopped:
        train_classifier(RUN, tmp_path / "halves", device="cpu", show=stop)
    assert (stopped.value.code, stopped.value.step) == (code, step)
    halves = train_classifier(RUN, tmp_path / "halves", resume=True, device="cpu", show=quiet)
    assert halves == whole
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "halves")) == []
    for name in ("train/loss", "val/accuracy", "attn_norm/layer_1"):
        assert numbers(tmp_path / "whole", name) == numbers(tmp_path / "halves", name)
    assert [step for step, _ in numbers(tmp_path / "whole", "val/accuracy")] == [0, 4, 8]
    assert numbers(tmp_path / "whole", "baseline/majority") == [(0, load_majority())]
    assert numbers(tmp_path / "whole", "data/skipped") == [(8, 0.0)]
    maps = [(tmp_path / name / "attention-maps.npz").read_bytes() for name in ("whole", "halves")]
    assert maps[0] == maps[1]


def load_majority() -> float:
    labels = digits(RUN.data).val.labels[:30]
    return float(torch.bincount(labels).max()) / 30


def test_the_records_say_which_b() -> None:
    assert RUN.settings()["sigmoid_bias"] == -math.log(5)  # four patches and the class token
    assert replace(RUN, model=replace(MODEL, sigmoid_bias=-1.0)).settings()["sigmoid_bias"] == -1.0


def test_workers_read_the_same(tmp_path) -> None:
    results = []
    for workers in (0, 2):
        run = replace(RUN, workers=workers, steps=4)
        results.append(train_classifier(run, tmp_path / str(workers), device="cpu", show=quiet))
    assert results[0] == results[1]
    assert differences(remains(tmp_path / "0")["weights"], remains(tmp_path / "2")["weights"]) == []


def test_what_is_validated_is_the_average(tmp_path) -> None:
    """With a decay so near 1 that float32 does not feel it, it stays where it began, while the model moves."""
    run = replace(RUN, ema=1.0 - 1e-15, optim=OptimConfig(lr=0.1, warmup=0))
    train_classifier(run, tmp_path / "run", device="cpu", show=quiet)
    losses = [value for _, value in numbers(tmp_path / "run", "val/loss")]
    # the first update copies the weights after the first step
    assert losses[0] != losses[1] == losses[2]
    state = torch.load(find_checkpoint(tmp_path / "run") / TRAINER, weights_only=True)["state_dict"]
    weights = load_file(find_checkpoint(tmp_path / "run") / WEIGHTS)
    assert int(state["average.n_averaged"]) == 8
    assert not torch.allclose(state["average.module.head.weight"], weights["head.weight"])


@pytest.mark.parametrize("attention", ["sigmoid", pytest.param("softmax", marks=pytest.mark.long)])
def test_it_learns_thirty_digits(tmp_path, attention) -> None:
    run = replace(
        RUN.with_attention(attention), augment=AugmentConfig(), ema=0.0, label_smoothing=0.0, steps=150, batch=40,
        accumulate=1, val_every=150, model=replace(MODEL, attention=attention, drop_path=0.0), log_every=150,
    )  # fmt: skip
    train_classifier(run, tmp_path / "run", device="cpu", show=quiet)
    ((_, loss),) = numbers(tmp_path / "run", "train/loss")
    assert loss < 0.5  # log 10 = 2.3 at the beginning


def test_the_optimizer_sees_every_image_once_an_epoch() -> None:
    data = digits(RUN.data).train
    batches = Order(RUN, data, 0)
    order = itertools.chain.from_iterable(batches)
    first, second = (list(itertools.islice(order, 8000)) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(8000))
    assert first != second
    assert next(iter(Order(RUN, data, 8003))) == second[3 : 3 + RUN.batch]
    assert next(iter(Order(RUN, data, 7999))) == [first[-1], *second[: RUN.batch - 1]]
    assert {len(batch) for batch in itertools.islice(batches, 1000)} == {RUN.batch}


def test_a_corrupt_image_is_left_out_of_training(tmp_path, capsys) -> None:
    for split in ("train", "val"):
        for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
            for number in range(4):
                draw(tmp_path / split / name / f"{number}.png", colour=colour)
    (tmp_path / "train" / "red" / "2.png").write_bytes(b"no image")
    data = ImageConfig(source="folder", root=str(tmp_path), img_size=14, on_corrupt="skip")
    model = replace(MODEL, num_classes=2, in_chans=3)
    result = train_classifier(replace(RUN, data=data, model=model), tmp_path / "run", device="cpu", show=quiet)
    assert result["baseline/majority"] == 0.5
    assert capsys.readouterr().err.count("left out, not a readable image") == 1
    assert numbers(tmp_path / "run", "data/skipped") == [(8, 1.0)]
    with pytest.raises(ValueError, match=r"images must be readable, got .*red.2.png"):
        train_classifier(
            replace(RUN, data=replace(data, on_corrupt="fail"), model=model), tmp_path / "other", device="cpu",
            show=quiet,
        )  # fmt: skip


def test_a_resumed_run_knows_what_was_left_out(tmp_path, capsys) -> None:
    """Of training and of validation; what was named once is not named again."""
    for split in ("train", "val"):
        for number in range(4):
            draw(tmp_path / split / "red" / f"{number}.png")
            draw(tmp_path / split / "blue" / f"{number}.png")
        (tmp_path / split / "red" / "2.png").write_bytes(b"no image")
    data = ImageConfig(source="folder", root=str(tmp_path), img_size=14, on_corrupt="skip")
    run = replace(RUN, data=data, model=replace(MODEL, num_classes=2, in_chans=3))

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train_classifier(run, tmp_path / "run", device="cpu", show=stop)
    assert capsys.readouterr().err.count("left out, not a readable image") == 2
    train_classifier(run, tmp_path / "run", resume=True, device="cpu", show=quiet)
    assert "left out" not in capsys.readouterr().err
    assert numbers(tmp_path / "run", "data/skipped") == [(8, 2.0)]


def test_what_the_average_looks_at_is_drawn(tmp_path) -> None:
    """With a decay so near 1 that float32 does not feel it, its maps stay those of the first step."""
    maps = []
    for steps in (1, 8):
        run = replace(
            RUN, ema=1.0 - 1e-15, steps=steps, val_every=steps, optim=OptimConfig(lr=0.1, warmup=0, final_lr=1.0)
        )
        train_classifier(run, tmp_path / str(steps), device="cpu", show=quiet)
        with np.load(tmp_path / str(steps) / "attention-maps.npz") as file:
            maps.append(file["maps"])
    assert np.array_equal(maps[0], maps[1])


def test_a_changed_description_is_one_error_that_names_the_field(tmp_path) -> None:
    run = replace(RUN, steps=4)
    train_classifier(run, tmp_path / "run", device="cpu", show=quiet)
    for changed, message in (
        (replace(run, seed=1), "run.seed must stay as the run began to resume it, 0, got 1"),
        (replace(run, ema=0.5), "run.ema must stay as the run began to resume it, 0.9, got 0.5"),
        (replace(run, augment=AugmentConfig()), "augment.crop must stay as the run began to resume it"),
        (replace(run, model=replace(MODEL, depth=3)), "model.depth must stay as the run began"),
    ):
        with pytest.raises(ValueError, match=message):
            train_classifier(changed, tmp_path / "run", resume=True, device="cpu", show=quiet)
    again = train_classifier(replace(run, workers=1), tmp_path / "run", resume=True, device="cpu", show=quiet)
    assert again["val/accuracy"] == numbers(tmp_path / "run", "val/accuracy")[-1][1]
    assert len(checkpoints(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
    ],
)
def test_bad_fields_are_one_clear_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RUN, **change)


def test_a_model_that_does_not_fit_the_data_says_so() -> None:
    data = digits(RUN.data)
    for field, value, message in (
        ("num_classes", 7, "model.num_classes must be that of the data, 10, got 7"),
        ("in_chans", 3, "model.in_chans must be that of the data, 1, got 3"),
        ("img_size", 28, "model.img_size must be that of the data, 14, got 28"),
        ("patch_size", 5, "img_size must be a multiple of patch_size, got 14 and 5"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassificationModule(replace(RUN, model=replace(MODEL, **{field: value})), data)


@pytest.mark.parametrize(("change", "kernel"), [
    ({}, "blocked"),
    ({"attention": "softmax"}, "sdpa"),
    ({"nheads_k": 1, "bias_mode": "per_head", "pool": "token"}, "blocked"),
    ({"bias_mode": "learnable"}, "blocked"),
])  # fmt: skip
def test_what_computes_the_attention_is_named(change, kernel) -> None:
    module = ClassificationModule(replace(RUN, model=replace(MODEL, **change)), digits(RUN.data))
    assert module.kernel() == kernel
    for block in module.model.blocks:
        block.attn.attention_fn = torch.nn.functional.scaled_dot_product_attention
    assert module.kernel() is None


@pytest.mark.parametrize("head_norm", [False, True])
def test_the_average_follows_as_torchs_does_without_reading_the_device(head_norm) -> None:
    module = ClassificationModule(replace(RUN, ema=0.9, head_norm=head_norm), digits(RUN.data))
    theirs = AveragedModel(module.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    assert module.average is not None
    for step in range(4):
        with torch.no_grad():
            for tensor in (*module.model.parameters(), *module.model.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
        module.follow(module.average, step == 0)
        theirs.update_parameters(module.model)
        for (name, ours), other in zip(module.average.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(ours, other), (step, name)
    module.to("meta").follow(module.average, False)  # where there is no value to be read
    with pytest.raises(RuntimeError, match="meta"):
        module.average.update_parameters(module.model)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_corrupt_images_only_is_left_out(tmp_path, batch) -> None:
    """In training the next one takes its place, in a validation it counts nowhere; a run of nothing else ends."""
    for number in range(4):
        for split in ("train", "val"):
            draw(tmp_path / split / "ab"[number % 2] / f"{number}.png", colour=(60 * number, 0, 0))
    for split in ("train", "val"):  # the last of its split, so that three and one are batches
        (tmp_path / split / "b" / "3.png").write_bytes(b"no image")
    data = ImageConfig(source="folder", root=str(tmp_path), img_size=14, on_corrupt="skip")
    run = replace(
        RUN, model=replace(MODEL, in_chans=3, num_classes=2), data=data, batch=batch, steps=4, augment=AugmentConfig()
    )
    final = train_classifier(run, tmp_path / "run", device="cpu", show=quiet)
    assert final["val/accuracy"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert numbers(tmp_path / "run", "data/skipped") == [(4, 2)]
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="data must have something that can be used, got 4 that cannot"):
        train_classifier(run, tmp_path / "other", device="cpu", show=quiet)


def test_one_class_is_nothing_to_learn(tmp_path) -> None:
    draw(tmp_path / "train" / "cat" / "1.png")
    draw(tmp_path / "val" / "cat" / "1.png")
    data = ImageConfig(source="folder", root=str(tmp_path), img_size=14)
    run = replace(RUN, model=replace(MODEL, in_chans=3, num_classes=1), data=data)
    with pytest.raises(ValueError, match="data must have at least two classes to tell apart, got cat alone"):
        train_classifier(run, tmp_path / "run", device="cpu", show=quiet)
