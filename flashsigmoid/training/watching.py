"""A run under the microscope: the watch of diagnostics/ around its training, into the records and TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from ..diagnostics.watch import Watch
from ..record import RecordWriter

if TYPE_CHECKING:
    from .run import Run


class Watcher(pl.Callback):
    """Writes what `diagnostics.watch.Watch` measures of a run's model in one of `every` steps.

    Records are those of `Watch`; TensorBoard has each under its name and, behind a slash, its module or parameter.

    Args:
        writer: of the run's records.jsonl.
        every: steps.
    """

    def __init__(self, writer: RecordWriter, every: int) -> None:
        self.writer, self.every = writer, every
        self._watch: Watch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, at the step where a run goes on."""
        module: Any = pl_module

        def write(name: str, value: float, *, step: int, **tags: Any) -> None:
            self.writer.write(name, value, step=step, **tags)
            if trainer.logger is not None:
                shown = name if "/" in name else f"{name}/{tags['layer']}"
                trainer.logger.log_metrics({shown: value}, step=step)

        start = trainer.global_step
        self._watch = Watch(module.model, trainer.optimizers[0], write=write, every=self.every, start=start)
        self._watch.__enter__()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End, however the training ended."""
        if self._watch is not None:
            self._watch.__exit__()
            self._watch = None


def check_watchable(run: Run, every: int, on_mesh: bool) -> None:
    """Whether a run can be watched.

    Raises:
        ValueError: every is negative; the run is compiled, on a mesh, or packs its sequences.
    """
    if every < 0:
        raise ValueError(f"probe_every must not be negative, got {every}")
    if not every:
        return
    model: Any = getattr(run, "model", None)
    for name, is_so in {
        "compile": getattr(run, "compile", False),
        "mesh": on_mesh,
        "model.packing": getattr(model, "packing", False),
    }.items():
        if is_so:
            raise ValueError(f"probe_every must be 0 with {name}, got {every}")
