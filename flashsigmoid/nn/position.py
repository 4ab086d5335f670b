"""Rotary embeddings, ALiBi slopes, sin-cos tables, CAPE. Adding tables to anything is the modules' business."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_Sizes = ParamSpec("_Sizes")
_Tables = TypeVar("_Tables", Tensor, tuple[Tensor, Tensor])


def _remembered(make: Callable[_Sizes, _Tables]) -> Callable[_Sizes, _Tables]:
    """`make`, computed once per arguments in eager mode. No buffers: no cast or checkpoint touches them.

    While a graph or a dispatch mode (fake tensors, say) is being traced they are computed in place.
    """

    @functools.lru_cache(maxsize=4)
    def remember(*args: object) -> _Tables:
        # a tensor born in inference mode could not be saved for a later backward
        with torch.inference_mode(False):
            return cast("Callable[..., _Tables]", make)(*args)

    @functools.wraps(make)
    def call(*args: _Sizes.args, **kwargs: _Sizes.kwargs) -> _Tables:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return make(*args, **kwargs)
        return remember(*args, **kwargs)

    return call


def _check_base(base: float) -> None:
    if not 0.0 < base < math.inf:
        raise ValueError(f"base must be positive and finite, got {base}")


def _wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it: an angle at position 1e5 is off by 6e-3 in float32."""
    return torch.float32 if device.type == "mps" else torch.float64


@_remembered
def _rotary_tables(
    seqlen: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base ** (-2 i / head_dim), each (seqlen, 1, head_dim / 2)."""
    return _rotation(torch.arange(seqlen, device=device)[:, None, None], head_dim, base, dtype)


def _rotation(position: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin at positions (..., 1), each (..., head_dim / 2)."""
    wide = _wide(position.device)
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=wide) / head_dim)
    angle = position.to(wide) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


class RotaryEmbedding(nn.Module):
    """Rotary embedding: turns each pair (x_i, x_{i + head_dim/2}) by the angle p * base ** (-2 i / head_dim).

    The product of a turned query and a turned key depends on their positions only through the distance.
    Tables are computed for the length at hand, kept in float32 (float64 for float64 inputs) and shared
    between modules; the turn itself is done in that dtype too. No parameters, no buffers.

    Args:
        head_dim: an even number.
        base: the longest wavelength is 2 pi base. Default: 10,000.

    Raises:
        ValueError: head_dim is odd, base is not positive, or x has another head_dim.

    Source: arXiv:2104.09864, equation 34, with the halves paired as GPT-NeoX pairs them.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim <= 0 or head_dim % 2:
            raise ValueError(f"head_dim must be positive and even for rotary embeddings, got {head_dim}")
        _check_base(base)
        self.head_dim, self.base = head_dim, float(base)

    def forward(
        self, x: Float[Tensor, "batch seqlen nheads head_dim"], offset: int | Int[Tensor, " batch"] = 0
    ) -> Float[Tensor, "batch seqlen nheads head_dim"]:
        """x turned, token t at position t + offset (of each sequence its own if it is a tensor), in the dtype of x."""
        if x.dim() != 4 or x.shape[-1] != self.head_dim:
            raise ValueError(f"x must be (batch, seqlen, nheads, head_dim={self.head_dim}), got {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(offset, Tensor):
            # (batch, seqlen, 1, head_dim / 2): made anew, since a table's length would be read from the device
            position = offset[:, None] + torch.arange(x.shape[1], device=x.device)
            cos, sin = _rotation(position[..., None, None], self.head_dim, self.base, dtype)
        else:
            end = offset + x.shape[1]
            # a power of two, so that growing lengths share few tables; a traced graph needs only its own
            size = end if torch.compiler.is_compiling() else 1 << max(end - 1, 0).bit_length()
            tables = _rotary_tables(size, self.head_dim, self.base, x.device, dtype)
            # (seqlen, 1, head_dim / 2)
            cos, sin = (table[offset:end] for table in tables)
        left, right = x.to(dtype).chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"


def alibi_slopes(nheads: int, device: torch.device | str | None = None) -> Float[Tensor, " nheads"]:
    """The geometric slopes of ALiBi in float32: 2 ** (-8 h / nheads) for h = 1 .. nheads.

    For a number of heads that is no power of two: the slopes of the next lower power m, then the odd ones of
    2 m.

    Args:
        nheads: number of query heads.
        device: of the result. Default: torch's current one.

    Raises:
        ValueError: nheads is not positive.

    Source: arXiv:2108.12409, section 3, and the authors' rule for other numbers of heads.
    """
    if nheads <= 0:
        raise ValueError(f"nheads must be positive, got {nheads}")
    return _alibi_slopes(nheads, torch.get_default_device() if device is None else torch.device(device))


@_remembered
def _alibi_slopes(nheads: int, device: torch.device) -> Tensor:
    wide = _wide(device)
    power = 1 << (nheads.bit_length() - 1)
    steps = torch.arange(power, device=device, dtype=wide)
    whole, between = (steps + 1) * (-8.0 / power), (2 * steps + 1) * (-4.0 / power)
    return torch.cat((whole, between))[:nheads].exp2().float()


def alibi_bias(
    slopes: Float[Tensor, "*batch nheads"], seqlen: float, *, causal: bool = True
) -> Float[Tensor, "*batch nheads"]:
    """The b of each head with which its rows begin with a mass of about 1 under ALiBi, in float32.

        b = -log n_m,   n_m = sum_{d < n} e^(-m d) = (1 - e^(-m n)) / (1 - e^(-m))               causal
                        n_m = sum_{|d| <= (n - 1) / 2} e^(-m |d|) = 2 n_m'(n') - 1, n' = (n + 1) / 2   both sides

    A head of slope m sees about n_m of the n keys, the last row of n causal ones, or the middle row of n (of an even n
    it has e^(-m n / 2) tanh(m / 4) keys fewer, an eighth of one at most for slopes up to 1/2). With
    b = -log n, the limit of m to 0, its rows begin with a mass of n_m / n: of n = 2048 keys a slope of 1/2 sees 2.5.
    The mass sum_d sigmoid(b - m d) is below 1 and above n_m / (n_m + 1).

    Args:
        slopes: m, (nheads,) or any other shape, as `alibi_slopes`; 0 gives -log n.
        seqlen: n, keys of a row in training, at least 1; it need not be whole.
        causal: whether a row sees one side. Default: True.

    Raises:
        ValueError: seqlen is below 1 or not finite.

    Source: ours, from b = -log n of arXiv:2409.04431.
    """
    if not 1.0 <= seqlen < math.inf:
        raise ValueError(f"seqlen must be at least 1 and finite, got {seqlen}")
    m = slopes.to(_wide(slopes.device))
    side = seqlen if causal else (seqlen + 1.0) / 2.0
    seen = torch.where(m == 0.0, side, torch.expm1(-m * side) / torch.expm1(-m))
    return -(seen if causal else 2.0 * seen - 1.0).log().float()


def head_biases(
    nheads: int, sigmoid_bias: float, causal: bool, device: torch.device | str | None = None
) -> Float[Tensor, " nheads"]:
    """`alibi_bias` of `alibi_slopes(nheads)` and n = exp(-sigmoid_bias), computed once."""
    where = torch.get_default_device() if device is None else torch.device(device)
    return _head_biases(nheads, sigmoid_bias, causal, where)


@_remembered
def _head_biases(nheads: int, sigmoid_bias: float, causal: bool, device: torch.device) -> Tensor:
    return alibi_bias(_alibi_slopes(nheads, device), math.exp(-sigmoid_bias), causal=causal)


def sincos_positions(
    size: int | tuple[int, int],
    dim: int,
    *,
    base: float = 10_000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "seqlen dim"]:
    """Fixed sin-cos positions, 1D for a length and 2D for a grid of patches.

        1D:  [sin(p w), cos(p w)] with w_i = base ** (-2 i / dim), i < dim / 2         (length, dim)
        2D:  [1D of the row with dim / 2, 1D of the column with dim / 2], rows first    (height * width, dim)

    Args:
        size: the length, or (height, width).
        dim: a multiple of 2 (1D) or 4 (2D).
        base: the longest wavelength is 2 pi base. Default: 10,000.
        device, dtype: of the result; computed in float64 where the device has it. Default: torch's, float32.

    Raises:
        ValueError: dim does not divide as above, or base is not positive.

    Source: arXiv:1706.03762, section 3.5; the 2D form as in arXiv:2111.06377 (MAE).
    """
    axes = 1 if isinstance(size, int) else 2
    if dim <= 0 or dim % (2 * axes):
        raise ValueError(f"dim must be a positive multiple of {2 * axes} for {axes}D positions, got {dim}")
    _check_base(base)
    where = torch.get_default_device() if device is None else torch.device(device)
    wide = _wide(where)
    width = dim // axes
    frequency = base ** (-torch.arange(0, width, 2, device=where, dtype=wide) / width)

    def one_axis(position: Tensor) -> Tensor:
        angle = position.to(wide)[:, None] * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    if isinstance(size, int):
        return one_axis(torch.arange(size, device=where)).to(dtype)
    rows, columns = size
    patch = torch.arange(rows * columns, device=where)
    return torch.cat((one_axis(patch // columns), one_axis(patch % columns)), dim=-1).to(dtype)


class CAPE(nn.Module):
    """Sin-cos positions that are shifted, jittered and stretched while training: continuous augmented positions.

        x_i <- x_i + [sin(p_i w), cos(p_i w)],   w_k = base ** (-2 k / dim), k < dim / 2
        p_i = scale (step (i - (n - 1) / 2) + shift + jitter_i)
        shift ~ U(-max_shift, max_shift), jitter_i ~ U(-max_jitter, max_jitter),
        log(scale) ~ U(-log(max_scale), log(max_scale))

    with one shift and scale for each sequence of n tokens, whose middle is 0; in eval mode shift = jitter = 0 and
    scale = 1. Absolute positions cannot be learned by heart then, and longer sequences are not far from what was seen.
    No parameters, no buffers.

    Args:
        dim: channels of x, even.
        max_shift: at least 0. Default: 5.
        max_jitter: at least 0; half a step keeps the order of tokens. Default: 0.5.
        max_scale: at least 1. Default: 1.03.
        step: from a token to the next. Default: 1.
        base: the longest wavelength is 2 pi base. Default: 10,000.

    Raises:
        ValueError: an argument breaks the rule beside it.

    Source: arXiv:2106.03143, section 3 (positions of a sequence centred, as for its images and text).
    """

    def __init__(
        self,
        dim: int,
        *,
        max_shift: float = 5.0,
        max_jitter: float = 0.5,
        max_scale: float = 1.03,
        step: float = 1.0,
        base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim must be positive and even, got {dim}")
        for name, value, least in (
            ("max_shift", max_shift, 0.0),
            ("max_jitter", max_jitter, 0.0),
            ("max_scale", max_scale, 1.0),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be at least {least:g} and finite, got {value}")
        if not 0.0 < step < math.inf:
            raise ValueError(f"step must be positive and finite, got {step}")
        _check_base(base)
        self.dim, self.step, self.base = dim, float(step), float(base)
        self.max_shift, self.max_jitter, self.max_scale = float(max_shift), float(max_jitter), float(max_scale)
        # in a process that has some sequences of a batch: number of the first, how many and how long all are
        self.place: Callable[[], tuple[int, int, int]] | None = None

    def positions(self, batch: int, seqlen: int, lengths: Tensor | None, device: torch.device) -> Tensor:
        """p of every token, (batch, seqlen), augmented in training mode."""
        n = torch.full((batch,), seqlen, device=device) if lengths is None else lengths.to(device)
        i = torch.arange(seqlen, device=device, dtype=torch.float32)
        p = self.step * (i - (n[:, None] - 1) / 2)
        if not self.training:
            return p

        def uniform(most: float, *shape: int) -> Tensor:
            return most * (2.0 * torch.rand(shape, device=device) - 1.0)

        start, total, longest = (0, batch, seqlen) if self.place is None else self.place()
        mine = slice(start, start + batch)
        shift, jitter = uniform(self.max_shift, total, 1)[mine], uniform(self.max_jitter, total, longest)[mine, :seqlen]
        return uniform(math.log(self.max_scale), total, 1)[mine].exp() * (p + shift + jitter)

    def forward(
        self, x: Float[Tensor, "batch seqlen dim"], lengths: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch seqlen dim"]:
        """x with its positions added, in the dtype of x.

        Args:
            x: (batch, seqlen, dim).
            lengths: (batch,) tokens of each sequence, where it is padded at the end. Default: all.
        """
        p = self.positions(x.shape[0], x.shape[1], lengths, x.device)
        # float32 holds a drawn position better than the drawing needs
        frequency = self.base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32) / self.dim)
        # (batch, seqlen, dim / 2)
        angle = p[..., None] * frequency
        return x + torch.cat((angle.sin(), angle.cos()), dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, max_shift={self.max_shift:g}, max_jitter={self.max_jitter:g}, "
            f"max_scale={self.max_scale:g}, step={self.step:g}"
        )
