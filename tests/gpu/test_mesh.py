"""A language model trained by the command on a mesh of two GPUs, by NCCL, has the losses of one GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed.runs import far

from flashsigmoid.recipes.language import demo
from flashsigmoid.record import read_records

ROOT = Path(__file__).parents[2]
FIELDS = (
    "model.vocab_size=264", "val_every=6", "save_every=3", "log_every=1", "data.val_windows=8", "sample_tokens=20",
)  # fmt: skip


def losses(folder: Path, *options: str) -> list[float]:
    """Of six steps of the demo in float32."""
    words = [sys.executable, "-m", "flashsigmoid", "train", "demo", "--device", "cuda", "--steps", "6"]
    for field in FIELDS:
        words += ["--set", field]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, "--out", str(folder), *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    records = read_records(folder / "records.jsonl").records
    return [record.value for record in records if record.name == "train/loss" and record.value is not None]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], float]:
    """The losses of one GPU, and four times what rounding does to them: the same run, its batches in two parts.

    That is a limit which a rate off by a thousandth would not pass.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, and torch finds {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("alone")
    whole = losses(folder / "whole")
    halves = losses(folder / "halves", "--set", "batch=8", "--set", "accumulate=2")
    allowed = 4.0 * max(far(halves, whole), torch.finfo(torch.float32).eps)
    other = losses(folder / "other", "--set", f"optim.lr={1.001 * demo().optim.lr}")
    assert far(other, whole) > allowed
    return whole, allowed


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("dp=2", ()),
        ("dp=2", ("--set", "compile=True")),
        ("cp=2", ()),
        ("cp=2", ("--set", "recompute=selective")),
        ("tp=2", ()),
    ],
)
def test_two_gpus_train_as_one(
    tmp_path: Path, alone: tuple[list[float], float], mesh: str, options: tuple[str, ...]
) -> None:
    both = losses(tmp_path / "run", "--mesh", mesh, *options)
    one, allowed = alone
    assert len(both) == len(one) == 6
    assert far(both, one) <= allowed
    assert not list((tmp_path / "run").rglob("*.tmp"))
