"""A run from end to end on a small problem, what it says of those who are absent, and what it does not let pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashsigmoid.backends import blocked
from flashsigmoid.bench import run as bench
from flashsigmoid.bench.candidate import RESULTS, Candidate, Inputs, Step, make_inputs
from flashsigmoid.bench.flex import Flex, attention_of
from flashsigmoid.bench.gate import Gate
from flashsigmoid.bench.joined import joined, reasons
from flashsigmoid.bench.peers import candidates
from flashsigmoid.bench.problems import PROBLEMS, Shape, spread
from flashsigmoid.record import Record, read_records

SIZES = {"batch": 2, "seqlen_q": 100, "seqlen_k": 100, "nheads": 4, "nheads_k": 4, "head_dim": 16}
SHAPES = [
    Shape(name="full", **SIZES),
    Shape(name="causal", **SIZES, causal=True),
    Shape(name="window", **SIZES | {"nheads_k": 2}, causal=True, window_size=(20, 0)),
    Shape(name="cross", **SIZES | {"seqlen_k": 300}),
    Shape(name="alibi", **SIZES, causal=True, alibi=True),
    Shape(name="long", **SIZES | {"seqlen_q": 1500, "seqlen_k": 1500, "batch": 1, "nheads_k": 2}, causal=True),
    Shape(
        name="packed",
        **SIZES | {"batch": 1, "seqlen_q": 256, "seqlen_k": 256},
        causal=True,
        lengths=spread(256, 4),
    ),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a problem that takes no time."""
    monkeypatch.setitem(PROBLEMS, "tiny", Shape(name="tiny", **SIZES, causal=True))
    return "tiny"


def test_a_run_records_error_speed_and_reasons(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.jsonl"
    shown: list[Record] = []
    records = bench.run([tiny], rounds=3, out=out, show=shown.extend)
    assert shown == records
    assert read_records(out).records == records
    assert read_records(out).settings["bias"] == "-log n or own"
    rows = {(row.work, row.peer): row for row in joined(records)}
    assert {work for work, _ in rows} == {"forward", "backward", "both"}
    for (_, peer), row in rows.items():
        assert row.p10_ms <= row.ms <= row.p90_ms
        assert row.tflops > 0
        assert (row.error_rms is None) == (peer == "bare products")
        assert (row.over_budget is not None) == (peer in ("blocked", "eager sigmoid"))
        assert row.over_softmax is not None
    assert rows["both", "softmax sdpa"].over_softmax == 1.0
    named = {r.name for r in records if r.tags["peer"] == "blocked"}
    assert {"time_ms", "speed_tflops", "speedup_over_sdpa", "error_over_budget", "error_rms"} <= named


def test_absent_peers_are_skipped_with_a_reason(tiny: str) -> None:
    records = bench.run([tiny], works=["forward"], rounds=1, names=["fa3", "triton-sigmoid", "blocked"])
    assert reasons(records) == ["tiny: no fa3, triton-sigmoid: needs CUDA, got cpu"]
    assert [row.peer for row in joined(records)] == ["blocked"]


def test_a_peer_that_fails_is_skipped_with_what_it_said(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsigmoid.bench.eager import Eager

    def attention(self: Candidate, inputs: object) -> None:
        raise RuntimeError("\n  no such kernel\nmore")

    monkeypatch.setattr(Eager, "attention", attention)
    records = bench.run([tiny], works=["forward"], rounds=1, names=["eager sigmoid", "blocked"])
    assert reasons(records) == ["tiny: no eager sigmoid: RuntimeError: no such kernel"]


def test_who_has_no_backward_is_timed_forward(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsigmoid.bench.eager import Eager

    def prepare(self: Candidate, inputs: Inputs, work: str) -> Step:
        if work != "forward":
            raise RuntimeError("no backward")
        return super(Eager, self).prepare(inputs, work)

    monkeypatch.setattr(Eager, "prepare", prepare, raising=False)
    records = bench.run([tiny], works=["forward", "backward"], rounds=1, names=["eager sigmoid", "blocked"])
    measured = [(row.work, row.peer) for row in joined(records)]
    assert measured == [("forward", "eager sigmoid"), ("forward", "blocked"), ("backward", "blocked")]
    assert reasons(records) == ["tiny, backward: no eager sigmoid: RuntimeError: no backward"]


def test_a_wrong_backend_is_an_error_and_not_a_row(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = blocked.forward, blocked.backward
    monkeypatch.setattr(blocked, "forward", lambda *args, **options: 1.01 * forward(*args, **options))
    with pytest.raises(AssertionError, match="blocked must be inside the error budget on tiny, got"):
        bench.run([tiny], works=["forward"], rounds=1, names=["blocked"])
    monkeypatch.setattr(blocked, "forward", forward)

    def wrong(*args, **options):
        dq, dk, dv, *rest = backward(*args, **options)
        return dq, dk, 1.01 * dv, *rest

    monkeypatch.setattr(blocked, "backward", wrong)
    with pytest.raises(AssertionError, match="blocked must be inside the error budget on tiny, got"):
        bench.run([tiny], works=["both"], rounds=1, names=["blocked"])


def test_rules_are_said_before_anything_runs() -> None:
    for options, message in (
        ({"works": ["up"]}, "work must be one of forward, backward, both, got 'up'"),
        ({"names": ["up"]}, "peer must be one of .*, got 'up'"),
        ({"device": "up"}, "device must be one of cpu.*, got 'up'"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.run(["cpu-512-d64"], **options)


@every_shape
def test_the_gate_knows_right_from_wrong(shape: Shape) -> None:
    """Every candidate that runs here is right in float32; one key less, or another scale, is not."""
    inputs = make_inputs(shape, torch.float32, "cpu")
    gate = Gate(inputs)
    for name in ("blocked", "softmax sdpa", "eager sigmoid"):
        candidate = candidates()[name]
        if candidate.unavailable(shape, torch.float32, "cpu") is not None:
            assert name == "softmax sdpa"
            continue
        step = candidate.prepare(inputs, "both")()
        results = {key: candidate.dense(x, inputs) for key, x in zip(RESULTS["both"], step, strict=True)}
        errors = gate.errors(results, candidate.kind)
        if candidate.kind == "softmax":  # no witness: some ten roundings in a row
            assert max(errors.rms.values()) < 8 * torch.finfo(torch.float32).eps
        else:
            assert errors.over_budget is not None
            assert errors.over_budget <= 1.0
        for key, x in results.items():
            wrong = gate.errors({key: 1.01 * x}, candidate.kind)
            assert wrong.rms[key] == pytest.approx(0.01, rel=0.01)


@every_shape
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_flex_attention_means_the_same(shape: Shape, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, and forward only: it has no backward on the CPU."""
    monkeypatch.setattr(Flex, "attention", lambda self, inputs: attention_of(inputs, self.kind))
    inputs, candidate = make_inputs(shape, torch.float32, "cpu"), Flex(kind)
    (out,) = candidate.prepare(inputs, "forward")()
    errors = Gate(inputs).errors({"out": candidate.dense(out, inputs)}, kind)
    assert errors.rms["out"] < 8 * torch.finfo(torch.float32).eps
    assert kind == "softmax" or (errors.over_budget is not None and errors.over_budget <= 1.0)


def test_importing_the_bench_imports_no_peer() -> None:
    source = (
        "import sys, flashsigmoid.bench.run\n"
        "found = {name for name in sys.modules if name.partition('.')[0] in ('triton', 'triton_sigmoid')}\n"
        "found |= {name for name in sys.modules if name == 'torch.nn.attention.flex_attention'}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)
