"""Cases of context parallel, what a rank computes for one, and faults planted in it."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef

from flashsigmoid.distributed import blocks, context_parallel, exchange, layout
from flashsigmoid.distributed.cost import SCHEMES, Sizes
from flashsigmoid.nn import SigmoidAttention
from flashsigmoid.testing import make_qkv

SEED = 7


@dataclass(frozen=True)
class Case:
    """One problem, whole; `bias` and `slopes` name the dimensions that a tensor has, "rows" the last of a row bias."""

    n: int = 48
    n_k: int | None = None
    batch: int = 2
    nheads: int = 4
    nheads_k: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: str = "float32"
    bias: str = ""  # "", "scalar", "heads", "batch", "rows"
    slopes: str = ""  # "", "heads", "batch"
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    dropout_p: float = 0.0
    scale: float | None = None
    backend: str = "blocked"
    cu_seqlens: tuple[int, ...] = ()  # packed: where sequences end, of n rows
    cu_seqlens_k: tuple[int, ...] = ()  # of n_k rows, where keys end elsewhere
    drawn: int | None = None  # the dropout seed, where another generator than the CPU's draws it

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v, dout and the options of the whole call, the same in every process."""
        n_k = self.rows_k
        dtype = getattr(torch, self.dtype)
        q, k, v, dout = make_qkv(
            self.batch, self.n, n_k, self.nheads, self.nheads_k, self.head_dim, self.head_dim_v, dtype=dtype, seed=SEED
        )
        draw = torch.Generator().manual_seed(SEED + 1)
        sequences = max(1, len(self.cu_seqlens) - 1) if self.cu_seqlens else self.batch
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = {
            "scalar": (),
            "heads": (self.nheads,),
            "batch": (sequences, self.nheads),
            "rows": (self.n, self.nheads) if self.cu_seqlens else (self.batch, self.nheads, self.n),
        }
        options: dict[str, Any] = {
            "sigmoid_bias": -math.log(max(1, n_k)),
            "causal": self.causal,
            "window_size": self.window_size,
        }
        if self.bias:
            options["sigmoid_bias"] = torch.randn(shapes[self.bias], generator=draw, dtype=wide) - 3.0
        if self.slopes:
            options["alibi_slopes"] = 0.1 * torch.rand(shapes[self.slopes], generator=draw, dtype=wide)
        if self.scale is not None:
            options["scale"] = self.scale
        if self.dropout_p:
            options["dropout_p"] = self.dropout_p
        return q, k, v, dout, options

    @property
    def rows_k(self) -> int:
        """Keys, of all ranks."""
        return self.n if self.n_k is None else self.n_k

    @property
    def ends_k(self) -> tuple[int, ...]:
        """Packed: where the sequences' keys end."""
        return self.cu_seqlens_k or self.cu_seqlens

    @property
    def seed(self) -> Tensor:
        """Of dropout: what the op draws from torch's generator at `SEED`."""
        return torch.tensor([seed_drawn("cpu") if self.drawn is None else self.drawn])


def drawn(number: int, sizes: tuple[int, ...]) -> tuple[Case, str, str, int]:
    """(case, scheme, order, ranks) of a number: every option beside every other, shards of a row, or of none."""
    draw = random.Random(number)
    pick, size = draw.choice, draw.choice(sizes)
    n, n_k = (2 * size * draw.randint(low, 6) for low in (1, 0))
    is_packed, is_self = draw.random() < 0.4, draw.random() < 0.4

    def ends(rows: int, sequences: int) -> tuple[int, ...]:
        return (0, *sorted(draw.randint(0, rows) for _ in range(sequences)))

    n_k, sequences = n if is_self else n_k, draw.randint(1, 4)
    sequences += sequences == n // size  # (batch, nheads) and (local_q, nheads) are different shapes
    cu_seqlens = ends(n, sequences) if is_packed else ()
    left, right = (None if draw.random() < 0.5 else draw.randint(0, n + 2) for _ in range(2))
    case = Case(
        n=n,
        n_k=n_k,
        batch=1 if is_packed else draw.randint(1, 2),
        nheads_k=pick((1, 2, 4)),
        head_dim_v=pick((8, 5)),
        dtype=pick(("float32", "float64", "bfloat16")),
        bias=pick(("", "scalar", "heads", "batch", "rows")),
        slopes=pick(("", "heads", "batch")),
        causal=draw.random() < 0.5,
        window_size=(left, right),
        dropout_p=pick((0.0, 0.0, 0.3)),
        scale=pick((None, 0.7)),
        backend=pick(("blocked", "blocked", "reference")),
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=ends(n_k, sequences) if is_packed and not is_self else (),
    )
    return case, pick(("auto", *SCHEMES)), pick(layout.ORDERS), size


def seed_drawn(device: str) -> int:
    """By the generator of a device."""
    torch.manual_seed(SEED)
    return int(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device))


def device() -> str:
    """Where this process computes."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(size: int) -> DeviceMesh | None:
    """The first `size` ranks of the crew as a mesh of one axis; None outside of it. Every rank calls this."""
    ranks = tuple(range(size))
    if ranks not in _meshes:
        if size == dist.get_world_size():
            _meshes[ranks] = init_device_mesh(device(), (size,), mesh_dim_names=("cp",))
        else:
            group = dist.new_group(list(ranks))
            if dist.get_rank() < size:
                _meshes[ranks] = DeviceMesh.from_group(group, device(), mesh_dim_names=("cp",))
    return _meshes.get(ranks)


def release() -> None:
    """Forget the meshes: a group that outlives destroy_process_group aborts the process."""
    _meshes.clear()


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each send, as handed to torch."""
    sent: list[int] = []
    post = dist.batch_isend_irecv

    def count(ops: list[dist.P2POp]) -> Any:
        sent.extend(op.tensor.numel() * op.tensor.element_size() for op in ops if op.op is dist.isend)
        return post(ops)

    with mock.patch.object(dist, "batch_isend_irecv", count):
        yield sent


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Bytes of visitors that are in memory after each one that is sent for."""
    alive: list[tuple[StorageWeakRef, int]] = []
    held: list[int] = []
    received = exchange.Exchange._received

    def note(posted: tuple) -> tuple:
        for x in posted[2].values():
            storage = x.untyped_storage()
            alive.append((StorageWeakRef(storage), storage.nbytes()))
        held.append(sum(nbytes for weak, nbytes in alive if not weak.expired()))
        return posted

    def receive(self: Any, posted: list, post: Any) -> Iterator:
        return received(self, [note(x) for x in posted], lambda step: note(post(step)))

    with mock.patch.object(exchange.Exchange, "_received", receive):
        yield held


def held_of(case: Case, scheme: str, order: str, size: int) -> tuple[int, int] | None:
    """The most bytes of others' inputs that this rank holds at once in a forward and in a backward."""
    mesh = mesh_of(size)
    if mesh is None:
        return None
    q, k, v, _, options = case.tensors()
    parts = [context_parallel.shard(x, mesh, order=order).requires_grad_() for x in (q, k, v)]
    options |= {"mesh": mesh, "order": order, "scheme": scheme, "backend": "blocked"}
    with watched() as forward:
        out = context_parallel.sigmoid_attention(*parts, **options)
    with watched() as backward:
        out.sum().backward()
    return max(forward, default=0), max(backward, default=0)


def compute(case: Case, scheme: str, order: str, size: int, fault: str = "") -> dict[str, Any] | None:
    """out and every gradient, whole, from the shards of `size` ranks; and the bytes that this rank sent."""
    mesh = mesh_of(size)
    if mesh is None:
        return None
    *tensors, options = case.tensors()
    q, k, v, dout = (x.to(device()) for x in tensors)
    options = {name: x.to(device()) if isinstance(x, Tensor) else x for name, x in options.items()}
    packed = bool(case.cu_seqlens)
    if packed:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
    dim = 0 if packed else 1
    rows = case.bias == "rows"
    row_dim = 0 if packed else 2

    def part(x: Tensor, along: int = dim) -> Tensor:
        return context_parallel.shard(x, mesh, dim=along, order=order)

    leaves = {name: part(x).requires_grad_() for name, x in (("dq", q), ("dk", k), ("dv", v))}
    given = dict(options)
    if case.bias:
        b = options["sigmoid_bias"]
        leaves["db"] = given["sigmoid_bias"] = (part(b, row_dim) if rows else b).clone().requires_grad_()
    if case.slopes:
        leaves["dslopes"] = given["alibi_slopes"] = options["alibi_slopes"].clone().requires_grad_()
    function = context_parallel.sigmoid_attention
    if packed:
        function = context_parallel.sigmoid_attention_varlen
        ends = {"cu_seqlens_q": case.cu_seqlens, "cu_seqlens_k": case.ends_k}
        given |= {name: torch.tensor(cu, dtype=torch.int32, device=device()) for name, cu in ends.items()}
    torch.manual_seed(SEED)
    # parts must not be rounded by what a training in bfloat16 has on, either
    autocast = torch.autocast(device(), torch.bfloat16, enabled=case.dtype == "bfloat16")
    with autocast, planted(fault), counted() as forward:
        out = function(
            leaves["dq"],
            leaves["dk"],
            leaves["dv"],
            mesh=mesh,
            order=order,
            scheme=scheme,
            backend=case.backend,
            **given,
        )
        with counted() as backward:
            grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), part(dout)), strict=True))
    results: dict[str, Any] = {"out": context_parallel.unshard(out, mesh, dim=dim, order=order)}
    for name, grad in grads.items():
        if name in ("dq", "dk", "dv"):
            results[name] = context_parallel.unshard(grad, mesh, dim=dim, order=order)
        elif name == "db" and rows:
            results[name] = context_parallel.unshard(grad, mesh, dim=row_dim, order=order)
        else:
            results[name] = grad.clone()
            dist.all_reduce(results[name], group=mesh.get_group())
    results = {name: x.cpu() for name, x in results.items()}
    # the inner count also passed through the outer one
    results["sent"] = (sum(forward) - sum(backward), sum(backward))
    if mesh.get_local_rank() > 0:
        results = {"sent": results["sent"]}
    return results


def attend_by_module(size: int, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, dx, gradient of the weights of q), whole, of an `nn.SigmoidAttention` whose sequence is sharded."""
    mesh = mesh_of(size)
    assert mesh is not None
    x, dx, module = module_of()
    module.attention_fn = functools.partial(context_parallel.sigmoid_attention, mesh=mesh, scheme=scheme)
    part = context_parallel.shard(x, mesh).requires_grad_()
    out = module(part)
    grad, weight = torch.autograd.grad(out, (part, module.q_proj.weight), context_parallel.shard(dx, mesh))
    dist.all_reduce(weight, group=mesh.get_group())
    return context_parallel.unshard(out, mesh), context_parallel.unshard(grad, mesh), weight


def module_of() -> tuple[Tensor, Tensor, SigmoidAttention]:
    """x, a gradient and a module, in float64, the same in every process; b = -log n by default."""
    torch.manual_seed(SEED)
    module = SigmoidAttention(32, 4, nheads_k=2, position="alibi", causal=True).double()
    return torch.randn(2, 48, 32, dtype=torch.float64), torch.randn(2, 48, 32, dtype=torch.float64), module


def layout_of(case: Case, order: str, size: int) -> layout.Layout:
    """What the call makes of the case."""
    left, right = case.window_size
    cu_q, cu_k = case.cu_seqlens or (0, case.n), case.ends_k or (0, case.rows_k)
    return layout.Layout(
        size,
        order,
        case.n,
        case.rows_k,
        cu_q,
        cu_k,
        (left, (0 if right is None else min(0, right)) if case.causal else right),
    )


def sizes_of(case: Case) -> Sizes:
    """Bytes of its rows."""
    itemsize = getattr(torch, case.dtype).itemsize
    return Sizes(
        case.batch, case.nheads, case.nheads_k, case.head_dim, case.head_dim_v, itemsize,
        (8 if case.dtype == "float64" else 4) if case.bias == "rows" else 0,
    )  # fmt: skip


def _other_chunk(place):
    """The rows of a rank's other chunk; the last rank's two are one."""

    def wrong(rows: int, size: int, rank: int, order: str, start: int) -> int:
        local = rows // size
        at = place(rows, size, rank, order, start)
        return at if rank == size - 1 else (at + local // 2) % local

    return wrong


def _at(**wrong: Any):
    """Blocks that are somewhere else than they say."""
    return lambda pairs: lambda *args: ((x, y, {**where, **wrong}, s) for x, y, where, s in pairs(*args))


# what a wrong shard looks like: name -> (where, attribute, a wrong version of it)
FAULTS = {
    "rows of the other chunk are sent": (exchange, "place", _other_chunk),
    "every shard has the offset 0": (blocks, "_pairs", _at(q_offset=0)),
    "positions are off by one": (
        layout.Layout,
        "shift",
        lambda shift: lambda self, sequence: shift(self, sequence) - 1,
    ),
    "the last wanted row is not sent": (
        layout,
        "_union",
        lambda union: lambda spans: tuple(s._replace(stop=s.stop - 1) for s in union(spans) if s.size > 1),
    ),
    "partial results do not come home": (
        exchange.Homecoming,
        "_take_in",
        lambda take_in: lambda self, spans, arrived, works, sent: exchange._wait(works),
    ),
    "dropout counts from the shard": (blocks, "_pairs", _at(origin=(0, 0, 0, 0))),
}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """With a fault of `FAULTS`, or none."""
    if not fault:
        yield
        return
    owner, name, wrong = FAULTS[fault]
    remembered = (layout.Layout.keys_for, layout.Layout.queries_for)
    for function in remembered:
        function.cache_clear()
    with mock.patch.object(owner, name, wrong(getattr(owner, name))):
        yield
    for function in remembered:
        function.cache_clear()
