"""Our language models on one DeviceMesh with the axes "dp", "cp" and "tp": heads and MLP split, sequence and weights
sharded, layers recomputed; other models along "dp" alone. Attention over "cp" is context_parallel.py's business; there
is no training here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..functional import sigmoid_attention_shard
from ..nn import Block, RotaryEmbedding, SigmoidAttention, SoftmaxAttention, SwiGLU
from ..nn.recompute import Recompute, check_recompute
from .context_parallel import shard, sigmoid_attention, unshard
from .layout import Order, chunks
from .softmax import ShardedSoftmax

AXES = ("dp", "cp", "tp")


class ShardedAttention:
    """The `attention_fn` of a module whose heads are split over "tp" and whose sequence is sharded over "cp".

    Called as `sigmoid_attention` is; dropout counts sequences and heads in the whole batch.

    Args:
        mesh: with the axes "dp", "cp" and "tp".
        order, scheme: of `context_parallel.sigmoid_attention`.
        backend: of the op.
    """

    def __init__(self, mesh: DeviceMesh, *, order: Order, scheme: str, backend: str) -> None:
        # read once: slicing a mesh takes longer than a short attention
        self.dp_rank, self.tp_rank = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
        self.backend = backend
        self.over_cp: dict[str, Any] | None = None
        if mesh["cp"].size() > 1:
            self.over_cp = {"mesh": mesh["cp"], "order": order, "scheme": scheme}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, sigmoid_bias, **options: Any) -> Tensor:
        if isinstance(sigmoid_bias, DTensor):
            # one for all heads: each rank has the gradient of its heads
            shared = all(placement.is_replicate() for placement in sigmoid_bias.placements)
            sigmoid_bias = sigmoid_bias.to_local(grad_placements=[Partial()] if shared else None)
        if isinstance(sigmoid_bias, Tensor) and sigmoid_bias.numel() == 1:
            sigmoid_bias = sigmoid_bias.reshape(())
        origin = (self.dp_rank * q.shape[0], self.tp_rank * q.shape[2])
        options |= {"sigmoid_bias": sigmoid_bias, "backend": self.backend}
        if self.over_cp is not None:
            return sigmoid_attention(q, k, v, origin=origin, **self.over_cp, **options)
        if options["dropout_p"] > 0:  # all ranks draw the same
            options["seed"] = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        return sigmoid_attention_shard(q, k, v, q_offset=k.shape[1] - q.shape[1], origin=(*origin, 0, 0), **options)


class ShardedRotaryEmbedding(RotaryEmbedding):
    """RoPE of tokens that lie in chunks: each is turned by its position in the whole sequence.

    Args:
        like: the embedding of the whole sequence.
        mesh: the axis over which the sequence is sharded.
        order: of the chunks.
    """

    def __init__(self, like: RotaryEmbedding, mesh: DeviceMesh, order: Order) -> None:
        super().__init__(like.head_dim, like.base)
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.order: Order = order

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """x (batch, local, nheads, head_dim) turned, in the dtype of x."""
        spans = chunks(x.shape[1] * self.size, self.size, self.rank, self.order)
        parts = x.split([stop - start for start, stop in spans], dim=1)
        turned = [
            super(ShardedRotaryEmbedding, self).forward(part, start)
            for part, (start, _) in zip(parts, spans, strict=True)
        ]
        return turned[0] if len(turned) == 1 else torch.cat(turned, dim=1)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    order: Order = "zigzag",
    scheme: str = "auto",
    backend: str = "auto",
    mp_policy: MixedPrecisionPolicy | None = None,
    recompute: Recompute = "none",
    compile: bool = False,
) -> nn.Module:
    """A `models.gpt.GPT` over a mesh, in place: first tensor parallel, then recomputed blocks, then FSDP2.

        tp: q, k, v, gate by heads, gate and up projections by hidden channels, the vocabulary; what ends a branch by
            its inputs. Between, tokens are sharded over tp: norms and LayerScales see 1 / tp of them.
        cp: the sequence, by `context_parallel.sigmoid_attention`; RoPE by positions in the whole.
        dp, cp: every weight, gradient and optimizer state, block by block.

    One bias of all heads becomes a tensor of one element, as FSDP2 takes no scalars.

    Each process then calls it with `shard_batch` of tokens and takes the mean loss of its own; gradients are means over
    dp and cp. Logits must not be changed in place: with tp and FSDP torch warns of it. With dropout every process
    must start from the same torch seed, and draws other masks of tokens than one process alone would.

    Args:
        model: with .embedding, .blocks, .norm and .head.
        mesh: with the axes "dp", "cp" and "tp", each of any size.
        order, scheme, backend: of `context_parallel.sigmoid_attention`; of softmax only order matters.
        mp_policy: dtypes of FSDP's all-gathers and reduce-scatters. Default: those of the weights.
        recompute: what of each block the backward computes again, what it receives included. "full": all but its
            input; "selective": all but its input and q, k, v of its projections. Default: "none".
        compile: torch.compile every block, over cp what is around its attention. Default: False.

    Raises:
        ValueError: other axes; heads, hidden channels or vocabulary that tp does not divide; a bias that depends on the
            length at hand; softmax attention that is not causal with cp above 1; compile with tp above 1, or with
            recompute and cp above 1.

    Source: arXiv:1909.08053 (heads and MLP), arXiv:2205.05198 (tokens between), arXiv:2304.11277 (FSDP).
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"mesh must have the axes {AXES}, got {mesh.mesh_dim_names}")
    tree = cast(Any, model)
    check_recompute(recompute)
    tp, cp = mesh["tp"], mesh["cp"]
    if compile:
        check_compiled(tp.size(), cp.size(), recompute)
    check_sizes(model, tp.size(), cp.size())
    sharded = sharding_axis(mesh)
    is_sharded = sharded.size() > 1 or mp_policy is not None
    for block in tree.blocks:
        is_softmax = isinstance(block.attention, SoftmaxAttention)
        if mesh.size() == 1 and (is_softmax or backend == "auto"):
            continue
        if is_softmax:
            attend = ShardedSoftmax(mesh, order=order, attention_fn=block.attention.attention_fn)
        else:
            attend = ShardedAttention(mesh, order=order, scheme=scheme, backend=backend)
        # what ranks exchange is in no graph
        block.attention.attention_fn = torch.compiler.disable(attend) if compile and cp.size() > 1 else attend
        if isinstance(block.attention.rope, RotaryEmbedding) and cp.size() > 1:
            block.attention.rope = ShardedRotaryEmbedding(block.attention.rope, cp, order)
        if isinstance(block.attention.sigmoid_bias, nn.Parameter):
            # FSDP2 takes no scalars
            block.attention.sigmoid_bias = nn.Parameter(block.attention.sigmoid_bias.detach().reshape(-1))
    if tp.size() > 1:
        for block in tree.blocks:
            _split_block(block, tp)
        parallelize_module(
            model,
            tp,
            {
                "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "norm": SequenceParallel(),
                "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
            },
        )
        for (
            parameter
        ) in model.parameters():  # those on the meta device lose it when they get memory: see clip_grad_norm
            parameter.register_post_accumulate_grad_hook(_sum_parts)
    for block in tree.blocks:
        block.recompute = recompute
        if compile:
            block.compile(dynamic=False)
    if is_sharded:
        _shard_weights(model, sharded, mp_policy=MixedPrecisionPolicy() if mp_policy is None else mp_policy)
    return model


def sharding_axis(mesh: DeviceMesh) -> DeviceMesh:
    """dp and cp as one axis, over which weights are sharded."""
    return mesh["dp", "cp"]._flatten("dp_cp")


def parallelize_data(
    model: nn.Module, mesh: DeviceMesh, *, trains: bool = True, compiled: Callable[[], bool] | None = None
) -> nn.Module:
    """Any model over the axis "dp", in place: every weight, gradient and optimizer state, block by block.

    Blocks are those of its attribute .blocks, or of its modules'.

    Parameters without a dimension become tensors of one element, as FSDP2 takes no scalars. Each process calls it with
    its part of the batch and takes the mean loss of that; gradients are means over dp.

    Args:
        model: a Vision Transformer of timm, or what contains one, a `models.speech.SpeechEncoder`.
        mesh: with the axes "dp", "cp" and "tp", the last two of size 1.
        trains: False: it has no backward, after which weights outside of blocks would be given up. Default: True.
        compiled: whether, at a call, the blocks are those of torch.compile, which compiles anew for every shape.
            Default: never.

    Raises:
        ValueError: other axes, or cp or tp above 1.

    Source: arXiv:2304.11277 (FSDP).
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"mesh must have the axes {AXES}, got {mesh.mesh_dim_names}")
    if mesh["dp"].size() != mesh.size():
        raise ValueError(f"mesh must be along dp alone, got {tuple(mesh.shape)} of {AXES}")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.dim():
                setattr(module, name, nn.Parameter(parameter.detach().reshape(-1), parameter.requires_grad))
    if mesh.size() == 1:
        return model
    if compiled is not None:
        for block in _blocks(model):
            _compile(block, compiled)
    return _shard_weights(model, mesh["dp"], reshard_after_forward=None if trains else True)


def shard_batch(x: Tensor, mesh: DeviceMesh, *, order: Order = "zigzag") -> Tensor:
    """This process's part of a whole batch of tokens or targets: sequences by dp, tokens of each by cp.

    Args:
        x: (batch, seqlen, ...), the same on every process.
        mesh: with the axes "dp" and "cp".
        order: as in `parallelize`.

    Raises:
        ValueError: a batch that dp does not divide; as `context_parallel.shard`.
    """
    dp, cp = (mesh.size(cast(tuple[str, ...], mesh.mesh_dim_names).index(axis)) for axis in ("dp", "cp"))
    if x.shape[0] % dp:
        raise ValueError(f"batch must be a multiple of dp={dp}, got {x.shape[0]}")
    if dp > 1:
        x = x.chunk(dp)[mesh.get_local_rank("dp")]
    return shard(x, mesh["cp"], order=order) if cp > 1 else x


def unshard_batch(x: Tensor, mesh: DeviceMesh, *, order: Order = "zigzag") -> Tensor:
    """The whole on every process, from the parts that `shard_batch` gives: its inverse. No gradient passes.

    Args:
        x: (local batch, local seqlen, ...).
        mesh, order: as there.
    """
    whole = unshard(x, mesh["cp"], order=order)
    return unshard(whole, mesh["dp"], dim=0, order="contiguous")


def clip_grad_norm(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Clip the L2 norm of the whole gradient of a model on a mesh, in place, as torch.nn.utils.clip_grad_norm_ does.

        g <- g min(1, largest / (|g| + 1e-6))

    First what ranks of "tp" have of one gradient is summed: torch 2.11 leaves parts, and its optimizers square each by
    itself. So it has to be called even where nothing is to be clipped.

    Args:
        parameters: sharded over any of the mesh's axes, or not at all.
        largest: norm; inf: no clipping.

    Returns:
        |g| before, the same on every process.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            _sum_parts(parameter)
            groups.setdefault(parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None, []).append(
                parameter
            )
    norms = []
    for group in groups.values():
        norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in group])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm()
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, largest, total)
    return total


def check_compiled(tp: int, cp: int, recompute: Recompute) -> None:
    """Whether the blocks of a mesh of these sizes can be compiled.

    Raises:
        ValueError: they cannot.
    """
    if tp > 1:
        raise ValueError(f"compile must be False with tp above 1, whose tensors break its graphs, got tp={tp}")
    if cp > 1 and recompute != "none":
        raise ValueError(f"recompute must be 'none' with compile and cp={cp}, got {recompute!r}")


def check_sizes(model: nn.Module, tp: int, cp: int) -> None:
    """Whether a model, as `parallelize` takes it, can be laid over a mesh of these sizes.

    Raises:
        ValueError: it cannot, as `parallelize`.
    """
    tree = cast(Any, model)
    for block in tree.blocks:
        _check_block(block, tp, cp)
    if tree.head.out_features % tp:
        raise ValueError(f"vocab_size must be a multiple of tp={tp}, got {tree.head.out_features}")


def _shard_weights(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """FSDP2 of every block, and of what is left."""
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Of a model, or of its modules."""
    return [block for part in model.modules() for block in getattr(part, "blocks", ())]


def _compile(block: nn.Module, when: Callable[[], bool]) -> None:
    """Its forward, within the hooks of FSDP2, which are in no graph."""
    plain = block.forward
    fast = torch.compile(plain, dynamic=False)
    block.forward = lambda *args, **options: (fast if when() else plain)(*args, **options)


def _check_block(block: Block, tp: int, cp: int) -> None:
    attention, mlp = cast(SigmoidAttention, block.attention), cast(Any, block.mlp)
    is_softmax = isinstance(attention, SoftmaxAttention)
    if is_softmax and cp > 1 and not attention.causal:
        raise ValueError(f"softmax attention must be causal with cp above 1, got cp={cp}")
    if not is_softmax and attention.sigmoid_bias is None:
        raise ValueError("sigmoid_bias must be given, -log of the training context length, got None")
    hidden = mlp.up_proj.out_features
    for name, size in (("nheads", attention.nheads), ("nheads_k", attention.nheads_k), ("hidden channels", hidden)):
        if size % tp:
            raise ValueError(f"{name} must be a multiple of tp={tp}, got {size}")


def _sum_parts(parameter: Tensor) -> None:
    """The gradient of what every rank has whole: the sum of the ranks', where they have parts of it."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
        parameter.grad = gradient.redistribute(placements=cast(DTensor, parameter).placements)


def _split_block(block: Block, tp: DeviceMesh) -> None:
    """Heads and hidden channels over tp, tokens between."""
    attention = cast(SigmoidAttention, block.attention)
    plan: dict[str, Any] = {
        "attention_norm": SequenceParallel(),
        "mlp_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "attention.out_proj": RowwiseParallel(output_layouts=Shard(1)),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    split = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.up_proj"]
    split += ["mlp.gate_proj"] if isinstance(block.mlp, SwiGLU) else []
    split += ["attention.gate_proj"] if attention.gate_proj is not None else []
    plan |= {name: ColwiseParallel() for name in split}
    # a norm of each head sees its rank's heads; what ends a branch its tokens
    for name, dim in (
        ("attention.q_norm", 2),
        ("attention.k_norm", 2),
        ("attention.out_norm", 2),
        ("attention_out_norm", 1),
        ("attention_scale", 1),
        ("mlp_out_norm", 1),
        ("mlp_scale", 1),
    ):
        if not isinstance(block.get_submodule(name), nn.Identity):
            plan[name] = SequenceParallel(sequence_dim=dim, use_local_output=True)
    parallelize_module(block, tp, plan)
    if isinstance(attention.sigmoid_bias, nn.Parameter):
        placement = Shard(0) if attention.sigmoid_bias.numel() > 1 else Replicate()
        attention.sigmoid_bias = nn.Parameter(distribute_tensor(attention.sigmoid_bias.detach(), tp, [placement]))
    attention.nheads //= tp.size()
    attention.first_head = tp.get_local_rank() * attention.nheads
    attention.nheads_k //= tp.size()
