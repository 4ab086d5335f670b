"""Packed sequences by the Hopper kernels without a GPU: the bits of each sequence alone, and inside the budget."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from backends import emulator
from gpu.cases import random_class
from gpu.packed import packed_sides
from varlen import Lengths, cumulated, dense_options, oracle_and_witness, sequences

from flashsigmoid.backends import hopper
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.testing import Options, assert_within_budget, make_qkv

BFLOAT16 = torch.bfloat16
# no rows, no keys, one, less than a block, one block and one more, several; more queries than keys and fewer
LENGTHS = ((0, 1, 64, 65, 200, 9, 0, 333, 128), (5, 1, 64, 190, 131, 0, 0, 128, 257))
SPARE = 77  # rows of no sequence, which are NaN
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 30)},
    "left": {"window_size": (40, None)},
    "slopes": {"causal": True, "alibi_slopes": "sequences"},
    "rows": {"sigmoid_bias": "rows", "causal": True, "alibi_slopes": "heads", "window_size": (90, None)},
    "heads": {"sigmoid_bias": "heads", "window_size": (50, 60)},
    "sequences": {"sigmoid_bias": "sequences"},
    "b = 0": {"sigmoid_bias": 0.0, "scale": 0.2},
}
TILES: dict[str, dict[str, dict[str, Any]]] = {
    "table": {},
    "two places": {"forward": {"own_out": False, "is_persistent": True, "places": 2}},
    "from the end": {"forward": {"is_from_end": True, "is_persistent": False}},
    "turns": {"forward": {"is_from_end": True, "is_persistent": True}},
}


def make(lengths: tuple[Lengths, Lengths], head_dim: int, heads: tuple[int, int] = (4, 2), dtype=BFLOAT16, spare=SPARE):
    """q, k, v, dout, and rows of no sequence behind them."""
    rows, keys = map(sum, lengths)
    torch.manual_seed(0)
    tensors = tuple(x[0] for x in make_qkv(1, rows + spare, keys + spare, *heads, head_dim, dtype=dtype))
    for x, used in zip(tensors, (rows, keys, keys, rows), strict=True):
        x[used:] = math.nan
    return tensors


def options_of(name: str, sequences: int, rows: int, nheads: int) -> dict[str, Any]:
    shapes = {"rows": (rows, nheads), "heads": (nheads,), "sequences": (sequences, nheads)}
    made: dict[str, Any] = {"sigmoid_bias": -4.5} | OPTIONS[name]
    if isinstance(made["sigmoid_bias"], str):
        made["sigmoid_bias"] = torch.randn(shapes[made["sigmoid_bias"]]) - 4.0
    if "alibi_slopes" in made:
        made["alibi_slopes"] = torch.rand(shapes[made["alibi_slopes"]]) * 0.2
    return made


def compute(tensors: tuple[Tensor, ...], cu: tuple[Tensor, Tensor] | None, **options: Any) -> dict[str, Tensor]:
    """out, and dq, dk, dv where there is a backward; without `cu` of a dense call."""
    q, k, v, dout = tensors
    bias, slopes = options.get("sigmoid_bias"), options.get("alibi_slopes")
    is_number = not isinstance(bias, Tensor)
    left, right = options.get("window_size", (None, None))
    problem = make_problem(
        q, k, v, bias=None if is_number else bias, slopes=slopes, sigmoid_bias=bias if is_number else None,
        scale=options.get("scale"), causal=options.get("causal", False), window_left=left, window_right=right,
        cu_seqlens_q=None if cu is None else cu[0], max_seqlen_q=100, max_seqlen_k=100,
    )  # fmt: skip
    problem = replace(problem, arch="sm_90", device="cuda")
    assert hopper.unsupported(problem) is None
    given: Any = (q, k, v, None if is_number else bias, slopes, None, cu)
    found = {"out": hopper.forward(problem, *given)}
    if hopper.unsupported(problem, "backward") is None:
        found |= zip(("dq", "dk", "dv"), hopper.backward(problem, dout, *given)[:3], strict=True)
    return found


def alone(tensors: tuple[Tensor, ...], lengths: tuple[Lengths, Lengths], options: dict[str, Any]) -> dict[str, Tensor]:
    """The same of every sequence by a dense call, and zeros elsewhere."""
    q, k, v, dout = tensors
    whole = {name: torch.zeros_like(x) for name, x in zip(("out", "dq", "dk", "dv"), (dout, q, k, v), strict=True)}
    for index, rows, keys in sequences(*lengths):
        dense: Any = dense_options(Options(**options), index, rows, *q.shape[:2])
        dense.pop("origin")
        parts = (q[None, rows], k[None, keys], v[None, keys], dout[None, rows])
        for name, x in compute(parts, None, **dense).items():
            whole[name][rows if name in ("out", "dq") else keys] = x[0]
    return whole


def check(name: str, head_dim: int, lengths: tuple[Lengths, Lengths] = LENGTHS, **made: Any) -> set[str]:
    """Inside the budget, and bit for bit what each sequence gives alone; but dQ, which is added in another order."""
    tensors = make(lengths, head_dim, **made)
    options = options_of(name, len(lengths[0]), *tensors[0].shape[:2])
    cu = cumulated(lengths[0]), cumulated(lengths[1])
    found = compute(tensors, cu, **options)
    expected, seen = oracle_and_witness(*tensors, *lengths, 8, Options(**options))
    for tensor, x in found.items():
        assert_within_budget(f"{tensor} of {name}", x, expected[tensor], seen[tensor])
    own = alone(tensors, lengths, options)
    assert all(torch.equal(x, own[tensor]) for tensor, x in found.items() if tensor != "dq")
    return set(found)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *((name, 64) for name in ("full", "causal")),
        *(pytest.param(name, 64, marks=pytest.mark.long) for name in OPTIONS if name not in ("full", "causal")),
        *(pytest.param(name, dim, marks=pytest.mark.long) for name in OPTIONS for dim in (128, 256)),
    ],
)
def test_each_sequence_is_as_it_is_alone(emulated, name, head_dim) -> None:
    emulated({})
    has_backward = head_dim < 256 and name != "rows"
    assert check(name, head_dim) == {"out"} | ({"dq", "dk", "dv"} if has_backward else set())


@pytest.mark.parametrize(
    ("tiles", "head_dim"),
    [
        *(pytest.param(tiles, dim, marks=pytest.mark.long) for tiles in TILES for dim in (64, 128) if tiles != "table"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("turns", 96), ("table", 256))),
    ],
)
def test_every_kind_of_tile(emulated, tiles, head_dim) -> None:
    emulated(TILES[tiles])
    for name in ("full", "causal"):
        check(name, head_dim, dtype=torch.float16, heads=(3, 1))


def test_many_sequences(emulated) -> None:
    """All short, most shorter than a block."""
    emulated({})
    lengths = tuple(itertools.islice(itertools.cycle((4, 0, 65, 17, 1)), 70))
    check("causal", 64, (lengths, lengths[::-1]), heads=(2, 1), spare=0)


@pytest.mark.parametrize("lengths", [((0, 0), (3, 2)), ((3, 2), (0, 0)), ((0, 2), (3, 0)), ((0,), (7,))])
def test_what_sees_nothing_is_zero(emulated, lengths) -> None:
    emulated({})
    tensors = make(lengths, 64)
    found = compute(tensors, (cumulated(lengths[0]), cumulated(lengths[1])), causal=True, sigmoid_bias=0.0)
    assert not any(x.any() for x in found.values())


@pytest.mark.long
@pytest.mark.parametrize("index", range(40))
def test_drawn_cases(emulated, index) -> None:
    """Lengths and options as those of the GPU's random test, each by another kind of tile."""
    rng = random.Random(f"packed {index}")
    emulated([*TILES.values()][index % len(TILES)])
    batch, nheads_k, group = rng.randint(1, 9), rng.randint(1, 2), rng.randint(1, 3)
    drawn = [rng.choice((0, 1, rng.randint(2, 70), rng.randint(64, 400))) for _ in range(2 * batch)]
    lengths, spare, head_dim = (
        (tuple(drawn[:batch]), tuple(drawn[batch:])),
        rng.choice((0, 1, 150)),
        8 * rng.randint(1, 16),
    )
    if not any(map(min, zip(*lengths, strict=True))):
        pytest.skip("nothing is seen")
    tensors = make(lengths, head_dim, (nheads_k * group, nheads_k), rng.choice((BFLOAT16, torch.float16)), spare)
    options: Any = packed_sides(rng, lengths[0], sum(lengths[0]) + spare, nheads_k * group)
    options |= random_class(rng, BFLOAT16)
    options = {
        name: options[name] for name in ("sigmoid_bias", "alibi_slopes", "causal", "window_size") if name in options
    }
    expected, seen = oracle_and_witness(*tensors, *lengths, 32, Options(**options))
    found = compute(tensors, (cumulated(lengths[0]), cumulated(lengths[1])), **options)
    for tensor, x in found.items():
        assert_within_budget(f"{tensor} of {lengths}, {head_dim}, {options}", x, expected[tensor], seen[tensor])


def check_reach(value: float, name: str, head_dim: int) -> None:
    """One sequence does not reach another, not a bit of it: formulas, which may know neighbours, are not imitated."""
    lengths = ((70, 50, 200), (200, 90, 120))
    tensors = make(lengths, head_dim, spare=0)
    options = options_of(name, 3, *tensors[0].shape[:2])
    cu = cumulated(lengths[0]), cumulated(lengths[1])
    clean = compute(tensors, cu, **options)
    rows, keys = slice(70, 120), slice(200, 290)
    for x, part in zip(tensors, (rows, keys, keys, rows), strict=True):
        x[part] = value
    if isinstance(options["sigmoid_bias"], Tensor):
        options["sigmoid_bias"][rows] = value
    dirty = compute(tensors, cu, **options)
    for tensor, x in dirty.items():
        where = rows if tensor in ("out", "dq") else keys
        assert (x[where] != clean[tensor][where]).any(), tensor
        x[where] = clean[tensor][where] = 0.0
        assert torch.equal(x, clean[tensor]), tensor


@pytest.mark.parametrize("value", [100.0, math.nan, math.inf])
def test_one_sequence_does_not_reach_another(emulated, value) -> None:
    emulated({})
    for name, head_dim in (("rows", 64), ("full", 64), ("causal", 128)):
        check_reach(value, name, head_dim)


@dataclass(frozen=True)
class Fault:
    """In a kernel's file `new` stands where `old` stood."""

    file: str
    old: str
    new: str = ""
    name: str = "full"
    tiles: str = "table"
    head_dim: int = 64
    is_reach: bool = False  # what `check_reach` sees


BLANK = "    blank(memory, place, rows, BLOCK, DIM, PLACES)\n"
BLANK_Q = BLANK.replace("memory", "xs")
ADDED = "                        blank(dqs, part, gl.minimum(64, gl.maximum(0, own)),"
OWN = "store_rows(packed[1], x, key + first, own,"
LAST = "count, gl.load(cu_"
PASS = "                        pass\n"
FAULTS = {
    "keys of the next sequence": Fault("sequences", BLANK, "    pass\n"),
    "values of the next sequence": Fault(
        "sequences", "        blank(others, place, rows, BLOCK, DIM, PLACES)\n", "        pass\n"
    ),
    "a value of the next sequence": Fault(
        "sequences", "layout=gl.SliceLayout(1, LANES)) < rows % 8)", "layout=gl.SliceLayout(1, LANES)) <= rows % 8)"
    ),
    "a value too few": Fault(
        "sequences", "layout=gl.SliceLayout(1, LANES)) < rows % 8)", "layout=gl.SliceLayout(1, LANES)) < rows % 8 - 1)"
    ),
    "eight values too few": Fault("sequences", "range(gl.cdiv(rows, 8), HIGH)", "range(rows // 8, HIGH)"),
    "zeros of half the channels": Fault("sequences", "SLABS: gl.constexpr = DIM // WIDTH", "SLABS = 1", head_dim=128),
    "zeros elsewhere": Fault("sequences", "(place * SLABS + slab) * HIGH + i)", "(place * SLABS + slab) * HIGH)"),
    "zeros before the values": Fault("sequences", "    mbarrier.wait(full.index(PLACES), times & 1)\n"),
    "ready for the second time": Fault("fwd", "                cuts += 1\n"),
    "values of another block": Fault("fwd", "load(v, [lead, head_k, key + n, 0]", "load(v, [lead, head_k, n, 0]"),
    "queries of another sequence": Fault("fwd", "[lead, head, row + m + i * 64, 0]", "[lead, head, m + i * 64, 0]"),
    "rows over the next sequence": Fault("fwd", "IS_PACKED and m + 64 > rows", "IS_PACKED and m > rows"),
    "a row over the next sequence": Fault("sequences", "mask=(i < count)", "mask=(i <= count)", tiles="from the end"),
    "the last row is not written": Fault("sequences", "mask=(i < count)", "mask=(i < count - 1)"),
    "rows of another head": Fault("sequences", "* nheads + head) * dim", "* nheads) * dim"),
    "the sequence before": Fault("sequences", "+ middle <= block", "+ middle < block"),
    "a block too few": Fault("sequences", "// ROWS + middle <=", "// ROWS + middle - 1 <="),
    "keys behind the last": Fault("sequences", f"where(sequence < {LAST}others", f"where(0 < {LAST}others"),
    "the other offset": Fault("sequences", "band = (others - rows,", "band = (rows - others,", "causal"),
    "b of another row": Fault("fwd", "(row + m).to(gl.int64)", "m.to(gl.int64)", "rows"),
    "b of another sequence": Fault("fwd", "bias + batch.to(gl.int64)", "bias + (batch - 1).to(gl.int64)", "sequences"),
    "of the backward, queries of the next sequence": Fault("sequences", BLANK_Q),
    "of the backward, dO of the next sequence": Fault("sequences", BLANK_Q.replace("xs", "ys")),
    "of the backward, zeros before the values": Fault("sequences", "    mbarrier.wait(late, times & 1)\n"),
    "of the backward, a NaN for the next sequence": Fault("bwd", f"{ADDED} 64, 64, 2, 32)\n", PASS, is_reach=True),
    "of the backward, zeros in the second part": Fault(
        "bwd", "(64 * part if DIM == 64 else 0)", "(64 * part if DIM != 64 else 0)", head_dim=128
    ),
    "of the backward, dQ of another sequence": Fault("bwd", "m = row + block * BLOCK_M", "m = block * BLOCK_M"),
    "of the backward, keys over the next sequence": Fault("bwd", "first + 64 > sizes[5]:", "first > sizes[5]:"),
    "of the backward, keys of another sequence": Fault("bwd", "(packed[0], x, key + first", "(packed[0], x, first"),
    "of the backward, channels of another head": Fault("bwd", f"{OWN} head_k,", f"{OWN} 0,"),
    "of the backward, a number too many": Fault("sequences", "gl.where(block * 128 < keys, rows, 0)", "rows"),
    "of the backward, keys behind the last": Fault("sequences", f"where(sequence < {LAST}q", f"where(0 < {LAST}q"),
    "of the backward, the other offset": Fault("sequences", "band = (keys - rows,", "band = (rows - keys,", "causal"),
    "of the backward, b of another sequence": Fault("bwd", "bias + batch *", "bias + (batch - 1) *", "sequences"),
    "from the wrong end": Fault("sequences", "sizes[7] * (64", "-sizes[7] * (64", "causal", "from the end"),
}  # fmt: skip


# in make test one of each kind
SHORT = {
    "values of the next sequence", "a value too few", "zeros before the values", "rows over the next sequence",
    "the sequence before", "of the backward, queries of the next sequence",
    "of the backward, a NaN for the next sequence", "of the backward, keys over the next sequence",
}  # fmt: skip
assert FAULTS.keys() >= SHORT


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in FAULTS]
)
def test_a_fault_in_a_kernel_is_caught(emulated, monkeypatch, name) -> None:
    fault = FAULTS[name]
    monkeypatch.setattr(emulator, "PATIENCE_S", 1.0)
    emulated(TILES.get(fault.tiles, {}), {fault.file: (fault.old, fault.new)})
    run = functools.partial(check_reach, math.nan) if fault.is_reach else check
    with pytest.raises((AssertionError, TimeoutError, IndexError)):
        run(fault.name, fault.head_dim)
