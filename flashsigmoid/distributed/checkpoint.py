"""Sharded checkpoints by torch.distributed.checkpoint: every rank writes its shards, in a thread, in safetensors.

A checkpoint is a directory: shard files, further files of rank 0, and manifest.json with the SHA-256 of each. It is
written to a sibling that ends in .tmp and renamed once every rank is done. There is no pickle among the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future as SaveFuture
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.futures import Future

from .processes import Processes

MANIFEST = "manifest.json"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class _Writer(HuggingFaceStorageWriter):
    """Shards into a draft, which becomes the checkpoint when all ranks have written.

    Args:
        path: the checkpoint.
        published: called with it on rank 0 once it is there.
    """

    def __init__(self, path: Path, published: Callable[[Path], None]) -> None:
        super().__init__(str(draft_of(path)), save_distributed=True)
        self.target, self.published = path, published

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        """Write this rank's shards; the result is the hash of each of its files."""
        results = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in results})
        done: Future[Any] = Future()
        done.set_result([(name, sha256_of(draft_of(self.target) / name)) for name in names])
        return done

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """Rank 0, once all have written: the manifest, and the rename."""
        draft = draft_of(self.target)
        hashes = {name: digest for of_rank in results for name, digest in of_rank}
        hashes |= {file.name: sha256_of(file) for file in draft.iterdir() if file.name not in hashes}
        publish(draft, self.target, hashes)
        self.published(self.target)


class Saves:
    """The checkpoints of a run, one being written at a time while the training goes on.

    Args:
        world: the ranks.
        published: called with its path on rank 0 when one is complete.
    """

    def __init__(self, world: Processes, published: Callable[[Path], None]) -> None:
        self.world, self.published = world, published
        self._writing: tuple[Path, Any] | None = None

    def save(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        files: Mapping[str, bytes],
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Copy the state to memory and write it behind the training's back; every rank calls it.

        Args:
            path: of the checkpoint.
            model, optimizer: sharded.
            files: further files of rank 0, by name.
            others: further models, such as an average of the weights, by name. Default: none.

        Raises:
            OSError, RuntimeError: as `wait`, of the one before.
        """
        self.wait()
        try:
            self.world.first(lambda: _begin(draft_of(path), files))
        except OSError as error:
            raise _unwritten(path, error) from error
        tensors, _ = _tensors(model, optimizer, others or {})
        writing = async_save(tensors, storage_writer=_Writer(path, self.published), process_group=self.world.saving)
        self._writing = path, writing

    def wait(self) -> None:
        """Until the last one is complete, on every rank.

        Raises:
            OSError: a rank could not write; on every rank.
            RuntimeError: a rank is gone.
        """
        if self._writing is None:
            return
        (path, writing), self._writing = self._writing, None
        assert isinstance(writing, SaveFuture)
        try:
            writing.result()
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            reason = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
            raise _unwritten(path, reason) from error


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: Processes,
    others: Mapping[str, nn.Module] | None = None,
) -> None:
    """Take the state of a checkpoint, whatever number of ranks wrote it; in place.

    Args:
        path: of the checkpoint.
        model, optimizer, others: as `Saves.save` takes them.
        world: the ranks.

    Raises:
        ValueError: other tensors than those of the model.
    """
    tensors, state = _tensors(model, optimizer, others or {})
    reader = HuggingFaceStorageReader(str(path))
    # a parameter that never had a gradient has no moments there, and keeps those of none
    begun = {name.rpartition(".")[0] for name in reader.read_metadata().state_dict_metadata}
    tensors["optim"] = {name: x for name, x in tensors["optim"].items() if f"optim.{name}".rpartition(".")[0] in begun}
    try:
        load_shards(tensors, storage_reader=reader, process_group=world.agreeing)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"a checkpoint must fit the model, got {path}: {cause}") from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict={**state, **tensors["optim"]},
        options=_FLAT,
    )
    for name, other in (others or {}).items():
        set_model_state_dict(other, tensors[name])


def load_whole(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    others: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
) -> None:
    """Take the state of one process alone, in place: every rank has all of it and keeps its shards.

    Args:
        model, optimizer: sharded.
        weights: by name.
        state: of that process's optimizer, whose parameters were in the same order.
        others: as `Saves.save` takes them.
        tensors: of the others, each under its name.

    Raises:
        ValueError: other tensors than those of the model.
    """
    names, parameters = parameter_names(model, optimizer), dict(model.named_parameters())
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    moments = {names[i]: _of(parameters[names[i]], of_one) for i, of_one in state["state"].items()}
    kinds = next(iter(state["state"].values()))
    for name in set(names) - moments.keys():  # it never had a gradient
        moments[name] = {key: torch.zeros(() if key == "step" else parameters[name].shape) for key in kinds}
    options = StateDictOptions(full_state_dict=True)
    try:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=cast(Any, shaped(weights, model)),
            optim_state_dict=cast(Any, {"state": moments, "param_groups": groups}),
            options=options,
        )
        for name, other in others.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            set_model_state_dict(other, cast(Any, shaped(own, other)), options=options)
    except RuntimeError as error:
        raise ValueError(f"a checkpoint must fit the model, got another: {error}") from error


def one_process_state(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """What one process's optimizer of this model would have saved, of a sharded checkpoint.

    Args:
        model, optimizer: of one process, the optimizer fresh.
        path: of the checkpoint.
    """
    moments, parameters = load_tensors(path, "optim."), dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(parameter_names(model, optimizer)):
        prefix = f"state.{name}."
        own = {key.removeprefix(prefix): x for key, x in moments.items() if key.startswith(prefix)}
        state[i] = _of(parameters[name], own)
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _of(parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer's state of a parameter, its moments in the parameter's shape."""
    return {key: x if key == "step" else x.reshape(parameter.shape) for key, x in state.items()}


def shaped(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors, those of one element in the shape that they have in the model: a scalar is (1,) on a mesh."""
    shapes = {name: x.shape for name, x in model.state_dict().items() if x.numel() == 1}
    return {name: x.reshape(shapes[name]) if name in shapes and x.numel() == 1 else x for name, x in tensors.items()}


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters, by their numbers in its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def load_tensors(path: Path, prefix: str | None = "model.") -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, on the CPU, in one process.

    Args:
        path: of the checkpoint.
        prefix: of their names, which is left out: "model.", the default, of the weights, "optim." of AdamW's moments;
            None: those that are neither.
    """
    reader = HuggingFaceStorageReader(str(path))
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(x.size, dtype=x.properties.dtype)
        for name, x in found.items()
        if (not name.startswith(("model.", "optim.")) if prefix is None else name.startswith(prefix))
    }
    if not tensors:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist says so, too
        load_shards(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix or ""): x for name, x in tensors.items()}


def draft_of(path: Path) -> Path:
    """Where a checkpoint is written before it is one."""
    return path.with_name(path.name + ".tmp")


def publish(draft: Path, path: Path, hashes: Mapping[str, str]) -> None:
    """Complete a draft with the manifest of its files' hashes, have it on the disk, and rename it."""
    (draft / MANIFEST).write_text(json.dumps(dict(sorted(hashes.items())), indent=2) + "\n", "utf-8")
    for file in (*sorted(draft.iterdir()), draft):
        flush(file)
    if path.exists():  # it is damaged, or the run would not have come here again
        shutil.rmtree(path)
    os.rename(draft, path)
    flush(path.parent)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint that has a manifest; None: every file is as it was written, or it has none."""
    if not (path / MANIFEST).is_file():
        return None
    try:
        hashes = json.loads((path / MANIFEST).read_text("utf-8"))
    except ValueError:
        return f"{MANIFEST} is not whole"
    for name, digest in hashes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != digest:
            return f"{name} is not as it was written"
    return None


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the file or directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, others: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What is saved, and the whole state of the optimizer.

    Its numbers are the run's description and the step; its tensors are what was learned.
    """
    weights, state = get_state_dict(model, optimizer, options=_FLAT)
    tensors = {"model": weights, "optim": {name: x for name, x in state.items() if isinstance(x, Tensor)}}
    return tensors | {name: get_model_state_dict(other) for name, other in others.items()}, state


def _begin(draft: Path, files: Mapping[str, bytes]) -> None:
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    for name, content in files.items():
        (draft / name).write_bytes(content)


def _unwritten(path: Path, reason: BaseException) -> Exception:
    """Of a checkpoint: an OSError if the disk did it."""
    if isinstance(reason, OSError):
        return OSError(
            f"checkpoint {path.name} could not be written: {reason.strerror or reason}; the one before stands"
        )
    return RuntimeError(f"checkpoint {path.name} could not be written: {reason}")
