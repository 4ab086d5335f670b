"""What each practice is worth: a run on images, its variants, and one file with what each reached.

The variants of the model's description are recipes.vision's; those of the activation are made here, since the op and
the models know the sigmoid only.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..models.vision import build_vit
from ..recipes.vision import ablations
from ..record import RECORDS_NAME, Record, RecordFile, RecordWriter, read_records
from ..training.callbacks import Show, show_line
from ..training.classification import ImageRun, train_classifier
from ..training.run import FREE
from .elementwise import ACTIVATIONS, elementwise_attention

SUMMARY = "ablation.jsonl"  # not named as a run's, so that nobody takes it for one
# what the records call the fields that touch neither a parameter nor the images; another source may be other images
_FREE = {"recipe", *(field.partition(".")[2] for field in FREE)} - {"name", "source"}


@dataclass(frozen=True, kw_only=True)
class ActivationRun(ImageRun):
    """An image run with another function of the scores, eagerly: a description that a study resumes and records.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    activation: str  # of `elementwise.ACTIVATIONS`
    divide_by_seqlen: bool = True  # the weights, by the number of tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.model.attention != "sigmoid":
            raise ValueError(f"model.attention must be 'sigmoid' beside an activation, got {self.model.attention!r}")

    @property
    def title(self) -> str:
        """Recipe and activation."""
        return f"{self.name} {self.activation}"

    def build(self) -> nn.Module:
        """The model, with this attention injected."""
        attend = elementwise_attention(ACTIVATIONS[self.activation], divide_by_seqlen=self.divide_by_seqlen)
        return build_vit(self.model, attention_fn=attend)


def variants(base: ImageRun) -> dict[str, ImageRun]:
    """All variants by name, the run itself first, as "base".

    Activations other than the sigmoid are divided by the number of tokens, with b = 0.
    """
    shared = {field.name: getattr(base, field.name) for field in fields(base)}
    shared["model"] = replace(base.model, sigmoid_bias=0.0)
    return ablations(base) | {
        name: ActivationRun(**shared, activation=name) for name in ACTIVATIONS if name != "sigmoid"
    }


def chosen(base: ImageRun, only: Sequence[str] = ()) -> dict[str, ImageRun]:
    """The variants of these names, all by default.

    Raises:
        ValueError: a name that no variant has.
    """
    found = variants(base)
    for name in only:
        if name not in found:
            raise ValueError(f"a variant must be one of {', '.join(found)}, got {name}")
    return {name: run for name, run in found.items() if not only or name in only}


def vision_ablation(
    base: ImageRun,
    out_dir: str | Path,
    *,
    only: Sequence[str] = (),
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    show: Show = show_line,
    command: str | None = None,
) -> Path:
    """Train the variants, each in out_dir/NAME, and summarise all that out_dir holds, whoever trained it.

    What is complete is taken as it is, by its records alone: a run from another machine is copied to its place. What is
    not goes on from its newest checkpoint.

    Args:
        base: the run.
        out_dir: folder of the study.
        only: names of variants. Default: all.
        device, show, command: as `language.train`; `show` is told the name of the variant.

    Returns:
        The file of `summarise`.

    Raises:
        ValueError: an unknown name; a folder that holds another run; as `train_classifier`.
        Interrupted: a signal ended it; the same call goes on.

    Source: arXiv:2409.04431 (its ablations).
    """
    out_dir = Path(out_dir)
    runs = chosen(base, only)
    missing = {name: run for name, run in runs.items() if not _is_complete(out_dir / name, run)}
    for name, run in missing.items():
        train_classifier(
            run,
            out_dir / name,
            resume=True,
            device=device,
            show=lambda progress, name=name: show(replace(progress, name=name)),
            command=command,
        )
    return summarise(out_dir, list(variants(base)), command)


def summarise(out_dir: str | Path, order: Sequence[str] = (), command: str | None = None) -> Path:
    """One file with the end of every complete run in the folders of `out_dir`, a record for each number.

    Each record has the tag `variant`, the name of the folder: val/accuracy, val/accuracy_se and val/loss at the end,
    attn_norm/layer_0 ... before the first step, step_ms, the median time of an optimizer step. That of val/accuracy
    says besides in what its settings differ from the base's, and where it was trained.

    Args:
        out_dir: folder of the study.
        order: names to begin with. Default: by name.
        command: how this came about. Default: that of the process.

    Returns:
        out_dir/ablation.jsonl.
    """
    out_dir = Path(out_dir)
    found = {path.parent.name: read_records(path) for path in sorted(out_dir.glob(f"*/{RECORDS_NAME}"))}
    found = {name: file for name, file in found.items() if _last_step(file) == file.settings.get("steps")}
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    base = found.get("base")
    shared = {
        key: value
        for key, value in (found[names[0]].settings.items() if names else ())
        if all(found[name].settings.get(key) == value for name in names)
    }
    with RecordWriter(out_dir / SUMMARY, shared, command) as writer:
        for name in names:
            for record in _ends(found[name], base):
                tags: Any = {"variant": name, **record.tags}
                writer.write(record.name, record.value, unit=record.unit, step=record.step, **tags)
    return out_dir / SUMMARY


def _ends(file: RecordFile, base: RecordFile | None) -> Iterator[Record]:
    """What the summary has of one run."""
    hardware = file.header.get("hardware", {})
    about = {
        "change": None if base is None else _change(base.settings, file.settings),
        "seed": file.settings.get("seed"),
        "hardware": hardware.get("gpu") or hardware.get("cpu"),
        "commit": file.header.get("commit"),
        "dirty": file.header.get("dirty"),
    }
    for record in file.records:
        if record.step == file.settings["steps"] and record.name in ("val/accuracy", "val/accuracy_se", "val/loss"):
            yield replace(record, tags=about if record.name == "val/accuracy" else {})
        elif record.step == 0 and record.name.startswith("attn_norm/"):
            yield record
    rates = [r.value for r in file.records if r.name == "images_per_s" and r.value]
    if rates:  # without the first stretch, in which kernels are compiled and chosen
        images = file.settings["batch"] * file.settings["accumulate"]
        yield Record(name="step_ms", value=1e3 * images / statistics.median(rates[1:] or rates), unit="ms")


def _is_complete(folder: Path, run: ImageRun) -> bool:
    """Whether the records in a folder are those of the whole run.

    Raises:
        ValueError: they are those of another run.
    """
    # by the records alone: a checkpoint may have stayed where it was trained
    if not (folder / RECORDS_NAME).exists():
        return False
    file = read_records(folder / RECORDS_NAME)
    settings = json.loads(json.dumps(run.settings()))
    for key in [*settings, *(key for key in file.settings if key not in settings)]:
        if key not in _FREE and file.settings.get(key) != settings.get(key):
            raise ValueError(
                f"{key} must be that of the run in {folder}, {file.settings.get(key)!r}, got {settings.get(key)!r}"
            )
    return _last_step(file) == run.steps


def _last_step(file: RecordFile) -> int | None:
    """Of the validations."""
    return max((r.step for r in file.records if r.name == "val/accuracy" and r.step is not None), default=None)


def _change(base: dict[str, Any], settings: dict[str, Any]) -> str:
    """What differs, as "qk_norm=False, ..."."""
    names = dict.fromkeys(key for key in (*base, *settings) if key not in _FREE)
    found = {key: settings[key] for key in names if key in settings and settings[key] != base.get(key)}
    return ", ".join(f"{key}={value:.4g}" if type(value) is float else f"{key}={value}" for key, value in found.items())
