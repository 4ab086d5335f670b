"""Softmax attention by the fastest kernel that torch has for it: FlexAttention where SDPA would need a mask tensor.

For training the softmax twin on equal terms. Decoding, padding and the meaning of softmax are attention.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import softmax_attention

if TYPE_CHECKING:
    from jaxtyping import Float

_Window = tuple[int | None, int | None]
_MASKS: dict[tuple[int, bool, int | None, int | None, str], Any] = {}


def softmax_kernel(
    device: torch.device | str,
    *,
    square: bool,
    alibi: bool,
    window_size: _Window = (None, None),
    dropout_p: float = 0.0,
) -> str:
    """What `fused_softmax_attention` runs: "flex", or "sdpa", torch's scaled_dot_product_attention.

    "flex" on CUDA with ALiBi or a window, as many queries as keys and no dropout: there SDPA would read a mask of
    O(seqlen^2).
    """
    needs_mask = alibi or window_size != (None, None)
    is_cuda = torch.device(device).type == "cuda"
    return "flex" if is_cuda and needs_mask and square and not dropout_p else "sdpa"


def fused_softmax_attention(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    v: Float[Tensor, "batch seqlen_k nheads_k head_dim_v"],
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
    """`nn.softmax_attention`, by the kernel that `softmax_kernel` names. An attention_fn of `nn.SoftmaxAttention`.

    FlexAttention is compiled for every shape: for training and whole windows, not for prompts of any length.

    Args, Returns: as `nn.softmax_attention`, without its key_mask.
    """
    square = q.shape[1] == k.shape[1]
    kernel = softmax_kernel(
        q.device, square=square, alibi=alibi_slopes is not None, window_size=window_size, dropout_p=dropout_p
    )
    if kernel == "sdpa":
        return softmax_attention(
            q, k, v,
            scale=scale, causal=causal, window_size=window_size, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        )  # fmt: skip
    return flex_softmax(q, k, v, scale, causal, window_size, alibi_slopes)


def flex_softmax(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window_size: _Window, slopes: Tensor | None
) -> Tensor:
    """The FlexAttention of `fused_softmax_attention`, of as many queries as keys."""

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert slopes is not None
        return score - slopes[head] * (query - key).abs()

    # inside somebody's torch.compile it is compiled with the rest
    is_inside = torch.compiler.is_compiling()
    attend = _flex() if is_inside else _compiled_flex()
    if is_inside and slopes is not None:
        slopes = _realized(slopes)
    out = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if slopes is None else alibi,
        block_mask=block_mask(q.shape[1], causal, window_size, q.device),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@torch.library.custom_op("flashsigmoid::realized", mutates_args=())
def _realized(x: Tensor) -> Tensor:
    """A copy of x that lies in memory: FlexAttention compiles no score that reads what its own graph computes."""
    return x.clone()


@_realized.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_realized.register_autograd(lambda ctx, grad: grad)


def block_mask(seqlen: int, causal: bool, window_size: _Window, device: torch.device) -> Any:
    """FlexAttention's list of visible blocks, None if all are visible; made once for a length.

    Call it before a torch.compile that will ask for the same, which then need not trace how it is made.
    """
    left, right = window_size
    if not causal and left is None and right is None:
        return None
    key = (seqlen, causal, left, right, str(device))
    if key not in _MASKS:
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            keep = query >= key if causal else query == query
            keep = keep if left is None else keep & (query - key <= left)
            return keep if right is None else keep & (key - query <= right)

        with torch.inference_mode(False):
            _MASKS[key] = create_block_mask(seen, None, None, seqlen, seqlen, device=str(device))
    return _MASKS[key]


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(_flex(), dynamic=False)
