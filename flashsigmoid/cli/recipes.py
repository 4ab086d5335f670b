"""All recipes by name; and folders of runs."""

from __future__ import annotations

import difflib
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.run import Run


def find_recipes() -> tuple[dict[str, Callable[[], Run]], str]:
    """All recipes by name, and which are not here and why."""
    from ..recipes import language

    recipes: dict[str, Callable[[], Run]] = dict(language.RECIPES)
    missing = []
    for room, what in (("vision", "images"), ("speech", "speech")):
        try:
            recipes |= importlib.import_module(f"..recipes.{room}", __package__).RECIPES
        except ModuleNotFoundError as error:
            missing.append(f"recipes for {what} need {error.name}: pip install 'flashsigmoid[{room}]'")
    return recipes, "; ".join(missing)


def find_recipe(name: str | None) -> Callable[[], Run]:
    """The recipe of this name.

    Raises:
        ValueError: there is none; says which is near, and which extra would bring more.
    """
    recipes, missing = find_recipes()
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name or "", recipes, n=1)
    hints = [f"did you mean {other}?" for other in near] + [missing] * bool(missing)
    got = "; ".join([name or "none", *hints])
    raise ValueError(f"RECIPE must be one of those that flashsigmoid train --list names, got {got}")


def remove_run(folder: Path) -> None:
    """Remove a folder if it holds a run, and nothing else by accident."""
    from ..record import RECORDS_NAME

    if (folder / RECORDS_NAME).exists():
        shutil.rmtree(folder)
