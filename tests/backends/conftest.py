"""What several tests share: calls that were made before, and the Hopper kernels without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from flashsigmoid.backends import known


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[known.Known]:
    """The known calls that were taken."""
    seen: list[known.Known] = []
    take = known.Known.__call__
    monkeypatch.setattr(known.Known, "__call__", lambda self, *args: seen.append(self) or take(self, *args))
    return seen


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Launches of the Hopper kernels run by the emulator: a call with changes of tiles and of the kernels' text."""
    from backends import emulator

    from flashsigmoid.backends.hopper import launch

    def prepare(tiles: dict[str, dict[str, Any]], changes: dict[str, tuple[str, str]] | None = None) -> None:
        choose = launch.choose_tile
        launch._plan.cache_clear()
        monkeypatch.setattr(launch, "launch", functools.partial(emulator.launch, emulator.load_kernels(changes)))
        monkeypatch.setattr(
            launch, "choose_tile", lambda problem, way: _other(choose(problem, way), tiles.get(way, {}))
        )
        monkeypatch.setattr(launch, "_multiprocessors", lambda x: 3)  # programs take turns

    yield prepare
    launch._plan.cache_clear()


def _other(tile: Any, changes: dict[str, Any]) -> Any:
    """The tile with what of the changes it can have: a split one has no memory for out."""
    return replace(tile, **(changes | {"own_out": False} if tile.is_split else changes))
