"""Speech on a mesh along dp: the losses of one process, checkpoints for any number of ranks, faults that are seen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import parts
from distributed.crew import Crew
from distributed.runs import far, free_port, losses, remains
from training.tiny import differences

from flashsigmoid.training.audio import SpecAugmentConfig, load_audio
from flashsigmoid.training.ctc import load_recogniser

pytestmark = pytest.mark.long  # stands beside images

EPS = torch.finfo(torch.float32).eps
NAMES = ("train/loss", "grad_norm", "val/loss")
RATES = ("val/cer", "val/cer_se", "val/wer", "val/wer_se", "baseline/constant_cer")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def alone(manifest: Path) -> Path:
    """One process."""
    return by_one(parts.speech_run(manifest), manifest.parent / "alone")


@pytest.fixture(scope="module")
def whole(manifest: Path, ranks: Crew) -> Path:
    """dp=2 that nobody touched."""
    trained(ranks, parts.speech_run(manifest), manifest.parent / "whole")
    return manifest.parent / "whole"


@pytest.fixture(scope="module")
def allowed(manifest: Path) -> dict[str, float]:
    """Of each number four times what rounding does to it: padded batches against packed ones, without draws."""
    run = parts.speech_run(manifest, augment=SpecAugmentConfig(time_masks=0, channel_masks=0))
    run = replace(run, model=replace(run.model, position="sincos"))
    one = by_one(run, manifest.parent / "plain")
    two = by_one(replace(run, model=replace(run.model, packing=True)), manifest.parent / "packed")
    return {name: 4.0 * max(far(losses(two, name), losses(one, name)), EPS) for name in NAMES}


def by_one(run: Any, out_dir: Path) -> Path:
    run.train(out_dir, device="cpu", show=lambda progress: None)
    return out_dir


def trained(ranks: Crew, run: Any, out_dir: Path, fault: str = "", **options: Any) -> list[dict]:
    """On a mesh to the end, with the same results on every rank."""
    answers = ranks.run(parts.train, free_port(), run, out_dir, fault, mesh="dp=2", **options)
    assert all("results" in answer for answer in answers), answers
    assert all(answer["results"] == answers[0]["results"] for answer in answers)
    return answers


def apart(some: Path, other: Path, allowed: dict[str, float]) -> dict[str, float]:
    """How many times what is allowed numbers of two runs differ by; of as many steps as the first has."""
    numbers = {name: losses(some, name) for name in NAMES}
    return {name: far(x, losses(other, name)[: len(x)]) / allowed[name] for name, x in numbers.items()}


def test_two_processes_have_the_numbers_of_one(alone, whole, allowed) -> None:
    """With masks and positions drawn, and micro-batches; 13 utterances to validate, so that one rank has one less."""
    assert max(apart(whole, alone, allowed).values()) <= 1.0, apart(whole, alone, allowed)
    assert max(allowed.values()) <= 2e-5, allowed
    assert all(losses(whole, name) == losses(alone, name) for name in RATES)
    assert (whole / "hearing.npz").is_file()
    assert load_recogniser(whole)[0].config.dim == 16


def test_packed_utterances_and_some_that_are_no_audio(tmp_path, ranks, allowed) -> None:
    """A rank that lost an utterance has the smaller part, and the loss stays that of every character alike."""
    manifest = parts.speech(tmp_path / "data")
    for number in (3, 8, 17, 21):
        (tmp_path / f"data/{number:02}.wav").write_bytes(b"no audio")
    run = parts.speech_run(manifest, model={"packing": True, "position": "rope"}, steps=3)
    by_one(run, tmp_path / "alone")
    trained(ranks, run, tmp_path / "run")
    found = apart(tmp_path / "run", tmp_path / "alone", allowed)
    assert max(found.values()) <= 1.0, found
    assert losses(tmp_path / "run", "data/skipped") == losses(tmp_path / "alone", "data/skipped") == [4.0]


def test_a_rank_whose_utterances_are_all_left_out_takes_part_with_none(tmp_path, ranks, allowed) -> None:
    run = parts.speech_run(parts.speech(tmp_path / "data"), steps=4, val_every=2)
    parts.spoil(load_audio(run.data, run.model.positions), run)
    by_one(run, tmp_path / "alone")
    trained(ranks, run, tmp_path / "run")
    found = apart(tmp_path / "run", tmp_path / "alone", allowed)
    assert max(found.values()) <= 1.0, found
    assert losses(tmp_path / "run", "data/skipped") == losses(tmp_path / "alone", "data/skipped")


@pytest.mark.parametrize("fault", ["others-utterances", "others-draws", "own-characters", "summed"])
def test_a_fault_is_seen(tmp_path, manifest, ranks, alone, allowed, fault) -> None:
    run = parts.speech_run(manifest, steps=2, val_every=2)  # two steps of warm-up, as of six
    trained(ranks, run, tmp_path / "run", fault)
    found = apart(tmp_path / "run", alone, allowed | {"val/loss": torch.inf})
    assert found["grad_norm"] > 100.0, found
    assert fault == "summed" or found["train/loss"] > 100.0, found


@pytest.mark.long
def test_compiled_blocks_train_as_one_process(tmp_path, manifest, ranks, allowed) -> None:
    run = parts.speech_run(manifest, steps=2, val_every=2, pad_frames=120)
    by_one(run, tmp_path / "one")
    answers = trained(ranks, replace(run, compile=True), tmp_path / "two")
    assert all(answer["graphs"] >= 1 for answer in answers)
    found = apart(tmp_path / "two", tmp_path / "one", allowed)
    assert max(found.values()) <= 1.0, found


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.long
def test_with_dropout_a_run_goes_on_with_the_same_bits(tmp_path, manifest, ranks, packing) -> None:
    """A rank's masks are a function of the position of the data; the draws of all stay together."""
    run = parts.speech_run(manifest, model={"dropout_p": 0.2, "packing": packing})
    trained(ranks, run, tmp_path / "whole")
    answers = ranks.run(parts.train, free_port(), run, tmp_path / "run", "SIGTERM", mesh="dp=2")
    assert [answer["error"] for answer in answers] == ["Interrupted 143 3"] * 2
    trained(ranks, run, tmp_path / "run", resume=True)
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "run")) == []


def test_a_run_of_two_goes_on_on_one(tmp_path, monkeypatch, manifest, ranks, alone, allowed) -> None:
    run = parts.speech_run(manifest)
    ranks.run(parts.train, free_port(), run, tmp_path / "run", "SIGTERM", mesh="dp=2")
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    parts.as_one_rank(monkeypatch)
    answer = parts.train(free_port(), run, tmp_path / "one", mesh="dp=1", resume=True)
    assert "results" in answer, answer
    assert max(apart(tmp_path / "one", alone, allowed).values()) <= 1.0, apart(tmp_path / "one", alone, allowed)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("dp=2", {"batch": 3}, "batch must be a multiple of dp=2, got 3"),
        ("tp=2", {}, "cp and tp must be 1 where no language model is trained, got dp=1,cp=1,tp=2"),
    ],
)
def test_what_a_mesh_cannot_train_is_one_clear_error(tmp_path, manifest, ranks, mesh, changes, message) -> None:
    answers = ranks.run(parts.train, free_port(), parts.speech_run(manifest, **changes), tmp_path / "run", mesh=mesh)
    assert [answer["error"] for answer in answers] == [f"ValueError: {message}", "SystemExit: 1"]
    assert not (tmp_path / "run/records.jsonl").exists()
