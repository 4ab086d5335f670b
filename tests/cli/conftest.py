"""The command in this process, and what makes its trainings short."""

from __future__ import annotations

import functools
import signal
from pathlib import Path

import pytest
from cli.outcome import Flashsigmoid, Outcome
from training.digits import few_images

from flashsigmoid import __main__
from flashsigmoid.training import baseline, classification, ctc, pretraining


@pytest.fixture
def flashsigmoid(capfd, monkeypatch, tmp_path) -> Flashsigmoid:
    """Runs the command in this process, in an empty folder, as its entry point does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*words: str | Path) -> Outcome:
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as left:
                __main__.main([str(word) for word in words])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return call


@pytest.fixture
def few_digits(monkeypatch) -> None:
    """Of the embedded digits the first 200 and 100: what a run takes longest for is to look at them."""
    for module in (classification, pretraining):
        monkeypatch.setattr(module, "load_images", lambda config: few_images(config, 200, 100))


@functools.cache
def best_constant(said: tuple[str, ...], candidates: tuple[str, ...], characters: str) -> str:
    return baseline.best_constant(said, candidates, characters)


@pytest.fixture
def constant_found_once(monkeypatch) -> None:
    """The search for the best constant answer is three quarters of a short run; it is the same in all of them."""
    monkeypatch.setattr(ctc, "best_constant", lambda *texts: best_constant(*map(tuple, texts[:2]), texts[2]))
