"""Named shapes to measure on. No tensor is made here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A self-attention problem: q, k, v of (batch, seqlen, nheads, head_dim), with b = -log(seqlen)."""

    name: str
    batch: int
    nheads: int
    seqlen: int
    head_dim: int
    causal: bool = False

    @property
    def forward_flop(self) -> float:
        """4 n^2 d per head: two matrix products; half of it counts when causal."""
        return 4.0 * self.batch * self.nheads * self.seqlen**2 * self.head_dim * (0.5 if self.causal else 1.0)

    def flop(self, work: str) -> float:
        """Operations of "forward", or of "both": forward plus backward's five products, 14 n^2 d in all."""
        return self.forward_flop * {"forward": 1.0, "both": 3.5}[work]


def _pair(name: str, batch: int, nheads: int, seqlen: int, head_dim: int) -> tuple[Shape, Shape]:
    sizes = (batch, nheads, seqlen, head_dim)
    return Shape(name, *sizes), Shape(f"{name}-causal", *sizes, causal=True)


PROBLEMS = {
    shape.name: shape
    for shape in (
        *_pair("cpu-512-d64", 4, 8, 512, 64),
        *_pair("cpu-2k-d64", 1, 8, 2048, 64),
        *_pair("cpu-4k-d128", 1, 4, 4096, 128),
    )
}
