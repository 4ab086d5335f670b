"""A small language model, trained on the embedded text for about a quarter of a minute: its answers are words."""

from __future__ import annotations

from pathlib import Path

from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.training.checkpoint import load_model
from flashsigmoid.training.data import DataConfig
from flashsigmoid.training.language import LanguageRun, train
from flashsigmoid.training.optim import OptimConfig
from flashsigmoid.training.tokenizer import Tokenizer


def small_run() -> LanguageRun:
    """Bytes, 3 layers of 96, context 96."""
    return LanguageRun(
        name="small",
        model=GPTConfig(vocab_size=257, seqlen=96, nlayers=3, dim=96, nheads=3, nheads_k=1, position="rope"),
        data=DataConfig(val_windows=32),
        optim=OptimConfig(lr=4e-3, warmup=20),
        steps=300,
        batch=16,
        val_every=100,
        save_every=100,
        sample_tokens=0,
    )


def small_model(folder: Path) -> tuple[GPT, Tokenizer, float]:
    """The model, its tokenizer and its validation loss in nats per byte."""
    loss = train(small_run(), folder, device="cpu", show=lambda progress: None)["val/loss"]
    return *load_model(folder), loss
