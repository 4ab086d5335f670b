"""The Hopper kernels without a GPU: their source runs by `emulator`, from the launch on, and is inside the budget."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from backends import emulator
from gpu.cases import CASES, drawn, for_hopper

from flashsigmoid.backends import hopper
from flashsigmoid.backends.hopper import launch
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.testing import assert_within_budget, make_qkv, oracle, witness

BFLOAT16 = torch.bfloat16
# (batch, seqlen_q, seqlen_k, nheads, nheads_k): blocks that are not full, and rows that see nothing where masked
SHAPES = ((2, 260, 300, 2, 1), (1, 300, 130, 6, 2))
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 30)},
    "left": {"window_size": (70, None)},
    "offset": {"causal": True, "q_offset": -40},
    "slopes": {"causal": True, "alibi_slopes": "heads"},
    "rows": {"sigmoid_bias": "rows", "causal": True, "alibi_slopes": "heads", "window_size": (200, None)},
    "heads": {"sigmoid_bias": "heads", "window_size": (150, 60)},
    "b = 0": {"sigmoid_bias": 0.0},
}
# what differs from the table's tile: direction -> fields
TILES: dict[str, dict[str, dict[str, Any]]] = {
    "table": {},
    "from the end": {"forward": {"is_from_end": True, "is_persistent": False, "own_out": False, "places": 1}}
    | {"backward": {"is_persistent": False}},
    "turns": {"forward": {"is_from_end": True, "is_persistent": True, "own_out": True, "places": 1}}
    | {"backward": {"is_persistent": True}},
    "a kernel each": {"backward": {"adds_dq": False}},
}


def compute(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> dict[str, Tensor]:
    """out, and dq, dk, dv where there is a backward, by the functions that the backend calls."""
    bias, slopes = options.get("sigmoid_bias"), options.get("alibi_slopes")
    is_number = not isinstance(bias, Tensor)
    left, right = options.get("window_size", (None, None))
    problem = make_problem(
        q, k, v, bias=None if is_number else bias, slopes=slopes, sigmoid_bias=bias if is_number else None, scale=None,
        causal=options.get("causal", False), window_left=left, window_right=right, q_offset=options.get("q_offset"),
        dropout_p=0.0, origin=(0, 0, 0, 0), sigmoid="auto",
    )  # fmt: skip
    problem = replace(problem, arch="sm_90", device="cuda")
    sides = None if is_number else bias, slopes
    assert hopper.unsupported(problem) is None
    found = {"out": launch.forward(problem, q, k, v, *sides)}
    if hopper.unsupported(problem, "backward") is None:
        found |= zip(("dq", "dk", "dv"), launch.backward(problem, dout, q, k, v, *sides), strict=True)
    return found


def options_of(name: str, batch: int, rows: int, keys: int, nheads: int) -> dict[str, Any]:
    shapes = {"rows": (batch, nheads, rows), "heads": (nheads,)}
    made: dict[str, Any] = {"sigmoid_bias": -math.log(keys)} | OPTIONS[name]
    if isinstance(made["sigmoid_bias"], str):
        made["sigmoid_bias"] = torch.randn(shapes[made["sigmoid_bias"]]) - 5.0
    if "alibi_slopes" in made:
        made["alibi_slopes"] = torch.rand(nheads)
    return made


def check(name: str, head_dim: int, shape: tuple[int, ...], dtype: torch.dtype = BFLOAT16) -> set[str]:
    batch, rows, keys, nheads, nheads_k = shape
    torch.manual_seed(0)
    tensors = make_qkv(batch, rows, keys, nheads, nheads_k, head_dim, dtype=dtype)
    options = options_of(name, batch, rows, keys, nheads)
    expected, seen = oracle(*tensors, **options), witness(*tensors, draws=8, **options)
    found = compute(*tensors, **options)
    for tensor, result in found.items():
        assert_within_budget(f"{tensor} of {name}, {shape}", result, expected[tensor], seen[tensor])
    return set(found)


@pytest.mark.parametrize("head_dim", [64, *(pytest.param(dim, marks=pytest.mark.long) for dim in (128, 256))])
@pytest.mark.parametrize("name", OPTIONS)
def test_inside_the_budget(emulated, name, head_dim) -> None:
    emulated({})
    for shape in SHAPES:
        found = check(name, head_dim, shape)
    has_backward = "rows" not in name and (head_dim < 256 or name not in ("slopes", "heads"))
    assert found == {"out"} | ({"dq", "dk", "dv"} if has_backward else set())


@pytest.mark.parametrize(
    ("tiles", "head_dim"),
    [
        ("turns", 128),
        *(pytest.param(tiles, 64, marks=pytest.mark.long) for tiles in ("turns", "from the end")),
        pytest.param("from the end", 128, marks=pytest.mark.long),
        ("table", 256),
        pytest.param("a kernel each", 256, marks=pytest.mark.long),
    ],
)
def test_every_kind_of_tile(emulated, tiles, head_dim) -> None:
    emulated(TILES[tiles])
    for name in ("full", "causal", "window"):
        check(name, head_dim, SHAPES[1], torch.float16)


@pytest.mark.long
@pytest.mark.parametrize("index", range(CASES))
def test_drawn_cases(emulated, index) -> None:
    """Those of the GPU, which have every pair of option values, each by another kind of tile."""
    case = for_hopper(drawn()[index])
    if case.sigmoid == "fast":
        pytest.skip("formulas are not imitated")
    emulated([*TILES.values()][index % len(TILES)])
    tensors, options = case.tensors(index), case.options(index)
    expected, seen = oracle(*tensors, **options), witness(*tensors, draws=16, **options)
    for tensor, result in compute(*tensors, **options).items():
        assert_within_budget(f"{tensor} of {case}", result, expected[tensor], seen[tensor])


@dataclass(frozen=True)
class Fault:
    """In a kernel's file `new` stands where `old` stood."""

    file: str
    old: str
    new: str = ""
    head_dim: int = 64
    tiles: str = "table"
    marks: Any = ()


LONG = pytest.mark.long
WAIT_K = "    mbarrier.wait(full.index(stage), (it // STAGES) & 1)\n    s = "
WEIGHTS = "    a = weights(s, m, n, c, b, slope"
RELEASE_Q = "        mbarrier.arrive(empty, count=1)"
WAIT_DS = "    mbarrier.wait(ds_empty.index(it & 1), ((it // 2) & 1) ^ 1)\n    dss"
READ_DS = "        if WARPGROUP == 1:\n            mbarrier.wait(ds_read, it & 1)\n"
WAIT_REST = "        if it > 0:\n            mbarrier.wait(empty, 0)\n"
LAST_REST = "    if count > 0:\n        mbarrier.wait(empty, 0)"
WIDE: dict[str, Any] = {"head_dim": 256}
FAULTS = {
    "a key too many": Fault("partitions", "gl.where(j <= p + right", "gl.where(j <= p + right + 1"),
    "a key too few": Fault("bwd", "gl.where(i <= j, y", "gl.where(i < j, y", marks=LONG),
    "a block too few": Fault("partitions", "last = gl.minimum(m + BLOCK, rows) - 1", "last = m", 128, marks=LONG),
    "the wrong head": Fault("partitions", "other = head // sizes[3]", "other = head % sizes[3]", marks=LONG),
    "K before it came": Fault("fwd", WAIT_K, "    s = ", marks=LONG),
    "V while it is read": Fault("fwd", WEIGHTS, f"    mbarrier.arrive(empty.index(before), count=1)\n{WEIGHTS}"),
    "Q of two turns": Fault("fwd", f"        tma.store_wait(0)\n{RELEASE_Q}", RELEASE_Q, marks=LONG),
    "out while it is copied": Fault(
        "fwd", "            if OWN_OUT:\n                tma.store_wait(0)\n", tiles="turns", marks=LONG
    ),
    "the wrong phase": Fault("bwd", "wait(dq_empty, it & 1)", "wait(dq_empty, (it & 1) ^ 1)", 128, marks=LONG),
    "dS while it is read": Fault("bwd", WAIT_DS, "    dss"),
    "dK while it is copied": Fault(
        "bwd", "    tma.store_wait(0)\n    if DIM != 64:", "    if DIM != 64:", tiles="turns", marks=LONG
    ),
    "a dQ of nothing": Fault(
        "bwd",
        "    if it > start:\n        mbarrier.arrive(ds",
        "    if it >= 0:\n        mbarrier.arrive(ds",
        marks=LONG,
    ),
    "W while it is read": Fault(
        "grad", "mbarrier.arrive(w_empty, count=1)\n        ds", "ds", 256, "a kernel each", LONG
    ),
    "dS of one warpgroup": Fault("dqdk", "        mbarrier.wait(ds_full, it & 1)\n", **WIDE, marks=LONG),
    "dQ where dS is read": Fault("dqdk", READ_DS, **WIDE, marks=LONG),
    "dQ where dQ is read": Fault("dqdk", WAIT_REST, "        if it > 0:\n", **WIDE, marks=LONG),
    "half of dQ": Fault("dqdk", "keys.slice(128 * WARPGROUP + 64,", "keys.slice(128 * WARPGROUP,", **WIDE, marks=LONG),
    "no last half": Fault("dqdk", LAST_REST, LAST_REST.replace(">", "<"), **WIDE, marks=LONG),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=fault.marks) for name, fault in FAULTS.items()])
def test_a_fault_in_a_kernel_is_caught(emulated, monkeypatch, name) -> None:
    fault = FAULTS[name]
    monkeypatch.setattr(emulator, "PATIENCE_S", 1.0)
    monkeypatch.setattr(emulator, "PAUSE_S", 0.02)
    emulated(TILES[fault.tiles], {fault.file: (fault.old, fault.new)})
    with pytest.raises((AssertionError, TimeoutError)):
        check("causal", fault.head_dim, (1, 700, 600, 4, 2))


def test_the_emulator_sees_what_it_is_for() -> None:
    machine = emulator._here.machine = emulator.Machine(0, 1)
    emulator._here.products = []
    a, b = (machine.allocate(BFLOAT16, [64, 64], "swizzled") for _ in range(2))
    zero = torch.zeros(64, 64)
    assert a.load().isnan().all()  # nobody wrote it
    a.store(torch.ones(64, 64, dtype=BFLOAT16))
    b.store(torch.ones(64, 64, dtype=BFLOAT16))
    (sums,) = [emulator.warpgroup_mma_wait(0, deps=[emulator.warpgroup_mma(a, b, zero, is_async=True)])]
    assert (sums == 64.0).all()
    late = emulator.warpgroup_mma(a, b, zero, is_async=True)
    b.store(torch.zeros(64, 64, dtype=BFLOAT16))
    assert emulator.warpgroup_mma_wait(0, deps=[late]).isnan().all()
    view = emulator._view(a, torch.float32, [32, 64], "swizzled")
    view.store(torch.zeros(32, 64))
    assert (a.load() == 0.0).all()  # the same bytes
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        machine.allocate(BFLOAT16, [64, 2048], "swizzled")
