"""A transformer block: two residual branches and where their norms stand. The branches are passed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .norm import LayerScale, RMSNorm
from .recompute import Recompute, recomputed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from .attention import KVCache, Packing


class Block(nn.Module):
    """Attention and MLP, each around a residual, pre-norm or hybrid-norm.

        pre:     x <- x + ls(f(norm(x)))             f = attention, then f = mlp
        hybrid:  x <- x + ls(out_norm(f(norm(x))))   bounds what a branch adds; long sigmoid language models
            need it

    Every norm is an RMSNorm; ls is a LayerScale, or nothing. `recompute`, "none" unless it is set, says what of it the
    backward computes again: with "full" only x is kept, with "selective" also q, k and v of its projections, which are
    all that the backward of sigmoid attention needs.

    Args:
        attention: module called as attention(x, key_mask), for instance `SigmoidAttention`.
        mlp: module called as mlp(x), for instance `SwiGLU`.
        dim: channels of x.
        norm: "pre" or "hybrid". Default: "pre".
        layer_scale: initial factor of the LayerScale at the end of each branch (1e-4 for vision). Default:
            none.
        eps: of the norms. Default: 1e-5.

    Raises:
        ValueError: norm is neither of the two.

    Source: arXiv:2409.04431, the practices for vision (LayerScale) and language (hybrid-norm).
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        dim: int,
        *,
        norm: Literal["pre", "hybrid"] = "pre",
        layer_scale: float | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "hybrid"):
            raise ValueError(f"norm must be 'pre' or 'hybrid', got {norm!r}")

        def out_norm() -> nn.Module:
            return RMSNorm(dim, eps) if norm == "hybrid" else nn.Identity()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

        self.recompute: Recompute = "none"
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = attention
        self.attention_out_norm = out_norm()
        self.attention_scale = scale()
        self.mlp_norm = RMSNorm(dim, eps)
        self.mlp = mlp
        self.mlp_out_norm = out_norm()
        self.mlp_scale = scale()

    def forward(
        self,
        x: Float[Tensor, "batch seqlen dim"],
        key_mask: Bool[Tensor, "batch seqlen"] | None = None,
        cache: KVCache | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch seqlen dim"]:
        """x through both branches; key_mask (True = keep), and a cache or packing if given, go to the attention."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._through(x, key_mask, cache, packing)
        return recomputed(self._through, self.recompute, x, key_mask, cache, packing)

    def _through(self, x: Tensor, key_mask: Tensor | None, cache: KVCache | None, packing: Packing | None) -> Tensor:
        given = {"cache": cache, "packing": packing}  # an attention without these is called without
        given = {name: value for name, value in given.items() if value is not None}
        attended = self.attention(self.attention_norm(x), key_mask, **given)
        x = x + self.attention_scale(self.attention_out_norm(attended))
        return x + self.mlp_scale(self.mlp_out_norm(self.mlp(self.mlp_norm(x))))
