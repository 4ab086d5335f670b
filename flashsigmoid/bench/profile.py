"""python -m flashsigmoid.bench.profile [PROBLEM...] --out FILE    what limits a kernel, by NVIDIA's Nsight Compute.

For every problem, work and peer one step runs under `ncu`, in a process of its own. Of its longest kernel the shares of
what the hardware offers become records: matrix units, special functions, issue slots, memories, what warps wait for.
Times under a profiler are no times: `bench` has those.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..record import RecordWriter
from .problems import choose

DEFAULT = ("lm-4k-d64", "lm-4k-d64-causal", "lm-4k-d128", "lm-4k-d128-causal", "lm-4k-d256", "lm-4k-d256-causal")
_MODULE = "flashsigmoid.bench.profile"  # under its own name where it is run
PEERS = ("hopper", "triton", "fa3")
_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")
_OF_PEAK = r"\.avg\.pct_of_peak_sustained_(active|elapsed)"
_DURATION = "gpu__time_duration.sum"
# what is recorded -> the metric, of which the first that this ncu has is taken; names differ between versions and GPUs
METRICS = {
    "tensor": (rf"sm__pipe_tensor_cycles_active{_OF_PEAK}", rf"sm__inst_executed_pipe_tensor\w*{_OF_PEAK}"),
    "special_functions": (rf"sm__inst_executed_pipe_xu{_OF_PEAK}",),
    "fma": (rf"sm__pipe_fma_cycles_active{_OF_PEAK}", rf"sm__inst_executed_pipe_fma{_OF_PEAK}"),
    "alu": (rf"sm__pipe_alu_cycles_active{_OF_PEAK}", rf"sm__inst_executed_pipe_alu{_OF_PEAK}"),
    "issue_slots": (rf"sm__inst_issued{_OF_PEAK}", rf"smsp__issue_active{_OF_PEAK}"),
    "l1_and_shared": (rf"l1tex__throughput{_OF_PEAK}",),
    "l2": (rf"lts__throughput{_OF_PEAK}",),
    "dram": (rf"(gpu__)?dram__?throughput{_OF_PEAK}",),
}
_STALL = re.compile(r"smsp__average_warps?_\w*issue_stalled_(\w+?)_per_issue_active\.ratio")


def longest(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """The kernel that took longest.

    Raises:
        ValueError: there is none.
    """
    timed = [row for row in rows if row.get(_DURATION)]
    if not timed:
        raise ValueError("ncu must see at least one kernel, got none")
    return max(timed, key=lambda row: _number(row[_DURATION]))


def kernels(text: str) -> list[dict[str, str]]:
    """The kernels in the output of `ncu --csv --page raw`: metric -> value; a row of units follows the header."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, _, *rows = csv.reader(lines[start:])
    return [dict(zip(header, row, strict=False)) for row in rows if row and row[0].isdigit()]


def shares(kernel: dict[str, str]) -> Iterator[tuple[str, float, str]]:
    """(name, value, unit) of what is recorded: per cent of a peak, and warps that wait per instruction issued."""
    for name, patterns in METRICS.items():
        for pattern in patterns:
            found = next((value for key, value in kernel.items() if re.fullmatch(pattern, key) and value), None)
            if found is not None:
                yield f"profile/{name}", _number(found), "per_cent"
                break
    stalls = {match[1]: _number(value) for key, value in kernel.items() if (match := _STALL.fullmatch(key)) and value}
    for name, value in sorted(stalls.items(), key=lambda item: -item[1])[:4]:
        yield f"profile/waiting_{name}", value, "warps"


def profile(
    problems: Iterable[str], works: Sequence[str], peers: Sequence[str], libraries: Sequence[str], out: Path
) -> None:
    """Records of every problem, work and peer; who cannot is left out with the reason.

    Raises:
        ValueError: there is no ncu, or an unknown problem.
    """
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        raise ValueError("ncu of Nsight Compute must be on PATH or in /usr/local/cuda/bin, got none")
    names = choose(problems or DEFAULT)
    command = [ncu, "--csv", "--page", "raw", "--profile-from-start", "off", "--target-processes", "all"]
    command += [word for section in _SECTIONS for word in ("--section", section)]
    step = [sys.executable, "-m", _MODULE, *(f"--load-library={library}" for library in libraries), "--step"]
    with RecordWriter(out, settings={"device": "cuda", "dtype": "bfloat16"}) as writer:
        for name, work, peer in itertools.product(names, works, peers):
            done = subprocess.run([*command, *step, name, work, peer], capture_output=True, text=True)
            tags: dict[str, Any] = {"problem": name, "work": work, "peer": peer}
            try:
                kernel = longest(kernels(done.stdout))
            except ValueError as error:
                said = (done.stderr.strip() or done.stdout.strip()).splitlines()
                writer.write("profile/unavailable", reason=f"{error}; {said[-1] if said else ''}", **tags)
                print(f"{name}, {work}, {peer}: {error}; {said[-1] if said else ''}", flush=True)
                continue
            tags["kernel"] = kernel.get("Kernel Name", "").partition("(")[0]
            values = list(shares(kernel))
            for metric, value, unit in values:
                writer.write(metric, value, unit=unit, **tags)
            said = ", ".join(f"{metric.removeprefix('profile/')} {value:.3g}" for metric, value, _ in values)
            print(f"{name}, {work}, {peer}: {said}", flush=True)


def step(name: str, work: str, peer: str, libraries: Sequence[str]) -> None:
    """One step of a peer between the profiler's start and stop, after one that compiles."""
    import torch

    from .candidate import make_inputs
    from .peers import candidates, load_library
    from .problems import PROBLEMS

    for library in libraries:
        load_library(Path(library))
    candidate, shape = candidates()[peer], PROBLEMS[name]
    reason = candidate.unavailable(shape, torch.bfloat16, "cuda")
    if reason is not None:
        sys.exit(reason)
    run = candidate.prepare(make_inputs(shape, torch.bfloat16, "cuda"), work)
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="What limits a kernel, by NVIDIA's Nsight Compute.")
    parser.add_argument("problems", nargs="*", help=f"names or globs; default: {' '.join(DEFAULT)}")
    parser.add_argument(
        "--work", action="append", choices=("forward", "backward"), help="again for more; default: both"
    )
    parser.add_argument("--peer", action="append", help=f"default: {', '.join(PEERS)}")
    parser.add_argument("--load-library", action="append", default=[], metavar="PATH", help="as of bench")
    parser.add_argument("--out", type=Path, default=Path("profile.jsonl"))
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)  # what runs under ncu
    args = parser.parse_args(arguments)
    if args.step:
        name, work, peer = args.problems
        step(name, work, peer, args.load_library)
        return
    works, peers = args.work or ("forward", "backward"), args.peer or PEERS
    profile(args.problems, works, peers, args.load_library, args.out)


if __name__ == "__main__":
    main()
