"""What each practice is worth, in one row per variant, from the summary that a study of ablations writes."""

from __future__ import annotations

import math
from pathlib import Path

from ..record import Record, read_records
from .summary import NOT_RECORDED, number_text

NOTE = (
    "One seed: hints, not findings. ± is a standard error that the number of validation images alone gives; "
    "|A V| is the attention norm before the first step, from the least to the greatest layer."
)


def ablation_rows(path: str | Path) -> list[dict[str, str]]:
    """One row per variant: column name -> text, the same columns in every row.

    Args:
        path: a file as `studies.vision_ablation.summarise` writes it.

    Raises:
        ValueError: it is missing, damaged, or has no variant.
    """
    variants: dict[str, dict[str, Record]] = {}
    for record in read_records(path).records:
        variants.setdefault(str(record.tags.get("variant")), {})[record.name] = record
    variants = {name: records for name, records in variants.items() if "val/accuracy" in records}
    if not variants:
        raise ValueError(f"a summary of ablations must have at least one complete variant, got none in {path}")
    base = variants.get("base")
    return [
        {
            "variant": name,
            "differs in": str(records["val/accuracy"].tags.get("change") or ""),
            "accuracy, %": _accuracy_text(records),
            "minus base": "" if base is None or records is base else _difference_text(records, base),
            "first |A V|": _norm_text(records),
            "ms per step": number_text(_value(records, "step_ms")) if "step_ms" in records else NOT_RECORDED,
        }
        for name, records in variants.items()
    ]


def _value(records: dict[str, Record], name: str) -> float:
    value = records[name].value if name in records else None
    return math.nan if value is None else value


def _percent(records: dict[str, Record]) -> tuple[float, float]:
    """The accuracy and its standard error."""
    return 100.0 * _value(records, "val/accuracy"), 100.0 * _value(records, "val/accuracy_se")


def _accuracy_text(records: dict[str, Record]) -> str:
    mean, error = _percent(records)
    broke = "val/loss" in records and not math.isfinite(_value(records, "val/loss"))
    return f"{mean:.1f} ± {error:.1f}" + (", loss not finite" if broke else "")


def _difference_text(records: dict[str, Record], base: dict[str, Record]) -> str:
    """In points; the two are taken as independent, although they see the same images."""
    (mean, error), (other, other_error) = _percent(records), _percent(base)
    return f"{mean - other:+.1f} ± {math.hypot(error, other_error):.1f}"


def _norm_text(records: dict[str, Record]) -> str:
    norms = [_value(records, name) for name in records if name.startswith("attn_norm/layer_")]
    if not norms:
        return NOT_RECORDED
    if any(map(math.isnan, norms)):
        return "nan"
    return number_text(norms[0]) if len(norms) == 1 else f"{number_text(min(norms))} to {number_text(max(norms))}"
