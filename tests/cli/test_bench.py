"""`flashsigmoid bench` and `flashsigmoid explain`."""

from __future__ import annotations

import re

import torch
from cli.outcome import assert_one_error

from flashsigmoid.record import read_records


def test_bench_times_and_records_a_problem(flashsigmoid, tmp_path):
    listed = flashsigmoid("bench", "--list")
    assert listed.code == 0
    assert "cpu-512-d64" in listed.out
    words = ("cpu-512-d64", "--work", "forward", "--rounds", "2", "--out", "bench.jsonl", "--plot", "bench.svg")
    outcome = flashsigmoid("bench", *words)
    assert outcome.code == 0, outcome.err
    numbers = r" +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+ +\d\.\d\d +\d\.\de-07 +0\.\d\d"
    assert re.search(rf"cpu-512-d64, forward\n.*\nblocked{numbers}", outcome.out), outcome.out
    assert "cpu-512-d64: no sdpa flash, sdpa cudnn, sdpa efficient, fa3" in outcome.out
    assert len(read_records(tmp_path / "bench.jsonl").records) > 5
    assert "blocked" in (tmp_path / "bench.svg").read_text("utf-8")
    assert_one_error(flashsigmoid("bench", "warp"), 1, "problem must be one of cpu-512-d64")
    assert_one_error(flashsigmoid("bench", "--work", "sideways"), 1, "work must be one of forward, backward, both")
    assert_one_error(flashsigmoid("bench", "--peer", "nobody"), 1, "peer must be one of hopper, triton, blocked")
    assert_one_error(flashsigmoid("bench", "--device", "tpu"), 1, "device must be one of cpu")
    assert_one_error(flashsigmoid("bench", "--load-library", "none.so"), 1, "--load-library must be a shared library")
    assert_one_error(flashsigmoid("bench", "--plot", "bench.gif"), 1, "--plot must end in .png or .svg")


def test_bench_tune_is_of_16_bits_and_takes_no_option_in_silence(flashsigmoid, monkeypatch):
    from flashsigmoid.bench import tune

    seen = []
    monkeypatch.setattr(tune, "tune", lambda names, **options: seen.append((names, options)))
    assert flashsigmoid("bench", "lm-4k-d64", "--tune", "--kernel", "fwd", "--rounds", "3").code == 0
    assert seen == [(["lm-4k-d64"], {"dtype": torch.bfloat16, "kernels": ["fwd"], "rounds": 3, "show": print})]
    assert flashsigmoid("bench", "--tune", "--dtype", "float32").code == 0
    assert seen[1][1]["dtype"] == torch.float32
    for words in (["--work", "forward"], ["--peer", "triton"], ["--out", "x"], ["--plot", "x.svg"], ["--no-graphs"]):
        assert_one_error(flashsigmoid("bench", "--tune", *words), 1, "--tune takes problems, --kernel, --dtype and")
    assert_one_error(flashsigmoid("bench", "--kernel", "fwd"), 1, "--kernel goes with --tune, got fwd without it")


def test_explain_says_backend_formula_and_why_not_the_others(flashsigmoid):
    outcome = flashsigmoid("explain", "--seqlen", "5", "--window", "3,none", "--alibi", "--bias-per-head", "--causal")
    assert outcome.code == 0
    assert outcome.out.startswith("backend: blocked\nformula: ")
    assert "not reference: " in outcome.out


def test_explain_of_an_absent_device_needs_no_device(flashsigmoid):
    assert flashsigmoid("explain", "--device", "cuda").code == 0
