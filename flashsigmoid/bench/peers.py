"""Who is measured: our backends, torch's softmax attention, and the bare matrix products nobody can do without."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..functional import sigmoid_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SOFTMAX, PRODUCTS = "softmax sdpa", "bare products"


def peers(causal: bool) -> dict[str, Attention]:
    """Name -> attention of q, k, v (batch, seqlen, nheads, head_dim)."""

    def ours(backend: str) -> Attention:
        return lambda q, k, v: sigmoid_attention(
            q, k, v, sigmoid_bias=-math.log(k.shape[1]), causal=causal, backend=backend
        )

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return {**{name: ours(name) for name in backends.NAMES}, SOFTMAX: softmax, PRODUCTS: products}


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(Q K^T) V, with the whole (seqlen, seqlen) matrix between: not attention, the two matrix products alone."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.matmul(torch.matmul(q, k.mT), v).transpose(1, 2)
