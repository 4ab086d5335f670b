"""A small model that reads a whole sequence and answers once: of the synthetic tasks k_summation.py, pair_repeat.py."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..nn import MLP, Block, RMSNorm, SigmoidAttention, SoftmaxAttention
from .trials import Budget

if TYPE_CHECKING:
    from jaxtyping import Float

# the arms of both tasks: b = -log n; b = 0; the softmax twin
KINDS = ("sigmoid", "no-bias", "softmax")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of an encoder, the same for every arm."""

    nlayers: int
    dim: int
    nheads: int


class Encoder(nn.Module):
    """Blocks without a mask over an embedded sequence, and one answer.

        answer = W mean_i norm(blocks(embed(x) + p))_i          (batch, 1, answers)

    The places p are parameters, N(0, 1) at the start. Attention with QK-norm, GELU, pre-norm; b = -log n of the longest
    sequence, whatever the length, or 0.

    Args:
        embed: inputs (batch, seqlen) to (batch, seqlen, dim).
        answers: channels of the answer.
        size: of the blocks.
        kind: of `KINDS`.
        seqlen: n, of the longest sequence in tokens.

    Raises:
        ValueError: kind is none of them.
    """

    def __init__(
        self,
        embed: nn.Module,
        answers: int,
        size: Size,
        kind: Literal["sigmoid", "no-bias", "softmax"] | str,
        *,
        seqlen: int,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        attention = SoftmaxAttention if kind == "softmax" else SigmoidAttention
        b = 0.0 if kind == "no-bias" else -math.log(seqlen)

        def block() -> Block:
            layer = attention(size.dim, size.nheads, sigmoid_bias=b)
            return Block(layer, MLP(size.dim, 4 * size.dim), size.dim)

        self.embed = embed
        self.places = nn.Parameter(torch.randn(seqlen, size.dim))
        self.blocks = nn.ModuleList(block() for _ in range(size.nlayers))
        self.norm = RMSNorm(size.dim)
        self.head = nn.Linear(size.dim, answers)

    def forward(self, x: Tensor) -> Float[Tensor, "batch 1 answers"]:
        """The answer to inputs (batch, seqlen)."""
        h = self.embed(x) + self.places[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        with torch.autocast(h.device.type, enabled=False):  # an answer of 8 bits would be the error
            return self.head(self.norm(h.float()).mean(1, keepdim=True))


def encoder_settings(kind: str, size: Size, budget: Budget, **more: Any) -> dict[str, Any]:
    """Settings of a trial with an encoder."""
    return {"kind": kind, **asdict(size), **asdict(budget), **more}
