"""Which backends this machine can run, and the tile of Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from flashsigmoid import backends
from flashsigmoid.backends import known
from flashsigmoid.backends.problem import Problem
from flashsigmoid.backends.triton import is_interpreted

IS_INTERPRETED = is_interpreted() and importlib.util.find_spec("triton") is not None
# the interpreter has no Gluon: "hopper" runs in tests/gpu only
NAMES = tuple(name for name in backends.NAMES if name != "hopper" and (name != "triton" or IS_INTERPRETED))
FUSED = tuple(name for name in NAMES if name != "reference")


def double(backend: str) -> dict[str, torch.dtype]:
    """float64, or float32 where the backend has no float64."""
    return {"dtype": torch.float32 if backend == "triton" else torch.float64}


def can(backend: str, problem: Problem) -> bool:
    return backends.load(backend).unsupported(problem) is None


def interpret_in_tiles(
    monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int, *, has_descriptors: bool = False
) -> None:
    """Let the interpreter's kernels work in such tiles, powers of two from 16, loaded as on sm_90 or by pointers."""
    if IS_INTERPRETED:
        from flashsigmoid.backends.triton import launch, tiles

        monkeypatch.setattr(tiles, "_INTERPRETED", tiles.Tile(block_m, block_n, 4, 1))
        if has_descriptors:
            monkeypatch.setattr(launch, "_HAVE_DESCRIPTORS", ("cpu",))
        monkeypatch.setattr(launch, "_plan", functools.lru_cache(launch._plan.__wrapped__))  # it remembers tiles
        known.forget()
