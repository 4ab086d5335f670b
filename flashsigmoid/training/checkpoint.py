"""Checkpoints: one directory each, complete or not there; weights in safetensors, no pickle on any load path.

    checkpoints/step-00000100/
      model.safetensors   the model's parameters
      trainer.pt          Lightning's state and ours: plain containers and tensors, loaded with weights_only=True
      config.json         what was trained, and on what
      manifest.json       the SHA-256 of every file
      tokenizer.json      of a language model: see tokenizer.py

On a mesh the shards of all ranks take the place of model.safetensors: distributed/checkpoint.py. A checkpoint is
written to a sibling that ends in .tmp, flushed to the disk and renamed: a crash leaves a .tmp, never half a checkpoint.
"""

from __future__ import annotations

import json
import pickle  # for the name of the error that torch.load raises
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..distributed import checkpoint as sharded
from ..distributed.checkpoint import MANIFEST
from ..models.gpt import GPT, GPTConfig
from .tokenizer import Tokenizer, load_tokenizer

FOLDER = "checkpoints"
WEIGHTS, TRAINER, CONFIG, TOKENIZER = "model.safetensors", "trainer.pt", "config.json", "tokenizer.json"
SHARDED = "sharded"  # key of what `DirectoryCheckpoint` loads: the path of a checkpoint that a mesh wrote
_PREFIX = "model."  # of the model inside the LightningModule
# what a model is, by a field of its configuration that the others lack
_KINDS = {"window_size": "a language model", "mels": "a speech recogniser", "patch_size": "an image model"}


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps stands."""
    return run_dir / FOLDER / f"step-{step:08d}"


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _named(run_dir) if _complete(path)]


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest whole one of the run at `path`, as `newest_whole`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(path)
    if _complete(path):
        if reason := sharded.damage(path):
            raise ValueError(f"a checkpoint must be as it was written, got {path}: {reason}")
        return path
    found = newest_whole(path)
    if found is None:
        runs = sorted(str(each.parent) for depth in ("*", "*/*") for each in path.glob(f"{depth}/{FOLDER}"))
        hint = f"; runs below it: {', '.join(runs[:8])}" if runs else ""
        raise ValueError(f"a checkpoint, or a run with one, must be at the path, got {path}{hint}")
    return found


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a checkpoint or of a run's newest checkpoint.

    Raises:
        ValueError: there is none, it is of another kind of model, or it is damaged.
    """
    path = find_checkpoint(path)
    config = load_config(path)
    check_kind(path, config, "a language model")
    try:
        model = GPT(GPTConfig(**config["model"]))
        model.load_state_dict(load_weights(path))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"a checkpoint must hold a GPT and its weights, got {path}: {reason}") from error
    return model.to(device).eval(), load_tokenizer(path / TOKENIZER)


def check_kind(path: Path, config: dict[str, Any], wanted: str) -> None:
    """Whether a checkpoint is of the kind of model that is asked for; one of no known kind is not judged here.

    Args:
        path: of the checkpoint.
        config: its config.json.
        wanted: "a language model", "a speech recogniser" or "an image model".

    Raises:
        ValueError: it is of another kind.
    """
    kind = next((kind for name, kind in _KINDS.items() if name in config.get("model", ())), wanted)
    if kind != wanted:
        raise ValueError(f"the checkpoint must be of {wanted}, got {kind} at {path}")


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The whole weights of a checkpoint, by name, on the CPU."""
    return load_file(path / WEIGHTS) if (path / WEIGHTS).is_file() else sharded.load_tensors(path)


def export_weights(path: str | Path, out: str | Path) -> Path:
    """Write the whole weights of a checkpoint, sharded or not, as one file in safetensors, by the names in the model.

    Args:
        path: a checkpoint, or a run: its newest checkpoint.
        out: the file.

    Raises:
        ValueError: there is none.
    """
    save_file(load_weights(find_checkpoint(path)), Path(out))
    return Path(out)


def load_trainer(path: Path) -> dict[str, Any]:
    """trainer.pt of a checkpoint, on the CPU.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return torch.load(path / TRAINER, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _not_whole(path, error) from error


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint that is as it was written, and a line on stderr for each newer one that is not.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    found = _published(run_dir)
    for path in reversed(found):
        if (reason := sharded.damage(path)) is None:
            return path
        print(f"{path} is damaged, {reason}: the one before it is used", file=sys.stderr)
    if found:
        raise ValueError(f"a run must have a whole checkpoint, got only damaged ones in {run_dir}")
    return None


def load_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads((path / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json of a checkpoint must be whole, got {path}: {error}") from error


def clean(run_dir: Path) -> None:
    """Remove what a crash left half written or half removed."""
    for path in (run_dir / FOLDER).glob("*.tmp"):
        shutil.rmtree(path)


def keep_last(newest: Path, count: int) -> None:
    """Remove all checkpoints of a run but `count`: the one just written and those before it.

    One of a later step is damaged, or the run would have gone on from it: it does not count, and goes.
    """
    found = _published(newest.parents[1])
    end = found.index(newest) + 1
    for path in (*found[: max(0, end - count)], *found[end:]):
        remove(path)


def remove(path: Path) -> None:
    """Remove one checkpoint; it stops being one before its files go."""
    doomed = path.with_name(path.name + ".tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


class DirectoryCheckpoint(CheckpointIO):
    """Lightning's checkpoints as directories: give it to the Trainer as a plugin.

    Args:
        config: for config.json.
        files: further files, by name, and their text.
    """

    def __init__(self, config: dict[str, Any], files: dict[str, str] | None = None) -> None:
        self.config, self.files = config, files or {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write Lightning's `checkpoint` to the directory `path`; when this returns it survives a loss of power."""
        path = Path(path)
        draft = path.with_name(path.name + ".tmp")
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
        weights, others = {}, {}
        for key, value in checkpoint["state_dict"].items():
            if key.startswith(_PREFIX):
                weights[key.removeprefix(_PREFIX)] = value.contiguous()
            else:
                others[key] = value
        save_file(weights, draft / WEIGHTS)
        torch.save({**checkpoint, "state_dict": others}, draft / TRAINER)
        config = {**self.config, "files": sorted(self.files)}
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for name, text in self.files.items():
            (draft / name).write_text(text, "utf-8")
        sharded.publish(draft, path, {file.name: sharded.sha256_of(file) for file in draft.iterdir()})

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """What `save_checkpoint` was given, on the CPU.

        Raises:
            ValueError: a file is damaged.
        """
        path = Path(path)
        state = load_trainer(path)
        try:
            weights = load_weights(path)
        except SafetensorError as error:
            raise _not_whole(path, error) from error
        if not (path / WEIGHTS).is_file():
            state[SHARDED] = path  # moments that want the optimizer's order: the module takes them
        others = state.get("state_dict", {}) if SHARDED not in state else sharded.load_tensors(path, None)  # an average
        return {**state, "state_dict": {**{_PREFIX + key: value for key, value in weights.items()}, **others}}

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one checkpoint."""
        remove(Path(path))


def rng_state() -> dict[str, Any]:
    """The random states of python, numpy, torch and the current CUDA device, as plain containers and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.array(keys, np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the random states of `rng_state` back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def _not_whole(path: Path, error: Exception) -> ValueError:
    reason = (str(error) or "it ends too early").partition("\n")[0]
    return ValueError(f"a checkpoint must be whole and plain, got {path}: {reason}")


def _named(run_dir: str | Path) -> list[Path]:
    """Whatever is called as a checkpoint of a run, oldest first."""
    folder = Path(run_dir) / FOLDER
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if re.fullmatch(r"step-\d{8,}", path.name)]


def _published(run_dir: str | Path) -> list[Path]:
    """What was a complete checkpoint once, whatever has become of it, oldest first."""
    return [path for path in _named(run_dir) if (path / MANIFEST).is_file() or _complete(path)]


def _complete(path: Path) -> bool:
    """Whether no file is missing."""
    if not all((path / name).is_file() for name in (TRAINER, CONFIG)):
        return False
    if not (path / WEIGHTS).is_file() and not (path / MANIFEST).is_file():
        return False
    try:
        files = load_config(path).get("files", [TOKENIZER])
    except ValueError:
        if (path / MANIFEST).is_file():  # it is there, and damaged: `find_checkpoint` and `newest_whole` say so
            return True
        raise
    return all((path / name).is_file() for name in files)
