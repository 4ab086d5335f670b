"""Studies: a function each that trains or computes, and writes records. What is drawn from them is report/'s."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

STUDIES = (
    "diagnosis",
    "retrieval",
    "k-summation",
    "pair-repeat",
    "neighbours",
    "sinks",
    "speculative",
)  # each a module here with a function of its name, _ for -


def load(name: str) -> Callable[..., Path]:
    """The function of a study: out_dir, and the keywords quick, only, seeds, device, jobs, show and command.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in STUDIES:
        raise ValueError(f"name must be one of {', '.join(STUDIES)}, got {name!r}")
    name = name.replace("-", "_")
    return getattr(importlib.import_module(f".{name}", __name__), name)
