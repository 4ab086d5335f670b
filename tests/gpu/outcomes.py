"""The record of a run of these tests: how each ended and what it measured, on disk before the next one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flashsigmoid.record import RecordWriter

MEASURED = {"error_over_budget": "times", "peak_bytes": "bytes"}


class Outcomes:
    """Plugin of the process that hears of every test: of its own, or of all workers'.

    A test measures by `record_property("error_over_budget", {"value": ...})`. Records stand in the order of their ends
    until the run is over, then sorted and with the totals: a record without totals is of a run that was cut.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path, self.command = path, command
        self.writer: RecordWriter | None = None
        self.ends: dict[str, tuple[str, str]] = {}  # test -> (outcome so far, what a failure says)
        self.totals: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of the phases of a test the first that did not pass decides, and is told at once."""
        if "gpu" not in Path(report.fspath).parts:
            return
        if self.writer is None:
            self.writer = RecordWriter(self.path, settings={"folder": "tests/gpu"}, command=self.command)
        if report.outcome != "passed" and self.ends.get(report.nodeid, ("passed",))[0] != "failed":
            self.ends[report.nodeid] = report.outcome, _told(report) if report.failed else ""
        if report.failed:
            print(f"\n{report.nodeid} failed: {_told(report)}", file=sys.__stderr__, flush=True)
        if report.when == "call":
            measured: list[tuple[str, Any]] = [each for each in report.user_properties if each[0] in MEASURED]
            for name, tags in measured:
                others = {key: x for key, x in tags.items() if key != "value"}
                self.writer.write(name, tags["value"], unit=MEASURED[name], **others)
        if report.when not in ("setup", "call"):  # teardown, or a worker that crashed
            outcome, told = self.ends.pop(report.nodeid, ("passed", ""))
            self.totals[outcome] += 1
            tags: dict[str, Any] = {"told": told} if told else {}
            self.writer.write("test", test=report.nodeid, outcome=outcome, **tags)

    def pytest_sessionfinish(self) -> None:
        """Totals, and an order that does not depend on the workers."""
        if self.writer is None:
            return
        for outcome, total in self.totals.items():
            self.writer.write(f"tests/{outcome}", total)
        self.writer.close()
        header, *lines = self.path.read_text().splitlines(keepends=True)
        draft = self.path.with_name(self.path.name + ".tmp")
        draft.write_text(header + "".join(sorted(lines, key=_rank)))
        draft.replace(self.path)  # a clock that cuts here too leaves the one or the other


def _told(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (report.longreprtext if crash is None else crash.message).strip()[:800]


def _rank(line: str) -> tuple[int, list[str]]:
    """Tests by name, the totals, what was measured by its tags."""
    fields = json.loads(line)
    kind = 0 if fields["name"] == "test" else 2 if fields["name"] in MEASURED else 1
    return kind, [str(x) for x in fields.get("tags", {}).values()] if kind != 1 else []
