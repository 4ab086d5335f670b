"""Ranks from Slurm's variables: two processes that find each other, and what is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from distributed.runs import far, free_port, losses

from flashsigmoid.distributed.processes import LOST, Processes
from flashsigmoid.training.cluster import adopt_launcher

ROOT = Path(__file__).parents[2]
STEP = {
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NODELIST": "node[07-08],other3",
}  # fmt: skip
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
SCRIPT = """
import json, os
from flashsigmoid.training.mesh import joined
with joined(None, "cpu", 60.0) as world:
    here = os.environ["LOCAL_WORLD_SIZE"]
    print(json.dumps([world.rank, world.size, str(world.sizes), world.largest(world.rank), here]))
"""

KILLED = """
import os, signal, sys
import torch, torch.distributed as dist
from flashsigmoid.training.mesh import joined
with joined(None, "cpu", 60.0) as world:
    world.largest(1)
    if world.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
"""


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher but that of the test, and nothing of it left."""
    for name in (*TORCHRUN, *(name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "LSB_")))):
        monkeypatch.setenv(name, "")  # what adopt_launcher sets is taken back
        monkeypatch.delenv(name)


def adopted(monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    adopt_launcher()
    return {name: os.environ[name] for name in TORCHRUN if name in os.environ}


def test_a_step_of_slurm_has_torchruns_variables(monkeypatch) -> None:
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "node07", "MASTER_PORT": "19567"}
    assert adopted(monkeypatch, **STEP) == expected
    assert adopted(monkeypatch, **STEP) == expected  # a second time nothing changes


def test_an_address_that_is_given_stands(monkeypatch) -> None:
    found = adopted(monkeypatch, **STEP, MASTER_ADDR="here", MASTER_PORT="29500")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("here", "29500")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_one_process_stays_alone(monkeypatch, variables) -> None:
    assert adopted(monkeypatch, **variables) == {}


def test_torchrun_within_a_step_is_left_alone(monkeypatch) -> None:
    own = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert adopted(monkeypatch, **STEP, **own) == own


def srun(words: list[str], ranks: int = 2, **changes: str) -> list[subprocess.CompletedProcess[str]]:
    """What srun would start."""
    shared = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7", "MASTER_PORT": str(free_port()), **changes,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    ended = [(process, *process.communicate(timeout=120)) for process in started]
    return [subprocess.CompletedProcess(words, process.returncode, out, err) for process, out, err in ended]


@pytest.mark.long
def test_processes_of_srun_find_each_other() -> None:
    ended = srun(["-c", SCRIPT])
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    assert [json.loads(process.stdout) for process in ended] == [
        [rank, 2, "dp=2,cp=1,tp=1", [1], "2"] for rank in (0, 1)
    ]


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_who_is_left_without_a_rank_ends_with_one_code(lost: int) -> None:
    """No torchrun keeps the store: it ends with rank 0."""
    ended = srun(["-c", KILLED, str(lost)])
    assert [process.returncode for process in ended] == ([-9, LOST] if lost == 0 else [LOST, -9])
    said = ended[1 - lost].stderr
    assert f"error: rank {lost} did not answer after step 0" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("own", "code"), [(False, LOST), (True, None)])
def test_a_roll_call_without_a_store_is_no_traceback(monkeypatch, capsys, own: bool, code: int | None) -> None:
    store = mock.Mock(**{"set.side_effect": dist.DistNetworkError("Connection reset by peer")})
    one = Processes.__new__(Processes)
    one.rank, one.size, one.step, one._store, one._hears = 1, 4, 7, store, True
    left = mock.Mock(side_effect=SystemExit)
    monkeypatch.setattr(os, "_exit", left)
    error = ValueError("own") if own else RuntimeError("gloo: Connection closed by peer")
    with pytest.raises(ValueError if own else SystemExit, match="own" if own else None):
        one.end(error)
    assert [call.args[0] for call in left.call_args_list] == ([] if own else [code])
    assert capsys.readouterr().err == ("" if own else "error: rank 0 did not answer after step 7, says rank 1\n")


@pytest.mark.long
def test_srun_trains_as_torchrun_does(tmp_path) -> None:
    words = ["-m", "flashsigmoid", "train", "demo", "--device", "cpu", "--steps", "4"]
    for field in ("val_every=4", "save_every=2", "log_every=1", "data.val_windows=4", "sample_tokens=0"):
        words += ["--set", field]
    elastic = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*elastic, *words, "--out", str(tmp_path / "torchrun")], env=environment, check=True)
    ended = srun([*words, "--out", str(tmp_path / "srun"), "--mesh", "dp=2"])
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    assert len(losses(tmp_path / "srun")) == 4
    assert far(losses(tmp_path / "srun"), losses(tmp_path / "torchrun")) == 0.0
