"""RMSNorm and LayerScale. Where they stand in a block is block.py's business."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with eps 1e-5, computed in the wider of the two dtypes where input and weight differ.

        y = weight * x / sqrt(mean(x ** 2) + eps)

    Under autocast a branch arrives in bfloat16 and the weight is float32; torch's own module would then warn
    and leave its fused kernel. The result is in the wider dtype.

    Args:
        dim: size of the last dimension, which is normalised.
        eps: Default: 1e-5.

    Source: arXiv:1910.07467, equation 4.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x normalised over its last dimension, same shape."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)


class LayerScale(nn.Module):
    """A learnable factor per channel at the end of a residual branch: y = weight * x, small at the start.

    Args:
        dim: number of channels.
        init: of every factor. Default: 1e-4.

    Source: arXiv:2103.17239, equation 5; 1e-4 on both branches for sigmoid vision models, arXiv:2409.04431.
    """

    def __init__(self, dim: int, init: float = 1e-4) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.full((dim,), float(init)))

    def reset_parameters(self) -> None:
        """Set every factor to `init`."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) times the factors, same shape."""
        return x * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, init={self.init:g}"
