"""Attention by any elementwise function of the scores, eagerly: for ablations, injected as an `attention_fn`.

The op computes the sigmoid only, and stays so: this is O(seqlen_q * seqlen_k) memory and has no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import op, reference
from ..functional import explain
from ..nn.attention import AttentionFn

if TYPE_CHECKING:
    from jaxtyping import Float

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda s: F.relu(s).square(),
    "gelu": F.gelu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "identity": lambda s: s,
    "sigmoid": torch.sigmoid,
}


def elementwise_attention(fn: Callable[[Tensor], Tensor], *, divide_by_seqlen: bool = False) -> AttentionFn:
    """Attention whose weights are fn of the scores, as an `attention_fn` of our modules.

        O = A V,   A = fn(scale * Q K^T + b - alibi_slope * |p_i - j|) / m,   0 where not visible

    with m = seqlen_k if `divide_by_seqlen`, else 1. b = -log n does for the sigmoid what division by n does for a
    function without an exponential tail: use one of them.

    Scores, weights and their product with V are float32, float64 for float64 inputs.

    Args:
        fn: elementwise, differentiable, as those of `ACTIVATIONS`.
        divide_by_seqlen: by the number of keys, visible or not; a key whose value is zero counts. Default: False.

    Returns:
        A function of q, k, v and the keywords sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p, each
        as in `sigmoid_attention`. sigmoid_bias=None is -log(seqlen_k), or 0 if `divide_by_seqlen`. It raises
        ValueError as `sigmoid_attention` does, and for a b of -inf where fn does not end at 0.

    Source: arXiv:2409.04431 (the ablation of activations); division by the number of keys arXiv:2309.08586.
    """
    ends_at_zero = float(fn(torch.tensor(-math.inf))) == 0.0

    def attend(
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
    ) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
        if sigmoid_bias is None and divide_by_seqlen:
            sigmoid_bias = 0.0
        problem = explain(  # the op's rules for its arguments
            q, k, v, sigmoid_bias=sigmoid_bias, scale=scale, causal=causal, window_size=window_size,
            alibi_slopes=alibi_slopes, dropout_p=dropout_p, backend="reference",
        ).problem  # fmt: skip
        if problem.sigmoid_bias == -math.inf and not ends_at_zero:
            raise ValueError("sigmoid_bias must be finite for a function that does not end at 0, got -inf")
        q, k, v = (x.to(problem.dtype) for x in (q, k, v))  # autocast's, where it is on
        bias = sigmoid_bias if isinstance(sigmoid_bias, Tensor) else None
        seed = torch.randint(0, 2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None
        with op.full_precision(problem.device):
            a = fn(reference.scores(problem, q, k, bias, alibi_slopes))
            keep = reference.visible(problem, q.device)
            if keep is not None:
                a = torch.where(keep, a, 0.0)
            if divide_by_seqlen:
                a = a / max(1, problem.seqlen_k)
            return reference.product(problem, reference.dropped(problem, a, seed), v)

    return attend
