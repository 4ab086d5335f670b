"""Runs named problems: first the error of every candidate, then its time beside the others; one record per number."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from ..backends import BackendUnsupported
from ..record import Record, RecordWriter, Scalar
from . import ceilings
from .candidate import RESULTS, Candidate, Inputs, make_inputs
from .eager import PRODUCTS
from .flex import compiler_settings
from .gate import Gate
from .peers import candidates
from .problems import PROBLEMS, WORKS, Shape, choose, defaults
from .sdpa import SOFTMAX
from .timing import CaptureError, Sample, Times, by_clock, by_events, interleaved, peak_bytes, side_stream

T = TypeVar("T")


def run(
    problems: Iterable[str] = (),
    *,
    works: Iterable[str] = WORKS,
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    names: Iterable[str] = (),
    device: str = "cpu",
    graphs: bool = True,
    out: Path | None = None,
    show: Callable[[list[Record]], object] = lambda _: None,
) -> list[Record]:
    """Measure the problems and return the records; with `out`, write each there as it comes.

    For each problem and candidate the error against float64, or the reason why it is not measured; then for each work
    median, p10 and p90 of the time in ms, TFLOP/s, and on CUDA the peak of memory beyond the inputs, in bytes. Once a
    run on CUDA, the ceilings: a matrix product and a copy. A backend of ours outside the error budget is an error.

    Args:
        problems: names of `PROBLEMS`, globs or beginnings; default those of the device.
        works: "forward", "backward" and "both", by default each.
        names: candidates; default all but "reference", which is not a fast backend.
        graphs: on CUDA every candidate is replayed as a CUDA graph, or, if False, none is.
        show: called with the records of each problem when it is done.

    Raises:
        ValueError: an unknown problem, work or candidate, or a device that is not here.
        AssertionError: a backend of ours outside the error budget.
    """
    known = candidates()
    chosen = choose(problems) or defaults(device)
    works, names = list(works), list(names) or [name for name in known if name != "reference"]
    for given, legal, what in ((works, WORKS, "work"), (names, known, "peer"), ([device], _devices(), "device")):
        for name in given:
            if name not in legal:
                raise ValueError(f"{what} must be one of {', '.join(legal)}, got {name!r}")
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": device, "rounds": rounds, "bias": "-log n or own"}
    settings |= {"threads": torch.get_num_threads()}
    if device == "cuda":
        settings |= {"graphs": graphs, "l2": "not flushed", "causal_pairs": "half"}
    records: list[Record] = []
    writer = None if out is None else RecordWriter(out, settings=settings)
    try:
        with compiler_settings() if device == "cuda" else nullcontext():
            bench = _Bench(works, [known[name] for name in names], dtype, rounds, device, graphs)
            for name in chosen:
                first = len(records)
                for record in bench.measure(PROBLEMS[name]):
                    records.append(record)
                    if writer is not None:
                        writer.write(record.name, record.value, unit=record.unit, **record.tags)  # pyright: ignore[reportArgumentType]
                show(records[first:])
    finally:
        if writer is not None:
            writer.close()
    return records


@dataclass
class _Bench:
    """What all problems of a run share."""

    works: list[str]
    candidates: list[Candidate]
    dtype: torch.dtype
    rounds: int
    device: str
    graphs: bool
    has_ceilings: bool = field(default=False, init=False)

    def measure(self, shape: Shape) -> Iterator[Record]:
        """The records of one problem."""
        inputs = make_inputs(shape, self.dtype, self.device)
        able = []
        for candidate, reason, records in self._checked(inputs):
            yield from records
            if reason is None:
                able.append(candidate)
            else:
                yield _unavailable(shape, candidate, reason)
        for work in self.works:
            yield from self._timed(inputs, work, able)
            self._forget()

    def _checked(self, inputs: Inputs) -> Iterator[tuple[Candidate, str | None, list[Record]]]:
        """Each candidate, why it cannot be measured, and its errors.

        Raises:
            AssertionError: one of ours is outside the error budget.
        """
        gate, works = Gate(inputs), ["forward"] if self.works == ["forward"] else ["both", "forward"]
        for candidate in self.candidates:
            reason = candidate.unavailable(inputs.shape, self.dtype, self.device)
            if reason is None and candidate.kind != "bare":
                for work in works:  # who has no backward may still be timed forward
                    results, reason = _tried(candidate, lambda c=candidate, w=work: _results(c, inputs, w))
                    if results is not None:
                        yield candidate, None, self._errors(gate, candidate, inputs.shape, results)
                        break
                else:
                    yield candidate, reason, []
            else:
                yield candidate, reason, []

    def _errors(self, gate: Gate, candidate: Candidate, shape: Shape, results: dict[str, torch.Tensor]) -> list[Record]:
        errors = gate.errors(results, candidate.kind)
        tags: dict[str, Scalar] = {"problem": shape.name, "peer": candidate.name}
        records = []
        if errors.over_budget is not None:
            times = errors.over_budget
            if candidate.kind == "ours":
                assert times <= 1.0, (
                    f"{candidate.name} must be inside the error budget on {shape.name}, got {times:.3g} times over"
                )
            records.append(Record(name="error_over_budget", value=times, unit="times", tags=tags))
        for tensor, rms in errors.rms.items():
            records.append(Record(name="error_rms", value=rms, tags={**tags, "tensor": tensor, "kind": candidate.kind}))
        return records

    def _timed(self, inputs: Inputs, work: str, able: list[Candidate]) -> Iterator[Record]:
        samples: dict[str, Sample] = {}
        peaks: dict[str, int] = {}
        for candidate in able:
            taken, reason = _tried(candidate, lambda c=candidate: self._sample(c, inputs, work))
            if taken is None:
                yield _unavailable(inputs.shape, candidate, reason or "", work)
            else:
                samples[candidate.name], peaks[candidate.name] = taken
        if not samples:
            return
        extra = {}
        if self.device == "cuda" and not self.has_ceilings:
            extra, self.has_ceilings = ceilings.samples(self.dtype, graphs=self.graphs), True
        times = interleaved({**samples, **extra}, rounds=self.rounds)
        yield from ceilings.records({name: times.pop(name) for name in extra})
        yield from _speeds(inputs.shape, work, times)
        if self.device == "cuda":
            for name, peak in peaks.items():
                tags: dict[str, Scalar] = {"problem": inputs.shape.name, "work": work, "peer": name}
                yield Record(name="peak_bytes", value=float(peak), unit="bytes", tags=tags)

    def _sample(self, candidate: Candidate, inputs: Inputs, work: str) -> tuple[Sample, int]:
        """How to time a candidate, which has run, and its peak of memory (0 where that is not known)."""
        if self.device != "cuda":
            return by_clock(candidate.prepare(inputs, work), self.device), 0
        # a graph is captured on the stream on which a forward has run
        stream = torch.cuda.Stream()
        with side_stream(stream):
            step = candidate.prepare(inputs, work)
            for _ in range(2):
                step()
            peak = peak_bytes(step)
        return by_events(step, stream, graphs=self.graphs), peak

    def _forget(self) -> None:
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _results(candidate: Candidate, inputs: Inputs, work: str) -> dict[str, torch.Tensor]:
    results = candidate.prepare(inputs, work)()
    return {name: candidate.dense(x, inputs) for name, x in zip(RESULTS[work], results, strict=True)}


def _tried(candidate: Candidate, function: Callable[[], T]) -> tuple[T | None, str | None]:
    """What the function returns, or why it does not: anything of a peer; of ours what it may refuse, or no memory."""
    try:
        return function(), None
    except (BackendUnsupported, CaptureError, torch.OutOfMemoryError) as error:
        return None, _first_line(error)
    except Exception as error:
        if candidate.kind == "ours":
            raise
        return None, f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _unavailable(shape: Shape, candidate: Candidate, reason: str, work: str | None = None) -> Record:
    tags: dict[str, Scalar] = {"problem": shape.name, "peer": candidate.name, "reason": reason}
    return Record(name="unavailable", tags=tags if work is None else {**tags, "of": work})


def _speeds(shape: Shape, work: str, times: dict[str, Times]) -> Iterator[Record]:
    for name, taken in times.items():
        tags: dict[str, Scalar] = {"problem": shape.name, "work": work, "peer": name}
        yield Record(name="time_ms", value=taken.median_ms, unit="ms", tags=tags)
        yield Record(name="time_p10_ms", value=taken.quantile_ms(0.1), unit="ms", tags=tags)
        yield Record(name="time_p90_ms", value=taken.quantile_ms(0.9), unit="ms", tags=tags)
        # the bare products know no mask: causal or not, they do the whole work
        flop = shape.flop(work) * (2.0 if name == PRODUCTS and shape.causal else 1.0)
        yield Record(name="speed_tflops", value=flop / taken.median_ms / 1e9, unit="TFLOP/s", tags=tags)
        if SOFTMAX in times:
            yield Record(name="speedup_over_sdpa", value=taken.speedup_over(times[SOFTMAX]), unit="times", tags=tags)


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
