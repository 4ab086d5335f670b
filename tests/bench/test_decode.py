"""The decode problems and their gate, on small ones; what is timed needs a GPU, tests/gpu/test_decode.py."""

from __future__ import annotations

import pytest
import torch

from flashsigmoid.bench.decode import PROBLEMS, Decode, Gate, _ours, _ours_unshared, _speeds, choose, make_inputs, run
from flashsigmoid.bench.timing import Times

SMALL = {"batch": 3, "nheads": 4, "nheads_k": 2, "head_dim": 16}
CASES = [
    Decode(name="plain", seqlen=200, **SMALL),
    Decode(name="pages", seqlen=208, page_size=16, **SMALL),
    Decode(name="prefix", seqlen=200, prefix=170, **SMALL),
]


@pytest.mark.parametrize("problem", CASES, ids=lambda problem: problem.name)
def test_ours_is_inside_the_budget_and_a_missing_key_is_not(problem) -> None:
    inputs = make_inputs(problem, torch.bfloat16, "cpu")
    gate = Gate(inputs)
    rms, over = gate.errors(_ours(inputs)(), "sigmoid")
    assert rms < 0.01
    assert over is not None
    assert over <= 1.0
    inputs.lengths -= 1
    assert (gate.errors(_ours(inputs)(), "sigmoid")[1] or 0.0) > 1.0


def test_the_prefix_in_front_of_every_sequence_is_the_same_problem() -> None:
    inputs = make_inputs(CASES[2], torch.bfloat16, "cpu")
    assert (Gate(inputs).errors(_ours_unshared(inputs)(), "sigmoid")[1] or 9.0) <= 1.0


def test_softmax_is_checked_against_softmax() -> None:
    inputs = make_inputs(CASES[0], torch.float32, "cpu")
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    assert Gate(inputs).errors(out, "softmax")[0] < 8 * torch.finfo(torch.float32).eps
    assert Gate(inputs).errors(out * 1.01, "softmax")[0] > 5e-3


def test_speed_is_bytes_read_over_the_copy_rate_and_over_the_fastest_softmax() -> None:
    problem = PROBLEMS["decode-b1-4k"]
    assert problem.cache_bytes(torch.bfloat16) == 4096 * 8 * 128 * 2 * 2
    assert PROBLEMS["decode-b64-32k-prefix"].cache_bytes(torch.bfloat16) == (32768 + 64 * 512) * 8 * 128 * 2 * 2
    times = {name: Times([ms]) for name, ms in {"triton": 0.008, "fa3": 0.02, "sdpa flash": 0.016}.items()}
    found = {(x.name, x.tags["peer"]): x.value for x in _speeds(problem, torch.bfloat16, times, 4.0)}
    assert found["speedup_over_softmax", "triton"] == pytest.approx(2.0)
    assert found["read_fraction", "triton"] == pytest.approx(16.777216e6 / 0.008e-3 / 4e12)


def test_names_globs_and_beginnings_choose() -> None:
    assert choose(["decode-b1-4k"]) == ["decode-b1-4k"]
    assert choose(["decode-b8-*k"]) == ["decode-b8-4k", "decode-b8-64k", "decode-b8-512k"]
    assert len(choose(["decode"])) == len(PROBLEMS)
    assert choose(["lm-4k"]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_it_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="must be timed on a CUDA device"):
        run(["decode-b1-4k"])
