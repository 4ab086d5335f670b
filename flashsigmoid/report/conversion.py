"""What a conversion from softmax to sigmoid attention cost, from the records of its two arms."""

from __future__ import annotations

import math
from pathlib import Path

from ..record import RECORDS_NAME, RecordFile, read_records

NOTE = (
    "Losses are nats per token of the same validation windows; the original is softmax before the training. "
    "One seed: the difference has no error."
)


def conversion_rows(path: str | Path) -> list[dict[str, str]]:
    """One row per arm: column name -> text, the same columns in every row.

    Args:
        path: the folder of `recipes.conversion.convert`, with the records of both arms.

    Raises:
        ValueError: records are missing, damaged, or have no validation.
    """
    files = {arm: read_records(Path(path) / arm / RECORDS_NAME) for arm in ("sigmoid", "softmax")}
    losses = {arm: _losses(file) for arm, file in files.items()}
    original, rows = losses["softmax"][0], []
    for arm, file in files.items():
        settings, (before, after) = file.settings, losses[arm]
        tokens = math.prod(int(settings[name]) for name in ("steps", "batch", "accumulate", "seqlen"))
        rows.append(
            {
                "attention": arm,
                "b": f"{settings['sigmoid_bias']:.4f}" if arm == "sigmoid" else "",
                "loss before": f"{before:.3f}",
                "loss after": f"{after:.3f}",
                "after, minus the original": f"{after - original:+.3f}",
                "tokens trained on": f"{tokens:,}",
            }
        )
    return rows


def _losses(file: RecordFile) -> tuple[float, float]:
    """Before the first step, and after the last."""
    found = {
        r.step: r.value for r in file.records if r.name == "val/loss" and r.value is not None and r.step is not None
    }
    last = file.settings.get("steps")
    if 0 not in found or last not in found:
        raise ValueError(f"records of a conversion must have a validation at steps 0 and {last}, got {sorted(found)}")
    return found[0], found[last]
