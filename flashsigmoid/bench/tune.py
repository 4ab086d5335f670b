"""Measures tiles of the Triton kernels on this GPU and prints a better table for backends/triton/tiles.py.

What a user's call takes is the table; nothing is measured at run time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context

import torch

from ..backends.problem import Problem, make_problem
from .candidate import make_inputs
from .problems import PROBLEMS, Shape, choose
from .timing import Sample, by_events, interleaved

KERNELS = ("fwd", "dkdv", "dq", "all")  # "all": dkdv and dq in one launch, of problems that take it


@dataclass(frozen=True)
class Choice:
    """The tile of one kernel for one class of problems, and its time over that of the table's."""

    kernel: str
    head_dim: int
    causal: bool
    tile: tuple[int | None, ...]  # the fields of tiles.Tile
    shipped: tuple[int | None, ...]
    speedup: float

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        change = "kept" if self.tile == self.shipped else f"{self.speedup:.3f} times as fast as {_text(self.shipped)}"
        return f"{self.kernel:5} head_dim {self.head_dim:3} {mask:7} {_text(self.tile):28} {change}"


def tune(
    problems: Iterable[str] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
    kernels: tuple[str, ...] = KERNELS,
    rounds: int = 7,
    show: Callable[[Choice], object] = lambda _: None,
) -> list[Choice]:
    """The fastest tile of every kernel for each named problem, measured interleaved with the table's.

    Candidates are compiled by parallel processes first; those that do not fit the GPU drop out. By default the
    problems are the table's rows at 4096 tokens.

    Raises:
        ValueError: no CUDA device, or a problem that is not a dense one.
    """
    if not torch.cuda.is_available():
        raise ValueError("--tune must run on a CUDA device, got none")
    names = choose(problems) or [f"lm-4k-d{dim}{mask}" for dim in (64, 128, 256) for mask in ("", "-causal")]
    for name in names:
        if PROBLEMS[name].lengths:
            raise ValueError(f"--tune takes dense problems, got {name}")
    pairs = [
        (name, kernel)
        for name, kernel in itertools.product(names, kernels)
        if kernel != "all" or _is_one_launch(PROBLEMS[name], dtype)
    ]
    _compile_in_parallel(pairs, dtype)
    choices = []
    for name, kernel in pairs:
        choices.append(_choose(PROBLEMS[name], kernel, dtype, rounds))
        show(choices[-1])
    return choices


def candidates(kernel: str, head_dim: int, itemsize: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(block_m, block_n, num_warps, num_stages, in_registers) worth trying."""
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
            yield block_m, block_n, warps, stages, in_registers


def _choose(shape: Shape, kernel: str, dtype: torch.dtype, rounds: int) -> Choice:
    from ..backends.triton.tiles import choose_tile

    problem = _problem(shape, dtype)
    shipped = astuple(choose_tile(problem, kernel))
    stream = torch.cuda.Stream()
    tiles = dict.fromkeys(
        (shipped, *((*each, None, False) for each in candidates(kernel, shape.head_dim, dtype.itemsize)))
    )
    by_text = {_text(tile): tile for tile in tiles}
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
    return make_problem(
        q, k, k, bias=None, slopes=None, sigmoid_bias=shape.bias, scale=None, causal=shape.causal, window_left=left,
        window_right=right, q_offset=None, dropout_p=0.0, origin=(0, 0, 0, 0), sigmoid="auto",
    )  # fmt: skip


def _call(shape: Shape, dtype: torch.dtype, kernel: str, tile: tuple[int | None, ...]) -> Callable[[], object]:
    """One launch of one kernel with a tile of its own."""
    from ..backends.triton.launch import Call
    from ..backends.triton.tiles import Tile

    inputs = make_inputs(shape, dtype, "cuda")
    call = Call(_problem(shape, dtype), inputs.q, inputs.k, inputs.v)
    chosen = Tile(*tile)  # pyright: ignore[reportArgumentType]
    if kernel == "fwd":
        return lambda: call.fwd(chosen)
    launch = call.bwd if kernel == "all" else getattr(call, kernel)
    return lambda: launch(inputs.dout, chosen)


def _is_one_launch(shape: Shape, dtype: torch.dtype) -> bool:
    from ..backends.triton.tiles import is_one_launch

    return is_one_launch(_problem(shape, dtype))


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


def _compile(job: tuple[str, str, tuple[int, ...]], dtype: torch.dtype) -> None:
    name, kernel, tile = job
    small = replace(PROBLEMS[name], batch=1, nheads=1, nheads_k=1)
    # whatever does not compile or fit is left out when it is timed
    with suppress(Exception):
        _call(small, dtype, kernel, (*tile, None, False))()
        torch.cuda.synchronize()


def _text(tile: tuple[int | None, ...]) -> str:
    last = max(i for i, value in enumerate(tile) if value or i == 3)
    return f"Tile({', '.join(map(str, tile[: last + 1]))})"
