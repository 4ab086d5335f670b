"""What was learned without labels, in one row per method: neighbours, linear probe and fine-tuning of both arms."""

from __future__ import annotations

from pathlib import Path

from ..record import RECORDS_NAME, read_records
from .arms import group_arms, load_runs
from .classifiers import accuracy_difference_text
from .words import NOT_RECORDED

NOTE = (
    "Percent of the validation images: sigmoid / softmax, and in parentheses sigmoid minus softmax in points. ± is the "
    "standard error of the mean difference over seeds, or, with one seed, that of two samples of images."
)
ARMS = ("sigmoid", "softmax")
_METHODS = {"simclr": "SimCLR", "byol": "BYOL", "mae": "MAE"}


def pretrained_rows(path: str | Path) -> list[dict[str, str]]:
    """One row per folder in a folder, of those that `flashsigmoid pair` wrote: column name -> text.

    A folder is of a pretraining with what its --then began, or of a probe alone, which is called random weights.

    Args:
        path: a folder of such folders.

    Raises:
        ValueError: it has none, or records that cannot be read.
    """
    rows: list[dict[str, str]] = []
    for folder in sorted(path for path in Path(path).iterdir() if (path / ARMS[0]).is_dir()):
        recipe = _recipe(folder)
        method = _METHODS.get(recipe.split("_")[0])
        stages = {stage.name.removeprefix("then-").split("_")[0]: stage for stage in folder.glob("then-*")}
        stages["neighbours" if method else recipe.split("_")[0]] = folder
        rows.append(
            {
                "after": method or "random weights",
                "seeds": str(len(list((folder / ARMS[0]).iterdir()))),
                "nearest neighbours": _cell(stages.get("neighbours")),
                "linear probe": _cell(stages.get("probe")),
                "fine-tuned": _cell(stages.get("finetune")),
            }
        )
    if not rows:
        raise ValueError(f"a folder of pretrainings must have one that holds {ARMS[0]}, got none in {path}")
    return sorted(rows, key=lambda row: ("random weights", *_METHODS.values()).index(row["after"]))


def _recipe(folder: Path) -> str:
    """The name of the recipe of the first run of the first arm."""
    records = sorted((folder / ARMS[0]).glob(f"*/{RECORDS_NAME}"))
    if not records:
        raise ValueError(f"an arm must have a run, got none in {folder / ARMS[0]}")
    return str(read_records(records[0]).settings.get("recipe"))


def _cell(stage: Path | None) -> str:
    """Both arms and their difference."""
    if stage is None:
        return NOT_RECORDED
    arms = group_arms(load_runs([stage / arm for arm in ARMS]))
    if len(arms) != len(ARMS) or not all(arm.accuracies.values for arm in arms):
        raise ValueError(f"a stage must have two arms with an accuracy, got {len(arms)} arms in {stage}")
    means = " / ".join(f"{100 * arm.accuracies.mean:.1f}" for arm in arms)
    return f"{means} ({accuracy_difference_text(*arms)})"
