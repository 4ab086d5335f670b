"""What is tried for a tile, and what the table's own tiles are among."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends.here import IS_INTERPRETED, interpret_in_tiles

from flashsigmoid.backends.hopper import tiles as hopper_tiles
from flashsigmoid.backends.hopper.tiles import Tile as HopperTile
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.backends.triton.tiles import Tile
from flashsigmoid.bench import tune as tuning
from flashsigmoid.bench.candidate import make_inputs
from flashsigmoid.bench.problems import PROBLEMS, Shape
from flashsigmoid.bench.tune import KERNELS, Choice, _shipped, candidates, tune
from flashsigmoid.testing import Options, assert_within_budget, oracle, witness


def test_it_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="--tune must run on a CUDA device, got none"):
        tune(["lm-4k-d64"])


@pytest.mark.parametrize(
    ("kernel", "head_dim"),
    [(kernel, dim) for kernel in KERNELS for dim in (64, 128, 256) if kernel != "all" or dim == 64],
)
def test_the_tables_tiles_are_candidates(kernel, head_dim) -> None:
    from flashsigmoid.backends.support import _BASE

    tried = set(candidates(kernel, head_dim, 2))
    is_hopper = kernel.startswith("hopper")
    assert (0 if is_hopper else 20) < len(tried) < 250
    for causal in (False, True):
        for seqlen in (197, 1024, 2048, 16384):
            problem = replace(
                _BASE, seqlen_q=seqlen, seqlen_k=seqlen, causal=causal, head_dim=head_dim, head_dim_v=head_dim
            )
            tile = _shipped(kernel, problem)
            if not is_hopper:
                tile = replace(tile, maxnreg=None)
            assert tile in tried, (causal, seqlen)


def test_a_choice_prints_as_a_row_of_the_table() -> None:
    kept = Choice("fwd", 64, False, Tile(128, 64, 4, 3, 1), Tile(128, 64, 4, 3, 1), 1.0)
    assert str(kept).split(maxsplit=4)[4] == "Tile(128, 64, 4, 3, in_registers=1) kept"
    other = Choice("dq", 128, True, Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), 1.07)
    assert str(other).endswith("1.070 times as fast as Tile(64, 64, 4, 2)")
    assert "causal" in str(other)
    tile = HopperTile(3, 64, 4, 160, is_from_end=True)
    assert "Tile(3, 64, 4, 160, is_from_end=True)" in str(Choice("hopper-forward", 128, True, tile, tile, 1.0))


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="kernel must be one of fwd, dkdv, dq, all, hopper-forward, hopper-backward"):
        tune(["lm-4k-d64"], kernels=["bwd"])


def test_the_default_problems_exist() -> None:
    assert {f"lm-4k-d{dim}{mask}" for dim in (64, 128, 256) for mask in ("", "-causal")} <= set(PROBLEMS)


def problem_on(shape: Shape, dtype: torch.dtype, **changes: Any):
    """What the shape is on a CPU, with changes."""
    inputs = make_inputs(replace(shape, batch=1, seqlen_q=4, seqlen_k=4), dtype, "cpu")
    problem = make_problem(inputs.q, inputs.k, inputs.v, sigmoid_bias=shape.bias, causal=shape.causal)
    return replace(problem, batch=shape.batch, seqlen_q=shape.seqlen_q, seqlen_k=shape.seqlen_k, **changes)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Choice]]:
    """`tune` on an sm_90 of paper, where `ms(kernel, tile)` is how long a tile takes, or the error it ends in."""

    class Stream:
        def synchronize(self) -> None:
            pass

    def run(names: list[str], ms: Callable[[str, Any], float | Exception], **options: Any) -> list[Choice]:
        def call(shape: Shape, dtype: torch.dtype, kernel: str, tile: Any) -> Callable[[], float]:
            def step() -> float:
                found = ms(kernel, tile)
                if isinstance(found, Exception):
                    raise found
                return found

            return step

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(tuning, "_problem", lambda *given: problem_on(*given, arch="sm_90", device="cuda"))
        monkeypatch.setattr(tuning.hopper, "_without_gluon", lambda: None)
        monkeypatch.setattr(tuning, "_compile_in_parallel", lambda pairs, dtype: None)
        monkeypatch.setattr(tuning, "_call", call)
        monkeypatch.setattr(tuning, "by_events", lambda step, stream, graphs: step)
        return tune(names, **options)

    return run


def test_the_fastest_tile_of_each_kernel_is_chosen(card) -> None:
    best = {"fwd": Tile(64, 128, 8, 2), "dkdv": Tile(32, 128, 4, 1), "dq": Tile(128, 64, 8, 2, 1)}
    shown: list[Choice] = []
    choices = card(["lm-4k-d64-causal"], lambda kernel, tile: 1.0 if tile == best.get(kernel) else 2.0,
                   show=shown.append)  # fmt: skip
    assert shown == choices
    assert [choice.kernel for choice in choices] == ["fwd", "dkdv", "dq", "hopper-forward", "hopper-backward"]
    for choice in choices:
        assert (choice.head_dim, choice.causal) == (64, True)
        if choice.kernel in best:
            assert (choice.tile, choice.speedup) == (best[choice.kernel], 2.0)
        else:  # as fast as all others
            assert (choice.tile, choice.speedup) == (choice.shipped, 1.0)
            assert str(choice).endswith("kept")
    shipped = hopper_tiles.choose_tile(problem_on(PROBLEMS["lm-4k-d64-causal"], torch.bfloat16), "forward")
    assert choices[3].shipped == shipped


def test_short_problems_take_one_launch_and_what_cannot_run_is_left_out(card) -> None:
    tried: list[Any] = []

    def ms(kernel: str, tile: Tile) -> float | Exception:
        tried.append(tile)
        return RuntimeError("out of resource: shared memory") if tile.num_warps == 8 else 1.0 / tile.block_m

    (choice,) = card(["vit-197-d64-b4"], ms, kernels=["all"])
    assert any(tile.num_warps == 8 for tile in tried)
    assert (choice.tile.block_m, choice.tile.num_warps) == (128, 4)
    assert card(["lm-4k-d64"], ms, kernels=["all"]) == []


def test_what_ends_a_tuning(card) -> None:
    """A broken device, and a table's own tile that does not run; no other tile does."""
    with pytest.raises(RuntimeError, match="CUDA error"):
        card(["lm-4k-d64"], lambda kernel, tile: RuntimeError("CUDA error: an illegal memory access"), kernels=["fwd"])
    with pytest.raises(ValueError, match=r"fwd on lm-4k-d64 must run with the table's Tile\(.*\), got no memory"):
        card(["lm-4k-d64"], lambda kernel, tile: RuntimeError("no memory"), kernels=["fwd"])
    with pytest.raises(ValueError, match="--tune takes dense problems, got varlen-16k-d128"):
        card(["varlen"], lambda kernel, tile: 1.0)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("kernel", ["fwd", "dkdv", "dq", "all"])
def test_what_is_timed_is_the_kernel_with_that_tile(kernel, monkeypatch) -> None:
    from flashsigmoid.backends.triton import launch

    interpret_in_tiles(monkeypatch, 64, 64)  # that of a table, which is not taken
    seen: list[Tile] = []
    plan = launch._plan.__wrapped__
    monkeypatch.setattr(launch, "_plan", lambda *given: seen.append(plan(*given).tile) or plan(*given))
    monkeypatch.setattr(tuning, "make_inputs", lambda shape, dtype, device: make_inputs(shape, dtype, "cpu"))
    monkeypatch.setattr(tuning, "_problem", problem_on)
    shape = Shape(name="s", seqlen_q=40, seqlen_k=40, nheads=2, nheads_k=1, head_dim=16, causal=True)
    inputs = make_inputs(shape, torch.float32, "cpu")
    tensors = inputs.q, inputs.k, inputs.v, inputs.dout
    found: Any = tuning._call(shape, torch.float32, kernel, Tile(16, 32, 4, 1))()
    assert {(tile.block_m, tile.block_n) for tile in seen} == {(16, 32)}
    names = {"fwd": ("out",), "dkdv": ("dk", "dv"), "dq": ("dq",), "all": ("dq", "dk", "dv")}[kernel]
    options = Options(causal=True, sigmoid_bias=-math.log(40))
    expected, near = oracle(*tensors, **options), witness(*tensors, **options)
    for name, result in zip(names, found if isinstance(found, tuple) else (found,), strict=False):
        assert_within_budget(name, result, expected[name], near[name])
