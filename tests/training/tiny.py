"""Tiny runs for the tests of training, and what is left of a run, to compare bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flashsigmoid.models.gpt import GPTConfig
from flashsigmoid.training.checkpoint import CONFIG, TRAINER, WEIGHTS, find_checkpoint
from flashsigmoid.training.data import DataConfig
from flashsigmoid.training.language import load_data
from flashsigmoid.training.optim import OptimConfig
from flashsigmoid.training.run import LanguageRun


def tiny_model(**changes: Any) -> GPTConfig:
    """2 layers of 16, one head, context 16, bytes."""
    return replace(GPTConfig(vocab_size=257, seqlen=16, nlayers=2, dim=16, nheads=1), **changes)


def tiny_run(source: Path | str | None, **changes: Any) -> LanguageRun:
    """Twelve steps of 2 x 2 windows with dropout; validation every 6, a checkpoint every 2, both inside epochs."""
    run = LanguageRun(
        name="tiny",
        model=tiny_model(dropout_p=0.2),
        data=DataConfig(source=None if source is None else str(source), val_windows=4),
        optim=OptimConfig(lr=3e-3, warmup=3),
        steps=12,
        batch=2,
        accumulate=2,
        val_every=6,
        save_every=2,
        log_every=1,
        sample_tokens=4,
    )
    return replace(run, **changes)


def write_text(path: Path, nbytes: int = 1000) -> Path:
    """A text of `nbytes` at `path`: a few dozen windows of 16, so that epochs are short."""
    path.write_bytes(
        (b"To be, or not to be, that is the question:\nWhether 'tis nobler in the mind " * nbytes)[:nbytes]
    )
    return path


def remains(run: LanguageRun, out_dir: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, time aside, and the ten batches that would come next; for `differences`."""
    path = find_checkpoint(out_dir)
    trainer = torch.load(path / TRAINER, weights_only=True)
    ours = trainer["flashsigmoid"]
    del ours["time_s"]
    batches = load_data(run).train.batches(run.batch, ours["position"])
    return {
        "name": path.name,
        "weights": load_file(path / WEIGHTS),
        "trainer": trainer,
        "config": (path / CONFIG).read_text(),
        "next batches": [next(batches).tokens for _ in range(10)],
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Every place where two nests of containers and tensors differ by as much as a bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.cpu().contiguous().numpy().tobytes() == b.cpu().contiguous().numpy().tobytes()
        return [] if same else [where]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        keys = sorted({*a, *b}, key=str)
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [where]
