"""What a training step on a mesh sends and holds, counted while it runs on a fake process group, on tensors without
contents: the code is the real one, and one process stands for any number. The formulas are cost.py's and scaling.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn.recompute import Recompute
from .plans import AXES, parallelize
from .processes import MeshSizes


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank hands to others: point to point, and in collectives over `size` ranks.

    Args:
        size: ranks over which weights are sharded.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.point_to_point, self.collective = size, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name() if hasattr(func, "name") else ""
        if name == "c10d::send":
            self.point_to_point += sum(map(_nbytes, args[0]))
        elif name == "c10d::_allgather_base_":
            self.collective += (self.size - 1) * _nbytes(args[1])
        elif name == "c10d::_reduce_scatter_base_":
            self.collective += (self.size - 1) * _nbytes(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Simulated:
    """Bytes of one rank in one training step, with AdamW, weights sharded over dp and cp."""

    attention_bytes: int  # sent between the ranks of cp
    weights_bytes: int  # sent by FSDP: its all-gathers and reduce-scatters
    states_bytes: int  # held: weights, gradients and AdamW's moments


def simulate(
    make: Callable[[], nn.Module],
    seqlen: int,
    sizes: MeshSizes,
    rank: int,
    *,
    batch: int = 1,
    recompute: Recompute = "none",
) -> Simulated:
    """One step of a GPT in bfloat16 over float32 weights, as `plans.parallelize` lays it over a mesh.

    Args:
        make: gives the `models.gpt.GPT`, called where tensors go to the meta device.
        seqlen: tokens of a sequence, over all ranks of cp.
        sizes: of the mesh, tp being 1.
        rank: that is simulated.
        batch: sequences of a rank. Default: 1.
        recompute: of the blocks. Default: "none".

    Raises:
        ValueError: tp above 1, whose collectives are not counted; a process group that is there already.
    """
    if sizes.tp > 1:
        raise ValueError(f"tp must be 1 in a simulation, got {sizes}")
    if dist.is_initialized():
        raise ValueError("a simulation must have no process group beside its own, got one")
    with _fake_group(sizes.size, rank):
        mesh = init_device_mesh("cpu", (sizes.dp, sizes.cp, sizes.tp), mesh_dim_names=AXES)
        with torch.device("meta"):
            model = make()
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        parallelize(model, mesh, mp_policy=policy, recompute=recompute)
        with FakeTensorMode(allow_non_fake_inputs=True), Sent(sizes.dp * sizes.cp) as sent:
            model.to_empty(device="cpu")
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            tokens = torch.empty(batch, seqlen // sizes.cp, dtype=torch.int64)
            F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            held = [x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values()) if x is not None]
        states = sum(_nbytes(x) for x in held if x.dim())
    return Simulated(sent.point_to_point, sent.collective, states)


def simulate_layers(
    make: Callable[[int], nn.Module], nlayers: int, seqlen: int, sizes: MeshSizes, rank: int
) -> Simulated:
    """`simulate` of a model of many layers, all alike, from runs of one and of two: make(layers)."""
    one, two = (simulate(functools.partial(make, layers), seqlen, sizes, rank) for layers in (1, 2))

    def of_all(name: str) -> int:
        first = getattr(one, name)
        return first + (nlayers - 1) * (getattr(two, name) - first)

    return Simulated(*map(of_all, ("attention_bytes", "weights_bytes", "states_bytes")))


@contextmanager
def _fake_group(size: int, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _nbytes(x: Tensor) -> int:
    """Of what this rank has of it."""
    local = getattr(x, "_local_tensor", x)
    return local.numel() * local.element_size()
