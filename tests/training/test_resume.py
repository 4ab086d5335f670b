"""A run that is stopped and resumed is the run that was not, to the last bit; and what may not be resumed."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.tiny import differences, remains, tiny_run, write_text

from flashsigmoid.record import read_records
from flashsigmoid.training import language
from flashsigmoid.training.callbacks import Interrupted, Progress
from flashsigmoid.training.checkpoint import checkpoints
from flashsigmoid.training.run import LanguageRun

train = functools.partial(language.train, device="cpu")  # where the same bits are promised


def quiet(progress: Progress) -> None:
    """Show nothing."""


def signal_at(step: int, signum: int, times: int = 1):
    """A `show` that sends this process a signal when the loss of a step is recorded."""

    def show(progress: Progress) -> None:
        if progress.step == step and not progress.validated:
            for _ in range(times):
                os.kill(os.getpid(), signum)

    return show


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[LanguageRun, Path, dict[str, float]]:
    """A run that nobody touched, where it is, and its results."""
    folder = tmp_path_factory.mktemp("whole")
    run = tiny_run(write_text(folder / "text.txt"))
    return run, folder / "run", train(run, folder / "run", show=quiet)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[LanguageRun, Path, dict[str, float]]:
    """A shorter one, for what is refused."""
    folder = tmp_path_factory.mktemp("finished")
    run = tiny_run(write_text(folder / "text.txt"), steps=6)
    return run, folder / "run", train(run, folder / "run", show=quiet)


@pytest.mark.parametrize(
    ("signum", "step", "code"),
    [
        (signal.SIGINT, 3, 130),  # between two checkpoints
        (signal.SIGTERM, 4, 143),  # where a checkpoint is due anyway
        (signal.SIGINT, 6, 130),  # before a validation
        (signal.SIGTERM, 11, 143),  # before the last step
    ],
)
def test_a_signal_saves_and_resuming_ends_with_the_same_bits(tmp_path, capsys, whole, signum, step, code):
    run, untouched, results = whole
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        train(run, tmp_path / "halves", show=signal_at(step, signum))
    assert (stop.value.code, stop.value.step) == (code, step)
    assert stop.value.checkpoint == checkpoints(tmp_path / "halves")[-1]
    assert "--resume" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

    assert train(run, tmp_path / "halves", resume=True, show=quiet) == results
    assert differences(remains(run, untouched), remains(run, tmp_path / "halves")) == []

    def numbers(out_dir):
        records = read_records(out_dir / "records.jsonl").records
        return [(r.name, r.step, r.value) for r in records if r.name != "tokens_per_s"]

    assert numbers(tmp_path / "halves") == numbers(untouched)


def test_the_time_over_saves_and_resuming_ends_with_the_same_bits(tmp_path, capsys):
    run = tiny_run(write_text(tmp_path / "text.txt"), steps=6)
    whole = train(run, tmp_path / "whole", show=quiet, max_minutes=60.0)
    parts = []
    while True:
        try:
            halves = train(run, tmp_path / "halves", resume=True, show=quiet, max_minutes=1e-9)
            break
        except Interrupted as stop:
            parts.append((stop.code, stop.step))
    assert parts == [(75, step) for step in range(1, 6)]  # a step at least in every part
    assert "stopped by max_minutes after step 1, saved" in capsys.readouterr().err
    assert halves == whole
    assert differences(remains(run, tmp_path / "whole"), remains(run, tmp_path / "halves")) == []
    with pytest.raises(ValueError, match="max_minutes must be positive or None, got 0"):
        train(run, tmp_path / "none", max_minutes=0)
    assert not (tmp_path / "none").exists()


def test_a_second_signal_ends_at_once(tmp_path):
    run = tiny_run(write_text(tmp_path / "text.txt"))
    with pytest.raises(SystemExit) as stop:
        train(run, tmp_path / "run", show=signal_at(3, signal.SIGINT, times=2))
    assert (type(stop.value), stop.value.code) == (SystemExit, 130)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_difference_is_seen(tmp_path):
    """The comparison above can fail: another seed changes weights, optimizer state and the batches to come."""
    run = tiny_run(write_text(tmp_path / "text.txt"), steps=6)
    other = replace(run, seed=1)
    train(run, tmp_path / "a", show=quiet)
    train(other, tmp_path / "b", show=quiet)
    found = differences(remains(run, tmp_path / "a"), remains(other, tmp_path / "b"))
    for part in (
        "/weights/embedding.weight",
        "/trainer/optimizer_states",
        "/trainer/flashsigmoid/rng",
        "/next batches/9",
    ):
        assert any(where.startswith(part) for where in found), part


def test_time_goes_on_where_it_stood(tmp_path):
    run = tiny_run(write_text(tmp_path / "text.txt"))
    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", show=signal_at(6, signal.SIGINT))
    train(run, tmp_path / "run", resume=True, show=quiet)
    times = [r.time_s for r in read_records(tmp_path / "run/records.jsonl").records if r.name == "train/loss"]
    assert times == sorted(times)
    assert times[0] > 0.0


def test_a_finished_run_is_returned_as_it_is(finished):
    run, out_dir, first = finished
    saved = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    assert train(run, out_dir, resume=True, show=quiet) == first
    assert saved == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}


def test_a_run_is_not_overwritten(finished):
    run, out_dir, _ = finished
    with pytest.raises(ValueError, match="out_dir must not hold a run unless it is resumed"):
        train(run, out_dir, show=quiet)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda run: replace(run, model=replace(run.model, dropout_p=0.1)), "model.dropout_p"),
        (lambda run: run.with_attention("softmax"), "model.attention"),
        (lambda run: replace(run, optim=replace(run.optim, lr=1e-3)), "optim.lr"),
        (lambda run: replace(run, steps=18), "run.steps"),
        (lambda run: replace(run, batch=4), "run.batch"),
        (lambda run: replace(run, seed=1), "run.seed"),
        (lambda run: replace(run, data=replace(run.data, tokenizer="bpe")), "data.tokenizer"),
        (lambda run: replace(run, data=replace(run.data, source=None)), "data must be the same as when the run began"),
    ],
)
def test_a_changed_description_is_one_error_that_names_the_field(finished, change, field):
    run, out_dir, _ = finished
    with pytest.raises(ValueError, match=field):
        train(change(run), out_dir, resume=True, show=quiet)


def test_what_does_not_matter_may_change(tmp_path):
    run = tiny_run(write_text(tmp_path / "text.txt"))
    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", show=signal_at(3, signal.SIGINT))
    moved = (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    run = replace(run, data=replace(run.data, source=str(moved)), keep_last=5, save_every=4)
    train(run, tmp_path / "run", resume=True, show=quiet)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:08d}" for step in (2, 3, 4, 8, 12)]


def test_resuming_where_nothing_was_saved_begins(tmp_path):
    run = tiny_run(write_text(tmp_path / "text.txt"), steps=6)
    half = tmp_path / "run/checkpoints/step-00000002.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    train(run, tmp_path / "run", resume=True, show=quiet)
    assert not half.exists()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, whole, name):
    run, untouched, _ = whole
    with pytest.raises(Interrupted):
        train(run, tmp_path / "halves", show=signal_at(4, signal.SIGTERM))
    path = checkpoints(tmp_path / "halves")[-1] / name
    path.write_bytes(path.read_bytes()[:-3])
    capsys.readouterr()
    train(run, tmp_path / "halves", resume=True, show=quiet)
    said = f"step-00000004 is damaged, {name} is not as it was written: the one before it is used\n"
    assert capsys.readouterr().err.endswith(said)
    assert differences(remains(run, untouched), remains(run, tmp_path / "halves")) == []


def test_a_run_of_damaged_checkpoints_is_not_begun_anew(tmp_path):
    run = tiny_run(write_text(tmp_path / "text.txt"), steps=2, val_every=2)
    train(run, tmp_path / "run", show=quiet)
    for path in checkpoints(tmp_path / "run"):
        (path / "trainer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="a run must have a whole checkpoint, got only damaged ones in "):
        train(run, tmp_path / "run", resume=True, show=quiet)


def test_a_loss_that_is_not_finite_is_skipped_and_in_the_end_stops(tmp_path, monkeypatch):
    run, loss = tiny_run(write_text(tmp_path / "text.txt")), language.LanguageModule.batch_loss

    def nan_from(first: int, last: int):
        def batch_loss(self, batch):
            return loss(self, batch) * (torch.nan if first <= self.trainer.global_step + 1 <= last else 1.0)

        monkeypatch.setattr(language.LanguageModule, "batch_loss", batch_loss)

    nan_from(3, 4)
    train(run, tmp_path / "two", show=quiet)
    records = read_records(tmp_path / "two/records.jsonl").records
    found = [record.value for record in records if record.name == "skipped_steps"]
    assert found == [1.0] + [2.0] * 9
    nan_from(5, 100)
    with pytest.raises(FloatingPointError, match="finite in one of 3 steps in a row, got nan up to step 7; the last"):
        train(run, tmp_path / "many", show=quiet, max_skipped=3)
    assert [path.name for path in checkpoints(tmp_path / "many")] == ["step-00000004", "step-00000006"]
    weights = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path / "many")]
    assert differences(*weights) == []  # nothing moved
