"""The Triton kernels compiled ahead of time for GPUs that are not here: the instructions, no spills, what fits.

Triton's interpreter, which the other tests use, accepts what the compiler refuses. The compiler runs in a process of
its own, since this one interprets; its calls and a line for every kernel are those of aot.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux", reason="needs Triton and its compilers"
)

ROOT = Path(__file__).parents[2]
SHARED = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KB of a block
KERNELS = ["fwd", "dkdv", "dq"]
# every option, in as few classes of problems as may be
CLASSES: dict[str, dict[str, Any]] = {
    "rows": {"bias": "row", "has_slopes": True, "causal": True, "nheads_k": 1, "head_dim": 40},
    "window": {"causal": True, "window_left": 100, "dropout_p": 0.1, "dtype": "float16", "head_dim": 64},
    "odd quads": {"dropout_p": 0.1, "origin": [0, 0, 0, 1], "bias": "head", "window_right": 3},
    "packed": {"is_packed": True, "causal": True, "bias": "row"},
    "pointers": {"layout": "unaligned", "head_dim": 96, "head_dim_v": 32, "dtype": "float16"},
    "exact": {"sigmoid": "exact"},
    "fast": {"sigmoid": "fast"},
    "float32": {"dtype": "float32"},
    "broadcast": {"layout": "broadcast", "dtype": "float32", "head_dim_v": 128},
}


Compile = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compile]:
    """What aot.py says of calls, JSON lines: a process for an architecture, since starting one takes seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))

        @functools.cache
        def process_of(arch: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("aot.py"), arch, "--calls"],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
            return stack.enter_context(process)

        def call(arch: str, *calls: str) -> list[dict[str, Any]]:
            process, answers = process_of(arch), []
            assert process.stdin
            assert process.stdout
            for line in calls:
                print(line, file=process.stdin, flush=True)
                while (answer := process.stdout.readline()) != "\n":
                    if not answer:
                        errors.seek(0)
                        raise AssertionError(errors.read()[-3000:])
                    answers.append(json.loads(answer))
            return answers

        yield call


def check(arch: str, one: dict[str, Any], spilled: float = 0) -> None:
    """One kernel: it compiled, fits, has matrix instructions, and spills no more than so many bytes a thread."""
    name = f"{one['kernel']} of {one['call']} for {arch}"
    assert not one["error"], f"{name}: {one['error']}"
    assert one["shared_bytes"] <= SHARED[arch] * 1024, f"{name} must fit, got {one['shared_bytes']} bytes"
    assert one["tensor_memory"] <= 512, f"{name} must fit tensor memory, got {one['tensor_memory']} columns"
    assert one["products"] > 0, f"{name} must use the matrix units"
    assert one["undefined"] == 0, f"{name} must read no uniform register that nothing wrote"
    assert one["spill_bytes"] <= spilled, f"{name} must spill at most {spilled} bytes, got {one['spill_bytes']}"


def check_sm_90(one: dict[str, Any], spilled: float = 0) -> None:
    """And it is made of what makes Hopper fast: products by warpgroups that do not wait for each other, and TMA."""
    check("sm_90", one, spilled)
    name = f"{one['kernel']} of {one['call']}"
    # the matrix units still take the instructions of sm_80, at about half the rate
    assert one["warpgroup_products"] == one["products"], f"{name} must multiply by wgmma alone, got {one}"
    # as many waits as products would be the sign of products that wait for each other
    assert one["waits"] < one["products"] / 2, f"{name} must not wait after each product, got {one}"
    assert one["tma_loads"] > 0, f"{name} must load by TMA"
    assert not one["notes"], one["notes"]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.long), True])
def test_the_measured_tiles_on_sm_90(compiled, head_dim, causal) -> None:
    kernels = compiled("sm_90", json.dumps({"head_dim": head_dim, "causal": causal}))
    assert [one["kernel"] for one in kernels] == KERNELS
    for one in kernels:
        # dK and dV, causal: measured faster (log.md) than the tiles that spill nothing
        check_sm_90(one, spilled=160 if causal and one["kernel"] == "dkdv" else 0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_rows_on_sm_90(compiled, head_dim) -> None:
    for one in compiled("sm_90", json.dumps({"head_dim": head_dim, "causal": True, "is_packed": True, "batch": 16})):
        check_sm_90(one, spilled=512)  # where a sequence ends, not in the loop over whole blocks; measured faster


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.long)])
def test_a_learnable_bias_costs_no_registers(compiled, head_dim) -> None:
    for one in compiled("sm_90", json.dumps({"head_dim": head_dim, "causal": True, "bias": "head"})):
        check_sm_90(one, spilled=200 if one["kernel"] == "dkdv" else 0)


@pytest.mark.parametrize(
    "call",
    [
        *({"head_dim": dim, "causal": True} for dim in (64, 128, 256)),
        {"head_dim": 64},
        *(pytest.param({"head_dim": dim}, marks=pytest.mark.long) for dim in (128, 256)),
        {"head_dim": 64, "seqlen": 2048, "kernel": "fwd"},  # two places for Q, as in the next
        {"head_dim": 128, "seqlen": 512, "kernel": "fwd", "causal": True},
        pytest.param(
            {
                "head_dim": 64,
                "kernel": "fwd",
                "tile": [2, 64, 4, 112, False, False, True, False, 2, False, 2],
            },  # groups
            marks=pytest.mark.long,
        ),
        {"head_dim": 256, "causal": True, "kernel": "bwd", "tile": [2, 64, 2, 240]},  # dQ and dK in a kernel each
        pytest.param({"head_dim": 256, "nheads_k": 1, "kernel": "bwd"}, marks=pytest.mark.long),
        {"head_dim": 96, "sigmoid": "exact", "dtype": "float16", "bias": "head"},
        pytest.param(
            {"head_dim": 64, "sigmoid": "fast", "window_left": 100, "window_right": 3, "q_offset": 5},
            marks=pytest.mark.long,
        ),
        pytest.param({"head_dim": 64, "causal": True, "has_slopes": True}, marks=pytest.mark.long),
        {"head_dim": 128, "causal": True, "bias": "row", "has_slopes": True, "window_left": 100, "nheads_k": 1},
    ],
    ids=str,
)
def test_the_hopper_kernels(compiled, call) -> None:
    """None spills more than a word or two a block, but the backward up to 128, which has all 240 registers in use: to
    spill less by computing addresses anew was measured to be slower."""
    kernels = compiled("sm_90", json.dumps({"backend": "hopper", **call}))
    backward = ["bwd"] * (1 if call["head_dim"] < 256 else 3 if "tile" in call else 2)  # dQ and dK, and dV
    only = call.get("kernel", "fwd" if call.get("bias") == "row" else None)
    assert [one["kernel"] for one in kernels] == [x for x in ("fwd", *backward) if only in (None, x)]
    for one in kernels:
        is_full = one["kernel"] == "bwd" and call["head_dim"] < 256
        check_sm_90(one, spilled=1536 if is_full else 104)
        assert one["loop_spills"] <= (60 if is_full else 4), one["loop_spills"]


PACKED: dict[str, Any] = {"backend": "hopper", "is_packed": True, "batch": 16}


@pytest.mark.parametrize(
    "call",
    [
        {"head_dim": 128, "causal": True},
        *(pytest.param({"head_dim": dim, "causal": True}, marks=pytest.mark.long) for dim in (64, 256)),
        *(pytest.param({"head_dim": dim}, marks=pytest.mark.long) for dim in (64, 128)),
        pytest.param({"head_dim": 128, "seqlen": 1024}, marks=pytest.mark.long),
        pytest.param({"head_dim": 96, "sigmoid": "exact", "dtype": "float16", "bias": "head"}, marks=pytest.mark.long),
        pytest.param(
            {"head_dim": 128, "causal": True, "bias": "row", "has_slopes": True, "window_left": 100, "nheads_k": 1},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_packed_rows_by_the_hopper_kernels(compiled, call) -> None:
    """What the forward spills it spills once a turn: where a sequence is, and how many rows it has."""
    kernels = compiled("sm_90", json.dumps({**PACKED, **call}))
    has_backward = call.get("bias") != "row" and call["head_dim"] <= 128
    assert [one["kernel"] for one in kernels] == ["fwd", *["bwd"] * has_backward]
    for one in kernels:
        is_full = one["kernel"] == "bwd"
        check_sm_90(one, spilled=1536 if is_full else 160)
        assert one["loop_spills"] <= (60 if is_full else 8), one["loop_spills"]


def test_sequences_compile_nothing_anew(compiled) -> None:
    sizes = ({"batch": 1, "seqlen": 16}, {"batch": 101, "seqlen": 2001})  # with the same tile
    shared = {**PACKED, "head_dim": 64, "kernel": "fwd", "sigmoid_bias": -8.0}
    kernels = compiled("sm_90", *(json.dumps({**shared, **size}) for size in sizes))
    assert len(kernels) == len(sizes)
    assert len({one["binary"] for one in kernels}) == 1


# a tile that is wrong, and what is said of it
PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "no wgmma: too few rows for a warpgroup": ({"head_dim": 64, "tile": [32, 64, 4, 3]}, "by wgmma alone"),
    "spills": ({"head_dim": 128, "tile": [128, 128, 4, 2]}, "must spill at most 0 bytes"),
    "by pointers": ({"head_dim": 64, "tile": [64, 64, 4, 3, 0, None, True]}, "must load by TMA"),
    "too large": ({"head_dim": 128, "tile": [128, 128, 8, 4]}, "must fit, got"),
}


@pytest.mark.parametrize(("call", "message"), PLANTED.values(), ids=PLANTED)
def test_a_planted_tile_is_caught(compiled, call, message) -> None:
    (one,) = compiled("sm_90", json.dumps({"kernel": "fwd", **call}))
    with pytest.raises(AssertionError, match=message):
        check_sm_90(one)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"error": "CompilationError"}, "CompilationError"),
        ({"shared_bytes": 228 * 1024}, "must fit, got"),
        ({"tensor_memory": 1024}, "must fit tensor memory"),
        ({"products": 0, "warpgroup_products": 0}, "must use the matrix units"),
        ({"warpgroup_products": 15}, "by wgmma alone"),
        ({"undefined": 1}, "no uniform register"),
        ({"spill_bytes": 4}, "must spill at most 0 bytes, got 4"),
        ({"waits": 16}, "must not wait after each product"),
        ({"tma_loads": 0}, "must load by TMA"),
        ({"notes": ["wgmma.mma_async instructions are serialized"]}, "serialized"),
    ],
    ids=str,
)
def test_every_check_can_fail(fault, message) -> None:
    good = {"kernel": "fwd", "call": {}, "error": "", "shared_bytes": 0, "tensor_memory": 0, "products": 16}
    good |= {"warpgroup_products": 16, "undefined": 0, "spill_bytes": 0, "waits": 4, "tma_loads": 8, "notes": []}
    check_sm_90(good)
    with pytest.raises(AssertionError, match=message):
        check_sm_90(good | fault)


FLOAT8: list[dict[str, Any]] = [
    {"head_dim": 64},
    {"head_dim": 128, "causal": True, "bias": "row", "has_slopes": True, "nheads_k": 1},
    {"head_dim": 256, "window_left": 100, "window_right": 30},
]


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_100", marks=pytest.mark.long)])
def test_the_kernel_of_8_bits(compiled, arch) -> None:
    kernels = compiled(arch, *(json.dumps({"backend": "fp8", **call}) for call in FLOAT8))
    assert [one["kernel"] for one in kernels] == ["fp8"] * len(FLOAT8)
    for one in kernels:
        check(arch, one)
        assert one["warpgroup_products"] == one["products"]
        assert one["tma_loads"] > 0


ROWS: dict[str, Any] = {"causal": True, "bias": "row", "has_slopes": True, "window_left": 100, "nheads_k": 1}
TOP: list[dict[str, Any]] = [
    {"head_dim": 64, "causal": True},
    {"head_dim": 128, "count": 64, **ROWS},
    {"head_dim": 256, "dtype": "float16", "count": 100},  # two launches
    {"head_dim": 64, "dtype": "float32", "count": 64},
    {"head_dim": 128, "dtype": "float32", "count": 64},
]


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.long) for arch in ("sm_80", "sm_100", "gfx942"))]
)
def test_the_kernel_of_the_largest_weights(compiled, arch) -> None:
    kernels = compiled(arch, *(json.dumps({"backend": "top", **call}) for call in TOP))
    assert [one["kernel"] for one in kernels] == ["top"] * (len(TOP) + 1)
    for one in kernels:
        is_float32 = one["call"].get("dtype") == "float32"
        check(arch, {**one, "products": 1} if is_float32 else one)


CACHES: dict[str, dict[str, Any]] = {
    "decode": {"nheads": 32, "nheads_k": 8, "head_dim": 128, "causal": True, "rotary_dim": 128},
    "pages": {"nheads": 32, "nheads_k": 8, "head_dim": 128, "causal": True, "page_size": 16, "seqlen_q": 2},
    "shared": {"nheads": 32, "nheads_k": 8, "head_dim": 64, "causal": True, "batch": 64, "is_shared": True},
    "options": {
        "nheads": 8, "nheads_k": 1, "head_dim": 40, "head_dim_v": 96, "bias": "row", "has_slopes": True,
        "window_left": 100, "causal": True, "seqlen_q": 3, "reduction": "atomic", "dtype": "float16",
    },
    "float32": {"head_dim": 64, "dtype": "float32"},
    "wide": {"nheads": 8, "nheads_k": 2, "head_dim": 256, "causal": True, "dtype": "float16", "page_size": 16},
    "queue": {"nheads": 32, "nheads_k": 8, "head_dim": 128, "causal": True, "batch": 64},
}  # fmt: skip


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.long) for arch in ("sm_80", "gfx942"))]
)
def test_the_kernels_of_a_cache(compiled, arch) -> None:
    calls = (json.dumps({"backend": "decode", "seqlen": 65536, **call}) for call in CACHES.values())
    kernels = compiled(arch, *calls)
    assert [one["kernel"] for one in kernels] == ["append", *["decode", "sum"] * len(CACHES)]
    for one in kernels:
        is_product = one["kernel"] == "decode" and one["call"].get("dtype") != "float32"
        check(arch, one if is_product else {**one, "products": 1})
    if arch != "gfx942":
        # several programs at once on a multiprocessor, each with two more blocks of keys and values on their way
        assert kernels[1]["registers"] <= 128
        for one in kernels[1], kernels[3]:
            assert 64 * 1024 < one["shared_bytes"] <= SHARED[arch] // 2 * 1024


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"])
def test_values_of_one_channel(compiled, arch) -> None:
    """What sums of weights are computed with (diagnostics.mass), also over a cache."""
    dense = {"head_dim": 64, "head_dim_v": 1, "causal": True, "kernel": "fwd"}
    cache = {"head_dim": 64, "head_dim_v": 1, "causal": True, "nheads": 8, "nheads_k": 2, "backend": "decode"}
    kernels = compiled(arch, json.dumps(dense), json.dumps({**cache, "seqlen": 65536, "page_size": 16}))
    assert [one["kernel"] for one in kernels] == ["fwd", "decode", "sum"]
    for one in kernels[:2]:
        check(arch, one)


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_100", marks=pytest.mark.long), "gfx942"])
@pytest.mark.parametrize(
    ("head_dim", "causal"),
    [(64, True), *(pytest.param(*call, marks=pytest.mark.long) for call in ((64, False), (128, False), (128, True)))],
)
def test_other_architectures(compiled, arch, head_dim, causal) -> None:
    """Their tiles, which nobody measured, spill nothing either, but for dK and dV of sm_100 before its loop."""
    for one in compiled(arch, json.dumps({"head_dim": head_dim, "causal": causal})):
        is_wide = (arch, one["kernel"], head_dim, causal) == ("sm_100", "dkdv", 128, True)
        check(arch, one, spilled=1400 if is_wide else 0)
        assert one["loop_spills"] <= (4 if is_wide else 0)
        assert arch != "sm_100" or one["warpgroup_products"] == one["products"]


@pytest.mark.long
def test_every_option_compiles(compiled) -> None:
    """As the interpreter cannot tell: variables of one type in loops, layouts, masks."""
    kernels = compiled("sm_90", *(json.dumps(call) for call in CLASSES.values()))
    assert len(kernels) == 3 * len(CLASSES)
    for one in kernels:
        check("sm_90", one, spilled=math.inf)


def test_three_kernels_a_class_and_none_for_another_size(compiled) -> None:
    sizes = ({}, {"batch": 3, "seqlen": 4001}, {"nheads": 6, "nheads_k": 3}, {"seqlen": 5000, "batch": 1})
    kernels = compiled("sm_90", *(json.dumps({"bias": "row", "has_slopes": True, **size}) for size in sizes))
    assert len(kernels) == 3 * len(sizes)
    assert len({one["binary"] for one in kernels}) == 3


@pytest.mark.long
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_option_on_every_architecture(compiled, arch, head_dim) -> None:
    calls = [{"head_dim": head_dim, "causal": causal} for causal in (False, True)]
    calls += [{**call, "head_dim": head_dim, "head_dim_v": None} for call in CLASSES.values()]
    for one in compiled(arch, *map(json.dumps, calls)):
        check(arch, one, spilled=math.inf)
