"""All recipes by name; and folders of runs."""

from __future__ import annotations

import difflib
import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.run import Run


def find_recipes() -> tuple[dict[str, Callable[[], Run]], str]:
    """All recipes by name, and which are not here and why."""
    recipes: dict[str, Callable[[], Run]] = {}
    missing = []
    for found, reason in _rooms():
        recipes |= found
        missing += [reason] * bool(reason)
    return recipes, "; ".join(missing)


def find_recipe(name: str | None) -> Callable[[], Run]:
    """The recipe of this name.

    Raises:
        ValueError: there is none; says which is near, and which extra would bring more.
    """
    for found, _ in _rooms():
        if name in found:
            return found[name]
    recipes, missing = find_recipes()
    near = difflib.get_close_matches(name or "", recipes, n=1)
    hints = [f"did you mean {other}?" for other in near] + [missing] * bool(missing)
    got = "; ".join([name or "none", *hints])
    raise ValueError(f"RECIPE must be one of those that flashsigmoid train --list names, got {got}")


def _rooms() -> Iterator[tuple[dict[str, Callable[[], Run]], str]]:
    """The recipes of each room, or why there are none; one by one, since the later ones take seconds to import."""
    from ..recipes import language

    yield dict(language.RECIPES), ""
    rooms = (
        *(("vision", "images", "vision"), ("pretraining", "images without labels", "vision")),
        ("speech", "speech", "speech"),
    )
    for room, what, extra in rooms:
        try:
            yield importlib.import_module(f"..recipes.{room}", __package__).RECIPES, ""
        except ModuleNotFoundError as error:
            yield {}, f"recipes for {what} need {error.name}: pip install 'flashsigmoid[{extra}]'"


def remove_run(folder: Path) -> None:
    """Remove a folder if it holds a run, and nothing else by accident."""
    from ..record import RECORDS_NAME

    if (folder / RECORDS_NAME).exists():
        shutil.rmtree(folder)
