"""Jobs side by side: order, failures, the time over and interrupts, with processes and a clock that are made up."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from flashsigmoid.studies.jobs import Job, Schedule, State, least_busy, run_jobs, start_process, visible_gpus


def job(name: str, after: str | None = None) -> Job:
    return Job(name, ("true",), Path(f"{name}.txt"), after)


@dataclass
class World:
    """A clock that only `sleep` moves, and processes that take the seconds in their plan and end with its code."""

    plans: dict[str, tuple[float, int]]
    interrupt_at_s: list[float] = field(default_factory=list)
    save_s: float = 2.0  # from a signal to the end
    time_s: float = 0.0
    started: list[tuple[float, str, float | None]] = field(default_factory=list)
    ended: list[tuple[float, str, State]] = field(default_factory=list)
    asked: list[tuple[float, str]] = field(default_factory=list)
    most: int = 0

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        if self.interrupt_at_s and self.time_s >= self.interrupt_at_s[0]:
            del self.interrupt_at_s[0]
            raise KeyboardInterrupt

    def start(self, job: Job, minutes: float | None) -> Running:
        self.started.append((self.time_s, job.name, minutes))
        self.most = max(self.most, len(self.started) - len(self.ended))
        seconds, code = self.plans[job.name]
        return Running(self, job.name, self.time_s + seconds, code)

    def run(self, schedule: Schedule, **options) -> None:
        def ended(job: Job, state: State) -> None:
            self.ended.append((self.time_s, job.name, state))

        run_jobs(schedule, self.start, ended=ended, now=self.now, sleep=self.sleep, **options)


@dataclass
class Running:
    world: World
    name: str
    end_s: float
    code: int

    def poll(self) -> int | None:
        return self.code if self.world.time_s >= self.end_s else None

    def terminate(self) -> None:
        self.world.asked.append((self.world.time_s, self.name))
        if self.world.time_s + self.world.save_s < self.end_s:
            self.end_s, self.code = self.world.time_s + self.world.save_s, 143


def names(world: World) -> list[str]:
    return [name for _, name, _ in world.started]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_all_run_in_order_and_never_more_than_allowed(at_once) -> None:
    world = World(dict.fromkeys("abcde", (3.0, 0)))
    schedule = Schedule([job(name) for name in "abcde"], at_once)
    world.run(schedule)
    assert names(world) == [*"abcde"]
    assert world.most == at_once
    assert schedule.named("finished") == [*"abcde"]
    assert world.time_s == pytest.approx(3.0 * -(-5 // at_once))
    assert world.asked == []


def test_a_job_waits_for_the_one_that_it_begins_with() -> None:
    world = World({"a": (5.0, 0), "probe a": (1.0, 0), "b": (1.0, 0), "probe b": (1.0, 0)})
    schedule = Schedule([job("a"), job("probe a", "a"), job("b"), job("probe b", "b")], 2)
    world.run(schedule)
    assert world.started == [(0.0, "a", None), (0.0, "b", None), (1.0, "probe b", None), (5.0, "probe a", None)]


def test_what_is_finished_does_not_run_again_and_lets_others_run() -> None:
    world = World({"probe a": (1.0, 0)})
    schedule = Schedule([job("a"), job("probe a", "a")], 1, finished=["a"])
    world.run(schedule)
    assert names(world) == ["probe a"]


def test_a_failure_keeps_back_only_what_waits_for_it() -> None:
    world = World({"a": (1.0, 3), "b": (4.0, 0), "c": (1.0, -9)})
    schedule = Schedule([job("a"), job("probe a", "a"), job("b"), job("c")], 2)
    world.run(schedule)
    assert schedule.states == {"a": "failed", "probe a": "waiting", "b": "finished", "c": "failed"}
    assert (1.0, "a", "failed") in world.ended


@pytest.mark.parametrize(("code", "state"), [(0, "finished"), (75, "stopped"), (130, "stopped"), (143, "stopped"),
                                             (-2, "stopped"), (-15, "stopped"), (1, "failed"), (2, "failed"),
                                             (-9, "failed"), (-11, "failed")])  # fmt: skip
def test_an_exit_code_says_how_it_ended(code, state) -> None:
    schedule = Schedule([job("a")], 1)
    assert schedule.ended("a", code) == state == schedule.states["a"]


def test_the_time_over_stops_what_runs_once_and_starts_nothing() -> None:
    world = World({"a": (40.0, 0), "b": (100.0, 0), "c": (100.0, 0)})
    schedule = Schedule([job(name) for name in "abcd"], 2)
    world.run(schedule, max_minutes=1.0)
    assert world.started == [(0.0, "a", 1.0), (0.0, "b", 1.0), (40.0, "c", pytest.approx(1 / 3))]
    assert world.asked == [(60.0, "b"), (60.0, "c")]
    assert world.time_s == pytest.approx(62.0)
    assert schedule.states == {"a": "finished", "b": "stopped", "c": "stopped", "d": "waiting"}


def test_an_interrupt_stops_all_and_waits_for_them() -> None:
    world = World({"a": (40.0, 0), "b": (100.0, 0)}, interrupt_at_s=[7.0])
    schedule = Schedule([job(name) for name in "abc"], 2)
    with pytest.raises(KeyboardInterrupt):
        world.run(schedule)
    assert world.asked == [(7.0, "a"), (7.0, "b")]
    assert world.time_s == pytest.approx(9.0)
    assert schedule.states == {"a": "stopped", "b": "stopped", "c": "waiting"}


def test_a_second_interrupt_asks_again() -> None:
    world = World({"a": (90.0, 0)}, interrupt_at_s=[7.0, 8.0], save_s=5.0)
    schedule = Schedule([job("a")], 1)
    with pytest.raises(KeyboardInterrupt):
        world.run(schedule)
    assert world.asked == [(7.0, "a"), (8.0, "a")]
    assert schedule.states == {"a": "stopped"}


def test_an_error_while_one_starts_stops_the_others() -> None:
    world = World({"a": (90.0, 0)})
    schedule = Schedule([job("a"), job("b")], 2)
    with pytest.raises(KeyError, match="b"):
        world.run(schedule)
    assert world.asked == [(0.0, "a")]
    assert schedule.states["a"] == "stopped"


def test_what_cannot_be_scheduled_is_one_error() -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        Schedule([job("a")], 0)
    for jobs in ([job("a"), job("a")], [job("b", "a"), job("a")]):
        with pytest.raises(ValueError, match="a name of its own and stand behind what it waits for"):
            Schedule(jobs, 1)


def test_processes_share_the_cores_and_print_to_their_logs(tmp_path, monkeypatch) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)
    program = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.getsid(0) == os.getpid())"
    printed = Job("a", (sys.executable, "-c", program), tmp_path / "deep" / "log.txt")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12), raising=False)
    for at_once in (5, 1):
        assert start_process(printed, at_once).wait(60) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert start_process(printed, 5).wait(60) == 0
    assert printed.log.read_text("utf-8").splitlines() == ["2 True", "None True", "7 True"]


def test_each_process_has_the_gpu_that_fewest_have(tmp_path, monkeypatch) -> None:
    assert [least_busy(["0", "1"], taken) for taken in ([], ["0"], ["0", "1"], ["1", "0", "0"])] == ["0", "1", "0", "1"]
    assert least_busy(["0"], []) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus() == ["5", "7"]
    printed = Job("a", (sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"), tmp_path / "log")
    for gpu in ("7", None):
        assert start_process(printed, 2, gpu).wait(60) == 0
    assert printed.log.read_text("utf-8").splitlines() == ["7", "5,7"]
