"""python -m flashsigmoid.distributed.scaling PAGE...    writes the tables of context parallel into Markdown pages anew.

What a training step of three sizes of model sends and keeps for each token, computed, and what was measured of it, from
records. Between <!-- scaling -->, <!-- sent --> and <!-- end -->.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..record import Scalar, read_records
from .cost import Sizes, choose_scheme, cost, softmax_ring_cost
from .layout import Layout

RESULTS = Path("benchmarks/results")
_MARKED = re.compile(r"^<!-- (scaling|sent) -->\n.*?^<!-- end -->$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class ModelSizes:
    """A language model with SwiGLU, embedding and head apart."""

    nlayers: int
    dim: int
    nheads: int
    nheads_k: int
    hidden: int
    vocab_size: int = 32_768

    @property
    def parameters(self) -> int:
        """All but the norms."""
        kv = self.dim * self.nheads_k // self.nheads
        layer = 2 * self.dim * self.dim + 2 * self.dim * kv + 3 * self.dim * self.hidden
        return self.ends + self.nlayers * layer

    @property
    def ends(self) -> int:
        """Of them, those of embedding and head."""
        return 2 * self.vocab_size * self.dim


MODELS = {
    "1B": ModelSizes(24, 2048, 32, 32, 5504),
    "7B": ModelSizes(32, 4096, 32, 32, 10_944),
    "70B": ModelSizes(80, 8192, 64, 8, 28_672),
}
# (tokens of a sequence, ranks that share it)
LENGTHS = ((8_192, 4), (131_072, 16), (1_048_576, 128))


@dataclass(frozen=True)
class TokenCost:
    """Bytes of one training step for each token that a rank holds, all layers together."""

    keys_bytes: float  # sent, where keys and values travel
    queries_bytes: float  # sent, where queries travel
    chosen: str  # by `choose_scheme`
    window_bytes: float  # sent by the better of both, with a window of 4,096 keys
    softmax_bytes: float  # sent by softmax ring attention
    fsdp_bytes: float  # sent by FSDP over the same ranks
    kept_bytes: float  # inputs of recomputed blocks
    visitors_bytes: float  # of the chosen scheme, at once
    states_bytes: float  # weights, gradients, AdamW in float32, on a rank in all


@functools.cache
def token_cost(model: ModelSizes, seqlen: int, ranks: int) -> TokenCost:
    """One causal sequence in zig-zag order over `ranks` ranks, 16-bit tensors, weights sharded over the same ranks.

    attention: nlayers * cost / (seqlen / ranks), of the busiest rank       (cost.py)
    FSDP:      (2 P + 2 P + 4 P - 2 E) (ranks - 1) / ranks / (seqlen / ranks)     16-bit weights twice, but embedding
               and head, E, once; float32 gradients
    kept:      4 dim nlayers, the float32 inputs of recomputed blocks       states: 16 P / ranks
    """
    head_dim = model.dim // model.nheads
    sizes = Sizes(1, model.nheads, model.nheads_k, head_dim, head_dim, itemsize=2)
    tokens = seqlen / ranks

    def busiest(layout: Layout, scheme: str) -> int:
        return max(cost(layout, sizes, scheme, rank).sent_bytes for rank in range(ranks))

    whole, narrow = (
        Layout(ranks, "zigzag", seqlen, seqlen, (0, seqlen), (0, seqlen), (left, 0)) for left in (None, 4095)
    )
    chosen = choose_scheme(whole, sizes)
    visitors = max(cost(whole, sizes, chosen, rank).buffer_bytes for rank in range(ranks))
    return TokenCost(
        keys_bytes=model.nlayers * busiest(whole, "ring") / tokens,
        queries_bytes=model.nlayers * busiest(whole, "reduce_scatter") / tokens,
        chosen=chosen,
        window_bytes=model.nlayers * busiest(narrow, choose_scheme(narrow, sizes)) / tokens,
        softmax_bytes=model.nlayers * softmax_ring_cost(whole, sizes).sent_bytes / tokens,
        fsdp_bytes=(8 * model.parameters - 2 * model.ends) * (ranks - 1) / ranks / tokens,
        kept_bytes=4 * model.dim * model.nlayers,
        visitors_bytes=visitors / tokens,
        states_bytes=16 * model.parameters / ranks,
    )


def scaling_table() -> str:
    """Markdown: a row for every model and length, all computed."""
    head = (
        "model", "n", "ranks", "keys travel", "queries travel", "chosen", "window 4k", "softmax ring", "FSDP",
        "kept", "visitors", "states a rank",
    )  # fmt: skip
    rows = []
    for name, model in MODELS.items():
        for seqlen, ranks in LENGTHS:
            x = token_cost(model, seqlen, ranks)
            sent = (x.keys_bytes, x.queries_bytes, x.chosen, x.window_bytes, x.softmax_bytes, x.fsdp_bytes)
            cells = [cell if isinstance(cell, str) else _mib(cell) for cell in (*sent, x.kept_bytes, x.visitors_bytes)]
            length = f"{seqlen // 2**20}M" if seqlen >= 2**20 else f"{seqlen // 2**10}k"
            rows.append([name, length, str(ranks), *cells, f"{x.states_bytes / 2**30:.1f} GiB"])
    return _table(head, rows)


def sent_table() -> str:
    """Markdown: what the long tests found, and bytes that the busiest rank sent in them beside the formulas."""
    records = read_records(RESULTS / "context-parallel.jsonl").records
    found: dict[tuple[Scalar, ...], dict[str, float]] = {}
    for record in records:
        key = tuple(record.tags[name] for name in ("case", "ranks", "order", "scheme"))
        found.setdefault(key, {})[record.name] = record.value or 0.0
    rows = []
    for (case, ranks, order, scheme), x in found.items():
        if case in ("full", "causal", "causal, one key head", "window over chunks") and scheme != "all_gather":
            numbers = (x["sent"], x["formula"], x["softmax_ring_formula"])
            share = f"{x['sent'] / x['softmax_ring_formula']:.2f}"
            rows.append([*map(str, (case, ranks, order, scheme)), *(f"{number:,.0f}" for number in numbers), share])
    head = ("case", "ranks", "order", "scheme", "sent", "formula", "softmax ring, formula", "sent / softmax")
    worst = max(x["over_budget"] for x in found.values())
    wrong = sum(x["sent"] != x["formula"] for x in found.values())
    losses = read_records(RESULTS / "parallel-losses.jsonl").records
    apart = [record.value or 0.0 for record in losses if record.name == "largest_relative_difference"]
    said = (
        f"{len(found)} cases; the largest error is {worst:.2f} of the budget; sent and formula differ in {wrong}. "
        f"Losses: {len(apart)} meshes and models, largest relative difference at any step {max(apart):.0e}."
    )
    return f"{said}\n\n{_table(head, rows)}"


def _mib(x: float) -> str:
    return f"{x / 2**20:.3g} MiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def rewrite(text: str) -> str:
    """A page with its tables written anew."""
    tables = {"scaling": scaling_table, "sent": sent_table}
    return _MARKED.sub(lambda match: f"<!-- {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->", text)


def main(pages: Sequence[str]) -> None:
    """Rewrite the pages in place."""
    for page in map(Path, pages):
        page.write_text(rewrite(page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
