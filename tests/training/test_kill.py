"""Killed with SIGKILL at random moments and resumed until done, a run ends with the bits of one that nobody touched.

Run by itself, this file is the child: python test_kill.py TEXT OUT_DIR STEPS
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training.tiny import differences, remains, tiny_run, write_text

from flashsigmoid.distributed import checkpoint as sharded
from flashsigmoid.record import RecordWriter
from flashsigmoid.training import checkpoint
from flashsigmoid.training.language import load_data, train
from flashsigmoid.training.run import LanguageRun

TESTS = Path(__file__).parents[1]
SAVING = "saving"  # a file beside the run: there while a checkpoint is being written


def run_of(text: Path, steps: int) -> LanguageRun:
    """Steps of 2 x 2 windows, about 14 steps an epoch, a checkpoint every 2 steps, dropout on."""
    return tiny_run(text, steps=steps, val_every=20, log_every=10)


def child(text: Path, out_dir: Path, steps: int) -> None:
    """Train, resuming; a checkpoint takes about 40 ms longer, so that a kill can hit it at every stage."""
    flush, save = sharded.flush, checkpoint.DirectoryCheckpoint.save_checkpoint

    def slow_flush(path: Path) -> None:
        time.sleep(0.006)
        flush(path)

    def marked_save(self, *args, **kwargs) -> None:
        marker = out_dir.with_name(SAVING)
        marker.touch()
        save(self, *args, **kwargs)
        marker.unlink()

    sharded.flush = slow_flush
    checkpoint.DirectoryCheckpoint.save_checkpoint = marked_save
    train(run_of(text, steps), out_dir, resume=True, device="cpu", show=lambda progress: None)


def start(text: Path, out_dir: Path, steps: int) -> subprocess.Popen[bytes]:
    """The child, a fresh process of one thread."""
    command = [sys.executable, __file__, str(text), str(out_dir), str(steps)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child that nobody kills."""
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr.decode()


def kill_once(process: subprocess.Popen[bytes], out_dir: Path, run_s: float, into_s: float | None) -> tuple[str, int]:
    """Kill a child `run_s` after its first checkpoint, or, if `into_s`, that long into the next checkpoint's writing.

    Returns:
        where it was, "saving" inside the writing of a checkpoint or "step" outside, and the newest checkpoint's step.
    """
    marker = out_dir.with_name(SAVING)

    def until_saving() -> None:
        while process.poll() is None and not marker.exists():
            time.sleep(0.001)

    until_saving()
    time.sleep(run_s)
    if into_s is not None:
        until_saving()
        time.sleep(into_s)
    process.kill()
    stderr = process.communicate()[1]
    assert process.returncode == -9, f"the child was done before it was killed: {stderr.decode()}"
    found = checkpoint.checkpoints(out_dir)
    newest = int(found[-1].name.removeprefix("step-")) if found else 0
    return ("saving" if marker.exists() else "step"), newest


def kill_and_compare(tmp_path: Path, kills: int, steps: int, most_s: float) -> tuple[int, list[tuple[str, int]]]:
    """Kill `kills` times, every other aimed inside a checkpoint; let it finish; compare with the run nobody touched.

    Args:
        kills: how many.
        steps: of the run.
        most_s: a child lives up to this long after its first checkpoint.

    Returns:
        the seed of the moments, and the moments.
    """
    text = write_text(tmp_path / "text.txt")
    killed, whole = tmp_path / "killed/run", tmp_path / "whole/run"
    for run_dir in (killed, whole):
        run_dir.mkdir(parents=True)
    seed, moments = random.SystemRandom().randrange(2**32), []
    draw = random.Random(seed)
    print(f"seed {seed}")
    untouched = start(text, whole, steps)
    for kill in range(kills):
        killed.with_name(SAVING).unlink(missing_ok=True)
        # writing a checkpoint takes about 40 ms
        run_s, into_s = draw.uniform(0.0, most_s), draw.uniform(0.0, 0.04) if kill % 2 else None
        moments.append(kill_once(start(text, killed, steps), killed, run_s, into_s))
        print(*moments[-1])
    finish(start(text, killed, steps))
    finish(untouched)
    run = run_of(text, steps)
    assert differences(remains(run, whole), remains(run, killed)) == []
    return seed, moments


@pytest.mark.long
def test_two_kills(tmp_path):
    """One outside and one inside the writing of a checkpoint."""
    kill_and_compare(tmp_path, kills=2, steps=60, most_s=0.2)


@pytest.mark.long
def test_twenty_kills(tmp_path):
    """Twenty moments; how many fell inside checkpoint writing and how many in mid-epoch goes to the records."""
    steps = 600
    seed, moments = kill_and_compare(tmp_path, kills=20, steps=steps, most_s=0.5)
    saving = sum(where == "saving" for where, _ in moments)
    run = run_of(tmp_path / "text.txt", steps)
    windows = load_data(run).train.windows
    mid_epoch = sum(run.batch * run.accumulate * step % windows != 0 for _, step in moments)
    assert saving >= 5, moments
    assert 20 - saving >= 2, moments
    assert mid_epoch >= 5, moments
    settings = {**run.settings(), "source": "1000 bytes of text", "kill_seed": seed}
    with RecordWriter(TESTS.parent / "benchmarks/results/kill-resume.jsonl", settings) as writer:
        for where, step in moments:
            writer.write("kill", step=step, where=where)
        writer.write("kills", 20)
        writer.write("kills/saving", saving)
        writer.write("kills/mid_epoch", mid_epoch)
        writer.write("different_tensors", 0)


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
