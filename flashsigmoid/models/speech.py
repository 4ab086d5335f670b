"""A speech encoder of sigmoid attention for CTC, its configuration and its sizes. No audio, no training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.op import is_plain
from ..nn import CAPE, MLP, Block, RMSNorm, SigmoidAttention, SoftmaxAttention, sincos_positions
from ..nn.attention import AttentionFn, Packing, check_alibi_bias
from ..nn.config import check_layer_scale, check_types

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """Everything that shapes a `SpeechEncoder`. The softmax twin is dataclasses.replace(config, attention="softmax").

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    vocab_size: int  # tokens of the text, and the blank, which is token 0
    seqlen: int  # training context in positions after the convolutions: of a usual utterance; fixes sigmoid_bias only
    nlayers: int  # blocks
    dim: int  # channels of the residual stream, even, a multiple of nheads
    nheads: int
    mels: int = 80  # channels of the features
    strides: tuple[int, ...] = (2, 2)  # of the convolutions, one after the other; their product is the subsampling
    kernel: int = 7  # frames that a convolution sees, odd
    mlp_dim: int | None = None  # hidden channels of the MLP; None: 4 dim
    position: Literal["cape", "sincos", "rope", "alibi"] = "cape"
    cape_shift: float = 5.0  # CAPE's bounds, in positions: of the shift of an utterance,
    cape_jitter: float = 0.5  # of that of a position,
    cape_scale: float = 1.03  # and of the factor of all
    norm: Literal["pre", "hybrid"] = "pre"
    qk_norm: bool = True  # RMSNorm of queries and keys per head
    out_norm: bool = False  # RMSNorm of what each head gives, for which b can be lower, as -log(seqlen) - 3
    layer_scale: float | None = 0.1  # initial factor per channel on each branch; None: no LayerScale
    dropout_p: float = 0.0  # of attention weights and of what enters the blocks, in training, in [0, 1)
    packing: bool = False  # the blocks see utterances in a row, without padding, instead of padded ones
    attention: Literal["sigmoid", "softmax"] = "sigmoid"  # the one field in which a pair differs
    sigmoid_bias: float | None = None  # b; None: -log(seqlen) of this config, whatever the input's length
    alibi_bias: bool | None = None  # True: each head its own b, `nn.alibi_bias` of n = exp(-b); else b for all

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "strides", tuple(self.strides))
        for name in ("vocab_size", "seqlen", "nlayers", "dim", "nheads", "mels", "kernel", "mlp_dim"):
            size = getattr(self, name)
            if not (type(size) is int and size > 0) and not (size is None and name == "mlp_dim"):
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if not self.strides or not all(type(stride) is int and stride > 0 for stride in self.strides):
            raise ValueError(f"strides must be positive integers, at least one, got {self.strides}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.dim % self.nheads or self.dim % 2:
            raise ValueError(f"dim must be even and a multiple of nheads={self.nheads}, got {self.dim}")
        if self.position == "rope" and self.dim // self.nheads % 2:
            raise ValueError(f"dim / nheads must be even for position='rope', got {self.dim // self.nheads}")
        for name, allowed in (
            ("position", ("cape", "sincos", "rope", "alibi")),
            ("norm", ("pre", "hybrid")),
            ("attention", ("sigmoid", "softmax")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_layer_scale(self.layer_scale)
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")
        for name in ("cape_shift", "cape_jitter"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 1.0 <= self.cape_scale < math.inf:
            raise ValueError(f"cape_scale must be at least 1, got {self.cape_scale}")
        if self.sigmoid_bias is not None and not self.sigmoid_bias < math.inf:
            raise ValueError(f"sigmoid_bias must be a number below inf, or None, got {self.sigmoid_bias}")
        if self.alibi_bias:
            check_alibi_bias(self.position, self.bias)

    @property
    def bias(self) -> float:
        """b of every attention: `sigmoid_bias`, or -log(seqlen); with alibi_bias what its heads' are computed from."""
        return -math.log(self.seqlen) if self.sigmoid_bias is None else self.sigmoid_bias

    def positions(self, frames: int) -> int:
        """Positions after the convolutions of so many frames: each stride divides, and rounds up."""
        for stride in self.strides:
            frames = -(-frames // stride)
        return frames


class SpeechEncoder(nn.Module):
    """Convolutions over time, transformer blocks that see the whole utterance, and a linear head.

        x = gelu(conv(x))                                    once for each stride
        logits = W_head norm(blocks(norm(x) + positions))    (batch, positions, vocab_size)

    norm(x) is of the size of the positions, which would drown what fresh convolutions give.

    A padded batch gives every utterance what it gets alone: frames beyond its end are zero before each convolution, as
    the convolution's own padding is, and the attention leaves them out by its key mask (sigmoid: their values are
    zero). What stands beyond the end of the result means nothing. With config.packing the blocks get no padding at all:
    the positions of all utterances in a row, and the attention of each by the variable-length path (softmax: torch's
    SDPA, for which they are padded again). Results are the same up to rounding; dropout and CAPE draw otherwise.

    Start: as `GPT`: matrices N(0, 1 / fan_in), those that end a branch divided by sqrt(2 nlayers), the head
    N(0, 1 / (4 dim)); convolutions as torch draws them.

    Args:
        config: its shape.
        attention_fn: called instead of the config's attention; see `nn.SigmoidAttention`.

    Source: arXiv:2409.04431, its encoders for speech (b = -log n, QK-norm, LayerScale; CAPE, RoPE, ALiBi).
    """

    def __init__(self, config: SpeechConfig, *, attention_fn: AttentionFn | None = None) -> None:
        super().__init__()
        self.config = config
        attention_class = SigmoidAttention if config.attention == "sigmoid" else SoftmaxAttention
        injected: dict[str, Any] = {} if attention_fn is None else {"attention_fn": attention_fn}

        def block() -> Block:
            attention = attention_class(
                config.dim,
                config.nheads,
                qk_norm=config.qk_norm,
                out_norm=config.out_norm,
                position=config.position if config.position in ("rope", "alibi") else None,
                sigmoid_bias=config.bias,
                alibi_bias=bool(config.alibi_bias),
                dropout_p=config.dropout_p,
                **injected,
            )
            mlp = MLP(config.dim, config.mlp_dim)
            return Block(attention, mlp, config.dim, norm=config.norm, layer_scale=config.layer_scale)

        channels = (config.mels, *(config.dim for _ in config.strides))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, config.dim, config.kernel, stride, padding=config.kernel // 2)
            for before, stride in zip(channels, config.strides, strict=False)
        )
        self.front_norm = RMSNorm(config.dim)
        self.cape = (
            CAPE(
                config.dim,
                max_shift=config.cape_shift,
                max_jitter=config.cape_jitter,
                max_scale=config.cape_scale,
            )
            if config.position == "cape"
            else None
        )
        self.dropout = nn.Dropout(config.dropout_p)
        self.blocks = nn.ModuleList(block() for _ in range(config.nlayers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices anew, as the class says; norms and LayerScales set themselves at construction."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith(("out_proj", "down_proj"))
                std = module.in_features**-0.5 / (math.sqrt(2 * self.config.nlayers) if ends_branch else 1.0)
                nn.init.normal_(module.weight, std=std / 2 if module is self.head else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv1d):
                module.reset_parameters()

    def forward(
        self, features: Float[Tensor, "batch frames mels"], lengths: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch positions vocab_size"], Int[Tensor, " batch"]]:
        """Logits of a token, or of the blank, at every position, and how many positions each utterance has.

        Args:
            features: (batch, frames, mels), padded at the end with anything finite.
            lengths: (batch,) frames of each utterance, integers from 0 to frames. The range is checked on the CPU,
                outside of a compiler: for values on a GPU the host would wait.

        Raises:
            ValueError: features or lengths are of another shape, lengths are no integers, or out of range where read.
        """
        if features.dim() != 3 or features.shape[2] != self.config.mels or lengths.shape != features.shape[:1]:
            raise ValueError(
                f"features must be (batch, frames, {self.config.mels}) and lengths (batch,), "
                f"got {tuple(features.shape)} and {tuple(lengths.shape)}"
            )
        _check_lengths(lengths, features.shape[1])
        keep = _keep(features, lengths)
        x = features * keep[..., None]
        for convolution, stride in zip(self.convolutions, self.config.strides, strict=True):
            # (batch, positions, dim)
            x = F.gelu(convolution(x.mT)).mT
            lengths = (lengths - 1) // stride + 1
            keep = _keep(x, lengths)
            x = x * keep[..., None]
        x = self.front_norm(x)
        if self.cape is not None:
            x = self.cape(x, lengths)
        elif self.config.position == "sincos":
            x = x + sincos_positions(x.shape[1], self.config.dim, device=x.device, dtype=x.dtype)
        if not self.config.packing:
            x = self.dropout(x)
            for block in self.blocks:
                x = block(x, keep)
            return self.head(self.norm(x)), lengths
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        packing = Packing(ends, x.shape[1])
        # (1, total, dim)
        packed = self.dropout(x[keep][None])
        for block in self.blocks:
            packed = block(packed, packing=packing)
        logits = self.head(self.norm(packed))[0]
        return logits.new_zeros(*keep.shape, logits.shape[-1]).masked_scatter(keep[..., None], logits), lengths


def _check_lengths(lengths: Tensor, frames: int) -> None:
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or not is_plain((lengths,)):
        return
    wrong = lengths[(lengths < 0) | (lengths > frames)]
    if len(wrong):
        raise ValueError(f"lengths must be from 0 to frames={frames}, got {int(wrong[0])}")


def _keep(x: Tensor, lengths: Tensor) -> Tensor:
    """True within each sequence, (batch, seqlen)."""
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def speech_small(vocab_size: int = 29) -> SpeechConfig:
    """About 15 million parameters, for the whole of AN4: 8 blocks of 384, subsampling 4."""
    return SpeechConfig(vocab_size=vocab_size, seqlen=64, nlayers=8, dim=384, nheads=6, dropout_p=0.1)


def speech_255m(vocab_size: int = 29) -> SpeechConfig:
    """The paper's 255M: one convolution of 7 frames and stride 3, 36 blocks of 768, 4 heads, MLP 3072, characters.

    Its convolution has GELU where the recipe it stands on (arXiv:2010.11524) has a gated unit, and its norms stand
    before the branches. b = -log 512: an utterance of 15 seconds.

    Source: arXiv:2409.04431.
    """
    return SpeechConfig(
        vocab_size=vocab_size, seqlen=512, nlayers=36, dim=768, nheads=4, strides=(3,), layer_scale=1e-4, dropout_p=0.1
    )


def parameter_count(config: SpeechConfig) -> int:
    """Parameters of `SpeechEncoder(config)`, counted on the meta device: no memory is taken."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SpeechEncoder(config).parameters())
