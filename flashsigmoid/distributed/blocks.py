"""Blocks of queries and of keys on one rank: which two see each other, and the op for them, added up.

Where the blocks come from is the business of context_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import op
from ..functional import sigmoid_attention_shard
from .exchange import Axis, Exchange
from .layout import Layout, Span


@dataclass(frozen=True)
class Call:
    """Everything of a call that is not a tensor."""

    axis: Axis
    layout: Layout
    scheme: str
    origin: tuple[int, int]
    number: float | None  # b where it is no tensor
    dropout_p: float
    row_bias: bool
    is_packed: bool
    options: dict[str, Any]

    @property
    def queries_travel(self) -> bool:
        return self.scheme == "reduce_scatter"

    @property
    def exchange(self) -> Exchange:
        """Of the rows that travel."""
        layout = self.layout
        if self.queries_travel:
            return Exchange(self.axis, layout.queries_for, layout.rows_q, layout.order)
        return Exchange(self.axis, layout.keys_for, layout.rows_k, layout.order)

    @property
    def ahead(self) -> int:
        return self.axis.size - 1 if self.scheme == "all_gather" else 1


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one sequence: inputs and sums of the queries or of the keys, (batch, rows, ...) each."""

    span: Span
    of: dict[str, Tensor]

    def cut(self, span: Span) -> dict[str, Tensor]:
        """The tensors of a part of the rows."""
        return {name: x.narrow(1, span.start - self.span.start, span.size) for name, x in self.of.items()}


def blocks_of(spans: Iterable[Span], tensors: Mapping[str, Tensor]) -> list[Block]:
    """Tensors whose rows are those of the spans, one after the other."""
    blocks, row = [], 0
    for span in spans:
        blocks.append(Block(span, {name: x.narrow(1, row, span.size) for name, x in tensors.items()}))
        row += span.size
    return blocks


def joined(blocks: Sequence[Block]) -> list[Block]:
    """The blocks in order, those that touch made one, so that the op is called less often."""
    runs: list[list[Block]] = []
    for block in sorted(blocks, key=lambda block: block.span):
        last = runs[-1][-1].span if runs else None
        if last is not None and (last.sequence, last.stop) == (block.span.sequence, block.span.start):
            runs[-1].append(block)
        else:
            runs.append([block])
    return [
        Block(
            Span(run[0].span.sequence, run[0].span.start, run[-1].span.stop),
            {name: torch.cat([block.of[name] for block in run], dim=1) for name in run[0].of},
        )
        for run in runs
    ]


@dataclass(frozen=True)
class Sides:
    """What every block of a call shares: a bias that is not sharded, slopes, the dropout seed."""

    bias: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    sums: dict[str, Tensor]  # of the gradients of bias and slopes

    def of(self, name: str, call: Call, sequence: int) -> Tensor | None:
        """Bias or slopes of one sequence."""
        x = getattr(self, name)
        return x[sequence : sequence + 1] if x is not None and call.is_packed and x.dim() == 2 else x

    def add(self, name: str, call: Call, sequence: int, grad: Tensor | None) -> None:
        """Add to the gradient of `of`."""
        if name in self.sums and grad is not None:
            total = self.sums[name]
            (total[sequence : sequence + 1] if call.is_packed and total.dim() == 2 else total).add_(grad)


def _pairs(call: Call, queries: list[Block], keys: list[Block]) -> Iterator[tuple[Any, Any, dict[str, Any], int]]:
    """(queries, keys, keywords of `sigmoid_attention_shard`, sequence) of every two blocks, cut to what is seen."""
    layout = call.layout
    for one in queries:
        for other in keys:
            seen = layout.seen(one.span, other.span)
            if not seen.size:
                continue
            seeing = layout.seeing(seen, one.span)
            s = seen.sequence
            where = {
                "q_offset": seeing.start + layout.shift(s) - seen.start,
                "origin": (
                    call.origin[0] + s,
                    call.origin[1],
                    seeing.start - layout.cu_seqlens_q[s],
                    seen.start - layout.cu_seqlens_k[s],
                ),
            }
            yield one.cut(seeing), other.cut(seen), where, s


def _bias(call: Call, sides: Sides, x: Mapping[str, Tensor], sequence: int) -> Any:
    """b of some queries: a number, a tensor that all rows share, or the rows' own."""
    if call.number is not None:
        return call.number
    return x["bias"].transpose(1, 2) if call.row_bias else sides.of("bias", call, sequence)


def attend(call: Call, sides: Sides, queries: list[Block], keys: list[Block], *, are_all: bool = False) -> None:
    """out += A V of every two blocks. are_all: of queries that stay, these are all the keys there are."""
    for one in queries:
        pairs = list(_pairs(call, [one], keys))
        # what one block gives is rounded as the whole would be, by the fastest kernel; a summand is not
        is_part = not (are_all and len(pairs) == 1)
        for x, y, where, sequence in pairs:
            bias, slopes = _bias(call, sides, x, sequence), sides.of("slopes", call, sequence)
            x["out"].add_(_forward(call, sides, x, y, bias, slopes, where, is_part))


def attend_backward(call: Call, sides: Sides, queries: list[Block], keys: list[Block]) -> None:
    """dq, dk, dv and the gradients of bias and slopes += those of every two blocks."""
    for x, y, where, sequence in _pairs(call, queries, keys):
        bias, slopes = _bias(call, sides, x, sequence), sides.of("slopes", call, sequence)
        dq, dk, dv, dbias, dslopes = _backward(call, sides, x, y, bias, slopes, where)
        x["dq"].add_(dq)
        y["dk"].add_(dk)
        y["dv"].add_(dv)
        if "dbias" in x:
            x["dbias"].add_(dbias.transpose(1, 2))
        sides.add("bias", call, sequence, dbias)
        sides.add("slopes", call, sequence, dslopes)


def _forward(call: Call, sides: Sides, x, y, bias, slopes, where, is_part: bool) -> Tensor:
    """A V of two blocks, as a part of a sum not rounded."""
    qkv = x["q"], y["k"], y["v"]
    if call.options["backend"] == "reference":
        q, k, v = _wide(qkv)
        return _by_reference(call, sides, q, k, v, bias, slopes, where)
    forward = op.forward_part if is_part else op.forward
    return forward(*qkv, *_rest(call, sides, bias, slopes, where, False))


def _backward(call: Call, sides: Sides, x, y, bias, slopes, where) -> tuple[Any, ...]:
    """The gradients of `_forward`, not rounded."""
    qkv = x["q"], y["k"], y["v"]
    if call.options["backend"] != "reference":
        needs_sums = "dbias" in x or bool(sides.sums)
        return op.backward_part(x["dout"], *qkv, *_rest(call, sides, bias, slopes, where, needs_sums))
    given = (*_wide(qkv), bias if isinstance(bias, Tensor) else None, slopes)
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        q, k, v, given_bias, slopes = leaves
        out = _by_reference(call, sides, q, k, v, bias if given_bias is None else given_bias, slopes, where)
    with op.full_precision(out.device.type):  # a backward within autocast would round what is summed
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], _wide([x["dout"]])))
    return tuple(None if t is None else next(grads) for t in leaves)


def _rest(call: Call, sides: Sides, bias, slopes, where, needs_sums: bool) -> tuple[Any, ...]:
    """What the op takes after q, k, v."""
    options, tensor_bias = call.options, bias if isinstance(bias, Tensor) else None
    return (
        tensor_bias, slopes, sides.seed, None, None,
        call.number, options["scale"], options["causal"], *options["window_size"], where["q_offset"],
        float(call.dropout_p), where["origin"], options["sigmoid"], None, None, needs_sums, options["backend"],
    )  # fmt: skip


def _by_reference(call: Call, sides: Sides, q: Any, k: Any, v: Any, bias: Any, slopes: Any, where: Any) -> Tensor:
    with op.full_precision(q.device.type):
        return sigmoid_attention_shard(
            q, k, v, sigmoid_bias=bias, alibi_slopes=slopes, dropout_p=call.dropout_p, seed=sides.seed, **where,
            **call.options,
        )  # fmt: skip


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In float32 at least: the reference rounds what it returns."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def within(runs: Sequence[Block], span: Span) -> dict[str, Tensor]:
    """The rows of a span, of the run that has them."""
    for run in runs:
        if run.span.sequence == span.sequence and run.span.start <= span.start and span.stop <= run.span.stop:
            return run.cut(span)
    raise AssertionError(f"{span} is in none of the gathered runs")
