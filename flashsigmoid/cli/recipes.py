"""All recipes by name; and folders of runs."""

from __future__ import annotations

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


def remove_run(folder: Path) -> None:
    """Remove a folder if it holds a run, and nothing else by accident."""
    from ..record import RECORDS_NAME

    if (folder / RECORDS_NAME).exists():
        shutil.rmtree(folder)
