"""Measures tiles of the fused kernels on this GPU and prints better tables for backends/triton/tiles.py and hopper's.

What a user's call takes is the table; nothing is measured at run time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from multiprocessing import get_context
from typing import Any

import torch

from ..backends import hopper
from ..backends.hopper.tiles import Tile as HopperTile
from ..backends.hopper.tiles import choose_tile as choose_hopper_tile
from ..backends.problem import Problem, make_problem
from ..backends.triton.tiles import Tile, choose_tile, is_one_launch
from .candidate import make_inputs
from .problems import PROBLEMS, Shape, choose
from .timing import Sample, by_events, interleaved

# of `triton`; "all" is dkdv and dq in one launch, of problems that take it; then of `hopper`
KERNELS = ("fwd", "dkdv", "dq", "all", "hopper-forward", "hopper-backward")
_HOPPER = "hopper-"


@dataclass(frozen=True)
class Choice:
    """The tile of one kernel for one class of problems, and its time over that of the table's."""

    kernel: str
    head_dim: int
    causal: bool
    tile: Any  # a Tile of the kernel's backend
    shipped: Any
    speedup: float

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        change = "kept" if self.tile == self.shipped else f"{self.speedup:.3f} times as fast as {_text(self.shipped)}"
        return f"{self.kernel:15} head_dim {self.head_dim:3} {mask:7} {_text(self.tile):28} {change}"


def tune(
    problems: Iterable[str] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Iterable[str] = (),
    rounds: int = 7,
    show: Callable[[Choice], object] = lambda _: None,
) -> list[Choice]:
    """The fastest tile of every kernel for each named problem, measured interleaved with the table's.

    Candidates are compiled by parallel processes first; those that do not fit the GPU drop out. By default the
    problems are the table's rows at 4096 tokens, and the kernels all that can compute them here.

    Raises:
        ValueError: no CUDA device, a problem that is not a dense one, an unknown kernel, or a tile of the table that
            does not run.
    """
    kernels = tuple(kernels) or KERNELS
    for kernel in kernels:
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if not torch.cuda.is_available():
        raise ValueError("--tune must run on a CUDA device, got none")
    names = choose(problems) or [f"lm-4k-d{dim}{mask}" for dim in (64, 128, 256) for mask in ("", "-causal")]
    for name in names:
        if PROBLEMS[name].lengths:
            raise ValueError(f"--tune takes dense problems, got {name}")
    pairs = [
        (name, kernel)
        for name, kernel in itertools.product(names, kernels)
        if _is_launched(kernel, _problem(PROBLEMS[name], dtype))
    ]
    _compile_in_parallel(pairs, dtype)
    choices = []
    for name, kernel in pairs:
        choices.append(_choose(PROBLEMS[name], kernel, dtype, rounds))
        show(choices[-1])
    return choices


def candidates(kernel: str, head_dim: int, itemsize: int) -> Iterator[Any]:
    """Tiles worth trying."""
    if kernel.startswith(_HOPPER):
        yield from _hopper_candidates(kernel.removeprefix(_HOPPER), max(64, head_dim))
        return
    sizes = (32, 64, 128) if itemsize == 2 else (16, 32, 64)
    for block_m, block_n, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3, 4)):
        by_keys = kernel in ("dkdv", "all")
        rows = block_n if by_keys else block_m  # of the accumulators
        sums = head_dim * (2 if by_keys else 1) + (block_m if by_keys else block_n)
        fixed = (rows if kernel == "fwd" else 2 * rows) * head_dim * itemsize
        loaded = 2 * (block_m if by_keys else block_n) * head_dim * itemsize * stages
        if kernel == "all" and block_m < 8 * warps:
            continue
        if rows < 8 * warps or rows * sums > 220 * 32 * warps or fixed + loaded > 227 * 1024:
            continue  # no rows for every warp; more registers or shared memory than there are
        for in_registers in (0, 1) if kernel == "fwd" else (0, 1, 2):
            yield Tile(block_m, block_n, warps, stages, in_registers)
        if head_dim == 64:  # short sequences
            yield Tile(block_m, block_n, warps, stages, by_pointers=True)


def _hopper_candidates(direction: str, head_dim: int) -> Iterator[HopperTile]:
    registers = {2: 240, 3: 160, 4: 112}  # of each of so many warpgroups that multiply
    if direction == "backward":
        if head_dim == 256:
            yield from (HopperTile(2, 64, 2, 240, adds_dq=adds_dq) for adds_dq in (False, True))
            return
        for is_persistent in (False, True):
            yield HopperTile(2, 128 if head_dim == 64 else 64, 2, 240, is_persistent=is_persistent)
        return
    for warpgroups, block in ((2, 64), (2, 128), (3, 64), (4, 64)):
        for stages, places, own_out, is_split in itertools.product((2, 4), (1, 2), (False, True), (False, True)):
            if places == 2 and own_out:
                continue  # either gives out its memory
            rows = 64 * warpgroups * (2 if own_out else places)
            sums = head_dim + block + block // 2  # registers of a thread, twice: sums, scores and weights
            if 2 * head_dim * (rows + 2 * block * stages) > 227 * 1024 or sums // 2 > registers[warpgroups] - 24:
                continue
            for is_persistent, is_from_end in itertools.product((False, True), (False, True)):
                if places == 2 and not is_persistent:
                    continue  # one turn needs one place
                numbers = warpgroups, block, stages, registers[warpgroups]
                yield HopperTile(*numbers, is_split, own_out, is_persistent, is_from_end, places)


def _is_launched(kernel: str, problem: Problem) -> bool:
    if kernel.startswith(_HOPPER):
        return hopper.unsupported(problem, kernel.removeprefix(_HOPPER)) is None
    return kernel != "all" or is_one_launch(problem)


def _shipped(kernel: str, problem: Problem) -> Any:
    if kernel.startswith(_HOPPER):
        return choose_hopper_tile(problem, kernel.removeprefix(_HOPPER))
    return choose_tile(problem, kernel)


def _choose(shape: Shape, kernel: str, dtype: torch.dtype, rounds: int) -> Choice:
    shipped = _shipped(kernel, _problem(shape, dtype))
    stream = torch.cuda.Stream()
    by_text = {_text(tile): tile for tile in (shipped, *candidates(kernel, shape.head_dim, dtype.itemsize))}
    samples: dict[str, Sample] = {}
    for text, tile in by_text.items():
        call = _call(shape, dtype, kernel, tile)
        try:
            with torch.cuda.stream(stream):
                call()
            stream.synchronize()
            samples[text] = by_events(call, stream, graphs=False)
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            if tile == shipped:
                raise ValueError(f"{kernel} on {shape.name} must run with the table's {text}, got {error}") from error
            continue  # more shared memory or registers than there are
    # a coarse round for all, then the best few beside each other
    coarse = interleaved(samples, rounds=1)
    best = sorted(samples, key=lambda text: coarse[text].median_ms)[:6]
    times = interleaved({text: samples[text] for text in dict.fromkeys((_text(shipped), *best))}, rounds=rounds)
    fastest = min(times, key=lambda text: times[text].median_ms)
    speedup = times[fastest].speedup_over(times[_text(shipped)])
    return Choice(kernel, shape.head_dim, shape.causal, by_text[fastest], shipped, speedup)


def _problem(shape: Shape, dtype: torch.dtype) -> Problem:
    q, k = (
        torch.empty((), dtype=dtype, device="cuda").expand(shape.batch, seqlen, heads, shape.head_dim)
        for seqlen, heads in ((shape.seqlen_q, shape.nheads), (shape.seqlen_k, shape.nheads_k))
    )
    left, right = shape.window_size
    return make_problem(q, k, k, sigmoid_bias=shape.bias, causal=shape.causal, window_left=left, window_right=right)


def _call(shape: Shape, dtype: torch.dtype, kernel: str, tile: Any) -> Callable[[], object]:
    """The launches of one kernel with a tile of its own."""
    inputs, problem = make_inputs(shape, dtype, "cuda"), _problem(shape, dtype)
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    if kernel.startswith(_HOPPER):
        from ..backends.hopper import launch

        if kernel == "hopper-forward":
            return lambda: launch.forward(problem, q, k, v, None, None, tile=tile)
        return lambda: launch.backward(problem, dout, q, k, v, None, None, tile=tile)
    from ..backends.triton.launch import Call

    call = Call(problem, q, k, v)
    if kernel == "fwd":
        return lambda: call.fwd(tile)
    run = call.bwd if kernel == "all" else getattr(call, kernel)
    return lambda: run(dout, tile)


def _compile_in_parallel(pairs: list[tuple[str, str]], dtype: torch.dtype) -> None:
    """Fill Triton's cache from many processes, one candidate after the other in each."""
    jobs = [
        (name, kernel, tile)
        for name, kernel in pairs
        for tile in candidates(kernel, PROBLEMS[name].head_dim, dtype.itemsize)
    ]
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, jobs, itertools.repeat(dtype), chunksize=4))


def _compile(job: tuple[str, str, Any], dtype: torch.dtype) -> None:
    name, kernel, tile = job
    small = replace(PROBLEMS[name], batch=1, nheads=1, nheads_k=1)
    # whatever does not compile or fit is left out when it is timed
    with suppress(Exception):
        _call(small, dtype, kernel, tile)()
        torch.cuda.synchronize()


def _text(tile: Any) -> str:
    """As the table's file has it: what has a default by name, where it differs."""
    words = []
    for field in fields(tile):
        value = getattr(tile, field.name)
        if field.default is MISSING:
            words.append(str(value))
        elif value != field.default:
            words.append(f"{field.name}={value}")
    return f"Tile({', '.join(words)})"
