"""Lightning over the processes of a mesh: the strategy that owns dp, cp and tp, and its checkpoints."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning.plugins.environments import TorchElasticEnvironment  # pyright: ignore[reportPrivateImportUsage]
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from ..distributed import checkpoint as sharded
from ..distributed.plans import AXES, sharding_axis
from ..distributed.processes import MeshSizes, Processes, is_launched, parse_mesh, processes
from .checkpoint import CONFIG, TRAINER, WEIGHTS, load_trainer, load_weights
from .cluster import adopt_launcher


class MeshStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that lay themselves over a DeviceMesh, with our three axes for its two.

    Args:
        world: the ranks, whose process group is there already.
        config: for config.json of a checkpoint.
        files: further files of a checkpoint, by name, and their text.
        published: called with a checkpoint's path on rank 0 when it is complete.
    """

    def __init__(
        self, world: Processes, config: dict[str, Any], files: dict[str, str], published: Callable[[Path], None]
    ) -> None:
        super().__init__(timeout=timedelta(seconds=world.timeout_s))
        self.world, self.config, self.files = world, config, files
        self.saves = sharded.Saves(world, published)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Of a sampler of Lightning's: sequences are divided over dp."""
        dp = self.device_mesh["dp"]
        return {"num_replicas": dp.size(), "rank": dp.get_local_rank()}

    def setup_environment(self) -> None:
        """Ranks, device and mesh, before the model is laid over it."""
        self._setup_distributed()
        sizes = self.world.sizes
        self._device_mesh = init_device_mesh(self.root_device.type, (sizes.dp, sizes.cp, sizes.tp), mesh_dim_names=AXES)
        cast(Any, self.lightning_module)._device_mesh = self._device_mesh
        axes = (*(self._device_mesh[axis] for axis in AXES), sharding_axis(self._device_mesh))
        self.world.bound(axis.get_group() for axis in axes)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `save_checkpoint` takes the shards itself."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing, as above."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Begin to write Lightning's `checkpoint` and every rank's shards to the directory; `saves.wait` ends it."""
        others = io.BytesIO()
        torch.save(checkpoint, others)
        config = {**self.config, "files": sorted(self.files)}
        files = {TRAINER: others.getvalue(), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
        files |= {name: text.encode() for name, text in self.files.items()}
        module = cast(Any, self.lightning_module)
        self.saves.save(Path(filepath), module.model, self.optimizers[0], files, module.beside)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer in place, from however many ranks; the rest is returned.

        Raises:
            ValueError: a file is damaged, or is of another model.
        """
        path, module = Path(checkpoint_path), cast(Any, self.lightning_module)
        state = load_trainer(path)
        if (path / WEIGHTS).is_file():
            (own,) = state["optimizer_states"]
            beside = state.get("state_dict", {})
            sharded.load_whole(module.model, self.optimizers[0], load_weights(path), own, module.beside, beside)
            return {**state, "optimizer_states": [{}], "state_dict": {}}
        sharded.load(path, module.model, self.optimizers[0], self.world, module.beside)
        return state


@contextmanager
def joined(mesh: str | None, device: str, timeout_s: float) -> Iterator[Processes | None]:
    """The ranks of this run where a launcher started several; None for one process alone.

    Args:
        mesh: as `parse_mesh` takes it; None: all along dp.
        device: as of `Options`.
        timeout_s: longest wait for another rank.

    Raises:
        ValueError: a mesh that the ranks do not make up, or without processes; a device that none of it has.
    """
    adopt_launcher()
    sizes: MeshSizes | None = None if mesh is None else parse_mesh(mesh)
    if sizes is None and not is_launched():
        yield None
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda on a mesh, got {device}")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    with processes(sizes, kind, timeout_s) as world:
        yield world


def trainer_options(world: Processes, strategy: MeshStrategy) -> dict[str, Any]:
    """Of `pl.Trainer`, what a mesh needs; the ranks of a machine are those of the launcher."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return {
        "accelerator": {"cuda": "gpu"}.get(world.device, world.device),
        "devices": here,
        "num_nodes": world.size // here,
        "strategy": strategy,
        "plugins": [TorchElasticEnvironment()],  # and no other, whatever variables a cluster sets besides
        "use_distributed_sampler": False,
    }
