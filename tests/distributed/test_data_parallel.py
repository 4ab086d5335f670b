"""Images on a mesh along dp: the losses of one process, checkpoints for any number of ranks, faults that are seen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import parts
from distributed.crew import Crew
from distributed.runs import far, free_port, losses, remains, stopped_at
from training.tiny import differences

from flashsigmoid.training.augment import AugmentConfig
from flashsigmoid.training.callbacks import Interrupted
from flashsigmoid.training.images import ImageConfig, load_images
from flashsigmoid.training.part import val_numbers
from flashsigmoid.training.transfer import load_encoder

EPS = torch.finfo(torch.float32).eps
NAMES = ("train/loss", "grad_norm", "val/loss")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.images(tmp_path_factory.mktemp("images") / "few.npz")


@pytest.fixture(scope="module")
def alone(few: Path) -> Path:
    """One process."""
    return by_one(parts.image_run(few), few.parent / "alone")


@pytest.fixture(scope="module")
def whole(few: Path, ranks: Crew) -> Path:
    """dp=2 that nobody touched."""
    trained(ranks, parts.image_run(few), few.parent / "whole")
    return few.parent / "whole"


@pytest.fixture(scope="module")
def allowed(few: Path) -> dict[str, float]:
    """Of each number four times what rounding does to it: a run without draws, its micro-batches in two parts."""
    run = parts.image_run(few, augment=AugmentConfig(), attention_snapshots=0)
    run = replace(run, model=replace(run.model, drop_path=0.0))
    one = by_one(run, few.parent / "plain")
    two = by_one(replace(run, batch=4, accumulate=4), few.parent / "halves")
    return {name: 4.0 * max(far(losses(two, name), losses(one, name)), EPS) for name in NAMES}


def by_one(run: Any, out_dir: Path) -> Path:
    run.train(out_dir, device="cpu", show=lambda progress: None)
    return out_dir


def trained(ranks: Crew, run: Any, out_dir: Path, fault: str = "", **options: Any) -> list[dict]:
    """On a mesh to the end, with the same results on every rank."""
    options = {"mesh": "dp=2"} | options
    answers = ranks.run(parts.train, free_port(), run, out_dir, fault, **options)
    assert all("results" in answer for answer in answers), answers
    assert all(answer["results"] == answers[0]["results"] for answer in answers)
    return answers


def apart(some: Path, other: Path, allowed: dict[str, float]) -> dict[str, float]:
    """How many times what is allowed numbers of two runs differ by; of as many steps as the first has."""
    found = {}
    for name in NAMES:
        x = losses(some, name)
        found[name] = far(x, losses(other, name)[: len(x)]) / allowed[name]
    return found


def test_two_processes_have_the_numbers_of_one(alone, whole, allowed) -> None:
    """With everything drawn, an average that is validated, and micro-batches."""
    assert max(apart(whole, alone, allowed).values()) <= 1.0, apart(whole, alone, allowed)
    assert max(allowed.values()) <= 2e-5, allowed
    assert losses(whole, "val/accuracy") == losses(alone, "val/accuracy")
    assert len(losses(whole)) == 8
    assert (whole / "attention-maps.npz").is_file()


@pytest.mark.parametrize("fault", ["others-part", "others-draws", "summed"])
def test_a_fault_is_seen(tmp_path, few, ranks, alone, allowed, fault) -> None:
    run = parts.image_run(few, steps=2, val_every=2, attention_snapshots=0)  # two steps of warm-up, as of eight
    trained(ranks, run, tmp_path / "run", fault)
    found = apart(tmp_path / "run", alone, allowed | {"val/loss": torch.inf})
    assert found["grad_norm"] > 100.0, found
    assert fault == "summed" or found["train/loss"] > 100.0, found


@pytest.mark.long
def test_compiled_blocks_train_as_one_process(tmp_path, few, ranks, allowed) -> None:
    """Alike, they are one graph; validations take none."""
    run = parts.image_run(few, steps=2, val_every=2, attention_snapshots=0)
    run = replace(run, model=replace(run.model, drop_path=0.0))
    by_one(run, tmp_path / "one")
    answers = trained(ranks, replace(run, compile=True), tmp_path / "two")
    assert [answer["graphs"] for answer in answers] == [1, 1]
    found = apart(tmp_path / "two", tmp_path / "one", allowed)
    assert max(found.values()) <= 1.0, found


def test_a_run_goes_on_on_two_ranks_and_on_one(tmp_path, monkeypatch, few, ranks, alone, whole, allowed) -> None:
    run = parts.image_run(few)
    answers = ranks.run(parts.train, free_port(), run, tmp_path / "run", "SIGTERM", mesh="dp=2")
    assert [answer["error"] for answer in answers] == ["Interrupted 143 3"] * 2
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    trained(ranks, run, tmp_path / "run", resume=True)
    assert differences(remains(whole), remains(tmp_path / "run")) == []
    assert {"average.module.head.weight", "average.module.blocks.0.attn.sigmoid_bias"} <= set(remains(whole)["tensors"])
    parts.as_one_rank(monkeypatch)
    answer = parts.train(free_port(), run, tmp_path / "one", mesh="dp=1", resume=True)
    assert "results" in answer, answer
    assert max(apart(tmp_path / "one", alone, allowed).values()) <= 1.0, apart(tmp_path / "one", alone, allowed)


def test_one_process_and_a_mesh_go_on_from_each_other(tmp_path, few, ranks, alone, allowed) -> None:
    """The average of the weights, too, which is what is validated."""
    run, out = parts.image_run(few), tmp_path / "run"
    with pytest.raises(Interrupted, match="143"):
        run.train(out, device="cpu", show=stopped_at(2))
    answers = ranks.run(parts.train, free_port(), run, out, "SIGTERM", mesh="dp=2", resume=True)
    assert [answer["error"] for answer in answers] == ["Interrupted 143 3"] * 2, answers
    run.train(out, device="cpu", resume=True, show=lambda progress: None)
    assert max(apart(out, alone, allowed).values()) <= 1.0, apart(out, alone, allowed)


def test_an_encoder_of_a_mesh_is_probed_on_one(tmp_path, few, ranks, whole, allowed) -> None:
    """A linear probe with the norm of MAE's: mean and variance are those of the whole micro-batch."""
    changes = {"init": str(whole), "train_only": "head", "head_norm": True, "ema": 0.0, "attention_snapshots": 0}
    run = parts.image_run(few, **changes)
    assert load_encoder(whole, run.model).sha256
    by_one(run, tmp_path / "alone")
    trained(ranks, run, tmp_path / "run")
    assert max(apart(tmp_path / "run", tmp_path / "alone", allowed).values()) <= 1.0
    found = {name: x for name, x in remains(tmp_path / "run")["tensors"].items() if "running" in name}
    assert found["model.head.0.running_var"].ne(1.0).all()


def test_a_fine_tuning_and_files_that_are_no_images(tmp_path, ranks, allowed) -> None:
    """A rate of every layer; a rank that lost an image has the smaller part, and the loss stays the mean over all."""
    root = parts.corrupt_folder(tmp_path / "data")
    data = ImageConfig(source="folder", root=str(root), img_size=14, on_corrupt="skip")
    run = parts.image_run(tmp_path, data=data, layer_decay=0.7, ema=0.0, steps=4, attention_snapshots=0)
    run = replace(run, model=replace(run.model, num_classes=2, bias_mode="per_head", nheads=1))
    by_one(run, tmp_path / "alone")
    trained(ranks, run, tmp_path / "run")
    assert max(apart(tmp_path / "run", tmp_path / "alone", allowed).values()) <= 1.0
    assert losses(tmp_path / "run", "data/skipped") == losses(tmp_path / "alone", "data/skipped") == [5.0]


@pytest.mark.parametrize("fault", ["", "spare-counts", "mixed-with-nothing"])
def test_a_rank_whose_images_are_all_left_out_takes_part_with_none(tmp_path, ranks, allowed, fault) -> None:
    """The mean is over those that there are, and a micro-batch that no rank has is passed over, as by one process."""
    root = parts.corrupt_folder(tmp_path / "data")
    data = ImageConfig(source="folder", root=str(root), img_size=14, on_corrupt="skip")
    run = parts.image_run(tmp_path, data=data, batch=4, steps=6, val_every=3, ema=0.0, attention_snapshots=0)
    run = replace(run, model=replace(run.model, num_classes=2))
    parts.spoil(load_images(data), run)
    by_one(run, tmp_path / "alone")
    trained(ranks, run, tmp_path / "run", fault)
    found = apart(tmp_path / "run", tmp_path / "alone", allowed)
    if fault:
        assert found["train/loss"] > 100.0, found
        return
    assert max(found.values()) <= 1.0, found
    assert losses(tmp_path / "run", "data/skipped") == losses(tmp_path / "alone", "data/skipped")


def test_data_of_which_nothing_can_be_used_end_every_rank_with_one_error(tmp_path, ranks) -> None:
    root = parts.corrupt_folder(tmp_path / "data")
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    data = ImageConfig(source="folder", root=str(root), img_size=14, on_corrupt="skip")
    run = parts.image_run(tmp_path, data=data, attention_snapshots=0)
    run = replace(run, model=replace(run.model, num_classes=2))
    answers = ranks.run(parts.train, free_port(), run, tmp_path / "run", mesh="dp=2")
    message = "ValueError: data must have something that can be used, got 24 that cannot"
    assert message in [answer["error"] for answer in answers], answers
    assert all("error" in answer for answer in answers)


def test_each_rank_reads_its_own_images_only(few) -> None:
    data, run = load_images(ImageConfig(source="npz", root=str(few))), parts.image_run(few)
    assert parts.reads(2, run, data, 12) == parts.reads(4, run, data, 12) == parts.reads(1, run, data, 12)
    for count, batch, ranks in ((21, 4, 2), (16, 4, 2), (17, 4, 2), (1, 4, 4), (9, 2, 4)):
        shares = [val_numbers(count, batch, rank, ranks) for rank in range(ranks)]
        assert sorted(i for mine, _ in shares for i in mine) == list(range(count))
        assert len({-(-len(mine) // batch) + further for mine, further in shares}) == 1


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("dp=2", {"batch": 3}, "batch must be a multiple of dp=2, got 3"),
        ("cp=2", {}, "cp and tp must be 1 where no language model is trained, got dp=1,cp=2,tp=1"),
        (
            "dp=2",
            {"compile": True, "cuda_graphs": True, "accumulate": 1},
            "cuda_graphs must be False on several ranks, whose exchanges no graph holds, got dp=2,cp=1,tp=1",
        ),
    ],
)
def test_what_a_mesh_cannot_train_is_one_clear_error(tmp_path, few, ranks, mesh, changes, message) -> None:
    run = parts.image_run(few, **changes)
    answers = ranks.run(parts.train, free_port(), run, tmp_path / "run", mesh=mesh)
    assert answers[0]["error"] == f"ValueError: {message}"
    assert answers[1]["error"] == "SystemExit: 1"
    assert not (tmp_path / "run/records.jsonl").exists()
