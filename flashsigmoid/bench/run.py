"""Runs named problems: first the error of every candidate, then its time beside the others; one record per number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..record import Record, RecordWriter, Scalar
from ..testing import Options, errors_over_budget, make_qkv, oracle, witness
from .peers import PRODUCTS, SOFTMAX, peers
from .problems import PROBLEMS, Shape
from .timing import interleaved

WORKS = ("forward", "both")


def run(
    problems: Iterable[str] = tuple(PROBLEMS),
    *,
    works: Iterable[str] = WORKS,
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    names: Iterable[str] | None = None,
    device: str = "cpu",
    out: Path | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[Record]:
    """Measure the problems and return the records; with `out`, write them there too.

    For each problem, each work ("forward", or "both": forward and backward) and each candidate: median, p10 and p90 of
    the time in ms, the speed in TFLOP/s, and the median ratio to torch's softmax in the same rounds. A backend of ours
    outside the error budget is an error, not a row.

    Args:
        problems: names of `PROBLEMS`.
        names: candidates; default all but "reference", which is not a fast backend.
        progress: called after every round.

    Raises:
        ValueError: an unknown problem, work or candidate.
    """
    known = peers(causal=False)
    names = [name for name in known if name != "reference"] if names is None else list(names)
    for given, legal, what in ((problems, PROBLEMS, "problem"), (works, WORKS, "work"), (names, known, "candidate")):
        for name in given:
            if name not in legal:
                raise ValueError(f"{what} must be one of {', '.join(legal)}, got {name!r}")
    records: list[Record] = []
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": device, "rounds": rounds, "bias": "-log n"}
    writer = None if out is None else RecordWriter(out, settings={**settings, "threads": torch.get_num_threads()})
    try:
        for name in problems:
            for record in measure(PROBLEMS[name], list(works), names, dtype, rounds, device, progress):
                records.append(record)
                if writer is not None:
                    writer.write(record.name, record.value, unit=record.unit, **record.tags)  # pyright: ignore[reportArgumentType]
    finally:
        if writer is not None:
            writer.close()
    return records


def measure(
    shape: Shape,
    works: list[str],
    names: list[str],
    dtype: torch.dtype,
    rounds: int,
    device: str,
    progress: Callable[[], object],
) -> Iterable[Record]:
    """The records of one problem."""
    sizes = (shape.batch, shape.seqlen, shape.seqlen, shape.nheads, shape.nheads, shape.head_dim)
    q, k, v, dout = make_qkv(*sizes, dtype=dtype, device=device)
    attention = {name: function for name, function in peers(shape.causal).items() if name in names}
    for name, error in gate(shape, attention, dtype, device).items():
        yield Record(name="error_over_budget", value=error, unit="times", tags={"problem": shape.name, "peer": name})
    for work in works:
        leaves = [x.detach().requires_grad_(work == "both") for x in (q, k, v)]

        def step(function, leaves=leaves, work=work):
            result = function(*leaves)
            return torch.autograd.grad(result, leaves, dout) if work == "both" else result

        functions = {name: (lambda function=function: step(function)) for name, function in attention.items()}
        times = interleaved(functions, rounds=rounds, device=device, progress=progress)
        for name, taken in times.items():
            tags: dict[str, Scalar] = {"problem": shape.name, "work": work, "peer": name}
            yield Record(name="time_ms", value=taken.median_ms, unit="ms", tags=tags)
            yield Record(name="time_p10_ms", value=taken.quantile_ms(0.1), unit="ms", tags=tags)
            yield Record(name="time_p90_ms", value=taken.quantile_ms(0.9), unit="ms", tags=tags)
            # the bare products know no mask: causal or not, they do the whole work
            flop = shape.flop(work) * (2.0 if name == PRODUCTS and shape.causal else 1.0)
            yield Record(name="speed_tflops", value=flop / taken.median_ms / 1e9, unit="TFLOP/s", tags=tags)
            if SOFTMAX in times:
                yield Record(
                    name="speedup_over_sdpa", value=taken.speedup_over(times[SOFTMAX]), unit="times", tags=tags
                )


def gate(shape: Shape, attention: dict, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Times over the error budget of each of our backends on a slice of the problem: a speed counts only if right.

    Raises:
        AssertionError: outside the budget.
    """
    sizes = (1, min(shape.seqlen, 1024), min(shape.seqlen, 1024), 1, 1, shape.head_dim)
    tensors = make_qkv(*sizes, dtype=dtype, device=device)
    options = Options(causal=shape.causal)
    expected, seen = oracle(*tensors, **options), witness(*tensors, draws=32, **options)
    errors = {}
    for name, function in attention.items():
        if name in (SOFTMAX, PRODUCTS):
            continue
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        result = function(*leaves)
        actual = (result, *torch.autograd.grad(result, leaves, tensors[3]))
        errors[name] = max(
            max(errors_over_budget(x.detach(), expected[key], seen[key]))
            for key, x in zip(("out", "dq", "dk", "dv"), actual, strict=True)
        )
        assert errors[name] <= 1.0, f"{name} must be inside the error budget, got {errors[name]:.3g} times over"
    return errors
