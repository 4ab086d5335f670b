"""A small language model trained by one process, or by a mesh of them: the losses of its steps."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from flashsigmoid.distributed import plans
from flashsigmoid.distributed.initialize import initialize
from flashsigmoid.distributed.plans import AXES, parallelize, shard_batch
from flashsigmoid.distributed.simulate import Sent
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.nn import RotaryEmbedding
from flashsigmoid.nn import alibi_slopes as alibi_slopes_of
from flashsigmoid.nn.position import head_biases
from flashsigmoid.nn.recompute import Recompute

BATCH, SEQLEN = 4, 32
TINY = GPTConfig(vocab_size=64, seqlen=SEQLEN, nlayers=2, dim=32, nheads=4, nheads_k=2, mlp_dim=48)
# everything that a plan treats in its own way
MODELS = {
    "alibi": TINY,
    "rope": replace(TINY, position="rope", norm="hybrid", gate=True, window_size=(9, None)),
    "gelu": replace(TINY, mlp="gelu", layer_scale=0.1, nheads_k=4),
    "bias of slopes": replace(TINY, alibi_bias=True),
    "bias of heads": TINY,
    "one bias": replace(TINY, norm="hybrid"),
    "normed heads": replace(TINY, out_norm=True, sigmoid_bias=-6.0, gate=True),
    "softmax": replace(TINY, attention="softmax"),
    "softmax, rope": replace(TINY, attention="softmax", position="rope", window_size=(9, None)),
}
REFUSED = {
    "no bias": TINY,
    "compiled": TINY,
    "three heads": replace(TINY, dim=33, nheads=3, nheads_k=3),
    "odd vocabulary": replace(TINY, vocab_size=65),
}
BIAS_STEP = 0.3  # between the biases of two heads


def model_of(name: str, dtype: torch.dtype) -> GPT:
    """The same weights in every process."""
    torch.manual_seed(3)
    model = GPT((MODELS | REFUSED)[name]).to(dtype)
    heads = {"bias of heads": torch.arange(4.0), "one bias": torch.zeros(())}.get(name)
    for attention in model._attentions():
        if heads is not None:
            attention.sigmoid_bias = nn.Parameter(MODELS[name].bias + BIAS_STEP * heads.to(dtype))
        elif name == "no bias":
            attention.sigmoid_bias = None
    return model


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and the next ones, of a sequence with something to learn."""
    draw = torch.Generator().manual_seed(4)
    found = []
    for _ in range(steps):
        start = torch.randint(0, 64, (BATCH, 1), generator=draw)
        step = torch.randint(1, 5, (BATCH, 1), generator=draw)
        x = (start + step * torch.arange(SEQLEN + 1)) % 64
        found.append((x[:, :-1], x[:, 1:]))
    return found


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]], mesh: DeviceMesh | None = None, **layout: Any):
    """AdamW at 3e-3, gradients clipped to norm 1: the mean loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    losses = []
    for tokens, targets in data:
        if mesh is not None:
            tokens, targets = (shard_batch(x, mesh, **layout) for x in (tokens, targets))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        clip(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if mesh is not None:
            for axis in ("dp", "cp"):
                dist.all_reduce(mean, group=mesh[axis].get_group())
                mean /= mesh[axis].size()
        losses.append(mean.item())
    return losses


def clip(parameters) -> None:
    """Gradients to a norm of at most 1: weights of different meshes have no common foreach."""
    grads = [p.grad for p in parameters]
    norms = [g.norm() for g in grads]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    factor = (1.0 / total).clamp(max=1.0)
    for g in grads:
        (g.to_local() if isinstance(g, DTensor) else g).mul_(factor)


@functools.cache
def mesh_of(sizes: tuple[int, int, int]) -> DeviceMesh:
    """dp, cp, tp over all processes."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=AXES)


def losses_of(name: str, sizes: tuple[int, int, int], steps: int, dtype: torch.dtype, **options: Any) -> list[float]:
    """Over a mesh."""
    mesh = mesh_of(sizes)
    model = parallelize(model_of(name, dtype), mesh, backend="blocked", **options)
    return train(model, batches(steps), mesh, **{name: x for name, x in options.items() if name == "order"})


# what a plan may forget: (what, model, mesh)
FAULTS = [
    ("slopes of the first heads", "alibi", (1, 1, 2)),
    ("RoPE by local positions", "rope", (1, 2, 1)),
    ("b of the first heads", "bias of heads", (1, 1, 2)),
    ("b of the first slopes", "bias of slopes", (1, 1, 2)),
]


def losses_with_fault(
    fault: str, name: str, sizes: tuple[int, int, int], steps: int, dtype: torch.dtype
) -> list[float]:
    """`losses_of` with one of `FAULTS`."""
    attend = plans.sigmoid_attention_shard

    def first_slopes(*args: Any, alibi_slopes: Tensor, **options: Any) -> Tensor:
        return attend(*args, alibi_slopes=alibi_slopes_of(TINY.nheads)[: alibi_slopes.shape[0]], **options)

    def first_bias(*args: Any, sigmoid_bias: Tensor, origin: tuple[int, ...], **options: Any) -> Tensor:
        return attend(*args, sigmoid_bias=sigmoid_bias - BIAS_STEP * origin[1], origin=origin, **options)

    def bias_of_first_slopes(*args: Any, sigmoid_bias: Tensor, **options: Any) -> Tensor:
        b = head_biases(TINY.nheads, TINY.bias, True)[: sigmoid_bias.shape[0]]
        return attend(*args, sigmoid_bias=b, **options)

    wrong = {
        "slopes of the first heads": (plans, "sigmoid_attention_shard", first_slopes),
        "RoPE by local positions": (plans.ShardedRotaryEmbedding, "forward", RotaryEmbedding.forward),
        "b of the first heads": (plans, "sigmoid_attention_shard", first_bias),
        "b of the first slopes": (plans, "sigmoid_attention_shard", bias_of_first_slopes),
    }[fault]
    with mock.patch.object(*wrong):
        return losses_of(name, sizes, steps, dtype)


@functools.cache
def losses_alone(name: str, steps: int, dtype: torch.dtype) -> list[float]:
    """By one process."""
    return train(model_of(name, dtype), batches(steps))


@functools.cache
def rounding_alone(name: str, steps: int, dtype: torch.dtype) -> float:
    """The largest relative difference that rounding makes to a loss: one process with its batches in other orders."""
    alone, found = losses_alone(name, steps, dtype), torch.finfo(dtype).eps
    for order in ([3, 2, 1, 0], [1, 2, 3, 0], [2, 0, 3, 1]):
        losses = train(model_of(name, dtype), [(tokens[order], targets[order]) for tokens, targets in batches(steps)])
        found = max(found, *(abs(x - y) / abs(y) for x, y in zip(losses, alone, strict=True)))
    return found


def release() -> None:
    """Forget the meshes: a group that outlives destroy_process_group aborts the process."""
    mesh_of.cache_clear()


def losses_compiled(
    name: str, sizes: tuple[int, int, int], steps: int, dtype: torch.dtype, **options: Any
) -> tuple[list[float], int]:
    """`losses_of` by compiled blocks, and how many graphs they became; the compiler warns of its own doings."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = losses_of(name, sizes, steps, dtype, compile=True, **options)
    return losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def weights_from_meta(name: str, sizes: tuple[int, int, int]) -> list[str]:
    """Which weights of a model from the meta device differ by as much as a bit from those of one process."""
    with torch.device("meta"):
        model = GPT(MODELS[name])
    parallelize(model, mesh_of(sizes))
    torch.manual_seed(3)
    initialize(model, "cpu")
    whole = dict(model_of(name, torch.float32).named_parameters())
    parts = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in model.named_parameters()}
    return [key for key, x in parts.items() if not torch.equal(x, whole[key])]


def sent_of(name: str, sizes: tuple[int, int, int], recompute: Recompute) -> tuple[int, int]:
    """Bytes that this rank sends in one step as `simulate` takes it: point to point, and in collectives."""
    mesh, config = mesh_of(sizes), MODELS[name]
    model = parallelize(
        model_of(name, torch.float32), mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        recompute=recompute,
    )  # fmt: skip
    tokens = torch.zeros(1, config.seqlen // sizes[1], dtype=torch.int64)
    with Sent(sizes[0] * sizes[1]) as sent:
        F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
    return sent.point_to_point, sent.collective
