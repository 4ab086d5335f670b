"""Items of images and speech: their order, those left out, which a rank has, and its part of draws for all of them.

Laying a model over the ranks is distributed/plans.py's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..distributed.context_parallel import unshard
from ..distributed.processes import MeshSizes
from .data import shuffled_all

NO_LABEL = -100  # of an image that fills up a validation batch: torch's cross entropy leaves it out


@dataclass(frozen=True)
class Part:
    """Items `start` to `start + count` of the `total` of a micro-batch; without a mesh that is all of them.

    A spare item is another rank's, computed for the sake of what ranks do together, and counts nowhere.
    """

    start: int
    count: int
    total: int
    mesh: DeviceMesh | None = None  # the axis "dp"
    spare: bool = False
    before: int = -1  # rank that has the item before this rank's first; -1: any before the first rank is the last

    @property
    def weight(self) -> float:
        """Of a mean over this rank's items: the mean over ranks is then the mean over all items."""
        if self.spare:
            return 0.0
        return 1.0 if self.mesh is None else self.count * self.mesh.size() / self.total

    def of(self, drawn: Tensor, dim: int = 0) -> Tensor:
        """This rank's items of what every rank drew for all."""
        return drawn.narrow(dim, self.start, self.count)

    def whole(self, x: Tensor) -> Tensor:
        """x, (count, ...), with that of all other ranks: (total, ...).

        The gradient of x is the sum of the ranks', so that of their mean is what one process has, if each rank's loss
        is a function of all. Parts may differ in size, which torch's and lightly's gathers do not take.
        """
        if self.mesh is None:
            return x
        whole = x.new_zeros(self.total, *x.shape[1:])
        if self.spare and x.requires_grad:
            # the backward passes here too: FSDP2 exchanges gradients in it
            whole = whole + 0.0 * x.sum()
        elif not self.spare:
            whole[self.start : self.start + self.count] = x
        return _Summed.apply(whole, self.mesh)  # pyright: ignore[reportReturnType]

    def preceded(self, x: Tensor) -> Tensor:
        """x, (count, ...), behind the item before it, of the first rank the last of all. No gradient passes."""
        if self.mesh is None:
            return torch.cat([x[-1:], x])
        last = unshard(x[-1:], self.mesh, dim=0, order="contiguous")
        return torch.cat([last[self.before :][:1], x])


def part_of(count: int, counts: Sequence[int], mesh: DeviceMesh | None) -> Part:
    """The part of a rank with `count` items, where the ranks along dp have `counts`; without any, a spare one."""
    rank, ranks, total = 0 if mesh is None else mesh.get_local_rank(), len(counts), sum(counts)
    before = next(((rank - i) % ranks for i in range(1, ranks + 1) if counts[(rank - i) % ranks]), rank)
    if mesh is not None and not count and total:
        return Part(0, 1, total, mesh, spare=True, before=before)
    return Part(sum(counts[:rank]), count, total, mesh, before=before)


def check_data_parallel(run: Any, sizes: MeshSizes) -> None:
    """Whether a run whose items are images or utterances can be trained on a mesh of these sizes.

    Raises:
        ValueError: cp or tp above 1, cuda_graphs on several ranks, or a batch that dp does not divide.
    """
    if sizes.cp * sizes.tp > 1:
        raise ValueError(f"cp and tp must be 1 where no language model is trained, got {sizes}")
    if run.cuda_graphs and sizes.dp > 1:
        raise ValueError(f"cuda_graphs must be False on several ranks, whose exchanges no graph holds, got {sizes}")
    if run.batch % sizes.dp:
        raise ValueError(f"batch must be a multiple of dp={sizes.dp}, got {run.batch}")


def val_numbers(count: int, batch: int, rank: int, ranks: int) -> tuple[range, int]:
    """Of `count` validation items those of a rank, and how many batches of no items it has behind its own.

    FSDP2 gathers weights at every forward, so all ranks need as many.
    """
    mine, most = range(rank, count, ranks), -(-count // ranks)
    return mine, -(-most // batch) - -(-len(mine) // batch)


def val_shares(numbers: Sequence[int], batch: int, rank: int, ranks: int) -> tuple[list[list[int]], bool]:
    """Of batches of validation items those of a rank in each, and whether in the last it has but a spare one.

    For losses that compare the items of a batch, which are then those of one process.
    """
    shares, is_spare = [], False
    for first in range(0, len(numbers), batch):
        whole = numbers[first : first + batch]
        size = -(-len(whole) // ranks)
        mine = whole[rank * size : (rank + 1) * size]
        is_spare = not mine
        shares.append([*mine] or [whole[-1]])
    return shares, is_spare


def agree_on_skipped(module: Any) -> None:
    """Have a module's data take what other ranks left out as left out."""
    for skipped in module.of_all(module.data.skipped):
        module.data.skip(skipped)


class Order:
    """Batches of numbers of training items without an end, shuffled anew in every epoch; of one rank its part of each.

    A function of (seed, position) only.

    Args:
        run: whose seed and micro-batches.
        dataset: whose items.
        start: position of the first.
        rank, ranks: along dp.
    """

    def __init__(self, run: Any, dataset: Any, start: int, rank: int = 0, ranks: int = 1) -> None:
        self.seed, self.batch, self.size = run.seed, run.batch, run.batch // ranks
        self.start, self.count = start + rank * self.size, len(dataset)

    def __iter__(self) -> Iterator[list[int]]:
        for first in itertools.count(self.start, self.batch):
            found: list[int] = []
            while len(found) < self.size:
                epoch, index = divmod(first + len(found), self.count)
                indices = range(index, min(self.count, index + self.size - len(found)))
                found += shuffled_all(indices, self.count, seed=self.seed, epoch=epoch)
            yield found


def what_is_left(module: Any, batches: Iterable[Any], dataset: Any, spare: Any) -> Iterator[tuple[int, Any]]:
    """Batches of a DataLoader and their numbers, from 1 on, without those of which every item was left out.

    On a mesh that is every item of all ranks, of which each asks as often: a rank alone without any has the spare one.

    Args:
        module: whose mesh.
        batches: None where nothing is left.
        dataset: whose `skipped` says what was left out so far.
        spare: of no item that counts, in place of None on a mesh.

    Raises:
        ValueError: nothing of the dataset can be used; on every rank.
    """
    for number, batch in enumerate(batches, 1):
        # files that cannot be read end the run, or never occur: nothing to ask the others
        may_lack = module.run.data.on_corrupt == "skip"
        if may_lack and not any(module.of_all(batch is not None)):
            agree_on_skipped(module)
            if dataset.skipped.all():
                raise ValueError(f"data must have something that can be used, got {len(dataset)} that cannot")
            continue
        yield number, spare if batch is None else batch


def first_left(dataset: Any, count: int) -> list[Any]:
    """The first `count` items of a dataset, or as many as there are, without those that are left out.

    Raises:
        ValueError: there is none.
    """
    found = list(itertools.islice((item for i in range(len(dataset)) if (item := dataset[i]) is not None), count))
    if not found:
        raise ValueError(f"data must have something that can be used, got {len(dataset)} that cannot")
    return found


@contextmanager
def own_draws(device: torch.device, *key: int) -> Iterator[None]:
    """Random draws that the key decides alone, and none of the training's."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


def here(x: Tensor) -> Tensor:
    """What this rank has of a tensor, in place."""
    return x.to_local().detach() if isinstance(x, DTensor) else x


class BatchNormOfParts(nn.BatchNorm1d):
    """torch's BatchNorm1d, whose mean and variance are those of all ranks' items, on any device.

    torch's SyncBatchNorm needs a GPU.

    Args:
        like: the norm of the whole, whose parameters it takes.
        part: of the current micro-batch.
    """

    def __init__(self, like: nn.BatchNorm1d, part: Callable[[], Part]) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, affine=like.affine)
        self.weight, self.bias, self.part = like.weight, like.bias, part

    def forward(self, input: Tensor) -> Tensor:
        """(count, channels), or as many of every view of the images."""
        if not self.training:
            return super().forward(input)
        part, x = self.part(), input.float()
        counted = x[:0] if part.spare else x
        running: Any = self
        total = part.total * (len(x) // part.count)
        mean = _Summed.apply(counted.sum(0), part.mesh) / total
        variance = _Summed.apply((counted - mean).square().sum(0), part.mesh) / total
        with torch.no_grad():
            running.num_batches_tracked += 1
            running.running_mean.lerp_(mean, self.momentum)
            running.running_var.lerp_(variance * (total / max(1, total - 1)), self.momentum)
        out = (x - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            out = out * self.weight + self.bias
        return out.to(input.dtype)


def share_batch_norm(model: nn.Module, part: Callable[[], Part]) -> None:
    """Put `BatchNormOfParts` in the place of every `BatchNorm1d` of a model."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, BatchNormOfParts(child, part))


class _Summed(torch.autograd.Function):
    """The sum over ranks, of which each rank's loss is a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        total = x.clone()
        dist.all_reduce(total, group=mesh.get_group())
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        total = grad_outputs[0].clone()
        dist.all_reduce(total, group=ctx.mesh.get_group())
        return total, None
