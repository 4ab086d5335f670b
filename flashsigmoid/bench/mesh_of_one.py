"""python -m flashsigmoid.bench.mesh_of_one [--device cuda] [--set FIELD=VALUE]...    what a mesh of one process costs.

The same run trained as it is, over a mesh of one process, and as it is once more, by steps.py: what two equal things
differ by.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from ..recipes.fields import override
from ..recipes.language import enwik8
from ..training.data import DataConfig
from ..training.run import LanguageRun
from .steps import AGAIN, Arms, cut, measure, print_times

BASE, MESH = "plain", "dp=1,cp=1,tp=1"


def run_of(block: int, rounds: int) -> LanguageRun:
    """The recipe `enwik8` on the embedded text, cut to what is timed."""
    return cast(LanguageRun, cut(replace(enwik8(), data=DataConfig(val_windows=32)), block, rounds))


def arms(run: LanguageRun) -> Arms:
    """The three trainings."""
    return {BASE: (run, None), "mesh": (run, MESH), BASE + AGAIN: (run, None)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="What a mesh of one process costs.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--block", type=int, default=20, help="steps between two records; default: 20")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each arm; default: 10")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the run, as of train")
    parser.add_argument("--out", type=Path, default=Path("mesh-of-one.jsonl"))
    args = parser.parse_args(arguments)
    fields = dict(text.split("=", 1) for text in args.set)
    run = cast(LanguageRun, override(run_of(args.block, args.rounds), fields))
    print_times(measure(arms(run), BASE, args.device, args.rounds, args.out), BASE)


if __name__ == "__main__":
    main()
