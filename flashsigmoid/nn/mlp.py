"""The two feed-forward branches: SwiGLU and GELU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """Gated feed-forward: y = W_down (silu(W_gate x) * W_up x).

    Args:
        dim: channels in and out.
        hidden: channels between. Default: 8/3 dim, as many weights as a plain MLP of 4 dim has, rounded up to
            a multiple of `multiple_of`. A given number is taken as it is.
        multiple_of: Default: 64, a tile of the matrix units.
        bias: of the three projections. Default: False.

    Raises:
        ValueError: hidden or multiple_of is not positive.

    Source: arXiv:2002.05202, equation 6.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, multiple_of: int = 64, bias: bool = False) -> None:
        super().__init__()
        if multiple_of <= 0:
            raise ValueError(f"multiple_of must be positive, got {multiple_of}")
        if hidden is None:
            hidden = -(-8 * dim // (3 * multiple_of)) * multiple_of
        if hidden <= 0:
            raise ValueError(f"hidden must be positive, got {hidden}")
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) to (..., dim)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """Plain feed-forward: y = W_down gelu(W_up x), with the exact (erf) GELU.

    Args:
        dim: channels in and out.
        hidden: channels between. Default: 4 dim.
        bias: of both projections. Default: True.

    Raises:
        ValueError: hidden is not positive.

    Source: arXiv:1606.08415 (GELU); the branch of arXiv:1706.03762, section 3.3.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        if hidden <= 0:
            raise ValueError(f"hidden must be positive, got {hidden}")
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) to (..., dim)."""
        return self.down_proj(F.gelu(self.up_proj(x)))
