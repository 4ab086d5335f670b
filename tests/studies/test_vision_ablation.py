"""The study of practices: every variant trains, is resumed, taken when complete, and its numbers are its records'."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from training.test_classification import RUN, few, numbers, quiet, remains  # noqa: F401  few: fewer digits
from training.tiny import differences

from flashsigmoid.recipes.vision import ablations
from flashsigmoid.record import read_records
from flashsigmoid.studies.elementwise import ACTIVATIONS
from flashsigmoid.studies.vision_ablation import ActivationRun, chosen, summarise, variants, vision_ablation
from flashsigmoid.training.callbacks import Interrupted
from flashsigmoid.training.checkpoint import CONFIG, find_checkpoint
from flashsigmoid.training.classification import ClassificationModule, ImageRun, load_images, train_classifier

BASE = replace(RUN, model=replace(RUN.model, layer_scale=0.1), steps=2, val_every=2, save_every=2)
OTHERS = [name for name in ACTIVATIONS if name != "sigmoid"]


def summary(path) -> dict[tuple[str, str], float | None]:
    return {(record.tags["variant"], record.name): record.value for record in read_records(path).records}


def test_every_variant_trains_once_and_is_then_taken(tmp_path) -> None:
    seen = []

    def show(progress) -> None:
        seen.append(progress.name)

    path = vision_ablation(BASE, tmp_path, device="cpu", show=show)
    names = [*ablations(BASE), *OTHERS]
    assert list(dict.fromkeys(seen)) == names
    found = summary(path)
    assert list(dict.fromkeys(name for name, _ in found)) == names
    assert {name for _, name in found} == {
        "val/accuracy", "val/accuracy_se", "val/loss", "attn_norm/layer_0", "attn_norm/layer_1", "step_ms",
    }  # fmt: skip
    assert len(found) == 6 * len(names)
    for name in names:
        for key in ("val/accuracy", "val/accuracy_se", "val/loss"):
            assert found[name, key] == numbers(tmp_path / name, key)[-1][1]
        assert found[name, "attn_norm/layer_1"] == numbers(tmp_path / name, "attn_norm/layer_1")[0][1]
    # the first of two stretches is left out; a step is two micro-batches of eight
    assert found["base", "step_ms"] == pytest.approx(1e3 * 16 / numbers(tmp_path / "base", "images_per_s")[1][1])
    assert found["softmax", "attn_norm/layer_0"] != found["base", "attn_norm/layer_0"]
    assert found["learnable-bias", "attn_norm/layer_0"] == found["base", "attn_norm/layer_0"]

    seen.clear()
    for name in ("base", "relu"):  # as from another machine: the records alone
        shutil.rmtree(tmp_path / name / "checkpoints")
    assert summary(vision_ablation(BASE, tmp_path, device="cpu", show=show)) == found
    assert seen == []


def test_the_summary_says_what_differs_and_where_it_was_trained(tmp_path) -> None:
    path = vision_ablation(BASE, tmp_path, only=("relu2", "base", "no-qk-norm"), device="cpu", show=quiet)
    file = read_records(path)
    tags = {r.tags["variant"]: r.tags for r in file.records if r.name == "val/accuracy"}
    assert list(tags) == ["base", "no-qk-norm", "relu2"]
    assert [each["change"] for each in tags.values()] == [
        "", "qk_norm=False", "sigmoid_bias=0, activation=relu2, divide_by_seqlen=True",
    ]  # fmt: skip
    origin = read_records(tmp_path / "base" / "records.jsonl").header
    assert tags["base"]["commit"] == origin["commit"]
    assert tags["base"]["hardware"] == origin["hardware"]["gpu"] or origin["hardware"]["cpu"]
    assert file.settings["depth"] == 2
    assert not {"qk_norm", "activation"} & set(file.settings)


def test_what_is_unfinished_is_not_in_the_summary_and_goes_on_to_the_same_bits(tmp_path) -> None:
    base = replace(BASE, steps=8, val_every=4)

    def stop(progress) -> None:
        if progress.step == 3 and progress.name == "tanh":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        vision_ablation(base, tmp_path / "halves", only=("tanh",), device="cpu", show=stop)
    assert summary(summarise(tmp_path / "halves")) == {}
    for name in ("halves", "whole"):
        vision_ablation(base, tmp_path / name, only=("tanh",), device="cpu", show=quiet)
    assert differences(*(remains(tmp_path / name / "tanh") for name in ("whole", "halves"))) == []
    assert numbers(tmp_path / "whole" / "tanh", "train/loss") == numbers(tmp_path / "halves" / "tanh", "train/loss")


def test_a_run_with_an_activation_is_described_by_it(tmp_path) -> None:
    run = variants(BASE)["relu"]
    assert isinstance(run, ActivationRun)
    assert (run.title, run.settings()["activation"], run.settings()["sigmoid_bias"]) == ("tiny relu", "relu", 0.0)
    train_classifier(run, tmp_path, device="cpu", show=quiet)
    config = json.loads((find_checkpoint(tmp_path) / CONFIG).read_text())
    assert (config["run"]["activation"], config["run"]["divide_by_seqlen"]) == ("relu", True)
    plain = ImageRun(**{field.name: getattr(run, field.name) for field in dataclasses.fields(ImageRun)})
    for other, got in ((replace(run, activation="gelu"), "'gelu'"), (plain, "None")):
        with pytest.raises(
            ValueError, match=f"run.activation must stay as the run began to resume it, 'relu', got {got}"
        ):
            train_classifier(other, tmp_path, resume=True, device="cpu", show=quiet)


def test_activations_are_in_every_block_and_in_the_average_of_the_weights() -> None:
    data = load_images(BASE.data)
    runs = {name: variants(BASE)[name] for name in ("relu", "identity")}
    outs = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        module = ClassificationModule(run, data).eval()
        x = torch.randn(2, 1, 14, 14, generator=torch.Generator().manual_seed(1))
        outs[name] = module.model(x)
        assert torch.equal(module.judged(x), outs[name])
        assert dict(module.probed()).keys() == {"attn_norm/layer_0", "attn_norm/layer_1"}
    assert not torch.allclose(outs["relu"], outs["identity"])


def test_without_b_the_first_attention_is_larger_by_its_factor() -> None:
    """Scores without QK-norm are near 0 at the start: sigmoid(0) is 1/2, with b it is 1 / (n + 1), n = 5 tokens."""
    data, norms = load_images(BASE.data), {}
    base = replace(BASE, model=replace(BASE.model, qk_norm=False))
    for name in ("base", "no-bias"):
        torch.manual_seed(0)
        norms[name] = dict(ClassificationModule(variants(base)[name], data).eval().probed())["attn_norm/layer_0"]
    assert norms["no-bias"] / norms["base"] == pytest.approx(3.0, rel=0.02)


def test_a_variant_differs_from_the_base_in_what_its_name_says() -> None:
    settings = {name: run.settings() for name, run in variants(BASE).items()}
    changed = {name: {key for key in each if each[key] != settings["base"].get(key)} for name, each in settings.items()}
    assert changed.pop("base") == set()
    # without the class token there is a token less
    assert changed.pop("average-pooling") == {"pool", "sigmoid_bias"}
    assert changed.pop("out-norm") == {"out_norm", "sigmoid_bias"}
    for name, by in (("bias-lower", 0.5), ("out-norm", 3.0)):
        assert settings[name]["sigmoid_bias"] == pytest.approx(settings["base"]["sigmoid_bias"] - by)
    for name, fields in changed.items():
        if name in ACTIVATIONS:
            assert fields == {"activation", "divide_by_seqlen", "sigmoid_bias"}, name
        else:
            assert len(fields) == 1, name
    assert ablations(BASE).keys() == settings.keys() - set(OTHERS)
    assert list(chosen(BASE, ["softmax", "base"])) == ["base", "softmax"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation must be one of relu, relu2, .*, got 'swish'"),
        ({"model": replace(BASE.model, attention="softmax")}, "model.attention must be 'sigmoid' beside an activation"),
    ],
)
def test_bad_fields_are_one_clear_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(variants(BASE)["relu"], **change)


def test_names_and_folders_that_do_not_fit_say_so(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a variant must be one of base, softmax, .*, got swish"):
        vision_ablation(BASE, tmp_path, only=("base", "swish"), show=quiet)
    assert list(tmp_path.iterdir()) == []
    vision_ablation(BASE, tmp_path, only=("base",), device="cpu", show=quiet)
    with pytest.raises(ValueError, match=r"lr must be that of the run in .*base, 0.003, got 0.1"):
        vision_ablation(replace(BASE, optim=replace(BASE.optim, lr=0.1)), tmp_path, only=("base",), show=quiet)
    # what touches no bit may differ
    vision_ablation(replace(BASE, workers=2, name="other"), tmp_path, only=("base",), show=quiet)
