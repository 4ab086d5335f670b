"""Trainings by the command line, tiny: text, images and speech, and what is done with them then."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from cli.outcome import TINY, assert_one_error
from training.test_audio import tone
from training.test_images import draw


def test_train_lists_its_recipes(flashsigmoid):
    outcome = flashsigmoid("train", "--list")
    assert outcome.code == 0
    assert outcome.out.startswith("demo ")
    assert "\ncifar10 " in outcome.out
    assert "\nan4_sample " in outcome.out


def test_train_lists_what_it_can_without_an_extra(flashsigmoid, monkeypatch):
    def missing(name: str, package: str):
        raise ModuleNotFoundError(f"No module named {name}", name=f"guest-of{name}")

    # of our own importing alone: what typer imports meanwhile is there
    monkeypatch.setattr("flashsigmoid.cli.recipes.importlib", SimpleNamespace(import_module=missing))
    outcome = flashsigmoid("train", "--list")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == (
        "recipes for images need guest-of..recipes.vision: pip install 'flashsigmoid[vision]'; "
        "recipes for images without labels need guest-of..recipes.pretraining: pip install 'flashsigmoid[vision]'; "
        "recipes for speech need guest-of..recipes.speech: pip install 'flashsigmoid[speech]'"
    )
    assert_one_error(flashsigmoid("train", "an4"), 1, "got an4", "pip install 'flashsigmoid[speech]'")


def test_train_resume_generate_report(flashsigmoid, tmp_path):
    """The round trip: two arms, one of them in two parts, text from it, and a page."""
    run = tmp_path / "runs/demo/sigmoid"
    first = flashsigmoid("train", "demo", "--steps", "2", "--device", "cpu", "--resume", *TINY)
    assert first.code == 0, first.err
    assert "val/loss" in first.out
    assert first.err.startswith("no checkpoint in runs/demo/sigmoid to resume from: training from the beginning\n")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]

    assert_one_error(flashsigmoid("train", "demo", "--steps", "2", *TINY), 1, "must not hold a run")
    again = flashsigmoid("train", "demo", "--steps", "2", "--device", "cpu", "--resume", *TINY)
    assert again.code == 0, again.err
    assert again.out == first.out

    twin = flashsigmoid("train", "demo", "--attention", "softmax", "--steps", "2", "--device", "cpu", *TINY)
    assert twin.code == 0, twin.err
    assert (tmp_path / "runs/demo/softmax/records.jsonl").exists()

    options = ("--max-new-tokens", "12", "--seed", "3")
    text = flashsigmoid("generate", run, "--prompt", "To be", *options)
    assert text.code == 0, text.err
    assert text.out.startswith("To be")
    assert text.out == flashsigmoid("generate", run / "checkpoints/step-00000002", "--prompt", "To be", *options).out
    assert_one_error(flashsigmoid("generate", run, "--prompt", ""), 1, "prompt must have at least one character")
    assert_one_error(flashsigmoid("generate", run, "--top-p", "2"), 1, "top_p must be in (0, 1], got 2.0")

    exported = flashsigmoid("export", run, "exported")
    assert exported.code == 0, exported.err
    assert (tmp_path / "exported/model.safetensors").exists()
    assert_one_error(flashsigmoid("export", run, "exported"), 1, "out_dir must be new or empty")
    assert_one_error(
        flashsigmoid("export", "runs/demo/softmax", "other"), 1, "attention of the model must be 'sigmoid'"
    )

    page = flashsigmoid("report", "runs/demo")
    assert page.code == 0, page.err
    assert (tmp_path / "runs/demo/report.html").exists()
    assert "report: " in page.out
    assert "softmax" in page.out
    assert flashsigmoid("report", "runs/demo", "--out", "other/page.html").code == 0
    assert (tmp_path / "other/page.html").exists()


@pytest.mark.usefixtures("constant_found_once")
def test_train_on_speech_then_transcribe(flashsigmoid, tmp_path):
    """A few steps of both arms, then what they hear in files, good and bad."""
    tiny = ("--device", "cpu", "--steps", "2", "--batch-size", "4", "--set", "model.dim=16", "--set", "nlayers=1")
    first = flashsigmoid("train", "an4_sample", *tiny)
    assert first.code == 0, first.err
    assert first.out.startswith("val/cer ")
    assert "baseline/constant_cer 0." in first.out
    assert first.out.endswith("next: flashsigmoid transcribe runs/an4_sample/sigmoid FILE...\n")
    assert flashsigmoid("train", "an4_sample", "--resume", *tiny).out == first.out
    assert flashsigmoid("train", "an4_sample", "--attention", "softmax", *tiny).code == 0
    for name in ("one", "two"):
        tone(tmp_path / f"{name}.wav")
    (tmp_path / "bad.wav").write_bytes(b"")
    words = ("transcribe", "runs/an4_sample/sigmoid")
    single, beam = flashsigmoid(*words, "one.wav"), flashsigmoid(*words, "one.wav", "--beam", "4")
    assert (single.code, beam.code, single.err, beam.err) == (0, 0, "", "")
    assert re.fullmatch(r"[A-Z' ]*\n", single.out)
    assert re.fullmatch(r"[A-Z' ]*\n", beam.out)
    both = flashsigmoid(*words, "one.wav", "bad.wav", "two.wav", "--skip")
    assert both.code == 0
    assert [line.partition("\t")[0] for line in both.out.splitlines()] == ["one.wav", "two.wav"]
    assert both.out.splitlines()[0] == f"one.wav\t{single.out.rstrip(chr(10))}"
    assert re.fullmatch(r"left out, audio must be usable, got bad.wav: .+\n1 of 3 files left out\n", both.err)
    assert_one_error(flashsigmoid(*words, "bad.wav", "one.wav"), 1, "audio must be usable, got bad.wav: ")
    none = flashsigmoid(*words, "bad.wav", "gone.wav", "--skip")
    assert (none.code, none.out) == (1, "")
    assert none.err.splitlines()[2:] == ["error: files must have one that can be used, got 2 that cannot"]
    another = "the checkpoint must be of a language model, got a speech recogniser at runs/an4_sample/sigmoid/check"
    assert_one_error(flashsigmoid("generate", words[1]), 1, another)
    assert_one_error(flashsigmoid("export", words[1], "exported"), 1, another)
    assert not (tmp_path / "exported").exists()


@pytest.mark.usefixtures("few_digits")
def test_train_on_images(flashsigmoid, tmp_path):
    """A few steps, and what is there already."""
    out = tmp_path / "run"
    tiny = (
        "--out",
        str(out),
        "--device",
        "cpu",
        "--set",
        "model.dim=16",
        "--set",
        "model.depth=1",
        "--batch-size",
        "8",
    )
    first = flashsigmoid("train", "digits", "--steps", "2", *tiny)
    assert first.code == 0, first.err
    assert first.out.startswith("val/accuracy 0.")
    assert first.out.splitlines()[-1] == f"run: {out}   next: flashsigmoid report {out}"
    assert_one_error(flashsigmoid("train", "digits", "--steps", "2", *tiny), 1, "out_dir must not hold a run unless")
    assert flashsigmoid("train", "digits", "--steps", "2", "--resume", *tiny).out == first.out
    assert_one_error(flashsigmoid("train", "digits", "--tokenizer", "bpe", *tiny), 1, "the run has no field data.token")


def test_a_folder_is_packed_and_trained_on(flashsigmoid, tmp_path):
    for split, count in (("train", 9), ("val", 2)):
        for number in range(count):
            draw(tmp_path / "images" / split / f"class-{number % 2}" / f"{number}.png")
    packed = flashsigmoid("pack", "images", "shards", "--shard-size", "4")
    assert (packed.code, packed.err) == (0, "")
    assert packed.out.splitlines()[:3] == [f"train-000{i}.tar: {n} images" for i, n in enumerate((4, 4, 1))]
    assert packed.out.splitlines()[3] == "val-0000.tar: 2 images"
    words = ("train", "digits", "--steps", "1", "--batch-size", "4", "--device", "cpu", "--out", "run")
    fields = ("data.source=tar", "data.root=shards", "num_classes=2", "in_chans=3", "data.img_size=28", "model.dim=16")
    trained = flashsigmoid(*words, *(word for field in fields for word in ("--set", field)))
    assert trained.code == 0, trained.err
    assert "baseline/majority 0.5000" in trained.out


@pytest.mark.parametrize("recipe", ["simclr_digits", pytest.param("byol_digits", marks=pytest.mark.long), "mae_digits"])
@pytest.mark.usefixtures("few_digits")
def test_train_without_labels_then_a_probe(flashsigmoid, tmp_path, recipe):
    """A few steps of each, a page of both, and an encoder of the other attention."""
    tiny = ("--device", "cpu", "--steps", "2", "--set", "model.dim=16", "--set", "model.depth=1", "--batch-size", "8")
    first = flashsigmoid("train", recipe, *tiny, "--set", "knn_images=50")
    assert first.code == 0, first.err
    assert first.out.startswith("val/knn_accuracy 0.")
    assert flashsigmoid("train", recipe, *tiny, "--set", "knn_images=50", "--resume").out == first.out
    init = ("--set", f"run.init=runs/{recipe}/sigmoid")
    probe = flashsigmoid("train", "probe_digits", *tiny, *init)
    assert probe.code == 0, probe.err
    assert probe.out.startswith("val/accuracy 0.")
    assert_one_error(
        flashsigmoid("train", "probe_digits", *tiny, *init, "--attention", "softmax"),
        1,
        "model.attention must be that of the encoder in runs",
    )
    assert not (tmp_path / "runs/probe_digits/softmax").exists()
    for folder, label in ((f"runs/{recipe}", "kNN accuracy"), ("runs/probe_digits", "accuracy")):
        page = flashsigmoid("report", folder)
        assert page.code == 0, page.err
        assert f"final validation {label} " in (tmp_path / folder / "report.html").read_text("utf-8")


def test_a_terminal_gets_a_bar(flashsigmoid, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    outcome = flashsigmoid("train", "demo", "--steps", "2", "--device", "cpu", *TINY)
    assert outcome.code == 0, outcome.err
    assert re.search(r"demo sigmoid .*━.* 2/2 +val \d\.\d{3}", re.sub(r"\x1b\[[\d;?]*\w", "", outcome.err))


def test_fresh_removes_nothing_but_runs(flashsigmoid, tmp_path):
    diary = tmp_path / "runs/demo/sigmoid/diary.txt"
    diary.parent.mkdir(parents=True)
    diary.write_text("mine")
    outcome = flashsigmoid("demo", "--fresh", "--set", "steps=2", *TINY)
    assert outcome.code == 0, outcome.err
    assert diary.read_text() == "mine"
