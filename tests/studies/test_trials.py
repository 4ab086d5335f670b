"""What small studies share: a trial that is there is taken, one of other settings refused, and all are gathered."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from flashsigmoid.record import read_records
from flashsigmoid.studies import STUDIES, load
from flashsigmoid.studies import trials as trials_module
from flashsigmoid.studies.text import text_bytes, text_draw, text_windows
from flashsigmoid.studies.trials import (
    IGNORED,
    Bench,
    Budget,
    Trial,
    run_trials,
)

BUDGET = Budget(steps=20, batch=4, seqlen=8, lr=1e-2)


def quiet(progress) -> None:
    pass


class Counter(nn.Module):
    """The logits of one table, whatever the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, tokens):
        return self.table(tokens)


def draw(step: int):
    tokens = torch.arange(8).remainder(5).expand(4, 8)
    return tokens, torch.where(tokens == 0, IGNORED, (tokens + 1).remainder(5))


def trials(ran: list, seeds=(0, 1), lr: float = 1e-2) -> list[Trial]:
    def run(bench: Bench) -> None:
        ran.append(bench.trial.name)
        bench.train(Counter().to(bench.device), draw, replace(BUDGET, lr=lr), at=lambda step: None)
        bench.writer.write("accuracy", 0.5, task="none")

    return [
        Trial(arm=arm, seed=seed, settings={"lr": lr, "kind": arm}, run=run, tags=("kind",))
        for seed in seeds
        for arm in ("one", "two")
    ]


def test_what_is_there_is_taken_and_all_is_gathered(tmp_path) -> None:
    ran: list[str] = []
    path = run_trials("mine", trials(ran), tmp_path, only=("o*",), seeds=(1,), device="cpu", show=quiet)
    assert ran == ["one-seed-1"]
    run_trials("mine", trials(ran), tmp_path, device="cpu", show=quiet, command="the command")
    assert ran == ["one-seed-1", "one-seed-0", "two-seed-0", "two-seed-1"]
    file = read_records(path)
    assert path == tmp_path / "mine.jsonl"
    assert (file.settings, file.header["command"]) == ({"study": "mine", "lr": 1e-2}, "the command")
    ends = [record.tags for record in file.records if record.name == "train_s"]
    assert [(tags["arm"], tags["seed"], tags["kind"]) for tags in ends] == [
        ("one", 0, "one"), ("two", 0, "two"), ("one", 1, "one"), ("two", 1, "two"),
    ]  # fmt: skip
    assert all("commit" in tags and "dirty" in tags for tags in ends)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "trials"]


def test_a_torn_trial_runs_again(tmp_path) -> None:
    ran: list[str] = []
    run_trials("mine", trials(ran), tmp_path, device="cpu", show=quiet)
    torn = tmp_path / "trials" / "two-seed-1.jsonl"
    lines = torn.read_text().splitlines()
    torn.write_text("\n".join(lines[:-1]) + "\n")
    del ran[:]
    run_trials("mine", trials(ran), tmp_path, device="cpu", show=quiet)
    assert ran == ["two-seed-1"]


def test_a_trial_of_other_settings_is_refused(tmp_path) -> None:
    run_trials("mine", trials([]), tmp_path, device="cpu", show=quiet)
    with pytest.raises(ValueError, match=r"lr must be that of .*one-seed-0.jsonl, 0.01, got 0.1"):
        run_trials("mine", trials([], lr=0.1), tmp_path, device="cpu", show=quiet)


def test_unknown_arms_and_seeds_are_one_clear_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="an arm must be one of one, two, or a pattern of them, got three"):
        run_trials("mine", trials([]), tmp_path, only=("three",), show=quiet)
    with pytest.raises(ValueError, match="a seed of the study must be one of 0, 1, got 2"):
        run_trials("mine", trials([]), tmp_path, seeds=(2,), show=quiet)
    assert list(tmp_path.iterdir()) == []


def test_side_by_side_runs_what_is_missing_by_name_and_raises_what_failed(tmp_path, monkeypatch) -> None:
    """Threads in place of processes, in which the trials of the test's own study are found."""
    ran: list[str] = []
    every = trials(ran)

    def study(out_dir, *, quick, only, seeds, device, show, command):
        if (only, seeds) == (("two",), (1,)):
            raise ValueError("two-seed-1 is broken")
        return run_trials("mine", every, out_dir, only=only, seeds=seeds, device=device, show=show, command=command)

    pools: list[int] = []

    def pool(jobs, *, mp_context, initializer, initargs):
        pools.append(jobs)
        assert mp_context.get_start_method() == "spawn"
        return ThreadPoolExecutor(1)

    every = [replace(trial, settings={**trial.settings, "quick": True}) for trial in every]
    monkeypatch.setattr(trials_module, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(trials_module, "load", lambda name: {"mine": study}[name])
    run_trials("mine", every, tmp_path, only=("one",), seeds=(0,), device="cpu", show=quiet)
    with pytest.raises(ValueError, match="two-seed-1 is broken"):
        run_trials("mine", every, tmp_path, device="cpu", jobs=9, show=quiet, command="the command")
    assert pools == [3]  # no more processes than trials
    assert ran == [
        "one-seed-0",
        "two-seed-0",
        "one-seed-1",
    ]  # the one that is there is taken, the broken one stops no other
    file = read_records(tmp_path / "trials" / "one-seed-1.jsonl")
    assert file.header["command"] == "the command"
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_trials("mine", every, tmp_path, jobs=0, show=quiet)


@pytest.mark.long
def test_processes_side_by_side_give_the_numbers_of_one(tmp_path) -> None:
    numbers = []
    for jobs in (1, 2):
        options: dict = {"quick": True, "only": ("softmax", "sigmoid"), "seeds": (0,), "device": "cpu", "show": quiet}
        path = load("k-summation")(tmp_path / str(jobs), jobs=jobs, **options)
        numbers.append([r.value for r in read_records(path).records if r.name == "error"])
    assert len(numbers[0]) > 2
    assert numbers[0] == numbers[1]


def test_training_lowers_the_loss_and_looks_ten_times(tmp_path) -> None:
    looks: list[int] = []

    def run(bench: Bench) -> None:
        bench.train(Counter(), draw, replace(BUDGET, steps=200, lr=0.1), at=looks.append)

    trial = Trial(arm="one", seed=0, settings={}, run=run)
    records = read_records(run_trials("mine", [trial], tmp_path, device="cpu", show=quiet)).records
    losses = [record.value for record in records if record.name == "train/loss"]
    assert looks == list(range(0, 201, 20))
    assert len(losses) == 10
    assert losses[-1] < 0.1 < losses[0]


def test_a_loss_that_is_not_finite_ends_a_training(tmp_path) -> None:
    class Broken(Counter):
        def forward(self, tokens):
            return super().forward(tokens) * math.nan

    trial = Trial(arm="one", seed=0, settings={}, run=lambda bench: bench.train(Broken(), draw, BUDGET))
    records = read_records(run_trials("mine", [trial], tmp_path, device="cpu", show=quiet)).records
    losses = [record for record in records if record.name == "train/loss"]
    assert [record.step for record in losses] == [2]
    assert math.isnan(losses[0].value)


def test_text_is_split_and_drawn_by_seed_and_step() -> None:
    text, val = text_bytes()
    assert len(val) == pytest.approx(0.1 * (len(text) + len(val)), abs=1)
    tokens, targets = text_draw(text, BUDGET, 3)(7)
    assert tokens.shape == targets.shape == (4, 8)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    again, other = text_draw(text, BUDGET, 3)(7)[0], text_draw(text, BUDGET, 3)(8)[0]
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    windows = text_windows(val, 16, 160)
    assert windows.shape == (10, 17)
    assert torch.equal(windows[-1], val[-17:].long())


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_the_function_of_its_name(name) -> None:
    assert load(name).__name__ == name.replace("-", "_")
    with pytest.raises(ValueError, match=r"name must be one of diagnosis, .*, got 'sleep'"):
        load("sleep")


@pytest.mark.long
def test_a_signal_ends_the_trials_that_run_side_by_side(tmp_path) -> None:
    """The command and its workers, and what stands behind in the queue is not begun."""
    words = [sys.executable, "-m", "flashsigmoid", "study", "retrieval", "--quick", "--jobs", "2", "--device", "cpu"]
    study = subprocess.Popen([*words, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(begun := list(tmp_path.glob("trials/*.jsonl"))) < 2:
        assert study.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    study.send_signal(signal.SIGTERM)
    study.communicate(timeout=30)  # what workers hold open ends, too
    assert study.returncode == 143
    assert sorted(tmp_path.glob("trials/*.jsonl")) == sorted(begun)
