"""Numbers that tell how attention behaves: the norm of A V, the mass of a row of A, its share on one key.

Explicit weights are O(seqlen_q * seqlen_k) memory: for a small batch now and then, not for every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..backends.problem import make_problem
from ..backends.reference import attention_weights, visible
from ..nn.attention import SigmoidAttention, SoftmaxAttention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True, kw_only=True)
class AttentionProbe:
    """One attention layer during one forward; means over batch, heads and queries, in float32."""

    layer: int  # 0 is the first that ran
    name: str  # of the module in the model
    attention: Literal["sigmoid", "softmax"]
    attention_norm: float  # |A V|, before a gate and the output projection
    row_mass: float  # sum_j A_ij; exactly 1 for softmax
    sink_mass: float  # A_i0 / sum_j A_ij
    max_weight: float  # max_ij A_ij


def attention_norm(out: Float[Tensor, "batch seqlen_q nheads head_dim_v"]) -> Float[Tensor, ""]:
    """Mean over tokens of the L2 norm of A V, the heads of a token concatenated, in at least float32.

        mean_bi sqrt(sum_hd out_bihd^2)

    Args:
        out: A V, (batch, seqlen_q, nheads, head_dim_v), before the output projection.

    Source: arXiv:2409.04431, whose main empirical finding is that this norm must stay small early on.
    """
    return _wide(out).flatten(2).norm(dim=-1).mean()


def row_mass(weights: Float[Tensor, "batch nheads seqlen_q seqlen_k"]) -> Float[Tensor, ""]:
    """Mean over rows of what a row of A sums to, in at least float32.

        mean_bhi sum_j A_bhij

    1 for softmax. About 1 for sigmoid at the start with b = -log n, n / 2 without b.

    Args:
        weights: A, (batch, nheads, seqlen_q, seqlen_k).
    """
    return _wide(weights).sum(-1).mean()


def sink_mass(weights: Float[Tensor, "batch nheads seqlen_q seqlen_k"]) -> Float[Tensor, ""]:
    """Mean over rows of the share of a row's mass that lies on the first key, in at least float32.

        mean_bhi A_bhi0 / sum_j A_bhij

    A row without mass has no share and is left out; nan if there is no other. Even weights under a causal
    mask give (1 + 1/2 + ... + 1/n) / n.

    Args:
        weights: A, (batch, nheads, seqlen_q, seqlen_k).

    Source: arXiv:2410.10781 (attention sinks, and their absence where attention does not normalise).
    """
    weights = _wide(weights)
    mass = weights.sum(-1)
    return (weights[..., 0] / mass)[mass > 0].mean()


def softmax_weights(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    *,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    alibi_slopes: Tensor | None = None,
    key_mask: Bool[Tensor, "batch seqlen_k"] | None = None,
) -> Float[Tensor, "batch nheads seqlen_q seqlen_k"]:
    """The weights of `nn.softmax_attention` themselves, before dropout.

        A = softmax(scale * Q K^T - alibi_slope * |p_i - j|) over the visible keys j

    with p_i = i + seqlen_k - seqlen_q. A row that sees nothing is zero.

    Args:
        q, k, scale, causal, window_size, alibi_slopes, key_mask: as in `nn.softmax_attention`.

    Returns:
        (batch, nheads, seqlen_q, seqlen_k) in float32, float64 for float64 inputs.
    """
    problem = make_problem(
        q,
        k,
        k,
        bias=None,
        slopes=alibi_slopes,
        sigmoid_bias=0.0,
        scale=scale,
        causal=causal,
        window_left=window_size[0],
        window_right=window_size[1],
        q_offset=None,
        dropout_p=0.0,
        origin=(0, 0, 0, 0),
        sigmoid="exact",
    )
    # (batch, seqlen_k, nheads, head_dim)
    k = _wide(k).repeat_interleave(problem.group, dim=2)
    # (batch, nheads, seqlen_q, seqlen_k)
    scores = problem.scale * torch.einsum("bihd,bjhd->bhij", _wide(q), k)
    if alibi_slopes is not None:
        p = torch.arange(problem.seqlen_q, device=q.device) + problem.q_offset
        distance = (p[:, None] - torch.arange(problem.seqlen_k, device=q.device)).abs()
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance
    keep = torch.ones_like(scores, dtype=torch.bool)
    seen = visible(problem, q.device)
    if seen is not None:
        keep = keep & seen
    if key_mask is not None:
        keep = keep & key_mask[:, None, None, :]
    # a row of -inf is nan, and a row that sees nothing is zero
    return torch.where(keep, scores.masked_fill(~keep, -torch.inf).softmax(-1), 0.0)


def probe_attention(model: nn.Module, *inputs: Any, **keywords: Any) -> list[AttentionProbe]:
    """Measure every attention layer of a model in one forward without gradients, model(*inputs, **keywords).

    Layers are `nn.SigmoidAttention` and `nn.SoftmaxAttention`, in the order in which they run. The norm is
    that of what the layer's attention_fn returned; the weights are computed again from q and k, in float32
    whatever the dtype of the model. The forward is in eval mode. Afterwards the model is as it was: attention
    functions, the mode of each module, and torch's random state, also if the forward fails. Give a batch
    without padding, since padded tokens count.

    Args:
        model: on the device of the inputs.
        inputs, keywords: one small batch. Memory is O(batch * nheads * seqlen^2), one layer at a time.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SigmoidAttention)}
    if not layers:
        raise ValueError(
            f"model must contain a SigmoidAttention or a SoftmaxAttention, got {type(model).__name__} without"
        )
    functions = {name: layer.attention_fn for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    probes: list[AttentionProbe] = []
    try:
        model.eval()
        for name, layer in layers.items():
            layer.attention_fn = _watched(layer, name, probes)
        with torch.no_grad(), torch.random.fork_rng(devices):
            model(*inputs, **keywords)
    finally:
        for name, layer in layers.items():
            layer.attention_fn = functions[name]
        for module, mode in modes.items():
            module.training = mode
    return probes


def _watched(layer: SigmoidAttention, name: str, probes: list[AttentionProbe]) -> Callable[..., Tensor]:
    """The layer's attention_fn, which also appends what it sees."""
    attention_fn = layer.attention_fn

    def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = attention_fn(q, k, v, **options)
        options = {key: value for key, value in options.items() if key != "dropout_p"}
        # autocast would compute the scores in bfloat16
        with torch.autocast(q.device.type, enabled=False):
            if isinstance(layer, SoftmaxAttention):
                del options["sigmoid_bias"]
                weights = softmax_weights(q, k, **options)
            else:
                weights = attention_weights(q, k, **options)
            probes.append(
                AttentionProbe(
                    layer=len(probes),
                    name=name,
                    attention="softmax" if isinstance(layer, SoftmaxAttention) else "sigmoid",
                    attention_norm=attention_norm(out).item(),
                    row_mass=row_mass(weights).item(),
                    sink_mass=sink_mass(weights).item(),
                    max_weight=weights.max().item(),
                )
            )
        return out

    return watch


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
