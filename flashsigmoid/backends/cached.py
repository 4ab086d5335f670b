"""Calls against a cache of keys and values, contiguous or in pages: its rules, appending, its keys as dense tensors.

What the decode kernel does not take (decode.py) is computed here by the dense backends, sequence by sequence where the
host has the lengths, else all at once with every sequence moved to the end of the cache, where one q_offset fits all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unsupported(backend: str) -> str | None:
    """None if the backend computes a call against a cache when asked by name, else why not."""
    return "no decode kernel" if backend == "hopper" else None


@dataclass(frozen=True)
class Cache:
    """A cache and how many keys of it each sequence has.

    k is (batch, capacity, nheads_k, head_dim), or with a page_table (batch, pages of a sequence), int, its pages
    (npages, page_size, nheads_k, head_dim); v likewise. seqlens is int32 or int64 (batch,).
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    page_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """The most keys that a sequence can have."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def append(self, k: Tensor, v: Tensor) -> Cache:
        """Write k, v (batch, seqlen_new, nheads_k, head_dim) behind each sequence, in place."""
        # (batch, seqlen_new)
        position = self.seqlens[:, None] + torch.arange(k.shape[1], device=k.device)
        where = self._places(position)
        self.k.index_put_(where, k)
        self.v.index_put_(where, v)
        return Cache(self.k, self.v, self.seqlens + k.shape[1], self.page_table)

    def behind(self, k: Tensor, v: Tensor) -> Cache:
        """A contiguous copy in which k, v (seqlen, nheads_k, head_dim) stand in front of every sequence."""
        own, n = (self.k, self.v), k.shape[0]
        if self.page_table is not None:
            pages = self.page_table.long().clamp(min=0)
            own = tuple(x[pages].flatten(1, 2) for x in own)
        batch = self.seqlens.shape[0]
        k, v = (torch.cat((x.expand(batch, *x.shape), y), dim=1) for x, y in zip((k, v), own, strict=True))
        return Cache(k, v, self.seqlens + n)

    def of(self, index: int, seqlen: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one sequence, (1, seqlen, nheads_k, head_dim): a view, or of pages a copy."""
        if self.page_table is None:
            return self.k[index : index + 1, :seqlen], self.v[index : index + 1, :seqlen]
        pages = self.page_table[index, : -(-seqlen // self.k.shape[1])].long()
        return self.k[pages].flatten(0, 1)[None, :seqlen], self.v[pages].flatten(0, 1)[None, :seqlen]

    def at_the_end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies (batch, capacity, nheads_k, head_dim) in which the last key of each sequence is the last of all.

        Before its first key there are zeros: a key whose value is zero is masked. Also which keys are real,
        (batch, capacity) bool. The host reads no length.
        """
        behind = torch.arange(self.capacity, device=self.k.device) - self.capacity
        # (batch, capacity)
        position = self.seqlens[:, None] + behind
        real = position >= 0
        where = self._places(position.clamp(min=0))
        k, v = (x[where].masked_fill(~real[..., None, None], 0.0) for x in (self.k, self.v))
        return k, v, real

    def _places(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The two leading indices of the rows at these positions, (batch, n), of each sequence."""
        batch = torch.arange(position.shape[0], device=position.device)[:, None]
        if self.page_table is None:
            return batch, position
        page_size = self.k.shape[1]
        # a sequence without keys may have no page
        pages = self.page_table[batch, position // page_size].long().clamp(min=0)
        return pages, position % page_size


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """x (batch, seqlen, nheads, head_dim) turned by rows `position`, (batch, seqlen), of tables (n, rotary_dim / 2).

    Pairs are (x_i, x_{i + rotary_dim / 2}), or interleaved (x_{2i}, x_{2i+1}); channels from rotary_dim on stay.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(dtype)[position][:, :, None] for table in (cos, sin))  # (batch, seqlen, 1, rotary_dim / 2)
    turned, rest = x[..., : 2 * cos.shape[-1]].to(dtype), x[..., 2 * cos.shape[-1] :]
    left, right = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (left * cos - right * sin, right * cos + left * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def checked(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    cache_seqlens: Tensor | int, page_table: Tensor | None,
) -> Cache:  # fmt: skip
    """The cache before anything is appended.

    Raises:
        ValueError: a shape, dtype or device that does not fit q; where the host has them, lengths beyond the cache and
            pages that are not there.
    """
    paged = page_table is not None
    layout = "(npages, page_size, nheads_k, head_dim)" if paged else "(batch, capacity, nheads_k, head_dim)"
    tensors = [("k_cache", k_cache, layout), ("v_cache", v_cache, layout)]
    if (k is None) != (v is None):
        raise ValueError(f"k and v must be given together, got only {'v' if k is None else 'k'}")
    if k is not None and v is not None:
        tensors += [(name, x, "(batch, seqlen_new, nheads_k, head_dim)") for name, x in (("k", k), ("v", v))]
    for name, x, words in [("q", q, "(batch, seqlen_q, nheads, head_dim)"), *tensors]:
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
            raise ValueError(f"{name} must be a dense tensor {words}, got {got}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have the dtype and device of q, {q.dtype} on {q.device}, got {x.dtype} on {x.device}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, a cache is forward only, got one that does")
    batch, _, _, head_dim = q.shape
    if k_cache.shape[3] != head_dim or not (paged or k_cache.shape[0] == batch):
        raise ValueError(f"k_cache must be {layout} for q {tuple(q.shape)}, got {tuple(k_cache.shape)}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache must share all but head_dim of k_cache, {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}"
        )
    new = 0
    if k is not None and v is not None:
        new = k.shape[1]
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            if tuple(x.shape) != (batch, new, *cache.shape[2:]):
                raise ValueError(f"{name} must be {(batch, new, *cache.shape[2:])} for its cache, got {tuple(x.shape)}")
            if batch > 1 and not paged and cache.stride(0) == 0:
                raise ValueError(f"{name}_cache must have memory for each sequence to be written to, got one for all")
        if k_cache is v_cache and new:
            raise ValueError("k_cache and v_cache must be two tensors where k and v are written to them, got one")
    if page_table is not None:
        page_size = k_cache.shape[1]
        if page_size < 16 or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two from 16, got {page_size}")
        _check_indices("page_table", page_table, q, (batch, None))
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
        # the host has it, on a GPU too; a compiler would make a guard of it
        if not torch.compiler.is_compiling() and not 0 <= cache_seqlens <= capacity - new:
            raise ValueError(
                f"cache_seqlens must be from 0 to capacity - new keys = {capacity} - {new}, got {cache_seqlens}"
            )
        cache_seqlens = torch.full((batch,), cache_seqlens, device=q.device)
    _check_indices("cache_seqlens", cache_seqlens, q, (batch,))
    assert isinstance(cache_seqlens, Tensor)
    cache = Cache(k_cache, v_cache, cache_seqlens, page_table)
    if on_host(q):
        _check_lengths(cache, new)
    return cache


def check_rotary(
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, q: Tensor, k: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor] | None:
    """The tables of RoPE, or None.

    Raises:
        ValueError: one without the other, without new keys, or of a shape that does not fit; what is no boolean.
    """
    if not isinstance(interleaved, bool):
        raise ValueError(f"rotary_interleaved must be True or False, got {interleaved!r}")
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        raise ValueError(
            f"rotary_cos and rotary_sin must be given together, got only rotary_{'sin' if cos is None else 'cos'}"
        )
    if k is None or q.shape[1] > k.shape[1]:
        got = "no k" if k is None else f"{k.shape[1]} of k"
        raise ValueError(
            f"rotary_cos turns q and the new k: k must have at least the {q.shape[1]} rows of q, got {got}"
        )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, Tensor) or x.dtype not in _FLOATS or x.device != q.device:
            got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a floating-point tensor on {q.device}, got {got}")
        if x.dim() != 2 or x.shape != cos.shape or x.shape[0] < capacity or not 0 < 2 * x.shape[1] <= q.shape[3]:
            raise ValueError(
                f"{name} must be (at least {capacity} positions, rotary_dim / 2 <= {q.shape[3] // 2}), "
                f"both alike, got {tuple(x.shape)}"
            )
    return cos, sin


def check_prefix(k_prefix: Tensor, v_prefix: Tensor, cache: Cache, q: Tensor) -> None:
    """Keys that stand in front of every sequence.

    Raises:
        ValueError: a shape, dtype or device that does not fit the cache.
    """
    for name, x, own in (("k_prefix", k_prefix, cache.k), ("v_prefix", v_prefix, cache.v)):
        if not isinstance(x, Tensor) or x.dtype != q.dtype or x.device != q.device:
            got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of {q.dtype} on {q.device}, got {got}")
        if x.dim() != 3 or x.shape[1:] != own.shape[2:] or x.shape[0] != k_prefix.shape[0]:
            want = f"({k_prefix.shape[0]}, {own.shape[2]}, {own.shape[3]})"
            raise ValueError(f"{name} must be (seqlen_prefix, nheads_k, head_dim), {want}, got {tuple(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, a cache is forward only, got one that does")


def on_host(x: Tensor) -> bool:
    """Lengths beside x can be read without waiting for a device, and nothing is being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_indices(name: str, x: object, q: Tensor, shape: tuple[int | None, ...]) -> None:
    words = "(batch,)" if len(shape) == 1 else "(batch, pages of a sequence)"
    right = (
        isinstance(x, Tensor)
        and x.dtype in (torch.int32, torch.int64)
        and x.dim() == len(shape)
        and all(want in (None, size) for want, size in zip(shape, x.shape, strict=True))
    )
    if not right:
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
        raise ValueError(f"{name} must be an int32 or int64 tensor {words} with batch {q.shape[0]}, got {got}")
    if isinstance(x, Tensor) and x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_lengths(cache: Cache, new: int) -> None:
    lengths = cache.seqlens.tolist()
    for length in lengths:
        if length < 0 or length + new > cache.capacity:
            raise ValueError(
                f"cache_seqlens must be from 0 to capacity - new keys = {cache.capacity} - {new}, got {lengths}"
            )
    if cache.page_table is None:
        return
    npages, page_size = cache.k.shape[:2]
    written: set[tuple[int, int]] = set()
    for length, pages in zip(lengths, cache.page_table.tolist(), strict=True):
        used = pages[: -(-(length + new) // page_size)]
        if any(not 0 <= page < npages for page in used):
            raise ValueError(f"page_table must name pages from 0 to {npages - 1} up to each length, got {used}")
        places = {(pages[p // page_size], p % page_size) for p in range(length, length + new)}
        if len(places) < new or places & written:
            raise ValueError(f"page_table must give every new key a place of its own, got {cache.page_table.tolist()}")
        written |= places
