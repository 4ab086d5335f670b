"""Two processes for every quick test of this folder: starting them takes longer than what they compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed import cases, language
from distributed.crew import Crew


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    crew = Crew(2)
    yield crew
    crew.run(cases.release)
    crew.run(language.release)
    crew.close()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Crew]:
    """Two processes as a launcher starts them."""
    crew = Crew(2, grouped=False)
    yield crew
    crew.close()
