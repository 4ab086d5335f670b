"""SimCLR, BYOL and MAE on a mesh along dp: the numbers of one process, checkpoints for both, faults that are seen."""

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
from flashsigmoid.training.images import ImageConfig
from flashsigmoid.training.part import val_shares

METHODS = ("simclr", "byol", "mae")
NAMES = ("train/loss", "grad_norm", "val/loss", "val/feature_spread")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.images(tmp_path_factory.mktemp("images") / "few.npz")


@pytest.fixture(scope="module")
def alone(few: Path) -> dict[str, Path]:
    """One process, of every method."""
    return {name: by_one(parts.pretraining_run(few, name), few.parent / f"{name}-alone") for name in METHODS}


@pytest.fixture(scope="module")
def whole(few: Path, ranks: Crew) -> dict[str, Path]:
    """dp=2 that nobody touched."""
    return {
        name: trained(ranks, parts.pretraining_run(few, name), few.parent / f"{name}-whole") for name in METHODS
    }


def by_one(run: Any, out_dir: Path) -> Path:
    run.train(out_dir, device="cpu", show=lambda progress: None)
    return out_dir


def trained(ranks: Crew, run: Any, out_dir: Path, fault: str = "", **options: Any) -> Path:
    """On a mesh to the end, with the same results on every rank."""
    answers = ranks.run(parts.train, free_port(), run, out_dir, fault, **{"mesh": "dp=2"} | options)
    assert all("results" in answer for answer in answers), answers
    assert all(answer["results"] == answers[0]["results"] for answer in answers)
    return out_dir


def apart(some: Path, other: Path) -> dict[str, float]:
    """Largest relative difference of numbers of two runs; of as many steps as the first has."""
    numbers = {name: losses(some, name) for name in NAMES}
    return {name: far(x, losses(other, name)[: len(x)]) for name, x in numbers.items()}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_numbers_of_one(alone, whole, method) -> None:
    print(method, apart(whole[method], alone[method]))
    for name in ("val/knn_accuracy", "val/knn_accuracy_se"):
        print(name, losses(whole[method], name), losses(alone[method], name))
