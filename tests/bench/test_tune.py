"""What is tried for a tile, and what the table's own tiles are among."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashsigmoid.backends.hopper.tiles import Tile as HopperTile
from flashsigmoid.backends.triton.tiles import Tile
from flashsigmoid.bench.problems import PROBLEMS
from flashsigmoid.bench.tune import KERNELS, Choice, _shipped, candidates, tune


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
