"""Numbers that tell how attention behaves: the norm of A V, the mass of a row of A, its share on one key.

Explicit weights are O(seqlen_q * seqlen_k) memory: for a small batch now and then, not for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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


def sink_mass(weights: Float[Tensor, "batch nheads seqlen_q seqlen_k"], keys: int = 1) -> Float[Tensor, ""]:
    """Mean over rows of the share of a row's mass that lies on the first keys, in at least float32.

        mean_bhi sum_{j < keys} A_bhij / sum_j A_bhij

    A row without mass has no share and is left out; nan if there is no other. Even weights under a causal
    mask give (1 + 1/2 + ... + 1/n) / n for one key.

    Args:
        weights: A, (batch, nheads, seqlen_q, seqlen_k).
        keys: how many count as first. Default: 1.

    Source: arXiv:2410.10781 (attention sinks, and their absence where attention does not normalise).
    """
    weights = _wide(weights)
    mass = weights.sum(-1)
    return (weights[..., :keys].sum(-1) / mass)[mass > 0].mean()


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


def sdpa_weights(
    query: Float[Tensor, "*batch seqlen_q head_dim"],
    key: Float[Tensor, "*batch_k seqlen_k head_dim"],
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*batch seqlen_q seqlen_k"]:
    """The weights of torch's `scaled_dot_product_attention` itself, before dropout.

        A = softmax(scale * Q K^T + mask)         is_causal is torch's: top-left

    A row that sees nothing is zero.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa: as torch's, heads in the third dimension from the end.

    Returns:
        (..., seqlen_q, seqlen_k) in float32, float64 for float64 inputs.
    """
    query, key = _wide(query), _wide(key)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.transpose(-1, -2))
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask.to(scores.dtype)
    return scores.softmax(-1).nan_to_num(0.0) if attn_mask is not None else scores.softmax(-1)


def probe_attention(model: nn.Module, *inputs: Any, **keywords: Any) -> list[AttentionProbe]:
    """Measure every attention layer of a model in one forward without gradients, model(*inputs, **keywords).

    Layers are `nn.SigmoidAttention` and `nn.SoftmaxAttention`, and of models of others (timm, transformers, torch)
    whatever calls torch's `scaled_dot_product_attention`, or `multi_head_attention_forward`, which is behind
    `torch.nn.MultiheadAttention`; in the order in which they run. A layer of others has the name of the innermost
    module that was running, and a layer that was called twice is there twice. Attention that multiplies its matrices
    by itself, as attn_implementation="eager" of transformers, is not seen.

    The norm is that of what the layer's attention function returned; the weights are computed again from q and k, in
    float32 whatever the dtype of the model. The forward is in eval mode. Afterwards the model is as it was: attention
    functions, the mode of each module, and torch's random state, also if the forward fails. Give a batch
    without padding, since padded tokens count.

    Args:
        model: on the device of the inputs.
        inputs, keywords: one small batch. Memory is O(batch * nheads * seqlen^2), one layer at a time.

    Raises:
        ValueError: no such layer ran.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SigmoidAttention)}
    functions = {name: layer.attention_fn for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    probes: list[AttentionProbe] = []
    try:
        model.eval()
        with _running(model) as names, torch.no_grad(), torch.random.fork_rng(devices):
            mode = _SeesSoftmax(names, probes)
            for name, layer in layers.items():
                layer.attention_fn = _watched(layer, name, probes, mode)
            with mode:
                model(*inputs, **keywords)
    finally:
        for name, layer in layers.items():
            layer.attention_fn = functions[name]
        for module, training in modes.items():
            module.training = training
    if not probes:
        raise ValueError(
            "model must have run a SigmoidAttention, a SoftmaxAttention or torch's scaled_dot_product_attention, got "
            f"{type(model).__name__} without"
        )
    return probes


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, the innermost last, while the model runs."""
    names: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
            leave = module.register_forward_hook(lambda *_: names.pop() and None)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield names


class _SeesSoftmax(TorchFunctionMode):
    """Appends a probe for each call of torch's attention, except where `blind`: inside of a layer of ours."""

    def __init__(self, names: list[str], probes: list[AttentionProbe]) -> None:
        super().__init__()
        self.names, self.probes, self.blind = names, probes, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.blind:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            # no mode sees what happens inside; without weights it calls the function that is put in its way
            with mock.patch.object(F, "scaled_dot_product_attention", self._attended(F.scaled_dot_product_attention)):
                out = func(*args, **{**kwargs, "need_weights": False})
            return func(*args, **kwargs) if kwargs.get("need_weights", True) else out
        return func(*args, **kwargs)

    def _attended(self, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: self._attend(func, *args, **kwargs)

    def _attend(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        out = func(query, key, value, attn_mask, dropout_p, is_causal, **options)
        with torch.autocast(query.device.type, enabled=False):
            weights = sdpa_weights(query, key, attn_mask, is_causal=is_causal, **options)
            # (batch, heads, seqlen, dim), whatever stands in front of the last two; without heads it is one
            heads = out[:, None] if out.dim() == 3 else out.flatten(0, -4)
            name = self.names[-1] if self.names else ""
            _append(self.probes, name, "softmax", heads.transpose(1, 2), weights)
        return out


def _append(
    probes: list[AttentionProbe], name: str, attention: Literal["sigmoid", "softmax"], out: Tensor, weights: Tensor
) -> None:
    probes.append(
        AttentionProbe(
            layer=len(probes),
            name=name,
            attention=attention,
            attention_norm=attention_norm(out).item(),
            row_mass=row_mass(weights).item(),
            sink_mass=sink_mass(weights).item(),
            max_weight=weights.max().item(),
        )
    )


def _watched(
    layer: SigmoidAttention, name: str, probes: list[AttentionProbe], mode: _SeesSoftmax
) -> Callable[..., Tensor]:
    """The layer's attention_fn, which also appends what it sees, once, whatever it calls."""
    attention_fn = layer.attention_fn

    def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        mode.blind = True
        try:
            out = attention_fn(q, k, v, **options)
        finally:
            mode.blind = False
        options = {key: value for key, value in options.items() if key != "dropout_p"}
        # autocast would compute the scores in bfloat16
        with torch.autocast(q.device.type, enabled=False):
            if isinstance(layer, SoftmaxAttention):
                del options["sigmoid_bias"]
                _append(probes, name, "softmax", out, softmax_weights(q, k, **options))
            else:
                _append(probes, name, "sigmoid", out, attention_weights(q, k, **options))
        return out

    return watch


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
