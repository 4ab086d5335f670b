"""Blocks of queries and of keys on one rank: which two see each other, and the op for them, added up.

Where the blocks come from is the business of context_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    dtype: torch.dtype  # in which the op is given q, k, v

    def widened(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs in `dtype`; sums are what they are."""
        return {name: t.to(self.dtype) if name in ("q", "k", "v", "dout") else t for name, t in x.items()}

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
            yield call.widened(one.cut(seeing)), call.widened(other.cut(seen)), where, s


def _bias(call: Call, sides: Sides, x: Mapping[str, Tensor], sequence: int) -> Any:
    """b of some queries: a number, a tensor that all rows share, or the rows' own."""
    if call.number is not None:
        return call.number
    return x["bias"].transpose(1, 2) if call.row_bias else sides.of("bias", call, sequence)


def attend(call: Call, sides: Sides, queries: list[Block], keys: list[Block]) -> None:
    """out += A V of every two blocks."""
    for x, y, where, sequence in _pairs(call, queries, keys):
        out = sigmoid_attention_shard(
            x["q"],
            y["k"],
            y["v"],
            sigmoid_bias=_bias(call, sides, x, sequence),
            alibi_slopes=sides.of("slopes", call, sequence),
            dropout_p=call.dropout_p,
            seed=sides.seed,
            **where,
            **call.options,
        )
        x["out"].add_(out)


def attend_backward(call: Call, sides: Sides, queries: list[Block], keys: list[Block]) -> None:
    """dq, dk, dv and the gradients of bias and slopes += those of every two blocks."""
    for x, y, where, sequence in _pairs(call, queries, keys):
        bias, slopes = _bias(call, sides, x, sequence), sides.of("slopes", call, sequence)
        dq, dk, dv, dbias, dslopes = _shard_backward(call, sides, x, y, bias, slopes, where)
        x["dq"].add_(dq)
        y["dk"].add_(dk)
        y["dv"].add_(dv)
        if "dbias" in x:
            x["dbias"].add_(dbias.transpose(1, 2))
        sides.add("bias", call, sequence, dbias)
        sides.add("slopes", call, sequence, dslopes)


def _shard_backward(call: Call, sides: Sides, x, y, bias, slopes, where) -> tuple[Any, ...]:
    """The backward of `sigmoid_attention_shard`, without its forward where the backend has one of its own."""
    options, tensor_bias = call.options, bias if isinstance(bias, Tensor) else None
    if options["backend"] != "reference":
        return torch.ops.flashsigmoid.bwd(
            x["dout"], x["q"], y["k"], y["v"], tensor_bias, slopes, sides.seed, None, None,
            call.number, options["scale"], options["causal"], *options["window_size"], where["q_offset"],
            float(call.dropout_p), where["origin"], options["sigmoid"], None, None,
            "dbias" in x or bool(sides.sums), options["backend"],
        )  # fmt: skip
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x["q"], y["k"], y["v"], tensor_bias, slopes)]
    with torch.enable_grad():
        out = sigmoid_attention_shard(
            *leaves[:3],  # pyright: ignore[reportArgumentType]
            sigmoid_bias=bias if leaves[3] is None else leaves[3],
            alibi_slopes=leaves[4],
            dropout_p=call.dropout_p,
            seed=sides.seed,
            **where,
            **options,
        )
    grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], x["dout"]))
    return tuple(None if t is None else next(grads) for t in leaves)


def within(runs: Sequence[Block], span: Span) -> dict[str, Tensor]:
    """The rows of a span, of the run that has them."""
    for run in runs:
        if run.span.sequence == span.sequence and run.span.start <= span.start and span.stop <= run.span.stop:
            return run.cut(span)
    raise AssertionError(f"{span} is in none of the gathered runs")
