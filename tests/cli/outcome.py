"""What a command of a test leaves, small runs, and commands in processes of their own."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
TINY = (
    *("--set", "model.dim=16", "--set", "nlayers=1", "--set", "nheads=2", "--set", "seqlen=32", "--set", "batch=2"),
    *("--set", "val_windows=2", "--set", "val_every=2", "--set", "save_every=2", "--set", "sample_tokens=8"),
)


@dataclasses.dataclass
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Flashsigmoid = Callable[..., Outcome]


def assert_one_error(outcome: Outcome, code: int, *words: str) -> None:
    """One line on stderr that says what is wrong, nothing else, and the exit code."""
    assert outcome.code == code, outcome
    (line,) = outcome.err.splitlines()
    assert re.match(r"error: (?!\w+Error)", line), line  # the rule, not the name of a class
    for word in words:
        assert word in line
    assert outcome.out == ""


def run_python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
