"""Dropout bits by Philox4x32-10 of the seed and the global index of an element, in plain torch.

Every backend, block size and shard keeps the same elements, because only global indices enter the counter.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b for 32-bit values held in int64, without overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (low >> 32), low & _MASK


def philox4x32(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words (int64 tensors) for each counter (c0, c1, c2, c3); the counters broadcast.

    Ten rounds of Philox4x32 with the two halves of the int64 `seed` as key.
    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 4.3.
    """
    c0, c1, c2, c3 = counter
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high_0, low_0 = _mul_hi_lo(_ROUND_A, c0)
        high_2, low_2 = _mul_hi_lo(_ROUND_B, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ key_a, low_2, high_0 ^ c3 ^ key_b, low_0
        key_a, key_b = (key_a + _WEYL_A) & _MASK, (key_b + _WEYL_B) & _MASK
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """An element is kept if its 32-bit word is at least this: keep probability 1 - dropout_p to within 2**-32."""
    return round(dropout_p * 2**32)


def keep_mask(
    seed: torch.Tensor, dropout_p: float, origin: tuple[int, int, int, int], shape: tuple[int, ...]
) -> torch.Tensor:
    """Bool mask of kept elements for the block of `shape` (batch, heads, queries, keys) that begins at global `origin`.

    Element (batch, head, i, j) takes word j % 4 of the counter (j // 4, i, head, batch).
    """
    batch, nheads, rows, cols = shape
    batch_0, head_0, i_0, j_0 = origin
    index = {"dtype": torch.int64, "device": seed.device}
    quad_0 = j_0 // 4
    quads = (j_0 + cols + 3) // 4 - quad_0
    words = philox4x32(
        seed.reshape(()),
        (
            torch.arange(quad_0, quad_0 + quads, **index),
            torch.arange(i_0, i_0 + rows, **index)[:, None],
            torch.arange(head_0, head_0 + nheads, **index)[:, None, None],
            torch.arange(batch_0, batch_0 + batch, **index)[:, None, None, None],
        ),
    )
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)  # (batch, heads, rows, 4 * quads)
    skip = j_0 - 4 * quad_0
    return bits[..., skip : skip + cols] >= threshold(dropout_p)
