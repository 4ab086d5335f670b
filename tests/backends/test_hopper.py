"""What the Hopper backend says of itself without a GPU; its kernels run in tests/gpu."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from flashsigmoid import backends
from flashsigmoid.backends import hopper, select
from flashsigmoid.backends.problem import Problem

PROBLEM = Problem(
    batch=2, seqlen_q=8192, seqlen_k=8192, nheads=16, nheads_k=16, head_dim=128, head_dim_v=128, dtype=torch.bfloat16,
    device="cuda", scale=0.125, sigmoid_bias=-9.0, arch="sm_90",
)  # fmt: skip
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def fresh():
    hopper._without_gluon.cache_clear()
    yield
    hopper._without_gluon.cache_clear()


def test_auto_takes_it_where_it_is_faster() -> None:
    for direction in ("forward", "backward"):
        assert select(PROBLEM, "auto", direction) is hopper
        for change in ({"seqlen_k": 400, "seqlen_q": 400}, {"batch": 1, "nheads": 1, "nheads_k": 1}, {"head_dim": 96}):
            small = replace(PROBLEM, **change)
            assert hopper.unsupported(small, direction) is None
            assert hopper.slower(small, direction) is not None
            assert select(small, "auto", direction).NAME == "triton"
            assert select(small, "hopper", direction) is hopper
        for change in ({"seqlen_q": 300}, {"seqlen_k": 300}, {"seqlen_q": 300, "seqlen_k": 400}):
            reason = hopper.slower(replace(PROBLEM, **change), direction)
            assert reason == f"{direction} at head_dim 128 is faster from seqlen 512, got 300"


@pytest.mark.parametrize(
    ("change", "directions", "reason"),
    [
        ({"arch": "sm_100"}, "fb", "the device must be of compute capability 9.0, got sm_100"),
        ({"dtype": torch.float32}, "fb", "dtype must be float16 or bfloat16, got float32"),
        ({"head_dim": 100}, "fb", "must have a head_dim of a multiple of 8 up to"),
        ({"head_dim": 264}, "fb", "must have a head_dim of a multiple of 8 up to 256, got 264 and 128"),
        ({"head_dim": 256, "seqlen_k": 2**20}, "fb", "a float32 sum of products must have at most 524288 terms"),
        ({"q_offset": -(2**31)}, "fb", "seqlen and q_offset must be at most 2**30, got 8192, 8192, -2147483648"),
        ({"dropout_p": 0.1}, "fb", "dropout_p must be 0, got 0.1"),
        ({"total_q": 9000, "total_k": 9000}, "", ""),
        (
            {"total_q": 9000, "total_k": 9000, "head_dim": 136},
            "b",
            "packed sequences must have a head_dim of at most 128",
        ),
        ({"total_q": 9000, "total_k": 2**31}, "fb", "packed rows must be at most 2**30, got 9000 and 2147483648"),
        ({"seqlen_k": 2**20}, "f", "a float32 sum of products must have at most 524288 terms, got 1048576"),
        ({"seqlen_q": 2**20}, "b", "a float32 sum of products must have at most 524288 terms, got 1048576"),
        ({"sigmoid_bias": None, "bias_shape": (16,), "needs_sums": True}, "b", "must not require a gradient"),
        ({"slopes_shape": (16,), "needs_sums": True}, "b", "sigmoid_bias and alibi_slopes must not require a gradient"),
        ({"slopes_shape": (16,)}, "", ""),
        ({"sigmoid_bias": None, "bias_shape": ()}, "", ""),
        ({"sigmoid_bias": None, "bias_shape": (2, 16, 8192)}, "b", "sigmoid_bias must not have a value for every row"),
        ({"slopes_shape": (16,), "head_dim": 256}, "b", "beyond head_dim 128 there must be neither a tensor b nor"),
    ],
)
def test_what_it_cannot(change, directions, reason) -> None:
    problem = replace(PROBLEM, **change)
    for direction in ("forward", "backward"):
        said = hopper.unsupported(problem, direction)
        if direction[0] in directions:
            assert said is not None
            assert reason in said
        else:
            assert said is None


def test_packed_sequences_are_its_own_by_name_only_and_a_backward_it_lacks_is_tritons(monkeypatch) -> None:
    packed = replace(PROBLEM, batch=9, total_q=30_000, total_k=30_000, q_offset=0)
    for direction in ("forward", "backward"):
        assert select(packed, "hopper", direction) is hopper
        assert select(packed, "auto", direction).NAME == "triton"
        assert hopper.slower(packed, direction) == "packed sequences are not measured yet"
    assert hopper.PACKED
    # once it is measured
    backends._remembered.cache_clear()
    monkeypatch.setattr(hopper, "slower", lambda problem, direction: None)
    wide = replace(packed, head_dim=256, head_dim_v=256)
    with_rows = replace(packed, sigmoid_bias=None, bias_shape=(30_000, 16))
    try:
        for problem in (wide, with_rows):
            assert select(problem, "auto", "forward") is hopper
            assert select(problem, "auto", "backward").NAME == "triton"
    finally:
        backends._remembered.cache_clear()


def test_the_same_bits_are_the_triton_kernels() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert select(PROBLEM, "auto", "forward") is hopper
        assert select(PROBLEM, "auto", "backward").NAME == "triton"
        wide = replace(PROBLEM, head_dim=256, head_dim_v=256)
        assert select(wide, "hopper", "backward") is hopper  # a kernel for each gradient, which adds in one order
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_missing_or_changed_gluon_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def changed(name, package):
        raise ImportError("cannot import name 'warpgroup_mma'")

    monkeypatch.setattr(hopper.importlib, "import_module", changed)
    reason = hopper.unsupported(PROBLEM)
    assert (
        reason == "triton's gluon must be as it is from 3.6 to 3.9, got ImportError: cannot import name 'warpgroup_mma'"
    )
    hopper._without_gluon.cache_clear()
    monkeypatch.setattr(hopper.importlib.util, "find_spec", lambda name: None)
    assert hopper.unsupported(PROBLEM) == "the package triton, from 3.6 on, must be installed with its gluon"


def test_head_dims_are_padded() -> None:
    from flashsigmoid.backends.hopper.tiles import padded_head_dim

    padded = {d: padded_head_dim(replace(PROBLEM, head_dim=d, head_dim_v=8)) for d in (8, 64, 72, 128, 136, 256)}
    assert padded == {8: 64, 64: 64, 72: 128, 128: 128, 136: 256, 256: 256}
