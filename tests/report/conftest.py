"""Runs that never ran: records with the shape of real ones, computed by formula, for the tests of report/."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsigmoid.record import RecordWriter

BIGRAM = 2.48
SAMPLE = """ROMEO:
Ay, marry, sir: the king shall have my heart,
And I will stand upon the sound of death
To see the world that I have done to thee.

<GLOUCESTER> & Lady:
What say you, "lords"? The duke's of York is come.
"""


def make_run(
    folder: Path,
    *,
    attention: str = "sigmoid",
    seed: int = 0,
    final: float = 1.85,
    steps: int = 600,
    stop: int | None = None,
    nlayers: int = 4,
    broken_at: int | None = None,
    without: tuple[str, ...] = (),
    sample: str = SAMPLE,
    first_norm: float = 0.3,
    bytes_per_token: float = 1.0,
    time_scale: float = 0.2,
    **settings: Any,
) -> Path:
    """A run directory. The validation loss falls from 5.55 to exactly `final` at the last step."""
    noise = random.Random(f"{attention}{seed}{final}")
    fields = {
        "recipe": "demo",
        "attention": attention,
        "sigmoid_bias": None,
        "seed": seed,
        "position": "alibi",
        "norm": "hybrid",
        "seqlen": 256,
        "nlayers": nlayers,
        "dim": 192,
        "steps": steps,
        "lr": 0.002,
        "betas": (0.9, 0.95),
        **settings,
    }

    def loss(step: int) -> float:
        fall = (math.exp(-6.0 * (step / steps) ** 0.55) - math.exp(-6.0)) / (1 - math.exp(-6.0))
        return math.nan if broken_at is not None and step >= broken_at else final + (5.55 - final) * fall

    with RecordWriter(folder / "records.jsonl", fields, command="flashsigmoid demo --seeds 3") as writer:

        def write(name: str, value: float | None = None, **fields: Any) -> None:
            if not any(name.startswith(prefix) for prefix in without):
                writer.write(name, value, **fields)

        write("baseline/bigram", BIGRAM, unit="nats_per_byte")
        write("baseline/bigram_floor", BIGRAM - 0.13, unit="nats_per_byte")
        for step in range(0, (steps if stop is None else stop) + 1, 5):
            when = {"step": step, "time_s": time_scale * step}
            train = loss(step) - 0.05 + noise.gauss(0, 0.05)
            write("train/loss", train * bytes_per_token, unit="nats_per_token", **when)
            if step % 50 == 0:
                write("val/loss", loss(step) * bytes_per_token, unit="nats_per_token", **when)
                write("val/loss_bytes", loss(step), unit="nats_per_byte", **when)
                progress = 1 - math.exp(-4 * step / steps)
                for layer in range(nlayers):
                    norm = first_norm * (1 + 0.2 * layer) * (1 - progress) + (1.2 + layer) * progress
                    mass = 1.0 if attention == "softmax" else first_norm * 3 * (1 - progress) + progress * (0.5 + layer)
                    sink = 0.02 + (0.25 if attention == "softmax" else 0.01) * progress * layer / nlayers
                    write(f"attn_norm/layer_{layer}", norm * noise.gauss(1, 0.02), **when)
                    write(f"row_mass/layer_{layer}", mass, **when)
                    write(f"sink/layer_{layer}", sink, **when)
        write("sample", artifact="sample.txt", step=steps if stop is None else stop)
    if "sample" not in without:
        (folder / "sample.txt").write_text(sample, encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """run(name, **options of make_run) makes tmp_path/runs/name."""
    return lambda name, **options: make_run(tmp_path / "runs" / name, **options)


def make_image_run(
    folder: Path,
    *,
    attention: str = "sigmoid",
    seed: int = 0,
    accuracy: float = 0.9,
    error: float | None = 0.01,
    majority: float | None = 0.12,
    steps: int = 600,
    stop: int | None = None,
    step_ms: float = 50.0,
    skipped: int | None = 0,
    maps: bool = True,
    query: str = "class token",
    **settings: Any,
) -> Path:
    """A run directory as training an image classifier would leave it; `accuracy` is the last one."""
    fields = {"recipe": "digits", "attention": attention, "seed": seed, "steps": steps, "batch": 64, **settings}
    with RecordWriter(folder / "records.jsonl", fields, command="flashsigmoid demo vision") as writer:
        if majority is not None:
            writer.write("baseline/majority", majority, step=0)
        for step in range(0, (steps if stop is None else stop) + 1, 10):
            when = {"step": step, "time_s": step_ms * step / 1e3}
            share = step / steps
            if step:
                writer.write("train/loss", 2.3 - 2.0 * share, unit="nats_per_image", **when)
                writer.write("images_per_s", 64e3 / step_ms, unit="images_per_s", **when)
            if step % 100 == 0:
                writer.write("val/accuracy", 0.1 + (accuracy - 0.1) * share, **when)
                if error is not None:
                    writer.write("val/accuracy_se", error, **when)
                writer.write("val/loss", 2.3 - 2.0 * share, unit="nats_per_image", **when)
                writer.write("attn_norm/layer_0", 1.0 + share, **when)
        if skipped is not None and stop is None:
            writer.write("data/skipped", skipped, unit="files", step=steps)
        if maps and stop is None:
            weights = np.random.default_rng(seed).random((2, 3, 2, 4, 4), dtype=np.float32) / 16
            sums = weights.sum((-2, -1)) if attention == "sigmoid" else np.ones((2, 3, 2), np.float32)
            np.savez_compressed(
                folder / "attention-maps.npz",
                images=np.full((2, 1, 12, 12), 200, np.uint8),
                classes=np.array(["<four>", "nine"]),
                maps=weights,
                sums=sums,
                blocks=np.array([0, 2, 3]),
                heads=np.array([0, 1]),
                query=np.array(query),
            )
            writer.write("attention_maps", step=steps, artifact="attention-maps.npz")
    return folder


@pytest.fixture
def image_run(tmp_path: Path) -> Callable[..., Path]:
    """image_run(name, **options of make_image_run) makes tmp_path/runs/name."""
    return lambda name, **options: make_image_run(tmp_path / "runs" / name, **options)


@pytest.fixture
def pair(image_run: Callable[..., Path]) -> Path:
    """Both arms on images, one seed each, with maps."""
    image_run("sigmoid", accuracy=0.9, error=0.01)
    return image_run("softmax", attention="softmax", accuracy=0.91, error=0.01).parent


@pytest.fixture
def seeds(run: Callable[..., Path], tmp_path: Path) -> Path:
    """Three arms of three seeds; seed by seed sigmoid - softmax is 0.01, 0.03, 0.02."""
    for seed, (sigmoid, softmax) in enumerate([(1.84, 1.83), (1.85, 1.82), (1.86, 1.84)]):
        run(f"sigmoid-{seed}", seed=seed, final=sigmoid)
        run(f"softmax-{seed}", seed=seed, attention="softmax", final=softmax, first_norm=1.4)
        run(f"without-{seed}", seed=seed, final=2.0 + sigmoid, sigmoid_bias=0.0, first_norm=84.0)
    return tmp_path / "runs"
