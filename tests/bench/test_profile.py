"""What is read of Nsight Compute's output; it runs on a machine with a GPU only."""

from __future__ import annotations

import pytest

from flashsigmoid.bench import profile

OUTPUT = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","nsecond","%","%","%","inst","inst"
"0","7","elementwise(float)","1,000","0","1.5","90","0","0.2"
"1","7","_fwd_kernel(x)","1,040,000","71.25","88","3","0.5","1.75"
==PROF== Disconnected
"""


def test_of_the_longest_kernel_the_shares_are_read() -> None:
    kernel = profile.longest(profile.kernels(OUTPUT))
    assert kernel["Kernel Name"] == "_fwd_kernel(x)"
    assert {name: value for name, value, _ in profile.shares(kernel)} == {
        "profile/tensor": 71.25, "profile/special_functions": 88.0, "profile/dram": 3.0, "profile/waiting_wait": 1.75,
        "profile/waiting_barrier": 0.5,
    }  # fmt: skip


def test_without_a_kernel_or_without_ncu_it_says_so(tmp_path, monkeypatch) -> None:
    for text in ("", "==PROF== nothing\n", OUTPUT.partition('"0"')[0]):
        with pytest.raises(ValueError, match="ncu must see at least one kernel, got none"):
            profile.longest(profile.kernels(text))
    monkeypatch.setattr(profile.shutil, "which", lambda *args, **options: None)
    with pytest.raises(ValueError, match="ncu of Nsight Compute must be on PATH"):
        profile.main(["lm-4k-d64", "--out", str(tmp_path / "x.jsonl")])
    assert not (tmp_path / "x.jsonl").exists()


def test_what_a_peer_cannot_is_recorded_with_its_reason(tmp_path, monkeypatch, capsys) -> None:
    program = tmp_path / "ncu"
    program.write_text("#!/bin/sh\necho no GPU here >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(profile.shutil, "which", lambda *args, **options: str(program))
    profile.main(["lm-4k-d64", "--work", "forward", "--peer", "hopper", "--out", str(tmp_path / "x.jsonl")])
    assert "no GPU here" in (tmp_path / "x.jsonl").read_text()
    assert (
        "lm-4k-d64, forward, hopper: ncu must see at least one kernel, got none; no GPU here" in capsys.readouterr().out
    )
