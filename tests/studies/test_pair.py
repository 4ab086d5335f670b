"""Comparisons over seeds: what is planned, where a training stands, and all of it once with real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flashsigmoid.recipes.language import RECIPES
from flashsigmoid.recipes.pretraining import RECIPES as PRETRAININGS
from flashsigmoid.recipes.vision import RECIPES as IMAGES
from flashsigmoid.record import RecordWriter, find_runs, read_records
from flashsigmoid.studies.jobs import Schedule
from flashsigmoid.studies.pair import LOG, Watch, compared, last_lines, plan, train_trials
from flashsigmoid.training.callbacks import Progress
from flashsigmoid.training.checkpoint import CONFIG, TRAINER, WEIGHTS, checkpoint_path

ALL = {**RECIPES, **IMAGES, **PRETRAININGS}


def test_a_pair_is_planned_seed_by_seed() -> None:
    trials = plan(ALL, "demo", Path("out"), fields={"steps": "4", "seed": "5"}, seeds=2)
    assert [trial.name for trial in trials] == ["sigmoid-5", "softmax-5", "sigmoid-6", "softmax-6"]
    assert [str(trial.folder) for trial in trials[:2]] == ["out/sigmoid/seed-5", "out/softmax/seed-5"]
    assert [(trial.run.model.attention, trial.run.seed, trial.run.steps) for trial in trials[1:3]] == [
        ("softmax", 5, 4),
        ("sigmoid", 6, 4),
    ]
    differing = [trial.run.settings() for trial in trials[:2]]
    assert [name for name in differing[0] if differing[0][name] != differing[1][name]] == ["attention"]


def test_arms_differ_in_the_fields_that_they_name() -> None:
    arms = {"rope": {"position": "rope", "alibi_bias": "none"}, "wide": {"dim": "256", "betas": "0.9,0.95"}}
    rope, wide = plan(ALL, "demo", Path("out"), seeds=1, arms=arms)
    assert (rope.run.model.position, wide.run.model.dim, wide.run.optim.betas) == ("rope", 256, (0.9, 0.95))
    words = wide.command("cpu")
    assert words[1:5] == ("-m", "flashsigmoid", "train", "demo")
    assert words[5:] == (
        *("--set", "model.dim=256", "--set", "optim.betas=0.9,0.95", "--set", "seed=0"),
        *("--out", "out/wide/seed-0", "--resume", "--device", "cpu"),
    )


def test_what_follows_begins_with_its_own_arm_and_seed() -> None:
    trials = plan(
        ALL,
        "simclr_digits",
        Path("out"),
        seeds=2,
        fields={"model.dim": "32", "steps": "2", "data.img_size": "28"},
        then={"probe_digits": {"steps": "3"}, "finetune_digits": {}},
    )
    names = ["sigmoid-0", "probe_digits sigmoid-0", "finetune_digits sigmoid-0", "softmax-0"]
    assert [trial.name for trial in trials[:4]] == names
    probe = trials[10]
    assert (probe.name, probe.after) == ("probe_digits softmax-1", "softmax-1")
    assert probe.folder == Path("out/then-probe_digits/softmax/seed-1")
    run = probe.run
    assert (run.init, run.seed, run.steps, run.batch) == ("out/softmax/seed-1", 1, 3, 256)  # pyright: ignore
    assert (run.model.attention, run.model.dim, run.data.img_size) == ("softmax", 32, 28)  # pyright: ignore


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("dmeo", {}, "RECIPE must be one of demo, .* got dmeo"),
        ("demo", {"then": {"dmeo": {}}}, "got dmeo"),
        ("demo", {"seeds": 0}, "seeds must be at least 1, got 0"),
        ("demo", {"fields": {"attention": "softmax"}}, "model.attention must be set for all arms or by an arm"),
        ("demo", {"fields": {"nlayer": "2"}}, "did you mean model.nlayers"),
        ("demo", {"fields": {"sigmoid_bias": "-3"}}, "no effect with attention=softmax, got it for the arm softmax"),
        ("demo", {"arms": {"a": {}, "b": {"attention": "sigmoid"}}}, "arms must differ in a field, got a and b"),
        ("demo", {"arms": {"../a": {}}}, "an arm must have a name of letters, .* got '../a'"),
        ("demo", {"arms": {"then-a": {}}}, "an arm must have a name of letters"),
        ("simclr_digits", {"then": {"byol_digits": {}}}, "must be a recipe that begins with an encoder"),
        ("digits", {"then": {"probe_digits": {"lr": "x"}}}, "optim.lr must be a number"),
    ],
)
def test_a_plan_that_cannot_be_is_one_error(recipe, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan(ALL, recipe, Path("out"), **options)


def fake_checkpoint(trial, step: int, **changes) -> None:
    path = checkpoint_path(trial.folder, step)
    path.mkdir(parents=True)
    for name in (WEIGHTS, TRAINER):
        (path / name).touch()
    config = {**replace(trial.run, **changes).sections(), "fingerprint": "f", "files": []}
    (path / CONFIG).write_text(json.dumps(config))


def test_a_trial_is_finished_with_its_last_checkpoint(tmp_path) -> None:
    a, b, c = plan(ALL, "demo", tmp_path, seeds=3, arms={"a": {}}, fields={"steps": "8", "val_every": "8"})
    assert not a.is_finished
    fake_checkpoint(a, 8)
    fake_checkpoint(b, 7)
    assert a.is_finished
    assert not b.is_finished
    fake_checkpoint(c, 8, batch=3)
    with pytest.raises(ValueError, match=r"run.batch must stay as the run began .* in .*a/seed-2; --out names another"):
        _ = c.is_finished
    schedule = Schedule([], 1)
    schedule.states = {"a-0": "finished", "a-1": "failed", "a-2": "finished"}
    assert compared([a, b, c], schedule) == {tmp_path: [a.folder, c.folder]}


def test_all_finished_starts_nothing(tmp_path) -> None:
    trials = plan(ALL, "demo", tmp_path, seeds=1)
    for trial in trials:
        fake_checkpoint(trial, trial.run.steps)
    said = []
    assert train_trials(trials, show=said.append, say=said.append).named("finished") == ["sigmoid-0", "softmax-0"]
    assert said == ["trained already, taken as they are: sigmoid-0, softmax-0"]
    with pytest.raises(ValueError, match="max_minutes must be positive or None, got 0"):
        train_trials(trials, max_minutes=0, show=said.append, say=said.append)


def test_where_a_training_stands_is_read_from_its_records(tmp_path) -> None:
    path = tmp_path / "records.jsonl"
    watch = Watch("a", path, 10)
    assert not watch.read()
    with RecordWriter(path, {}, "test") as writer:
        assert not watch.read()
        writer.write("val/loss", 3.0, step=0, time_s=0.0)
        writer.write("baseline/bigram", 2.0, step=0)
        assert watch.read()
        assert watch.progress == Progress("a", 0, 10, 0.0, {"val/loss": 3.0}, True)
        assert not watch.read()
        writer.write("train/loss", float("nan"), step=5, time_s=2.5)
        assert watch.read()
        assert (watch.progress.step, watch.progress.time_s, watch.progress.validated) == (5, 2.5, False)
        assert watch.progress.metrics["train/loss"] != watch.progress.metrics["train/loss"]
    with path.open("a") as file:
        file.write('{"name": "train/lo')  # half written
    assert not watch.read()
    with RecordWriter(path, {}, "test", 0) as writer:  # cut back, and shorter than what was read
        watch.read()
        writer.write("train/loss", 1.0, step=1, time_s=0.5)
        assert watch.read()
        assert (watch.progress.step, watch.progress.metrics) == (1, {"train/loss": 1.0, "val/loss": 3.0})


def test_the_end_of_a_log(tmp_path) -> None:
    log = tmp_path / "log.txt"
    assert last_lines(log) == "  (it is empty)"
    log.write_text("".join(f"line {i}\n" for i in range(30)) + "\n")
    assert last_lines(log, 2) == "  line 28\n  line 29"


WAIT_S = 300  # for processes beside others on a busy machine
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TINY = ("dim=16", "nlayers=1", "nheads=2", "seqlen=32", "batch=2", "val_windows=2", "sample_tokens=0", "log_every=1")
SETS = tuple(word for field in TINY for word in ("--set", field))


def pair(folder: Path, *words: str) -> subprocess.Popen[str]:
    # a shell's background job hands SIGINT down ignored
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"import signal; from flashsigmoid import __main__; {listen}; __main__.main()"
    command = [sys.executable, "-c", program, "pair", "demo", "--device", "cpu", *SETS, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.long
def test_a_pair_is_stopped_goes_on_and_is_compared_and_a_failure_is_named(tmp_path) -> None:
    """Ctrl-C in the first of two parts; the third arm cannot be trained; then everything is there."""
    arms = ("--arm", "sigmoid:attention=sigmoid", "--arm", "softmax:attention=softmax")
    words = ("--seeds", "1", "--jobs", "2", *arms, "--set", "val_every=20000", "--set", "save_every=20000")
    first = pair(tmp_path, *words, "--set", "steps=20000")
    folders = [tmp_path / f"runs/demo/{arm}/seed-0" for arm in ("sigmoid", "softmax")]
    deadline = time.monotonic() + WAIT_S
    while not all("train/loss" in text(folder / "records.jsonl") for folder in folders):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=WAIT_S)
    assert (first.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "stopped, what ran has saved a checkpoint: the same command goes on"
    assert "Traceback" not in err
    for folder in folders:
        (checkpoint,) = (folder / "checkpoints").iterdir()
        assert "stopped by SIGTERM" in text(folder / LOG)
        assert 0 < int(checkpoint.name.removeprefix("step-")) < 20_000

    second = pair(tmp_path, *words, "--set", "steps=20000", "--max-minutes", "0.0001")
    out, err = second.communicate(timeout=WAIT_S)
    assert (second.returncode, out) == (75, ""), err
    assert "0 of 2 trainings are finished, checkpoints of the others saved: the same command goes on" in err

    broken = ("--arm", "broken:source=nowhere.txt", "--set", "steps=2", "--out", "other")
    third = pair(tmp_path, *words, *broken)
    out, err = third.communicate(timeout=WAIT_S)
    assert third.returncode == 1, err
    end = r"  no checkpoint in .* to resume from: training from the beginning\n  error: .*nowhere.txt"
    assert re.search(rf"broken-0 failed; the end of other/broken/seed-0/log.txt:\n{end}", err)
    assert err.splitlines()[-1] == "error: all trainings must end, got 1 of 3 that failed: broken-0"
    assert re.search(r"^sigmoid-0  2/2  val/loss \d", err, re.MULTILINE)
    assert re.search(r"seeds +│ 1 +│ 1 ", out)
    assert re.search(r"Sigmoid (ends \d|and softmax end)", out)
    assert (tmp_path / "other/report.html").exists()
    assert [run.parent.name for run in find_runs(tmp_path / "other")] == ["sigmoid", "softmax"]
    records = read_records(tmp_path / "other/softmax/seed-0/records.jsonl")
    assert "flashsigmoid train demo" in str(records.header["command"])

    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").rglob("model.safetensors")}
    last = pair(tmp_path, *words, "--set", "steps=2", "--out", "other")
    again, err = last.communicate(timeout=WAIT_S)
    assert (last.returncode, again) == (0, out), err
    assert err == "trained already, taken as they are: sigmoid-0, softmax-0\n"
    assert weights == {path: path.stat().st_mtime_ns for path in (tmp_path / "other").rglob("model.safetensors")}


def text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""
