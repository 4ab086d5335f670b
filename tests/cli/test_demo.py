"""`flashsigmoid demo`: both arms of text, images and speech, tiny."""

from __future__ import annotations

import re

import pytest
from cli.outcome import TINY, assert_one_error, run_python

from flashsigmoid.record import read_records

TINY_IMAGES = (
    *("--set", "steps=2", "--set", "model.dim=16", "--set", "depth=1", "--set", "nheads=2", "--set", "batch=8"),
    *("--set", "data.img_size=14", "--set", "model.img_size=14", "--set", "patch_size=7", "--set", "val_every=2"),
)


def test_demo_trains_both_arms_and_takes_them_the_second_time(flashsigmoid, tmp_path):
    words = ("demo", "--set", "steps=2", *TINY)
    first = flashsigmoid(*words)
    assert first.code == 0, first.err
    assert (tmp_path / "runs/demo/report.html").exists()
    assert "bigram model of the same text: " in first.out
    weights = {path: path.read_bytes() for path in tmp_path.rglob("model.safetensors")}
    assert len(weights) == 2

    second = flashsigmoid(*words)
    assert second.code == 0, second.err
    assert second.out.count("trained already") == 2
    assert "/2" not in second.err  # no step was trained
    assert {path: path.read_bytes() for path in tmp_path.rglob("model.safetensors")} == weights
    assert second.out.splitlines()[2:] == first.out.splitlines()

    third = flashsigmoid(*words, "--no-bias-arm")
    assert third.code == 0, third.err
    assert third.out.count("trained already") == 2
    assert (tmp_path / "runs/demo/sigmoid-no-bias/records.jsonl").exists()

    other = flashsigmoid(*words, "--seed", "1")
    assert other.code == 1
    assert "seed must stay as the run began" in other.err
    assert "--fresh trains anew" in other.err.splitlines()[-1]
    fresh = flashsigmoid(*words, "--seed", "1", "--fresh")
    assert fresh.code == 0, fresh.err
    assert "trained already" not in fresh.out


def test_demo_vision_trains_both_arms_on_digits(flashsigmoid, tmp_path):
    first = flashsigmoid("demo", "vision", *TINY_IMAGES)
    assert first.code == 0, first.err
    out = tmp_path / "runs/demo-vision"
    assert "attention-maps-0-" in (out / "report.html").read_text("utf-8")
    assert (out / "report-figures/attention-maps.png").exists()
    assert re.search(r"accuracy +. +\d+\.\d% ± \d\.\d% . +\d+\.\d% ± ", first.out)
    values = [
        {r.name: r.value for r in read_records(out / arm / "records.jsonl").records} for arm in ("sigmoid", "softmax")
    ]
    ends = " and ".join(
        f"{each['val/accuracy']:.1%} ± {each['val/accuracy_se']:.1%} for {arm}"
        for each, arm in zip(values, ("sigmoid", "softmax"), strict=True)
    )
    assert f"The validation accuracy ended at {ends}; the most frequent class alone gets 11.7%;" in first.out
    assert " standard errors above the most frequent class for sigmoid and " in first.out
    assert " the standard error of the difference, " in first.out
    assert "bigram" not in first.out
    assert {each["data/skipped"] for each in values} == {0.0}

    second = flashsigmoid("demo", "vision", *TINY_IMAGES)
    assert second.out.count("trained already") == 2
    assert second.out.splitlines()[2:] == first.out.splitlines()
    fresh = flashsigmoid("demo", "vision", "--fresh", "--no-bias-arm", "--out", out, *TINY_IMAGES)
    assert fresh.code == 0, fresh.err
    assert "trained already" not in fresh.out
    assert read_records(out / "sigmoid-no-bias/records.jsonl").settings["sigmoid_bias"] == 0.0
    assert_one_error(flashsigmoid("demo", "music"), 2, "'music' is not one of 'language', 'vision', 'speech'")
    assert_one_error(flashsigmoid("demo", "vision", "--set", "dropout_p=0.1"), 1, "the run has no field dropout_p")


@pytest.mark.long
@pytest.mark.parametrize("module", ["timm", "torchvision"])
def test_demo_vision_without_its_libraries_names_the_extra(tmp_path, module):
    program = (
        f"import sys; sys.modules[{module!r}] = None; from flashsigmoid.__main__ import main; main(['demo', 'vision'])"
    )
    done = run_python("-c", program, folder=tmp_path)
    assert done.returncode == 1
    assert module in done.stderr
    assert 'pip install "flashsigmoid[vision]"' in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("constant_found_once")
def test_the_demo_of_speech_reports_errors_against_the_constant(flashsigmoid, tmp_path):
    """Two steps of each arm teach nothing, and the report says so."""
    tiny = ("--set", "steps=2", "--set", "batch=4", "--set", "model.dim=16", "--set", "nlayers=1")
    outcome = flashsigmoid("demo", "speech", *tiny)
    assert outcome.code == 0, outcome.err
    assert re.search(r"The validation character errors ended at [\d.]+% ± [\d.]+% for sigmoid and ", outcome.out)
    assert "; the best constant answer has 68.1%;" in outcome.out
    assert "Fewer than 3 standard errors below the constant are no sign of learning: " in outcome.out
    assert "The character errors of sigmoid minus those of softmax are " in outcome.out
    page = (tmp_path / "runs/demo-speech/report.html").read_text("utf-8")
    assert "final validation character errors ± " in page
    assert "bigram" not in page
    assert "not recorded" not in page
    assert "taken as it is" in flashsigmoid("demo", "speech", *tiny).out
