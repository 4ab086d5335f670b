"""What a signal leaves: a checkpoint and how to go on, or nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from cli.outcome import ENVIRONMENT, TINY, run_python


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_an_interrupted_training_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, number, code):
    never = ["save_every=100000" if word == "save_every=2" else word for word in TINY]
    words = ["train", "demo", "--steps", "100000", "--device", "cpu", *never, "--set", "log_every=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flashsigmoid", *words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "runs/demo/sigmoid/records.jsonl"
    deadline = time.monotonic() + 100
    while not (records.exists() and "train/loss" in records.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (checkpoint,) = (tmp_path / "runs/demo/sigmoid/checkpoints").iterdir()
    last = err.splitlines()[-1]
    assert checkpoint.name in last
    assert "--resume" in last
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_any_work_leaves_quietly(tmp_path, number, code):
    # a shell's background job, as CI may be, hands SIGINT down ignored
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    plant = f"__main__._run = lambda words: os.kill(os.getpid(), {int(number)})"
    program = f"import os, signal; from flashsigmoid import __main__; {listen}; {plant}; __main__.main([])"
    done = run_python("-c", program, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
