"""Multi-head self-attention with the paper's practices, and its softmax twin. The op is functional's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.cached import Cache
from ..backends.problem import make_problem
from ..backends.reference import visible
from ..backends.rules import autocast, validate
from ..functional import sigmoid_attention, sigmoid_attention_varlen
from ..kvcache import sigmoid_attention_with_kvcache
from .norm import RMSNorm
from .position import RotaryEmbedding, alibi_slopes, head_biases

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

AttentionFn = Callable[..., Tensor]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer for decoding. A module writes new ones behind each sequence, in place."""

    k: Float[Tensor, "batch capacity nheads_k head_dim"]
    v: Float[Tensor, "batch capacity nheads_k head_dim"]
    seqlens: Int[Tensor, " batch"]  # keys that each sequence has; who calls a module adds what it has passed


@dataclass(frozen=True)
class Packing:
    """Sequences one after the other without padding, as one row of a batch: where each of them is."""

    cu_seqlens: Int[Tensor, " batch+1"]  # int32: 0, then where each sequence ends
    max_seqlen: int  # of the longest, or more


def kept_keys_bias(key_mask: Bool[Tensor, "batch seqlen_k"], dtype: torch.dtype, extra: int = 0) -> Tensor:
    """b = -log n, n the keys each sequence keeps plus `extra`, at least 1: (batch, 1), at least float32."""
    n = (key_mask.sum(-1, keepdim=True) + extra).clamp(min=1)
    return -n.to(torch.promote_types(dtype, torch.float32)).log()


def check_alibi_bias(position: str | None, sigmoid_bias: float | None, bias_mode: str = "fixed") -> None:
    """Raises ValueError where a bias of every head cannot be that of its slope."""
    if position != "alibi":
        raise ValueError(f"position must be 'alibi' with alibi_bias=True, got {position!r}")
    if sigmoid_bias is None or not -math.inf < sigmoid_bias <= 0.0:
        raise ValueError(f"sigmoid_bias must be -log n for an n of at least 1 with alibi_bias=True, got {sigmoid_bias}")
    if bias_mode == "learnable":
        raise ValueError("bias_mode must be 'fixed' or 'per_head' with alibi_bias=True, got 'learnable'")


class SigmoidAttention(nn.Module):
    """Multi-head sigmoid self-attention.

        q, k, v = W_q x, W_k x, W_v x              per head; q and k normalised (RMSNorm), then turned by RoPE
        out = W_o (g * N(A v)),   A = sigmoid(q k^T / sqrt(head_dim) + b - alibi_slope * |i - j|)

    with g = sigmoid(W_g x) elementwise if `gate`, else 1, and N an RMSNorm if `out_norm`, else nothing.

    Args:
        dim: channels of x.
        nheads: query heads.
        nheads_k: key and value heads; query head h reads key head h // (nheads // nheads_k). Default: nheads.
        head_dim: channels per head. Default: dim // nheads.
        qk_norm: RMSNorm (eps 1e-5) of every query and key head, before RoPE. Default: True.
        out_norm: RMSNorm (eps 1e-12: A v is small) of every head's A v. What a row of A adds up to does not count then,
            and b can be lower, as -log n - 3, where the weights are exponentials of the scores and none is near its
            largest value, 1. Default: False.
        position: "rope", "alibi" or None. Default: None.
        rope_base: base of RoPE's wavelengths. Default: 10,000.
        sigmoid_bias: b. None: -log(seqlen), or -log(keys kept) of each sequence under a key mask; a model
            should rather fix -log(its training context length). Default: None.
        bias_mode: "fixed"; "learnable", one parameter that starts at sigmoid_bias; "per_head", nheads of
            them.
        alibi_bias: with position "alibi", every head its own b, or its initial one: `nn.alibi_bias` of its slope and
            of n = exp(-sigmoid_bias). Default: False, sigmoid_bias for all heads.
        causal: token i sees tokens up to i. Default: False.
        window_size: (left, right) in tokens, None unlimited. Default: (None, None).
        dropout_p: probability of dropping a weight while training. Default: 0.
        gate: an elementwise sigmoid gate, computed from x, on the heads' outputs. Default: False.
        proj_bias: whether the projections have biases. Default: False.
        attention_fn: called as attention_fn(q, k, v, *, sigmoid_bias, scale, causal, window_size,
            alibi_slopes, dropout_p) on (batch, seqlen, heads, head_dim). Default:
            `flashsigmoid.sigmoid_attention`.

    Raises:
        ValueError: an option outside the rules above, a learnable bias without its initial value, or alibi_bias where
            there is no ALiBi, no n of at least 1, or one parameter for all heads.

    Source: arXiv:2409.04431 (b = -log n, QK-norm); RoPE arXiv:2104.09864; ALiBi arXiv:2108.12409; gate
    arXiv:2505.06708.
    """

    def __init__(
        self,
        dim: int,
        nheads: int,
        *,
        nheads_k: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = True,
        out_norm: bool = False,
        position: Literal["rope", "alibi"] | None = None,
        rope_base: float = 10_000.0,
        sigmoid_bias: float | None = None,
        bias_mode: Literal["fixed", "learnable", "per_head"] = "fixed",
        alibi_bias: bool = False,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        dropout_p: float = 0.0,
        gate: bool = False,
        proj_bias: bool = False,
        attention_fn: AttentionFn = sigmoid_attention,
    ) -> None:
        super().__init__()
        nheads_k = nheads if nheads_k is None else nheads_k
        if nheads <= 0 or nheads_k <= 0 or nheads % nheads_k:
            raise ValueError(
                f"nheads must be a positive multiple of nheads_k, got nheads={nheads}, nheads_k={nheads_k}"
            )
        if not isinstance(dim, int) or dim <= 0 or (head_dim is None and dim % nheads):
            rule = "dim must be positive, and a multiple of nheads unless head_dim is given"
            raise ValueError(f"{rule}, got dim={dim!r}, nheads={nheads}")
        if head_dim is not None and (not isinstance(head_dim, int) or head_dim <= 0):
            raise ValueError(f"head_dim must be a positive integer, got {head_dim!r}")
        if position not in (None, "rope", "alibi"):
            raise ValueError(f"position must be 'rope', 'alibi' or None, got {position!r}")
        if bias_mode not in ("fixed", "learnable", "per_head"):
            raise ValueError(f"bias_mode must be 'fixed', 'learnable' or 'per_head', got {bias_mode!r}")
        if bias_mode != "fixed" and sigmoid_bias is None:
            raise ValueError(
                f"sigmoid_bias must be given with bias_mode={bias_mode!r}, where it is the initial value "
                "(-log of the training context length), got None"
            )
        if sigmoid_bias is not None and bias_mode != "fixed" and not sigmoid_bias < math.inf:
            raise ValueError(f"sigmoid_bias must be a number below +inf, got {sigmoid_bias}")
        if alibi_bias:
            check_alibi_bias(position, sigmoid_bias, bias_mode)
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")

        self.nheads, self.nheads_k = nheads, nheads_k
        self.head_dim = dim // nheads if head_dim is None else head_dim
        self.position, self.causal, self.window_size = position, causal, window_size
        self.dropout_p, self.attention_fn = dropout_p, attention_fn
        self.first_head, self.all_heads = 0, nheads  # of a module that has some of a model's heads: which, for ALiBi
        inner, inner_k = nheads * self.head_dim, nheads_k * self.head_dim

        self.q_proj = nn.Linear(dim, inner, bias=proj_bias)
        self.k_proj = nn.Linear(dim, inner_k, bias=proj_bias)
        self.v_proj = nn.Linear(dim, inner_k, bias=proj_bias)
        self.gate_proj = nn.Linear(dim, inner, bias=proj_bias) if gate else None
        self.out_proj = nn.Linear(inner, dim, bias=proj_bias)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.out_norm = RMSNorm(self.head_dim, eps=1e-12) if out_norm else nn.Identity()
        self.rope = RotaryEmbedding(self.head_dim, rope_base) if position == "rope" else nn.Identity()
        self.sigmoid_bias, self.alibi_bias = sigmoid_bias, alibi_bias and bias_mode == "fixed"
        if bias_mode != "fixed":
            shape = () if bias_mode == "learnable" else (nheads,)
            b = head_biases(nheads, float(sigmoid_bias or 0.0), causal) if alibi_bias else float(sigmoid_bias or 0.0)
            self.sigmoid_bias = nn.Parameter(torch.empty(shape).copy_(torch.as_tensor(b)))

    @property
    def takes_cache(self) -> bool:
        """Whether forward can be given a cache: a causal module whose attention_fn is its own."""
        return self.causal and self.attention_fn is sigmoid_attention

    def bias(self, device: torch.device) -> float | Tensor | None:
        """b as the attention_fn gets it: sigmoid_bias, or under alibi_bias (nheads,) float32 on the device."""
        if not self.alibi_bias:
            return self.sigmoid_bias
        assert isinstance(self.sigmoid_bias, float | int)
        return self._of_heads(head_biases(self.all_heads, float(self.sigmoid_bias), self.causal, device))

    def new_cache(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> KVCache:
        """An empty cache; dtype and device default to those of the weights."""
        like = self.k_proj.weight
        k, v = (like.new_zeros(batch, capacity, self.nheads_k, self.head_dim, dtype=dtype, device=device) for _ in "kv")
        return KVCache(k, v, torch.zeros(batch, dtype=torch.long, device=k.device))

    def forward(
        self,
        x: Float[Tensor, "batch seqlen dim"],
        key_mask: Bool[Tensor, "batch seqlen"] | None = None,
        cache: KVCache | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch seqlen dim"]:
        """Attention of x to itself, and to what a cache has before it. With a cache, eval mode and without gradients.

        Args:
            x: (batch, seqlen, dim).
            key_mask: (batch, seqlen) bool, True for a token that may be attended to. Default: all.
            cache: keys and values of earlier tokens; those of x are written behind them, in place. Default: none.
            packing: of the sequences in x, (1, total, dim), of which none sees another. Default: a sequence a row.

        Raises:
            ValueError: x or key_mask is of another shape or dtype; a cache in training or where `takes_cache` is False;
                packing of more than one row, with a key_mask or a cache, without sigmoid_bias, or with another
                attention_fn than the module's own.
        """
        if x.dim() != 3 or x.shape[2] != self.q_proj.in_features:
            raise ValueError(f"x must be (batch, seqlen, dim={self.q_proj.in_features}), got {tuple(x.shape)}")
        if packing is not None:
            if key_mask is not None or cache is not None:
                raise ValueError("packing must be alone, got a key_mask or a cache beside it")
            if x.shape[0] != 1:
                raise ValueError(f"x must be one row (1, total, dim) with packing, got {tuple(x.shape)}")
            if self.attention_fn not in (sigmoid_attention, softmax_attention):
                raise ValueError(f"packing needs the module's own attention_fn, got {self.attention_fn}")
        if cache is not None and (not self.takes_cache or self.training):
            raise ValueError(
                "cache needs a causal module in eval mode with its own attention_fn, got "
                f"causal={self.causal}, training={self.training}, attention_fn={self.attention_fn}"
            )
        if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]):
            raise ValueError(
                f"key_mask must be bool (batch, seqlen) = {tuple(x.shape[:2])}, "
                f"got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        # (batch, seqlen, nheads or nheads_k, head_dim)
        q = self.q_proj(x).unflatten(-1, (self.nheads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.nheads_k, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.nheads_k, self.head_dim))
        # under autocast the norms return float32
        start = () if cache is None or self.position != "rope" else (cache.seqlens,)
        q = self.rope(self.q_norm(q), *start).to(v.dtype)
        k = self.rope(self.k_norm(k), *start).to(v.dtype)
        # (batch, seqlen, nheads * head_dim)
        if packing is not None:
            out = self._attend_packed(q[0], k[0], v[0], packing)[None]
        elif cache is not None:
            out = self._attend_cache(q, k, v, key_mask, cache)
        else:
            out = self._attend(q, k, v, key_mask)
        out = self.out_norm(out).to(v.dtype).flatten(2)
        if self.gate_proj is not None:
            out = out * torch.sigmoid(self.gate_proj(x))
        return self.out_proj(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """No denominator, so zeroing the value of a key masks it exactly, whatever the attention_fn."""
        bias = self.bias(q.device)
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, :, None, None], 0.0)
            if bias is None:
                bias = kept_keys_bias(key_mask, q.dtype).expand(-1, self.nheads)
        return self.attention_fn(q, k, v, sigmoid_bias=bias, **self._options(q.device))

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """By the variable-length path. RoPE's angles go on from sequence to sequence, but differences count only."""
        bias: Any = self.bias(q.device)
        cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
        return sigmoid_attention_varlen(
            q, k, v,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
            sigmoid_bias=bias, **self._options(q.device),
        )  # fmt: skip

    def _attend_cache(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cache: KVCache) -> Tensor:
        """A value that is zero when it is written masks its key for good."""
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, :, None, None], 0.0)
        options = self._options(q.device)
        del options["dropout_p"]
        bias: Any = self.bias(q.device)
        return sigmoid_attention_with_kvcache(
            q, cache.k, cache.v, k, v, cache_seqlens=cache.seqlens, sigmoid_bias=bias, **options
        )

    def _of_heads(self, x: Tensor) -> Tensor:
        """Of (all_heads,) those that are here, (nheads,)."""
        return x if self.nheads == self.all_heads else x[self.first_head : self.first_head + self.nheads]

    def _options(self, device: torch.device) -> dict[str, Any]:
        return {
            "scale": self.head_dim**-0.5,
            "causal": self.causal,
            "window_size": self.window_size,
            "alibi_slopes": self._of_heads(alibi_slopes(self.all_heads, device)) if self.position == "alibi" else None,
            "dropout_p": self.dropout_p if self.training else 0.0,
        }

    def extra_repr(self) -> str:
        bias = "learnable" if isinstance(self.sigmoid_bias, Tensor) else self.sigmoid_bias
        bias = f"{bias} by slopes" if self.alibi_bias else bias
        return (
            f"nheads={self.nheads}, nheads_k={self.nheads_k}, head_dim={self.head_dim}, "
            f"position={self.position}, sigmoid_bias={bias}, causal={self.causal}, "
            f"window_size={self.window_size}"
        )


class SoftmaxAttention(SigmoidAttention):
    """The softmax twin: same parameters, state_dict and everything, but A = softmax over the visible keys.

    Softmax must be told which keys are masked, so its attention_fn takes one keyword more, `key_mask` (batch,
    seqlen), passed only when there is one. A constant added to a row of scores does not change its softmax:
    sigmoid_bias, fixed or learnable, is accepted and has no effect and no gradient.

    Args, Raises: as `SigmoidAttention`; attention_fn defaults to `softmax_attention`.
    """

    def __init__(self, dim: int, nheads: int, *, attention_fn: AttentionFn | None = None, **options: Any) -> None:
        super().__init__(dim, nheads, attention_fn=attention_fn or softmax_attention, **options)

    @property
    def takes_cache(self) -> bool:
        """Whether forward can be given a cache: a causal module whose attention_fn is its own."""
        return self.causal and self.attention_fn is softmax_attention

    def _attend_cache(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cache: KVCache) -> Tensor:
        if key_mask is not None:
            raise ValueError("key_mask must be None with a cache, which has no place for softmax's, got one")
        keys, values, real = Cache(cache.k, cache.v, cache.seqlens).append(k, v).at_the_end()
        return softmax_attention(q, keys, values, key_mask=real, **self._options(q.device))

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """SDPA takes ALiBi in padded batches only, so that they are padded for it, and the padding goes again."""
        lengths = packing.cu_seqlens.diff()
        keep = torch.arange(packing.max_seqlen, device=q.device) < lengths[:, None]
        place = keep.flatten().nonzero()[:, 0]

        def padded(x: Tensor) -> Tensor:
            rows = x.new_zeros(keep.numel(), *x.shape[1:]).index_copy(0, place, x)
            return rows.unflatten(0, keep.shape)

        out = softmax_attention(*map(padded, (q, k, v)), key_mask=keep, **self._options(q.device))
        return out.flatten(0, 1)[place]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        mask = {} if key_mask is None else {"key_mask": key_mask}
        return self.attention_fn(q, k, v, sigmoid_bias=self.bias(q.device), **self._options(q.device), **mask)


def softmax_attention(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    v: Float[Tensor, "batch seqlen_k nheads_k head_dim_v"],
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    key_mask: Bool[Tensor, "batch seqlen_k"] | None = None,
) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
    """Softmax attention with the keywords of `sigmoid_attention`, by torch's scaled_dot_product_attention.

        O = A V,   A = softmax(scale * Q K^T - alibi_slope * |p_i - j|) over the visible keys j

    Visibility is that of `sigmoid_attention`: causal is bottom-right. A query that sees nothing gets zeros.
    Without window, ALiBi and key_mask, and for causal only where seqlen_q == seqlen_k, no mask tensor is
    built and torch's fast kernels apply.

    Args:
        q, k, v, scale, causal, window_size, alibi_slopes, dropout_p: as in `sigmoid_attention`.
        sigmoid_bias: ignored, since softmax does not change when a row of scores is shifted.
        key_mask: (batch, seqlen_k) bool, True for a key that may be attended to. Default: all.

    Returns:
        (batch, seqlen_q, nheads, head_dim_v) in the dtype of q, under autocast in autocast's.

    Raises:
        ValueError: as `sigmoid_attention`; key_mask is of another shape or dtype.
    """
    q, k, v = autocast(q, k, v)
    validate(q, k, v, None, scale, causal, window_size, alibi_slopes, dropout_p, "auto", "auto")
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (q.shape[0], seqlen_k)):
        raise ValueError(
            f"key_mask must be bool (batch, seqlen_k) = {(q.shape[0], seqlen_k)}, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    # (batch, heads, seqlen, head_dim)
    softmax = functools.partial(
        F.scaled_dot_product_attention,
        *(x.transpose(1, 2) for x in (q, k, v)),
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    square_or_full = not causal or seqlen_q == seqlen_k
    if square_or_full and window_size == (None, None) and alibi_slopes is None and key_mask is None:
        return softmax(is_causal=causal).transpose(1, 2)

    left, right = window_size
    problem = make_problem(q, k, v, causal=causal, window_left=left, window_right=right)
    keep = visible(problem, q.device)
    # (batch or 1, 1, seqlen_q, seqlen_k)
    keep = q.new_ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool) if keep is None else keep[None, None]
    if key_mask is not None:
        keep = keep & key_mask[:, None, None, :]
    mask = keep
    if alibi_slopes is not None:
        p = torch.arange(seqlen_q, device=q.device) + problem.q_offset
        distance = (p[:, None] - torch.arange(seqlen_k, device=q.device)).abs()
        mask = (-alibi_slopes[..., None, None] * distance).masked_fill(~keep, -torch.inf).to(q.dtype)
    out = softmax(attn_mask=mask)
    # torch's kernels disagree on a row that sees nothing: cuDNN's is not zero
    return out.masked_fill(~keep.any(-1, keepdim=True), 0.0).transpose(1, 2)
