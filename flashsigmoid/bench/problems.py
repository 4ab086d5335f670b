"""Named shapes to measure on. No tensor is made here."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

WORKS = ("forward", "backward", "both")
_PRODUCTS = {"forward": 4, "backward": 10, "both": 14}  # operations per visible pair and channel: 2, 5, 7 products


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An attention problem: q of (batch, seqlen_q, nheads, head_dim), k and v of (batch, seqlen_k, ...).

    Packed (`lengths` not empty): self-attention within sequences of these lengths, q, k, v of (total, heads, head_dim).
    """

    name: str
    batch: int = 1
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    head_dim: int
    causal: bool = False  # bottom-right
    window_size: tuple[int | None, int | None] = (None, None)
    alibi: bool = False
    lengths: tuple[int, ...] = ()
    sigmoid_bias: float | None = None  # b; None: -log n
    score_std: float = 1.0  # of scale * q k^T

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.nheads // self.nheads_k

    @property
    def scale(self) -> float:
        """head_dim ** -0.5, as everybody's default."""
        return self.head_dim**-0.5

    @property
    def bias(self) -> float:
        """b: its own, or -log n with n keys, of the longest sequence where they differ."""
        own = self.sigmoid_bias
        return -math.log(max(self.lengths, default=self.seqlen_k)) if own is None else own

    @property
    def has_window(self) -> bool:
        """Whether a window cuts keys off."""
        return self.window_size != (None, None)

    @property
    def band(self) -> tuple[int | None, int | None]:
        """(left, right) such that position p sees keys p - left to p + right; None is unlimited."""
        left, right = self.window_size
        return left, 0 if self.causal else right

    @property
    def slopes(self) -> list[float]:
        """ALiBi's slopes of the heads, 2 ** (-8 (h + 1) / nheads)."""
        return [2.0 ** (-8.0 * (head + 1) / self.nheads) for head in range(self.nheads)]

    @property
    def pairs(self) -> float:
        """Visible pairs of a query and a key per head, over the batch; causal counts half of all, as papers do."""
        if self.has_window:
            return float(self.batch * sum(map(self._keys_in_window, range(self.seqlen_q))))
        square = sum(n * n for n in self.lengths) if self.lengths else self.batch * self.seqlen_q * self.seqlen_k
        return square / 2.0 if self.causal else float(square)

    def row(self) -> dict[str, str]:
        """What it is, in words, for a table."""
        options = ["causal"] * self.causal + [f"window {self.window_size}"] * self.has_window + ["ALiBi"] * self.alibi
        options += [] if self.sigmoid_bias is None else [f"b = {self.sigmoid_bias:g}"]
        options += [f"scores x {self.score_std:g}"] * (self.score_std != 1.0)
        one = self.seqlen_q == self.seqlen_k
        return {
            "problem": self.name,
            "batch": f"{len(self.lengths)} packed" if self.lengths else str(self.batch),
            "seqlen": str(self.seqlen_q) if one else f"{self.seqlen_q}, {self.seqlen_k} keys",
            "nheads": str(self.nheads) if self.group == 1 else f"{self.nheads}, {self.nheads_k} of keys",
            "head_dim": str(self.head_dim),
            "options": ", ".join(options),
        }

    def flop(self, work: str) -> float:
        """Operations: forward 4 d, backward 10 d, both 14 d per visible pair of every query head."""
        return _PRODUCTS[work] * self.head_dim * self.nheads * self.pairs

    def _keys_in_window(self, query: int) -> int:
        left, right = self.band
        position = query + self.seqlen_k - self.seqlen_q
        first = 0 if left is None else max(0, position - left)
        last = self.seqlen_k - 1 if right is None else min(self.seqlen_k - 1, position + right)
        return max(0, last - first + 1)


def spread(total: int, count: int) -> tuple[int, ...]:
    """`count` lengths that differ widely, in no order, mostly odd, the same every time; their sum is `total`."""
    parts = [total * (2 * i + 1) // count**2 for i in range(count)]
    parts[-1] += total - sum(parts)
    for i in range(0, count - 1, 2):
        parts[i], parts[i + 1] = parts[i] + 2 * i + 1, parts[i + 1] - 2 * i - 1
    step = next(step for step in (7, 5, 3, 1) if math.gcd(step, count) == 1)
    return tuple(parts[i * step % count] for i in range(count))


def _self(name: str, batch: int, nheads: int, seqlen: int, head_dim: int, nheads_k: int | None = None, **options: Any):
    return Shape(
        name=name,
        batch=batch,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        nheads=nheads,
        nheads_k=nheads if nheads_k is None else nheads_k,
        head_dim=head_dim,
        **options,
    )


def _pair(name: str, *sizes: int, **options: Any) -> tuple[Shape, Shape]:
    return _self(name, *sizes, **options), _self(f"{name}-causal", *sizes, causal=True, **options)


def _language_models() -> Iterator[Shape]:
    """batch * seqlen = 16384, nheads * head_dim = 2048: FlashAttention's papers."""
    lengths = {"512": 512, "1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384}
    for head_dim in (64, 128, 256):
        for label, n in lengths.items():
            if head_dim < 256 or label in ("1k", "4k", "16k"):
                yield from _pair(f"lm-{label}-d{head_dim}", 16384 // n, 2048 // head_dim, n, head_dim)


def _other_scores() -> Iterator[Shape]:
    """Scores that leave the range of a series: b = 0, and three times as wide."""
    for head_dim in (64, 128, 256):
        yield from _pair(f"b0-4k-d{head_dim}", 4, 2048 // head_dim, 4096, head_dim, sigmoid_bias=0.0)
        yield from _pair(f"wide-4k-d{head_dim}", 4, 2048 // head_dim, 4096, head_dim, score_std=3.0)


_CROSS: dict[str, Any] = {"batch": 4, "seqlen_q": 1024, "seqlen_k": 8192, "nheads": 16, "nheads_k": 16, "head_dim": 128}

PROBLEMS = {
    shape.name: shape
    for shape in (
        *_pair("cpu-512-d64", 4, 8, 512, 64),
        *_pair("cpu-2k-d64", 1, 8, 2048, 64),
        *_pair("cpu-4k-d128", 1, 4, 4096, 128),
        *(_self(f"vit-197-d64-b{batch}", batch, 12, 197, 64) for batch in (4, 64, 256)),
        *_language_models(),
        *_other_scores(),
        *_pair("long-64k-d128", 1, 16, 65536, 128),
        *_pair("gqa-32-8-d128", 4, 32, 4096, 128, nheads_k=8),
        Shape(name="cross-1k-8k-d128", **_CROSS),
        _self("window-16k-d128", 1, 16, 16384, 128, causal=True, window_size=(1024, 0)),
        _self("varlen-16k-d128", 1, 16, 16384, 128, causal=True, lengths=spread(16384, 16)),
        _self("varlen-16k-d128-full", 1, 16, 16384, 128, lengths=spread(16384, 16)),
        _self("varlen-16k-d64", 1, 32, 16384, 64, causal=True, lengths=spread(16384, 16)),
        _self("varlen-16k-d64-short", 1, 32, 16384, 64, causal=True, lengths=spread(16384, 100)),
        _self("lm-4k-d64-alibi-causal", 4, 32, 4096, 64, causal=True, alibi=True),
    )
}


def choose(wanted: Iterable[str]) -> list[str]:
    """The problems meant by names, globs ("lm-4k-*") or beginnings ("vit"), in the order given, each once.

    Raises:
        ValueError: nothing is called so.
    """
    chosen: dict[str, None] = {}
    for word in wanted:
        found = [word] if word in PROBLEMS else fnmatch.filter(PROBLEMS, word)
        found = found or [name for name in PROBLEMS if name.startswith(word)]
        if not found:
            raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, or a glob of them, got {word!r}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def defaults(device: str) -> list[str]:
    """The problems of a processor, or those of an accelerator."""
    return [name for name in PROBLEMS if name.startswith("cpu-") == (device == "cpu")]
