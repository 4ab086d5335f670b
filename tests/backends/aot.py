"""python tests/backends/aot.py sm_90 gfx942: compiles the kernels that calls would launch, for a GPU that is not here.

A stand-in for Triton's driver names the target, and launch.py's kernels are compiled but not launched, so that what is
compiled is what launch.py asks for. Prints a JSON line for every kernel: registers, spills, shared memory,
instructions. With --calls the calls are JSON lines on stdin, each answered as it comes, with an empty line behind its
kernels; else they are the measured tiles'. Numbers are not checked here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import flashsigmoid.backends.hopper as hopper_backend
from flashsigmoid.backends.decode import problem_of
from flashsigmoid.backends.hopper import launch as hopper
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.backends.triton import decode_launch, fp8, launch, top
from flashsigmoid.backends.triton.tiles import Tile, choose_tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {
    "_fwd_kernel": launch,
    "_bwd_kernel": launch,
    "_hopper_fwd_kernel": hopper,
    "_hopper_bwd_kernel": hopper,
    "_bwd_rows_kernel": hopper,
    "_bwd_dqdk_kernel": hopper,
    "_decode_kernel": decode_launch,
    "_sum_kernel": decode_launch,
    "_append_kernel": decode_launch,
    "_fp8_kernel": fp8,
    "_top_kernel": top,
}
CACHED = {"_decode_kernel": "decode", "_sum_kernel": "sum", "_append_kernel": "append"}
CACHED |= {"_fp8_kernel": "fp8", "_top_kernel": "top"}
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A forward and its backward, as plain data; sizes are the same for queries and keys."""

    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    dtype: str = "bfloat16"
    matmul_precision: str = "highest"
    batch: int = 2
    seqlen: int = 4096
    nheads: int = 4
    nheads_k: int = 4
    is_packed: bool = False  # batch sequences in batch * seqlen rows
    layout: str = "aligned"  # to 16 bytes; "unaligned", "strided" (every other channel) or "broadcast" (all but q)
    bias: str | None = None  # "row" or "head": a tensor with a value for each
    sigmoid_bias: float | None = None  # None: -log(seqlen)
    has_slopes: bool = False
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    q_offset: int | None = None
    dropout_p: float = 0.0
    origin: tuple[int, ...] = (0, 0, 0, 0)
    sigmoid: str = "auto"
    count: int = 8  # of "top"
    backend: str = "triton"  # "fp8", "top", "hopper", or "decode": against a cache with room for `seqlen` keys
    seqlen_q: int = 1  # of "decode", as what follows
    page_size: int = 0
    num_splits: int = 0
    is_shared: bool = False  # all sequences read the same keys
    reduction: str = "parts"
    rotary_dim: int = 0
    kernel: str | None = None  # "fwd", "dkdv", "dq" or "all", hopper's "bwd"; None: what is launched
    tile: tuple[int, ...] | None = None  # a Tile's fields; None: the backend's own


@dataclass
class Compiled:
    """One kernel as the compiler left it; on failure only `error` says anything."""

    kernel: str
    binary: int  # calls that run the same binary have the same number
    error: str = ""
    registers: int = 0
    spill_bytes: int = 0  # of a thread's stores to and loads from local memory
    loop_spills: int = 0  # stores to and loads from local memory in the worst innermost loop with products
    shared_bytes: int = 0
    tensor_memory: int = 0  # columns, of sm_100
    products: int = 0  # matrix instructions in the machine code
    warpgroup_products: int = 0  # of them those of sm_90 by a warpgroup, wgmma, or of sm_100 by tensor memory
    tma_loads: int = 0
    waits: int = 0  # for wgmma
    undefined: int = 0  # uniform registers that are read before anything wrote them: the assembler's fault
    notes: list[str] = field(default_factory=list)  # the assembler's, beyond its statistics


class Driver:
    """A GPU of `target` on which nothing runs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Stands where launch.py has its kernels, and keeps what a launch would have run."""

    def __init__(self, arch: str, code: Path | None = None) -> None:
        self.arch = arch
        self.code = code  # where to write machine code
        self.binaries: dict[int, tuple[Any, Compiled]] = {}  # holds the kernel, so that its id stays its own
        self.launched: list[Compiled] = []
        self.call = Call()
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.runtime.driver.set_active(Driver(TARGETS[arch]))
        self.kernels = {name: getattr(module, _in(name)) for name, module in NAMES.items()}
        for name, kernel in self.kernels.items():
            kernel.device_caches.clear()
            setattr(NAMES[name], _in(name), _Launcher(self, name))
        launch.choose_tile = self.choose_tile

    def close(self) -> None:
        for name, kernel in self.kernels.items():
            setattr(NAMES[name], _in(name), kernel)
        launch.choose_tile = choose_tile

    def choose_tile(self, problem: Any, kernel: str) -> Tile:
        return choose_tile(problem, kernel) if self.call.tile is None else Tile(*self.call.tile)

    def compile(self, name: str, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        # dV of the widest heads is the forward's kernel
        part = CACHED.get(name) or kwargs.get("PART", "bwd" if "bwd" in name or kwargs.get("OF_KEYS") else "fwd")
        if self.call.kernel not in (None, part):
            return
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                kernel = self.kernels[name].warmup(*args, grid=grid, **kwargs)
        except Exception as error:  # the other kernels of the call are still of interest
            while error.__cause__ is not None:  # where in the kernel it began
                error = error.__cause__
            self.launched.append(Compiled(part, -1, error=f"{type(error).__name__}: {error}"))
            return
        if id(kernel) not in self.binaries:
            one = Compiled(part, len(self.binaries), shared_bytes=kernel.metadata.shared)
            self.binaries[id(kernel)] = kernel, one
            _examine(one, kernel, log.getvalue(), self.code and self.code / f"{part}.{self.arch}.{one.binary}.txt")
        self.launched.append(self.binaries[id(kernel)][1])

    def run(self, call: Call) -> list[Compiled]:
        """The kernels of one call, in the order of their launches."""
        self.call, self.launched = call, []
        launch._plan.cache_clear()  # it remembers tiles
        if call.backend == "decode":
            return self._run_decode(call)
        dtype = torch.float8_e4m3fn if call.backend == "fp8" else getattr(torch, call.dtype)
        torch.set_float32_matmul_precision(call.matmul_precision)
        dim_v = call.head_dim if call.head_dim_v is None else call.head_dim_v
        lead = (call.batch * call.seqlen,) if call.is_packed else (call.batch, call.seqlen)
        q, k, v, dout = (
            _empty((*lead, n, dim), dtype, call.layout, broadcast)
            for n, dim, broadcast in (
                (call.nheads, call.head_dim, 0), (call.nheads_k, call.head_dim, 1), (call.nheads_k, dim_v, 1),
                (call.nheads, dim_v, 4),
            )
        )  # fmt: skip
        bias = slopes = seed = cu_seqlens = None
        if call.bias == "head":
            bias = torch.empty(call.nheads, dtype=torch.float32)
        elif call.bias == "row":
            rows = (*lead, call.nheads) if call.is_packed else (call.batch, call.nheads, call.seqlen)
            bias = torch.empty(rows, dtype=torch.float32)
        if call.has_slopes:
            slopes = torch.empty(call.nheads, dtype=torch.float32)
        if call.dropout_p > 0:
            seed = torch.empty((), dtype=torch.int64)
        packed: dict[str, Any] = {}
        if call.is_packed:
            cu_seqlens = (torch.empty(call.batch + 1, dtype=torch.int32),) * 2
            packed = {"cu_seqlens_q": cu_seqlens[0], "max_seqlen_q": call.seqlen, "max_seqlen_k": call.seqlen}
        problem = make_problem(
            q, k, v, bias=bias, slopes=slopes, sigmoid_bias=call.sigmoid_bias, scale=None, causal=call.causal,
            window_left=call.window_left, window_right=call.window_right, q_offset=call.q_offset,
            dropout_p=call.dropout_p, origin=call.origin, sigmoid=call.sigmoid, **packed,
        )  # fmt: skip
        problem = replace(problem, arch=self.arch, device="cuda")
        if call.backend == "fp8":
            scales = [torch.empty(call.batch, heads) for heads in (call.nheads, call.nheads_k, call.nheads_k)]
            fp8.forward(problem, q, k, v, (scales[0], scales[1], scales[2]), bias, slopes, torch.bfloat16)
            return self.launched
        if call.backend == "top":
            top.top_weights(problem, q, k, call.count, bias, slopes)
            return self.launched
        if call.backend == "hopper":
            reason = hopper_backend.unsupported(problem)
            assert reason is None, reason
            tile = call.tile and hopper.Tile(*call.tile)
            if call.kernel != "bwd":
                hopper.forward(problem, q, k, v, bias, slopes, cu_seqlens, tile)
            if call.kernel != "fwd" and hopper_backend.unsupported(problem, "backward") is None:
                hopper.backward(problem, dout, q, k, v, bias, slopes, cu_seqlens, tile)
            return self.launched
        launch.forward(problem, q, k, v, bias, slopes, seed, cu_seqlens)
        launch.backward(problem, dout, q, k, v, bias, slopes, seed, cu_seqlens)
        return self.launched

    def _run_decode(self, call: Call) -> list[Compiled]:
        dtype = getattr(torch, call.dtype)
        torch.set_float32_matmul_precision(call.matmul_precision)
        dim_v = call.head_dim if call.head_dim_v is None else call.head_dim_v
        batch, capacity = (1 if call.is_shared else call.batch), call.seqlen
        lead, pages = (batch, capacity), None
        if call.page_size:
            lead = (batch * capacity // call.page_size, call.page_size)
            pages = torch.empty(batch, capacity // call.page_size, dtype=torch.int32)
        q = _empty((call.batch, call.seqlen_q, call.nheads, call.head_dim), dtype, call.layout, 0)
        k, v = (_empty((*lead, call.nheads_k, dim), dtype, call.layout, 0) for dim in (call.head_dim, dim_v))
        seqlens = torch.empty(call.batch, dtype=torch.int32)
        bias = slopes = None
        if call.bias == "head":
            bias = torch.empty(call.nheads, dtype=torch.float32)
        elif call.bias == "row":
            bias = torch.empty((call.batch, call.nheads, call.seqlen_q), dtype=torch.float32)
        if call.has_slopes:
            slopes = torch.empty(call.nheads, dtype=torch.float32)
        problem = problem_of(
            q, k, v, pages, bias, slopes, call.sigmoid_bias or -8.0, None, call.causal, call.window_left,
            call.window_right,
        )  # fmt: skip
        problem = replace(problem, arch=self.arch, device="cuda", sigmoid_bias=None if bias is not None else -8.0)
        decode_launch._plan.cache_clear()
        decode_launch.REDUCTION = call.reduction
        decode_launch._units = lambda device: 132
        if call.rotary_dim:
            angles = torch.empty(capacity, call.rotary_dim // 2)
            new = (torch.empty(call.batch, call.seqlen_q, *x.shape[2:], dtype=dtype) for x in (k, v))
            decode_launch.append(*new, k, v, seqlens, pages, q, angles, angles, False, 0)
        decode_launch.attend(
            problem, q, k, v, seqlens, pages, bias, slopes, call.seqlen_q, call.num_splits, call.is_shared, dtype
        )
        return self.launched


def _in(name: str) -> str:
    """What the kernel is called in its module."""
    return name.replace("_hopper", "").replace("_fp8", "").replace("_top", "")


class _Launcher:
    """A kernel as launch.py sees it: kernel[grid](...)."""

    def __init__(self, compiler: Compiler, name: str) -> None:
        self.compiler = compiler
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.compiler.compile, self.name, grid=grid)


@contextlib.contextmanager
def compiler(arch: str, code: Path | None = None) -> Iterator[Compiler]:
    """A compiler for `arch` in place of launch.py's kernels; with `code` machine code is written there."""
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache  # nothing is found in it: the assembler runs, and says what it did
        one = Compiler(arch, code)
        try:
            yield one
        finally:
            one.close()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str, broadcast: int) -> torch.Tensor:
    """A tensor in a layout; "broadcast" repeats one element along the first so many dimensions."""
    if layout == "aligned":
        return torch.empty(shape, dtype=dtype)
    if layout == "unaligned":
        return torch.empty((*shape[:-1], shape[-1] + 1), dtype=dtype)[..., 1:]
    if layout == "strided":
        return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]
    assert layout == "broadcast", layout
    return torch.empty((*(1,) * broadcast, *shape[broadcast:])[: len(shape)], dtype=dtype).expand(shape)


def _inner_loops(code: str) -> list[list[str]]:
    """Loops with matrix instructions that no smaller such loop is part of."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(lines)))
    loops = [(a, b) for a, b in loops if any("MMA" in line for line in lines[a:b])]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return [lines[a:b] for a, b in inner]


def _spills(lines: list[str]) -> int:
    return sum(bool(re.search(r"\b(?:STL|LDL)\b", line)) for line in lines)


def _examine(one: Compiled, kernel: Any, log: str, path: Path | None) -> None:
    """Read registers, spills and instructions from the assembler's log and the machine code."""
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        one.registers = _sum(r"\.vgpr_count:\s+(\d+)", code)
        one.spill_bytes = 4 * _sum(r"\.vgpr_spill_count:\s+(\d+)", code)  # scalar registers spill into vector registers
        one.products = len(re.findall(r"\bv_s?mfma", code))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [DISASSEMBLER, "-c", file.name]
            code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        one.registers = _sum(r"Used (\d+) registers", log)
        one.spill_bytes = _sum(r"(\d+) bytes spill", log)
        one.tensor_memory = kernel.metadata.tmem_size
        one.products = len(re.findall(r"\b(?:H|Q|HG|QG|UTC[A-Z]*)MMA\b", code))
        one.warpgroup_products = len(re.findall(r"\b(?:HG|QG|UTC[A-Z]*)MMA\b", code))
        one.tma_loads = len(re.findall(r"\bUTMALDG\b", code))
        one.waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code))
        one.undefined = len(set(_undefined(code)))
        one.loop_spills = max(map(_spills, _inner_loops(code)), default=0)
        statistics = r"bytes gmem|Compiling entry|Function properties|bytes stack frame|Used \d+ reg|Compile time|^\s*$"
        one.notes = [line.strip() for line in log.splitlines() if not re.search(statistics, line)]
    if path is not None:
        path.write_text(code)


def _undefined(code: str) -> Iterator[str]:
    """Uniform registers that no earlier line wrote; those of HGMMA are skipped, which names more than it reads."""
    written: set[int] = set()
    for operation, operands in re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?);", code):
        if operation == "ELECT":  # a predicate and a register are written, in this order
            operands = operands.partition(",")[2].strip()
        first, _, rest = operands.partition(",")
        target = re.fullmatch(r"UR(\d+)", first.strip())
        is_store = operation.startswith(("ST", "UST", "UTMA", "UBLK", "SYNCS"))
        if operation.startswith("HGMMA"):
            continue
        for register in re.findall(r"\bUR(\d+)", operands if is_store or not target else rest):
            if int(register) not in written:
                yield f"UR{register}"
        if target and not is_store:
            width = 4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation else 1
            written |= set(range(int(target[1]), int(target[1]) + width))


def _sum(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, f"no {pattern!r} in: {text[:2000]}"
    return sum(map(int, found))


def measured() -> Iterator[dict[str, Any]]:
    """The calls that tiles.py has tiles for."""
    for dim in (64, 128, 256):
        for causal in (False, True):
            yield {"head_dim": dim, "causal": causal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("arch", nargs="*", help=f"some of {', '.join(TARGETS)}; default: all")
    parser.add_argument(
        "--calls", action="store_true", help="read calls from stdin: JSON lines, fields of Call; of one arch"
    )
    parser.add_argument("--code", type=Path, help="write the machine code into this folder")
    args = parser.parse_args()
    if args.calls and len(args.arch) != 1:
        parser.error(f"--calls needs one architecture, got {args.arch}")
    for arch in args.arch or TARGETS:
        with compiler(arch, args.code) as one:
            for call in map(json.loads, sys.stdin) if args.calls else measured():
                for compiled in one.run(Call(**call)):
                    print(json.dumps({"arch": arch, "call": call, **asdict(compiled)}), flush=True)
                if args.calls:
                    print(flush=True)


if __name__ == "__main__":
    main()
