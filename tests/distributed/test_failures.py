"""Ranks that are killed or hang, started by `launch`, the command or torchrun: the run goes on, to the same bits.

Run by itself this file starts a run, or is a rank of it: test_failures.py launch|rank TEXT OUT_DIR STEPS FAULT MESH
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed import runs
from distributed.runs import far, losses, mesh_run, remains
from training.tiny import differences, write_text

from flashsigmoid.distributed.launch import launch
from flashsigmoid.distributed.processes import LOST, MeshSizes, parse_mesh
from flashsigmoid.record import RecordWriter
from flashsigmoid.training import language
from flashsigmoid.training.checkpoint import checkpoints, newest_whole
from flashsigmoid.training.run import LanguageRun

TESTS = Path(__file__).parents[1]
RESULTS = TESTS.parent / "benchmarks" / "results"
RESTARTS = 12
TIMEOUT_S = 20.0  # of a rank that waits for another


def run_of(text: Path, steps: int) -> LanguageRun:
    """With dropout, whose random state must go on, too; a checkpoint every 2 steps."""
    run = mesh_run(text, steps=steps, val_every=steps, log_every=10)
    return runs.replace(run, model=runs.replace(run.model, dropout_p=0.2))


def rank(text: Path, out_dir: Path, steps: int, fault: str, mesh: str, resume: bool) -> None:
    """One rank; it says where it is, and a fault comes the first time only."""
    out_dir.with_name(f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    with runs.planted("" if resume else fault):
        language.train(
            run_of(text, steps), out_dir, resume=resume, device="cpu", timeout_s=TIMEOUT_S, mesh=mesh,
            show=lambda progress: None,
        )  # fmt: skip


def environment() -> dict[str, str]:
    """Of a process of these tests."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(text: Path, out_dir: Path, steps: int, fault: str = "", mesh: str = "dp=2") -> subprocess.Popen[str]:
    """A run of the ranks of a mesh that is started again when one is lost."""
    words = [sys.executable, __file__, "launch", str(text), str(out_dir), str(steps), fault, mesh]
    return subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for it: what it said."""
    said = process.communicate(timeout=3000)[1]
    assert process.returncode == code, said
    return said


def pid_of(out_dir: Path, number: int, not_: int = 0, timeout_s: float = 300.0) -> int:
    """Of a rank, once it is another than `not_`."""
    file, deadline_s = out_dir.with_name(f"rank-{number}"), time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if file.exists() and (text := file.read_text()) and int(text) != not_:
            return int(text)
        time.sleep(0.01)
    raise AssertionError(f"rank {number} did not start")


def newest(out_dir: Path) -> int:
    """Step of the newest checkpoint."""
    found = checkpoints(out_dir)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def wait_for_step(out_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until there is a checkpoint of that step, or a later one."""
    while newest(out_dir) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def kill_and_compare(tmp_path: Path, kills: int, steps: int) -> tuple[int, list[tuple[int, int]], str]:
    """Kill one of two ranks `kills` times, at random moments after the first new checkpoint; compare with a whole run.

    Returns:
        the seed of the moments; the rank and the newest checkpoint of each; what was said.
    """
    text = write_text(tmp_path / "text.txt")
    killed, whole = tmp_path / "killed/run", tmp_path / "whole/run"
    killed.parent.mkdir()
    whole.parent.mkdir()
    end(start(text, whole, steps))
    seed, moments, pids = random.SystemRandom().randrange(2**32), [], [0, 0]
    print(f"seed {seed}")
    draw, process = random.Random(seed), start(text, killed, steps)
    for _ in range(kills):
        pids = [pid_of(killed, number, pids[number]) for number in (0, 1)]
        wait_for_step(killed, newest(killed) + 2, process)
        time.sleep(draw.uniform(0.0, 1.0))
        number = draw.randrange(2)
        os.kill(pids[number], signal.SIGKILL)
        moments.append((number, newest(killed)))
        print(*moments[-1])
    said = end(process)
    assert differences(remains(whole), remains(killed)) == []
    assert losses(killed) == losses(whole)
    assert not list(killed.rglob("*.tmp"))
    return seed, moments, said


@pytest.mark.long
def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_same_bits(tmp_path):
    _, ((number, _),), said = kill_and_compare(tmp_path, kills=1, steps=100)
    assert f"lost rank {number}: starting again, restart 1 of {RESTARTS}" in said


@pytest.mark.long
def test_ten_kills(tmp_path):
    """Leaves benchmarks/results/kill-resume-mesh.jsonl: the rank and the newest checkpoint of every kill."""
    steps = 600
    seed, moments, _ = kill_and_compare(tmp_path, kills=10, steps=steps)
    settings = {
        **run_of(tmp_path / "text.txt", steps).settings(),
        "source": "1000 bytes of text",
        "mesh": "dp=2",
        "kill_seed": seed,
    }
    command = "python -m pytest -m long tests/distributed/test_failures.py"
    with RecordWriter(RESULTS / "kill-resume-mesh.jsonl", settings, command) as writer:
        for number, step in moments:
            writer.write("kill", step=step, rank=number)
        writer.write("kills", len(moments))
        writer.write("different_tensors", 0)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(tmp_path, mesh):
    text = write_text(tmp_path / "text.txt")
    for name, fault in (("whole", ""), ("hung", "hang 5")):
        (tmp_path / name).mkdir()
        said = end(start(text, tmp_path / name / "run", 12, fault, mesh))
    assert f"error: rank 1 did not answer within {TIMEOUT_S:g} s after step 4" in said
    assert "lost rank 1: starting again, restart 1 of" in said
    assert differences(remains(tmp_path / "whole/run"), remains(tmp_path / "hung/run")) == []


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", [6, 12])
def test_a_rank_is_killed_while_it_writes_a_checkpoint_and_the_one_before_is_damaged(tmp_path, step):
    """In the middle, and after the last step, when no rank computes any more. Before it goes on, its last checkpoint is
    cut short."""
    text = write_text(tmp_path / "text.txt")
    for name, fault in (("whole", ""), ("killed", f"kill-writing {step}")):
        (tmp_path / name).mkdir()
        out_dir = tmp_path / name / "run"
        process = start(text, out_dir, 12, fault)
        if fault:
            pid_of(out_dir, 1, pid_of(out_dir, 1))  # it is started again, and imports
            assert newest(out_dir) == step - 2
            shard = next(checkpoints(out_dir)[-1].glob("shard-*"))
            shard.write_bytes(shard.read_bytes()[:-100])
        said = end(process)
    assert "lost rank 1: starting again, restart 1 of" in said
    assert f"step-{step - 2:08d} is damaged, {shard.name} is not as it was written: the one before it is used" in said
    assert differences(remains(tmp_path / "whole/run"), remains(tmp_path / "killed/run")) == []


@pytest.mark.long
def test_an_error_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path):
    text, out_dir = write_text(tmp_path / "text.txt"), tmp_path / "run"
    said = end(start(text, out_dir, 12, "raise-writing 6"), 1)
    assert said.count("\n[rank1]: ValueError: batch must be whole, got half a one") == 1
    found = newest_whole(out_dir)
    assert found is not None
    assert found.name in ("step-00000004", "step-00000006")


@pytest.mark.long
def test_the_command_and_torchrun_on_other_numbers_of_ranks(tmp_path):
    """Four ranks by --mesh to step 2, two of another mesh to step 3, four to step 4, one process to step 5, two by
    torchrun to the end: the losses of one process."""
    text = write_text(tmp_path / "text.txt", 4000)
    words = ["train", "demo", "--device", "cpu", "--data", str(text), "--set", "model.vocab_size=264"]
    for field in ("model.seqlen=32", "model.dim=32", "model.nlayers=2", "val_every=6", "save_every=2", "log_every=1"):
        words += ["--set", field]
    ours = [sys.executable, "-m", "flashsigmoid", *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["-m", "flashsigmoid", *words]
    out = ["--out", str(tmp_path / "run")]

    def call(words: list[str], code: int = 0) -> str:
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    call([*ours, "--steps", "12", "--out", str(tmp_path / "alone")])
    halves = ("--set", "batch=8", "--set", "accumulate=2", "--out", str(tmp_path / "halves"))
    call([*ours, "--steps", "12", *halves])
    said = call([*ours, "--steps", "12", *out, "--mesh", "dp=2,tp=2", "--max-minutes", "0.0001"], 75)
    assert said.count("stopped by max_minutes after step 1") == 1
    for mesh in ("dp=2,cp=2", "tp=2", "dp=1,cp=2,tp=2"):
        said = call([*ours, "--steps", "12", *out, "--mesh", mesh, "--max-minutes", "0.0001", "--resume"], 75)
    assert "stopped by max_minutes after step 4" in said
    said = call([*ours, "--steps", "12", *out, "--max-minutes", "0.0001", "--resume"], 75)
    assert "stopped by max_minutes after step 5" in said
    said = call([*torchrun, "--steps", "12", *out, "--resume"])
    assert said.count("next: ") == 1
    there, alone, halves = (losses(tmp_path / name) for name in ("run", "alone", "halves"))
    assert len(there) == 12
    rounding = max(far(halves, alone), torch.finfo(torch.float32).eps)
    assert far(there, alone) <= 4.0 * rounding <= 1e-5
    sample = call([sys.executable, "-m", "flashsigmoid", "generate", str(tmp_path / "run"), "--max-new-tokens", "4"])
    assert sample


def test_no_restart_is_left_in_the_end():
    words = ["-c", "import os; os.kill(os.getpid(), 9)"]
    assert launch(MeshSizes(), words, max_restarts=0) == LOST


def test_an_error_is_not_tried_again(tmp_path):
    """The exit code of the rank that knew why."""
    mark = tmp_path / "tries"
    code = f"open({str(mark)!r}, 'a').write('x'); raise SystemExit(75)"
    assert launch(MeshSizes(), ["-c", code]) == 75
    assert mark.read_text() == "x"


if __name__ == "__main__":
    role, text, out_dir, steps, fault, mesh = sys.argv[1:7]
    if role == "rank":
        rank(Path(text), Path(out_dir), int(steps), fault, mesh, "--resume" in sys.argv)
    else:
        words = [__file__, "rank", *sys.argv[2:7]]
        sys.exit(launch(parse_mesh(mesh), words, max_restarts=RESTARTS))
