"""Records of a run joined into a line per problem, work and candidate: speed, error and memory side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..record import Record


@dataclass(frozen=True)
class Row:
    """What one candidate did on one work of one problem; None: not known."""

    problem: str
    work: str
    peer: str
    ms: float
    p10_ms: float
    p90_ms: float
    tflops: float
    over_softmax: float | None  # the median of the fastest softmax divided by this one's
    error_rms: float | None  # relative, of the worst tensor
    over_budget: float | None
    peak_mib: float | None


def joined(records: Sequence[Record]) -> Iterator[Row]:
    """The rows in the order in which they were measured."""
    softmaxes = {r.tags["peer"] for r in records if r.name == "error_rms" and r.tags["kind"] == "softmax"}
    works: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    errors: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if record.value is None or "problem" not in record.tags:
            continue
        problem, peer = str(record.tags["problem"]), str(record.tags["peer"])
        if "work" in record.tags:
            peers = works.setdefault((problem, str(record.tags["work"])), {})
            peers.setdefault(peer, {})[record.name] = record.value
        else:
            own = errors.setdefault((problem, peer), {})
            own[record.name] = max(record.value, own.get(record.name, record.value))
    for (problem, work), peers in works.items():
        best = min((numbers["time_ms"] for peer, numbers in peers.items() if peer in softmaxes), default=None)
        for peer, numbers in peers.items():
            own, peak = errors.get((problem, peer), {}), numbers.get("peak_bytes")
            yield Row(
                problem,
                work,
                peer,
                numbers["time_ms"],
                numbers["time_p10_ms"],
                numbers["time_p90_ms"],
                numbers["speed_tflops"],
                None if best is None else best / numbers["time_ms"],
                own.get("error_rms"),
                own.get("error_over_budget"),
                None if peak is None else peak / 2**20,
            )


def reasons(records: Iterable[Record]) -> list[str]:
    """A line per reason why candidates were not measured on a problem."""
    names: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.name == "unavailable":
            of = f", {record.tags['of']}" if "of" in record.tags else ""
            where = f"{record.tags['problem']}{of}"
            names.setdefault((where, str(record.tags["reason"])), []).append(str(record.tags["peer"]))
    return [f"{where}: no {', '.join(peers)}: {reason}" for (where, reason), peers in names.items()]
