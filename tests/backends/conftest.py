"""What several tests of calls that were made before watch."""

from __future__ import annotations

import pytest

from flashsigmoid.backends import known


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[known.Known]:
    """The known calls that were taken."""
    seen: list[known.Known] = []
    take = known.Known.__call__
    monkeypatch.setattr(known.Known, "__call__", lambda self, *args: seen.append(self) or take(self, *args))
    return seen
