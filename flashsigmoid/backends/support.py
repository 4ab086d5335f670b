"""python -m flashsigmoid.backends.support PAGE...    writes the support table of Markdown pages anew.

The table is what the backends say of themselves, between <!-- support --> and <!-- end -->. No GPU is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import NAMES, load
from .problem import Problem

_MARKED = re.compile(r"(<!-- support -->\n).*?(^<!-- end -->$)", flags=re.DOTALL | re.MULTILINE)

_BASE = Problem(
    batch=2,
    seqlen_q=1000,
    seqlen_k=1000,
    nheads=8,
    nheads_k=8,
    head_dim=64,
    head_dim_v=64,
    dtype=torch.bfloat16,
    device="cuda",
    scale=0.125,
    sigmoid_bias=-6.9,
    arch="sm_90",
)
_ROWS: dict[str, Problem] = {
    "NVIDIA, compute capability 9.0": _BASE,
    "NVIDIA, 8.0": replace(_BASE, arch="sm_80"),
    "NVIDIA, 7.5": replace(_BASE, arch="sm_75"),
    "AMD, gfx942": replace(_BASE, arch="gfx942"),
    "Apple": replace(_BASE, device="mps", arch=None),
    "CPU": replace(_BASE, device="cpu", arch="cpu"),
    "float16": replace(_BASE, dtype=torch.float16),
    "float32": replace(_BASE, dtype=torch.float32),
    "float64": replace(_BASE, dtype=torch.float64),
    "head_dim 8": replace(_BASE, head_dim=8, head_dim_v=8),
    "head_dim 111, head_dim_v 72": replace(_BASE, head_dim=111, head_dim_v=72),
    "head_dim 256": replace(_BASE, head_dim=256, head_dim_v=256),
    "head_dim 320": replace(_BASE, head_dim=320, head_dim_v=320),
    "8 query heads on 1 key head": replace(_BASE, nheads_k=1),
    "causal, window (100, 20), q_offset": replace(_BASE, causal=True, window_left=100, window_right=20, q_offset=7),
    "ALiBi": replace(_BASE, slopes_shape=(8,)),
    "ALiBi with gradient": replace(_BASE, slopes_shape=(8,), needs_sums=True),
    "b per head": replace(_BASE, sigmoid_bias=None, bias_shape=(8,)),
    "b per row with gradient": replace(_BASE, sigmoid_bias=None, bias_shape=(2, 8, 1000), needs_sums=True),
    "dropout": replace(_BASE, dropout_p=0.1),
    "packed sequences": replace(_BASE, total_q=1500, total_k=1500),
}


def table() -> str:
    """Markdown: a row for every kind of call, a column for every backend, its reason where it cannot."""
    notes: list[str] = []

    def cell(name: str, problem: Problem) -> str:
        reasons = [load(name).unsupported(problem, direction) for direction in ("forward", "backward")]
        reason = next(filter(None, reasons), None)
        if reason is None:
            one_by_one = problem.is_packed and not load(name).PACKED
            return "one by one" if one_by_one else "yes"
        if reason not in notes:
            notes.append(reason)
        return f"{'no' if reasons[0] else 'forward'} [{notes.index(reason) + 1}]"

    lines = ["| 16-bit on compute capability 9.0, and | " + " | ".join(NAMES) + " |", "|---" * (len(NAMES) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(cell(name, problem) for name in NAMES) + " |" for row, problem in _ROWS.items()
    ]
    return "\n".join([*lines, "", *(f"[{i}] {note}  " for i, note in enumerate(notes, 1))])


def rewrite(text: str) -> str:
    """A page with its table written anew."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{table()}\n\n{match[2]}", text)


def main(pages: Sequence[str]) -> None:
    """Rewrite the pages in place."""
    for page in map(Path, pages):
        page.write_text(rewrite(page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
