"""A decoder-only language model of sigmoid attention, its configuration and its sizes. No training, no sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ..nn import MLP, Block, RMSNorm, SigmoidAttention, SoftmaxAttention, SwiGLU
from ..nn.attention import AttentionFn, KVCache, check_alibi_bias
from ..nn.config import check_layer_scale, check_types

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything that shapes a `GPT`. The softmax twin is dataclasses.replace(config, attention="softmax").

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    vocab_size: int  # rows of the embedding; at least the tokenizer's vocabulary
    seqlen: int  # training context in tokens; fixes sigmoid_bias and the longest input
    nlayers: int  # blocks
    dim: int  # channels of the residual stream, a multiple of nheads
    nheads: int  # query heads
    nheads_k: int | None = None  # key and value heads, a divisor of nheads; None: nheads
    position: Literal["alibi", "rope"] = "alibi"  # the paper's choice for sigmoid language models is ALiBi
    norm: Literal["pre", "hybrid"] = "pre"  # hybrid also normalises each branch's output: 1B at 4096 needs it
    qk_norm: bool = True  # RMSNorm of queries and keys per head
    out_norm: bool = False  # RMSNorm of what each head gives, for which b can be lower, as -log(seqlen) - 3
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_dim: int | None = None  # hidden channels; None: 8/3 dim rounded up to 64 (swiglu), 4 dim (gelu)
    layer_scale: float | None = None  # initial factor per channel on each branch; None: no LayerScale
    dropout_p: float = 0.0  # of attention weights and of embedded tokens, in training, in [0, 1)
    gate: bool = False  # elementwise sigmoid gate on the heads' outputs
    window_size: tuple[int | None, int | None] = (None, None)  # (left, None): tokens back; None: all
    attention: Literal["sigmoid", "softmax"] = "sigmoid"  # the one field in which a pair differs
    sigmoid_bias: float | None = None  # b; None: -log(seqlen) of this config, whatever the input's length
    alibi_bias: bool | None = None  # True: each head its own b, `nn.alibi_bias` of n = exp(-b); else b for all

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "window_size", tuple(self.window_size))
        for name in ("vocab_size", "seqlen", "nlayers", "dim", "nheads", "nheads_k", "mlp_dim"):
            size = getattr(self, name)
            if not (type(size) is int and size > 0) and not (size is None and name in ("nheads_k", "mlp_dim")):
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if self.dim % self.nheads:
            raise ValueError(f"dim must be a multiple of nheads={self.nheads}, got {self.dim}")
        if self.nheads % self.kv_heads:
            raise ValueError(f"nheads must be a multiple of nheads_k={self.nheads_k}, got {self.nheads}")
        if self.position == "rope" and self.dim // self.nheads % 2:
            raise ValueError(f"dim / nheads must be even for position='rope', got {self.dim // self.nheads}")
        for name, allowed in (
            ("position", ("alibi", "rope")),
            ("norm", ("pre", "hybrid")),
            ("mlp", ("swiglu", "gelu")),
            ("attention", ("sigmoid", "softmax")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_layer_scale(self.layer_scale)
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")
        left, right = self.window_size if len(self.window_size) == 2 else (-1, None)
        if right is not None or not (left is None or left >= 0):
            raise ValueError(
                f"window_size must be (left, None) with left None or >= 0, got {self.window_size}: "
                "a causal model sees nothing to the right"
            )
        if self.sigmoid_bias is not None and not self.sigmoid_bias < math.inf:
            raise ValueError(f"sigmoid_bias must be a number below inf, or None, got {self.sigmoid_bias}")
        if self.alibi_bias:
            check_alibi_bias(self.position, self.bias)

    @property
    def bias(self) -> float:
        """b of every attention: `sigmoid_bias`, or -log(seqlen); with alibi_bias what its heads' are computed from."""
        return -math.log(self.seqlen) if self.sigmoid_bias is None else self.sigmoid_bias

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.nheads if self.nheads_k is None else self.nheads_k

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        default = -(-8 * self.dim // (3 * 64)) * 64 if self.mlp == "swiglu" else 4 * self.dim
        return default if self.mlp_dim is None else self.mlp_dim


@dataclass
class GPTCache:
    """Keys and values of every layer of a `GPT`, (batch, capacity, nheads_k, head_dim), and how many of them count.

    seqlens, int64 (batch,), is the caller's to raise by the tokens passed: after a prefill of padded prompts to their
    lengths, so that what padding has left is written over.
    """

    layers: list[tuple[Tensor, Tensor]]
    seqlens: Int[Tensor, " batch"]

    def layer(self, index: int) -> KVCache:
        """The cache of one block's attention."""
        return KVCache(*self.layers[index], self.seqlens)


class GPT(nn.Module):
    """A causal transformer over tokens.

        logits = W_head norm(blocks(W_embed[tokens]))       (batch, seqlen, vocab_size)

    Embedding and head are separate matrices: tied, a fresh model would predict the token it has just read.
    Start: embeddings N(0, 0.02^2), small beside what the first blocks add, so that they are soon overwritten by it;
    every other matrix N(0, 1 / fan_in), which keeps the variance; the two that end a branch are divided by
    sqrt(2 nlayers), so the sum of 2 nlayers branches has the variance of one; the head is N(0, 1 / (4 dim)): the first
    loss is within 0.13 of log(vocab_size). Norms start at 1.

    Packed documents are separated by an end-of-text token and nothing else: attention crosses it, as in GPT-2, and
    the model learns what the token means.

    Args:
        config: its shape.
        attention_fn: called instead of `sigmoid_attention` (of torch's SDPA for softmax); see `nn.SigmoidAttention`.

    Source: arXiv:2409.04431 for the practices (b = -log n, QK-norm, hybrid-norm, ALiBi, SwiGLU); the depth factor is
    that of GPT-2, section 2.3.
    """

    def __init__(self, config: GPTConfig, *, attention_fn: AttentionFn | None = None) -> None:
        super().__init__()
        self.config = config
        attention_class = SigmoidAttention if config.attention == "sigmoid" else SoftmaxAttention
        injected: dict[str, Any] = {} if attention_fn is None else {"attention_fn": attention_fn}

        def block() -> Block:
            attention = attention_class(
                config.dim,
                config.nheads,
                nheads_k=config.nheads_k,
                qk_norm=config.qk_norm,
                out_norm=config.out_norm,
                position=config.position,
                sigmoid_bias=config.bias,
                alibi_bias=bool(config.alibi_bias),
                causal=True,
                window_size=config.window_size,
                dropout_p=config.dropout_p,
                gate=config.gate,
                **injected,
            )
            swiglu = config.mlp == "swiglu"
            mlp = SwiGLU(config.dim, config.hidden) if swiglu else MLP(config.dim, config.hidden, bias=False)
            return Block(attention, mlp, config.dim, norm=config.norm, layer_scale=config.layer_scale)

        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout_p)
        self.blocks = nn.ModuleList(block() for _ in range(config.nlayers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, normal_: Callable[..., Any] = nn.init.normal_) -> None:
        """Draw the matrices anew, as the class says; norms and LayerScales set themselves at construction.

        Args:
            normal_: called as normal_(weight, std=...) for each. Default: torch's own.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith(("out_proj", "down_proj"))
                std = module.in_features**-0.5 / (math.sqrt(2 * self.config.nlayers) if ends_branch else 1.0)
                normal_(module.weight, std=std / 2 if module is self.head else std)
        normal_(self.embedding.weight, std=0.02)

    def _attentions(self) -> list[SigmoidAttention]:
        return [cast(Any, block).attention for block in self.blocks]

    @property
    def takes_cache(self) -> bool:
        """Whether forward can be given a cache: not where another attention_fn was injected."""
        return all(attention.takes_cache for attention in self._attentions())

    def new_cache(self, batch: int, capacity: int | None = None) -> GPTCache:
        """Room for `capacity` tokens (default: the context) in every layer, in autocast's dtype or the weights'."""
        capacity = self.config.seqlen if capacity is None else capacity
        weight = self.embedding.weight
        dtype, kind = weight.dtype, weight.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        layers = [attention.new_cache(batch, capacity, dtype=dtype) for attention in self._attentions()]
        return GPTCache([(layer.k, layer.v) for layer in layers], layers[0].seqlens)

    def forward(
        self,
        tokens: Int[Tensor, "batch seqlen"],
        cache: GPTCache | None = None,
        key_mask: Bool[Tensor, "batch seqlen"] | None = None,
    ) -> Float[Tensor, "batch seqlen vocab_size"]:
        """Logits of the next token after each token.

        Args:
            tokens: (batch, seqlen) int64, at most config.seqlen of them.
            cache: what each sequence has before these tokens, whose keys and values are written behind it in place;
                its seqlens are the caller's to raise. In eval mode and without gradients. Default: none.
            key_mask: (batch, seqlen) bool, False for padding among these tokens, on any side. Default: no padding.

        Raises:
            ValueError: tokens are not (batch, seqlen), or longer than the context; a cache that is full, or is given in
                training or where `takes_cache` is False.
        """
        if tokens.dim() != 2 or tokens.shape[1] > self.config.seqlen:
            raise ValueError(
                f"tokens must be (batch, seqlen) with seqlen <= {self.config.seqlen}, got {tuple(tokens.shape)}"
            )
        # (batch, seqlen, dim)
        x = self.dropout(self.embedding(tokens))
        for i, block in enumerate(self.blocks):
            x = block(x, key_mask) if cache is None else block(x, key_mask, cache=cache.layer(i))
        # (batch, seqlen, vocab_size)
        return self.head(self.norm(x))


def gpt_demo() -> GPTConfig:
    """The demo's: bytes, 4 layers of 128, context 128; a minute or two on two CPU cores."""
    return GPTConfig(vocab_size=257, seqlen=128, nlayers=4, dim=128, nheads=4)


def gpt_40m() -> GPTConfig:
    """About 40 million parameters: 8 layers of 512, context 1024, BPE of 16,384."""
    return GPTConfig(vocab_size=16_384, seqlen=1024, nlayers=8, dim=512, nheads=8)


def gpt_enwik8() -> GPTConfig:
    """39 million parameters for bytes: 12 layers of 512, context 1024, hybrid-norm.

    257 tokens and 7 rows that none needs: GPUs multiply matrices of such sizes several times slower than of 8 k rows.
    """
    return GPTConfig(vocab_size=264, seqlen=1024, nlayers=12, dim=512, nheads=8, norm="hybrid")


def gpt_85m() -> GPTConfig:
    """The paper's 85M (embeddings apart): 12 layers of 768, context 2048, ALiBi, QK-norm. Source: arXiv:2409.04431."""
    return GPTConfig(vocab_size=32_768, seqlen=2048, nlayers=12, dim=768, nheads=12)


def gpt_1b() -> GPTConfig:
    """The paper's 1B: 24 layers of 2048, context 4096, hybrid-norm besides. Source: arXiv:2409.04431."""
    return GPTConfig(vocab_size=32_768, seqlen=4096, nlayers=24, dim=2048, nheads=32, norm="hybrid")


def gpt_7b() -> GPTConfig:
    """The paper's 7B: 32 layers of 4096, context 4096, hybrid-norm. Source: arXiv:2409.04431."""
    return GPTConfig(vocab_size=32_768, seqlen=4096, nlayers=32, dim=4096, nheads=32, norm="hybrid")


def parameter_count(config: GPTConfig) -> int:
    """Parameters of `GPT(config)`, counted on the meta device: no memory is taken."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training step holds, in bytes."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def memory_estimate(
    config: GPTConfig, batch: int, *, dtype: torch.dtype = torch.bfloat16, checkpointed: bool = False
) -> MemoryEstimate:
    """Bytes of training on one device with AdamW and an attention that keeps nothing of O(seqlen^2).

        weights, gradients = 4 P each       optimizer = 8 P        P parameters, all kept in float32
        activations = batch * seqlen * (nlayers * layer + 4 (2 dim) + s dim + 4 vocab_size) + (2 P if s < 4)
        layer = 4 (2 normed) + s (x dim + q + k + v + q (+ 3 q gate) + m hidden)       s = bytes of `dtype`
        normed = 2 dim (+ 2 dim hybrid) (+ q + k QK-norm)

    with q = dim, k = v = dim * nheads_k / nheads channels and m = 4 for SwiGLU, 2 for GELU. What they are: a norm's
    input and its normalised input, in float32; x inputs of the projections, 2 in float32, but under autocast (s = 2),
    which casts anew for each product, one for each of q, k, v, gate and of the MLP's (and 2 of LayerScale); q, k, v and
    A v; the gate's and the MLP's own. 2 P are autocast's copies of the weights. The allocator's overhead, the gradient
    of the logits and other temporaries are not in it, nor is what a compiler saves.

    Args:
        config: the model.
        batch: sequences of config.seqlen tokens in one micro-batch.
        dtype: of the matrix products, float32 or what autocast uses. Default: bfloat16.
        checkpointed: layers recomputed in backward, only their input kept. Default: False.

    Raises:
        ValueError: batch is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    p = parameter_count(config)
    s, d, q, k = dtype.itemsize, config.dim, config.dim, config.dim * config.kv_heads // config.nheads
    swiglu = config.mlp == "swiglu"
    normed = 2 * d + (q + k if config.qk_norm else 0) + (q if config.out_norm else 0)
    normed += 2 * d if config.norm == "hybrid" else 0
    inputs = (2 if s == 4 else 3 + config.gate + 1 + swiglu) + (0 if config.layer_scale is None else 2)
    narrow = inputs * d + 2 * q + 2 * k + (3 * q if config.gate else 0) + (4 if swiglu else 2) * config.hidden
    layer = 4 * 2 * normed + s * narrow
    blocks = config.nlayers * 4 * d + layer if checkpointed else config.nlayers * layer
    activations = batch * config.seqlen * (blocks + (8 + s) * d + 4 * config.vocab_size)
    return MemoryEstimate(4 * p, 4 * p, 8 * p, activations + (2 * p if s < 4 else 0))
