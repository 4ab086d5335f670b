"""Sigmoid attention with the face of torch.nn.MultiheadAttention, but no subclass of it."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends, functional
from ..backends import BackendUnsupported, Explanation, op, reference
from ..backends.problem import make_problem
from ..backends.rules import split_bias
from .attention import kept_keys_bias


class _Call(NamedTuple):
    """One forward, projected and split into heads, with bias_k and bias_v in front of keys and values."""

    q: Tensor  # (batch, seqlen_q, num_heads, head_dim)
    k: Tensor  # (batch, seqlen_k, num_heads, head_dim)
    v: Tensor
    sigmoid_bias: float | Tensor
    causal: bool  # top-left, not counting what stands in front
    mask: Tensor | None  # added to the scores; only where the weights are needed
    why_reference: str  # empty: a fused backend can do it


class MultiheadAttention(nn.Module):
    """Multi-head sigmoid attention with constructor, forward and state_dict of torch.nn.MultiheadAttention.

        out = W_o concat_h(A_h V_h) + b_o,   A_h = sigmoid(Q_h K_h^T / sqrt(head_dim) + b),   0 where masked

    It may replace `self_attn` and `multihead_attn` of torch's encoder and decoder layers, before or after
    they are stacked. In eval torch's encoder layer reads the attention's weights and computes softmax by
    itself whenever it finds `_qkv_same_embed_dim` true; here that is false always, whatever the form of the
    weights, and so neither the layer nor the stack takes that path. A stack built around this module says so
    in one UserWarning, which `enable_nested_tensor=False` avoids. A stack that was built before its attention
    was replaced still packs padded
    batches into nested tensors in eval: these are accepted, padded, and packed again.

    What runs how:
        key_padding_mask     zeroes value rows, which masks a key exactly: any backend
        is_causal=True       the causal mask, top-left as in torch; attn_mask is then only a hint and is not
        read:
                             any backend
        need_weights=True    (torch's default!), or an attn_mask without is_causal: the maths of
                             backend="reference" with O(seqlen_q * seqlen_k) memory. `explain` says so, and an
                             explicit fused backend raises.

    Default b = -log(n) with n the keys of a sequence that key_padding_mask leaves, so that a row does not
    depend on what else is in its batch. The keys of add_bias_kv and add_zero_attn count; causal and attn_mask
    do not change n. A key of add_zero_attn has the score b and the value 0: it adds nothing to out and shows
    only in n and in the returned weights, whose last columns are, as in torch, bias_k and the zero key.

    Args:
        embed_dim: channels of query and output.
        num_heads: a divisor of embed_dim.
        dropout: probability of dropping a weight while training. Default: 0.
        bias: of the projections. Default: True.
        add_bias_kv: append one learnable key and value. Default: False.
        add_zero_attn: append a zero key and value. Default: False.
        kdim, vdim: channels of key and value. Default: embed_dim.
        batch_first: (batch, seqlen, channels) instead of (seqlen, batch, channels). Default: False.
        device, dtype: of the parameters.
        sigmoid_bias: b; None is -log(n) as above. Default: None.
        backend: as in `flashsigmoid.sigmoid_attention`. Default: "auto".

    Raises:
        ValueError: embed_dim is no positive multiple of num_heads, dropout is outside [0, 1), sigmoid_bias is
            NaN or +inf, or there is no such backend.

    Source: arXiv:2409.04431; the interface of torch.nn.MultiheadAttention.
    """

    in_proj_weight: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sigmoid_bias: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a positive multiple of num_heads, got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if sigmoid_bias is not None and not sigmoid_bias < math.inf:  # NaN too
            raise ValueError(f"sigmoid_bias must be a number below +inf, or None, got {sigmoid_bias}")
        if backend not in ("auto", *backends.NAMES):
            raise ValueError(f"backend must be one of auto, {', '.join(backends.NAMES)}, got {backend!r}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.sigmoid_bias, self.backend = sigmoid_bias, backend
        # read by torch's encoder layer before it computes softmax from our weights: always False, see above
        self._qkv_same_embed_dim = False

        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        packed = self.kdim == self.vdim == embed_dim
        self.register_parameter("in_proj_weight", parameter(3 * embed_dim, embed_dim, wanted=packed))
        self.register_parameter("q_proj_weight", parameter(embed_dim, embed_dim, wanted=not packed))
        self.register_parameter("k_proj_weight", parameter(embed_dim, self.kdim, wanted=not packed))
        self.register_parameter("v_proj_weight", parameter(embed_dim, self.vdim, wanted=not packed))
        self.register_parameter("in_proj_bias", parameter(3 * embed_dim, wanted=bias))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.register_parameter("bias_k", parameter(1, 1, embed_dim, wanted=add_bias_kv))
        self.register_parameter("bias_v", parameter(1, 1, embed_dim, wanted=add_bias_kv))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """torch's initialisation, draw for draw."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query to key and value, as torch.nn.MultiheadAttention.forward.

        Args:
            query: (seqlen_q, batch, embed_dim), with batch_first (batch, seqlen_q, embed_dim), or without a
                batch (seqlen_q, embed_dim).
            key, value: the same form with seqlen_k, and kdim and vdim channels.
            key_padding_mask: (batch, seqlen_k) or (seqlen_k,); bool with True = ignore, or float with -inf =
                ignore and 0 = keep.
            need_weights: also return the weights, O(seqlen_q * seqlen_k). Default: True, as in torch.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k); bool with True = not
                visible, or float, added to the scores. Default: none.
            average_attn_weights: return the mean over heads instead of every head's weights. Default: True.
            is_causal: query i sees keys up to i; attn_mask, if any, is taken to say the same. Default: False.

        Returns:
            out in the form of query, and the weights (batch, seqlen_q, seqlen_k + extra keys), with num_heads
            before seqlen_q unless averaged, without batch if the input has none; None unless need_weights.
            They are those that multiply the values, so while training after dropout, and they do not sum to
            one.

        Raises:
            ValueError: a shape or dtype outside the rules above.
            BackendUnsupported: need_weights or attn_mask under an explicit fused backend.
            RuntimeError: a float key_padding_mask with values other than 0 and -inf, on CPU and CUDA.
        """
        if query.is_nested:
            masked = key_padding_mask is not None or (attn_mask is not None and not is_causal)
            if need_weights or masked or query is not key or key is not value or not self.batch_first:
                raise ValueError(
                    "a nested query must be key and value too, with batch_first=True, no mask and "
                    f"need_weights=False, got need_weights={need_weights}, masked={masked}, "
                    f"batch_first={self.batch_first}"
                )
            return self._forward_nested(query, is_causal), None
        call = self._prepare(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        seed = None
        if dropout_p > 0:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
        attn_weights = None
        if call.why_reference:
            out, attn_weights = self._reference(call, dropout_p, seed)
        else:
            out = functional.sigmoid_attention_shard(
                call.q,
                call.k,
                call.v,
                sigmoid_bias=call.sigmoid_bias,
                q_offset=self._in_front,
                causal=call.causal,
                dropout_p=dropout_p,
                seed=seed,
                backend=self.backend,
            )

        # (batch, seqlen_q, embed_dim)
        out = self.out_proj(out.flatten(2))
        if query.dim() == 2:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if attn_weights is None or not need_weights:
            return out, None
        if average_attn_weights:
            attn_weights = attn_weights.mean(1)
        return out, attn_weights.squeeze(0) if query.dim() == 2 else attn_weights

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Explanation:
        """Which backend `forward` would take for these arguments and why, as `flashsigmoid.explain`.

        Raises:
            ValueError, BackendUnsupported: as `forward`.
        """
        with torch.no_grad():
            call = self._prepare(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        told = functional.explain(
            call.q,
            call.k,
            call.v,
            sigmoid_bias=call.sigmoid_bias,
            causal=call.causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend="reference" if call.why_reference else self.backend,
        )
        if not call.why_reference:
            return told
        reasons = {name: call.why_reference for name in backends.NAMES if name != "reference"}
        return dataclasses.replace(told, reasons=reasons)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}, "
            f"sigmoid_bias={self.sigmoid_bias}, backend={self.backend!r}"
        )

    def _prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> _Call:
        self._validate(query, key, value, key_padding_mask, attn_mask)
        attn_mask = None if is_causal else attn_mask
        why = ""
        if need_weights:
            why = "need_weights=True returns all of A: the maths of reference, O(seqlen_q * seqlen_k) memory"
        elif attn_mask is not None:
            why = "attn_mask without is_causal=True: the maths of reference, O(seqlen_q * seqlen_k) memory"
        if why and self.backend not in ("auto", "reference"):
            raise BackendUnsupported(f"{self.backend}: {why}")

        # (batch, seqlen, embed_dim)
        q, k, v = self._project(query, key, value)
        batch, seqlen_k = k.shape[:2]
        keep = None if key_padding_mask is None else _kept(key_padding_mask).expand(batch, -1)
        if keep is not None:
            v = v.masked_fill(~keep[..., None], 0.0)
        counted = self._in_front + self.add_zero_attn
        sigmoid_bias: float | Tensor | None = self.sigmoid_bias
        if sigmoid_bias is None and keep is not None:
            sigmoid_bias = kept_keys_bias(keep, q.dtype, counted).expand(-1, self.num_heads)
        elif sigmoid_bias is None:
            sigmoid_bias = -math.log(max(seqlen_k + counted, 1))

        mask = self._score_mask(q, seqlen_k, keep, attn_mask, is_causal) if why else None
        if self.bias_k is not None and self.bias_v is not None:
            # in front, where no causal mask hides them
            k = torch.cat((self.bias_k.to(k.dtype).expand(batch, -1, -1), k), 1)
            v = torch.cat((self.bias_v.to(v.dtype).expand(batch, -1, -1), v), 1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (q, k, v))
        return _Call(q, k, v, sigmoid_bias, is_causal, mask, why)

    @property
    def _in_front(self) -> int:
        """How many learnt keys stand in front of the given ones."""
        return 0 if self.bias_k is None else 1

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, each (batch, seqlen, embed_dim)."""
        if self.in_proj_weight is not None and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            inputs = (query, key, value)
            projected = tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if query.dim() == 2:
            return tuple(x.unsqueeze(0) for x in projected)
        return projected if self.batch_first else tuple(x.transpose(0, 1) for x in projected)

    def _score_mask(
        self, q: Tensor, seqlen_k: int, keep: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """What masks add to the scores, (batch or 1, num_heads or 1, seqlen_q, in front + seqlen_k)."""
        batch, seqlen_q = q.shape[:2]
        mask = q.new_zeros(1, 1, seqlen_q, seqlen_k, dtype=torch.promote_types(q.dtype, torch.float32))
        if is_causal:
            mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
            forbids = attn_mask.dtype == torch.bool
            mask = mask.masked_fill(attn_mask, -torch.inf) if forbids else mask + attn_mask
        if keep is not None:
            mask = mask.masked_fill(~keep[:, None, None, :], -torch.inf)
        return F.pad(mask, (self._in_front, 0))

    def _reference(self, call: _Call, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """O = A V and A = sigmoid(scale * Q K^T + b + mask) with the columns of A in torch's order."""
        bias, number = split_bias(call.sigmoid_bias)
        problem = make_problem(call.q, call.k, call.v, bias=bias, sigmoid_bias=number, q_offset=0, dropout_p=dropout_p)
        assert call.mask is not None
        with op.full_precision(problem.device):
            a = torch.sigmoid(reference.scores(problem, call.q, call.k, bias, None) + call.mask)
            a = reference.dropped(problem, a, seed)
            out = reference.product(problem, a, call.v)
            in_torch_order = [a[..., self._in_front :], a[..., : self._in_front]]
            if self.add_zero_attn:
                b = a.new_tensor(number) if bias is None else bias.to(a.dtype)
                in_torch_order.append(torch.sigmoid(b)[..., None, None].expand(*a.shape[:-1], 1))
        return out, torch.cat(in_torch_order, dim=-1).to(call.q.dtype)

    def _forward_nested(self, x: Tensor, is_causal: bool) -> Tensor:
        """A nested batch of sequences, padded, attended and nested again."""
        lengths = [sequence.shape[0] for sequence in x.unbind()]
        padded = torch.nested.to_padded_tensor(x, 0.0)
        steps = torch.arange(padded.shape[1], device=x.device)
        ignore = steps >= torch.tensor(lengths, device=x.device)[:, None]
        out, _ = self.forward(padded, padded, padded, ignore, need_weights=False, is_causal=is_causal)
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=x.layout)

    def _validate(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        dims = (query.dim(), key.dim(), value.dim())
        if dims not in ((2, 2, 2), (3, 3, 3)):
            raise ValueError(f"query, key, value must have 3 dimensions, or 2 without a batch, got {dims}")
        channels = (self.embed_dim, self.kdim, self.vdim)
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != channels:
            raise ValueError(
                f"query, key and value must have {channels} channels, "
                f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        batched, batch_dim = query.dim() == 3, 0 if self.batch_first else 1
        batch = query.shape[batch_dim] if batched else 1
        if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[batch_dim] != batch):
            raise ValueError(
                "key and value must share batch and seqlen, and query the batch "
                f"(batch_first={self.batch_first}), "
                f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        seqlen_q, seqlen_k = (x.shape[1 - batch_dim] if batched else x.shape[0] for x in (query, key))
        legal = {
            "key_padding_mask": [(batch, seqlen_k)] if batched else [(seqlen_k,)],
            "attn_mask": [(seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k)],
        }
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is None:
                continue
            if tuple(mask.shape) not in legal[name]:
                raise ValueError(f"{name} must have one of the shapes {legal[name]}, got {tuple(mask.shape)}")
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(f"{name} must be bool or floating point, got {mask.dtype}")


def _kept(key_padding_mask: Tensor) -> Tensor:
    """True for the keys that may be attended to, (batch or 1, seqlen_k)."""
    mask = torch.atleast_2d(key_padding_mask)
    if mask.dtype == torch.bool:
        return ~mask
    keep = mask == 0
    if mask.device.type in ("cpu", "cuda"):
        # checked on the device: no synchronisation, and torch.compile keeps it
        legal = (keep | (mask == -torch.inf)).all()
        rule = "a float key_padding_mask must hold 0 (keep) and -inf (ignore) only"
        torch.ops.aten._assert_async.msg(legal, rule)
    return keep
