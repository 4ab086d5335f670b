"""python -m flashsigmoid.report.tables PAGE...    writes the tables of Markdown pages anew, from records.

A table stands between <!-- table KIND PATH --> and <!-- end -->, with PATH from the working folder: a page cannot say
what its record does not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..record import Record, read_records
from .ablation import NOTE, ablation_rows
from .conversion import NOTE as CONVERSION_NOTE
from .conversion import conversion_rows
from .pretrained import NOTE as PRETRAINED_NOTE
from .pretrained import pretrained_rows
from .recognisers import position_rows
from .speed import Speed, ceilings_text, speeds
from .studies import study_note, study_rows
from .summary import summary_rows
from .theory import theory_rows

_WORKS = {"forward": "forward", "backward": "backward", "both": "forward and backward"}
_TENSORS = ("out", "dq", "dk", "dv", "db", "dslopes")
_FAULTS = (
    "none", "last 16 keys dropped", "scale off by 1 %", "bias off by 2 %", "zeros", "none, masked", "mask off by one",
)  # fmt: skip
_MARKED = re.compile(r"(<!-- table ([\w-]+) (\S+) -->\n).*?(^<!-- end -->$)", flags=re.DOTALL | re.MULTILINE)


def arms(path: str | Path) -> str:
    """The arms of the runs in a folder, one per column, as the report's summary has them."""
    rows = summary_rows([path])
    label, *names = rows[0]
    return _table([label, *(row[label] for row in rows)], [[name, *(row[name] for row in rows)] for name in names])


def ablation(path: str | Path) -> str:
    """The summary of a study of ablations: a row per variant."""
    rows = ablation_rows(path)
    return _table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n{NOTE}\n"


def theory(path: str | Path) -> str:
    """A file of `flashsigmoid theory`."""
    rows = theory_rows(path)
    return _table(list(rows[0]), [list(row.values()) for row in rows])


def conversion(path: str | Path) -> str:
    """The folder of `flashsigmoid convert`: a row per arm."""
    rows = conversion_rows(path)
    return _table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n{CONVERSION_NOTE}\n"


def pretrained(path: str | Path) -> str:
    """A folder of pretrainings by `flashsigmoid pair --then`: a row per method."""
    rows = pretrained_rows(path)
    return _table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n{PRETRAINED_NOTE}\n"


def positions(path: str | Path) -> str:
    """A folder of recognisers by position encoding: a row for each, both arms, single utterances and joined ones."""
    rows = position_rows(path)
    note = "Character errors: sigmoid / softmax, of utterances as they are (± standard error) and joined."
    return _table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n{note}\n"


def study(path: str | Path) -> str:
    """A file of `flashsigmoid study`, other than an ablation."""
    rows = study_rows(path)
    return _table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n{study_note(path)}\n"


def speed(path: str | Path) -> str:
    """A file of `flashsigmoid bench`: median ms of each candidate, and its speed over torch's softmax attention."""
    records = [r for r in read_records(path).records if "work" in r.tags]
    peers = list(dict.fromkeys(r.tags["peer"] for r in records))
    problems = dict.fromkeys((r.tags["problem"], r.tags["work"]) for r in records)
    values = {(r.name, r.tags["problem"], r.tags["work"], r.tags["peer"]): r.value for r in records}
    rows = []
    for problem, work in problems:
        cells = []
        for peer in peers:
            ms, over = (values[name, problem, work, peer] for name in ("time_ms", "speedup_over_sdpa"))
            cells.append(f"{ms:.1f} ({over:.2f})")
        rows.append([f"{problem}, {_WORKS[str(work)]}", *cells])
    return _table(["ms (over softmax sdpa)", *map(str, peers)], rows)


def gpu_speed(path: str | Path) -> str:
    """A file of `flashsigmoid bench --device cuda`: TFLOP/s of each candidate, and its speed over the best softmax."""
    file = read_records(path)
    cells = speeds(file.records)
    peers = list(dict.fromkeys(peer for row in cells.values() for peer in row))
    rows = [
        [f"{problem}, {_WORKS[work]}", *(_speed(row[peer]) if peer in row else "" for peer in peers)]
        for (problem, work), row in cells.items()
    ]
    return _table(["TFLOP/s (over the best softmax)", *peers], rows) + ceilings_text(file)


def errors(path: str | Path) -> str:
    """The same file: relative rms error against float64 of each candidate and tensor, and times over the budget."""
    records = [r for r in read_records(path).records if r.name in ("error_rms", "error_over_budget")]
    tensors = list(dict.fromkeys(str(r.tags["tensor"]) for r in records if r.name == "error_rms"))
    values = {(r.tags["problem"], r.tags["peer"], r.tags.get("tensor")): r for r in records}
    rows = []
    for problem, peer in dict.fromkeys((r.tags["problem"], r.tags["peer"]) for r in records):
        own = [values.get((problem, peer, tensor)) for tensor in tensors]
        budget = values.get((problem, peer, None))
        cells = [f"{r.value:.2e}" if r is not None else "" for r in own]
        rows.append([f"{problem}, {peer}", *cells, _times(budget) if budget is not None else ""])
    return _table(["relative rms error", *tensors, "times over the budget"], rows)


def decode(path: str | Path) -> str:
    """A file of `flashsigmoid bench decode`: microseconds of a step, over the best softmax, share of a copy's rate."""
    records = [r for r in read_records(path).records if r.tags.get("work") == "decode"]
    values = {(r.name, r.tags["problem"], r.tags["peer"]): r.value or 0.0 for r in records}
    peers, problems = (list(dict.fromkeys(r.tags[tag] for r in records)) for tag in ("peer", "problem"))
    rows = []
    for problem in problems:
        cells = []
        for peer in peers:
            ms, over = (values.get((name, problem, peer)) for name in ("time_ms", "speedup_over_softmax"))
            cells.append("" if ms is None else f"{1e3 * ms:.1f}\u00a0({over:.2f})")
        best = max(values.get(("read_fraction", problem, peer), 0.0) for peer in peers)
        rows.append([str(problem), *cells, f"{best:.2f}"])
    return _table(["us (over the best softmax)", *map(str, peers), "cache read, of the copy rate"], rows)


def faults(path: str | Path) -> str:
    """The record of planted faults: times over the error budget, a table per backend and dtype."""
    records = [r for r in read_records(path).records if r.name == "error_over_budget" and "fault" in r.tags]
    parts = []
    for backend, dtype in dict.fromkeys((r.tags["backend"], r.tags["dtype"]) for r in records):
        own = [r for r in records if (r.tags["backend"], r.tags["dtype"]) == (backend, dtype)]
        tensors = _in_order({str(r.tags["tensor"]) for r in own}, _TENSORS)
        values = {(r.tags["fault"], r.tags["tensor"]): r for r in own}
        rows = [
            [fault, *(_times(values[fault, tensor]) for tensor in tensors)]
            for fault in _in_order({str(r.tags["fault"]) for r in own}, _FAULTS)
        ]
        parts.append(_table([f"{backend}, {dtype}", *tensors], rows))
    return "\n".join(parts)


KINDS: dict[str, Callable[[str | Path], str]] = {
    "arms": arms,
    "ablation": ablation,
    "conversion": conversion,
    "pretrained": pretrained,
    "positions": positions,
    "speed": speed,
    "faults": faults,
    "gpu-speed": gpu_speed,
    "decode": decode,
    "errors": errors,
    "theory": theory,
    "study": study,
}


def rewrite(text: str) -> str:
    """A page with each marked table rendered from its record.

    Raises:
        ValueError: an unknown kind, or records that cannot be read.
    """

    def render(match: re.Match[str]) -> str:
        opening, kind, path, closing = match.groups()
        if kind not in KINDS:
            raise ValueError(f"kind of a table must be one of {', '.join(KINDS)}, got {kind}")
        return f"{opening}\n{KINDS[kind](path)}\n{closing}"

    return _MARKED.sub(render, text)


def _in_order(names: set[str], known: Sequence[str]) -> list[str]:
    """As they are known, others behind."""
    return [name for name in known if name in names] + sorted(names - set(known))


def _speed(cell: Speed) -> str:
    over = "" if cell.over_softmax is None else f"\u00a0({cell.over_softmax:.2f})"  # a page breaks no number
    return f"{cell.tflops:.0f}{over}" if cell.tflops >= 10 else f"{cell.tflops:.2g}{over}"


def _times(record: Record) -> str:
    assert record.value is not None
    if record.value >= 1000:
        return f"{record.value:.0e}".replace("e+0", "e")
    return f"{record.value:.0f}" if record.value >= 10 else f"{record.value:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(rewrite(page.read_text("utf-8")), "utf-8")
