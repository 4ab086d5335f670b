"""The formulas in closed form, what `choose_scheme` chooses, and the tables of docs/scaling.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsigmoid.distributed import scaling
from flashsigmoid.distributed.cost import Sizes, choose_scheme, cost, softmax_ring_cost
from flashsigmoid.distributed.layout import ORDERS, Layout, chunks, place
from flashsigmoid.models import gpt

ROOT = Path(__file__).parents[2]
MHA = Sizes(1, 8, 8, 64, 64, 2)
N = 4096


def layout_of(size: int, order="zigzag", band=(None, None), n: int = N) -> Layout:
    return Layout(size, order, n, n, (0, n), (0, n), band)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_row_is_held_once(size, order) -> None:
    held = []
    for rank in range(size):
        rows = [row for start, stop in chunks(N, size, rank, order) for row in range(start, stop)]
        assert [place(N, size, rank, order, row) for row in rows] == list(range(N // size))
        held += rows
    assert sorted(held) == list(range(N))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_bytes_in_closed_form(size) -> None:
    once = (size - 1) * N // size
    kv, q, out = MHA.kv_bytes, MHA.q_bytes, MHA.out_bytes
    for order in ORDERS:
        for rank in range(size):
            keys, queries = (cost(layout_of(size, order), MHA, scheme, rank) for scheme in ("ring", "reduce_scatter"))
            assert (keys.forward_bytes, keys.backward_bytes) == (once * kv, 3 * once * kv)  # float32
            assert (queries.forward_bytes, queries.backward_bytes) == (once * (q + 2 * out), once * (3 * q + out))
    # causal, zig-zag: rank r's first chunk is seen by all others, its second by the ranks before it: r of them
    chunk = N // (2 * size)
    for rank in range(size):
        lent = (size - 1 + rank) * chunk
        assert cost(layout_of(size, "zigzag", (None, 0)), MHA, "ring", rank).forward_bytes == lent * kv
        assert cost(layout_of(size, "contiguous", (None, 0)), MHA, "ring", rank).forward_bytes == (
            (size - 1 - rank) * N // size * kv
        )
    # a window of 100 keys: each chunk lends its last 100 to the next one, which may be the same rank's
    sent = [cost(layout_of(size, "contiguous", (100, 0)), MHA, "ring", rank).forward_bytes for rank in range(size)]
    assert sent == [100 * kv] * (size - 1) + [0]


def test_softmax_ring_in_closed_form() -> None:
    x = softmax_ring_cost(layout_of(4), MHA)
    assert x.forward_bytes == 3 * N // 4 * MHA.kv_bytes
    assert x.backward_bytes == 3 * N // 4 * MHA.kv_bytes + N * MHA.kv_bytes * 2
    assert softmax_ring_cost(layout_of(1), MHA).sent_bytes == 0


def test_the_scheme_is_the_cheapest() -> None:
    grouped = Sizes(1, 8, 2, 64, 64, 2)
    assert choose_scheme(layout_of(4), MHA) == "reduce_scatter"
    assert choose_scheme(layout_of(4), MHA, training=False) == "all_gather"
    assert choose_scheme(layout_of(4), grouped) == "all_gather"
    assert choose_scheme(layout_of(4), grouped, gathered_bytes=2**20) == "ring"
    with pytest.raises(ValueError, match="scheme must be one of all_gather, ring, reduce_scatter, got 'tree'"):
        cost(layout_of(4), MHA, "tree", 0)


def test_work_is_equal_in_zigzag_order() -> None:
    """Scores that a rank computes under a causal mask."""
    for order in ORDERS:
        work = {
            sum(stop * (stop + 1) // 2 - start * (start + 1) // 2 for start, stop in chunks(N, 8, rank, order))
            for rank in range(8)
        }
        assert len(work) == (1 if order == "zigzag" else 8)


def test_sizes_are_those_of_our_models() -> None:
    for name, config in (("1B", gpt.gpt_1b()), ("7B", gpt.gpt_7b())):
        assert scaling.MODELS[name].parameters == pytest.approx(gpt.parameter_count(config), rel=1e-3)
    assert 65e9 < scaling.MODELS["70B"].parameters < 75e9


def test_the_tables_are_those_of_the_formulas_and_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page.count("<!-- end -->") == 2
    assert scaling.rewrite(page) == page
    assert scaling.rewrite(page.replace("| 1B | 8k | 4 |", "| 1B | 8k | 5 |")) == page
