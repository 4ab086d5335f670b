"""What Lightning drives, whatever is trained: steps, optimizer, learning rate, resume; and `train_run`, to the end.

The loss, the batches and what is recorded of a validation are a subclass's: language.py.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..distributed.checkpoint import one_process_state, shaped
from ..distributed.plans import clip_grad_norm
from ..distributed.processes import MeshSizes, Processes, restarts
from ..record import RECORDS_NAME, RecordWriter, read_records
from .callbacks import Interrupted, Muted, Recorder, Saver, Show, Stopwatch, quiet_lightning, show_line
from .checkpoint import (
    FOLDER,
    SHARDED,
    DirectoryCheckpoint,
    checkpoints,
    clean,
    keep_last,
    load_config,
    newest_whole,
    rng_state,
    set_rng_state,
)
from .mesh import MeshStrategy, joined, trainer_options
from .optim import adamw, lr_at
from .run import Run, check_unchanged
from .transfer import Initial
from .watching import Watcher, check_watchable

T = TypeVar("T")
Metric = tuple[str, float, str]  # name, value, unit
MOST_SKIPPED, TIMEOUT_S = 10, 600.0


class Positioned(Protocol):
    """A batch that knows where its data stand."""

    @property
    def position(self) -> dict[str, Any]:
        """After this batch: what `RunModule.position` becomes."""
        ...


class Feed:
    """Batches as Lightning wants them: what can be iterated again and again.

    Args:
        begin: called for the batches of one iteration.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self.begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self.begin()


class RunModule(pl.LightningModule):
    """A model with its optimizer and the position of its data. A subclass has the loss and the batches.

    Args:
        run: the description.
        model: what is trained.
    """

    loss_unit = ""  # of the records of the training loss
    read_per_sample: tuple[str, int] = ("samples_per_s", 1)  # name of the rate, and how many a sample of a batch counts

    def __init__(self, run: Run, model: nn.Module) -> None:
        super().__init__()
        self.run: Any = run
        self.model = model
        self.position: dict[str, Any] | None = None  # of the data after the last batch used
        self.clock = Stopwatch()
        self.grad_norm = torch.tensor(torch.nan)  # of the last optimizer step, before clipping
        self.step_loss = torch.zeros(())  # mean over the micro-batches of the current step
        # steps without an update, since the gradient was not finite: all, the last ones in a row, and the longest row
        self._skips, self.most_skipped = torch.zeros(3, dtype=torch.int64), MOST_SKIPPED
        self._resumed: dict[str, Any] | None = None

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh, where it has several ranks: one alone trains as without a mesh."""
        return self.device_mesh if self.device_mesh is not None and self.device_mesh.size() > 1 else None

    @property
    def place(self) -> tuple[int, int]:
        """Which of the ranks along dp this is, and how many they are."""
        return (0, 1) if self.mesh is None else (self.mesh.get_local_rank("dp"), self.mesh["dp"].size())

    def of_all(self, x: T) -> list[T]:
        """What every rank has, in their order; all of them call it."""
        return [x] if self.mesh is None else cast(MeshStrategy, self.trainer.strategy).world.gather(x)

    @property
    def beside(self) -> Mapping[str, nn.Module]:
        """What a checkpoint on a mesh holds beside the model and its optimizer, by name."""
        return {}

    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of a training batch, on a mesh this rank's part of it: a scalar, float32."""
        raise NotImplementedError

    def check_mesh(self, sizes: MeshSizes) -> None:
        """Whether it can be trained on a mesh.

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(f"a mesh must be of a training on language, images or speech, got {type(self).__name__}")

    def configure_model(self) -> None:
        """Lightning's hook: over the mesh, where there is one."""

    def validated(self) -> Iterable[Metric]:
        """Numbers of the last validation, the one to compare first."""
        raise NotImplementedError

    def baselines(self) -> Iterable[Metric]:
        """What the validation is compared with, recorded once."""
        return ()

    def probed(self) -> Iterable[tuple[str, float]]:
        """What is seen inside of the model at a validation."""
        return ()

    def kernel(self) -> str | None:
        """What computes the attention, by name, for the records; None: not said."""
        return None

    def snapshot(self, writer: RecordWriter, step: int) -> None:
        """After a validation: what attention does with one text or image, where a snapshot is due."""

    def finish(self, writer: RecordWriter) -> None:
        """After the last step: samples, pictures."""

    def training_step(self, batch: Positioned, batch_idx: int) -> Tensor:
        """Loss of a micro-batch; Lightning divides it by their number."""
        loss = self.batch_loss(batch)
        share = loss.detach() / self.run.accumulate
        self.step_loss = self.step_loss + share if batch_idx % self.run.accumulate else share
        self.position = batch.position
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; its learning rate is set before each step."""
        return adamw(self.model, self.run.optim)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this step: a pure function of its number."""
        for group in optimizer.param_groups:
            rate = lr_at(self.trainer.global_step, self.run.steps, self.run.optim)
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def configure_gradient_clipping(self, optimizer: Any, *limits: Any, **options: Any) -> None:
        """Clip the norm of the whole gradient, and keep it for the records; a step that has none is skipped.

        Nothing waits for the device: the fused optimizer reads there whether to step. On a mesh ranks wait.

        Raises:
            FloatingPointError: as `check_skipped`, after every step on the CPU or a mesh.
        """
        parameters, clip = self.model.parameters(), self.run.optim.clip
        sharded = self.mesh is not None
        clip_ = clip_grad_norm if sharded else nn.utils.clip_grad_norm_
        self.grad_norm = clip_(parameters, clip)
        finite = torch.isfinite(self.grad_norm)
        self._skips = self._skips.to(finite.device)
        total, row, longest = self._skips
        row = torch.where(finite, 0, row + 1)
        self._skips = torch.stack((total + ~finite, row, torch.maximum(longest, row)))
        if not sharded:
            optimizer.found_inf = (~finite).float()  # of torch's GradScaler: then no parameter and no moment changes
        elif not finite:
            optimizer.zero_grad(set_to_none=True)
        if sharded or not finite.is_cuda:
            self.check_skipped()

    @property
    def skipped(self) -> int:
        """Steps without an update so far; reading it waits for the device."""
        return int(self._skips[0])

    def check_skipped(self) -> None:
        """Called where the device is waited for anyway.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        if int(self._skips[2]) >= self.most_skipped:
            raise FloatingPointError(
                f"loss and gradient must be finite in one of {self.most_skipped} steps in a row, got "
                f"{float(self.grad_norm)} up to step {self.trainer.global_step + 1}; the last checkpoint stands"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not store: the position of the data, the random states, the time."""
        time_s = self.clock.read()
        ours = {"position": self.position, "rng": rng_state(), "time_s": time_s, "skipped_steps": self.skipped}
        checkpoint["flashsigmoid"] = ours

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back; the random states wait until nothing else draws before the first batch."""
        if (path := checkpoint.pop(SHARDED, None)) is not None:  # of a mesh
            state = one_process_state(self.model, self.configure_optimizers(), path)
            checkpoint["optimizer_states"] = [state]
            checkpoint["state_dict"] = shaped(checkpoint["state_dict"], self)
        ours: dict[str, Any] = checkpoint["flashsigmoid"]
        self._resumed, self.position = ours, ours["position"]
        self._skips = torch.tensor([ours.get("skipped_steps", 0), 0, 0])

    def on_train_start(self) -> None:
        """Random states and time go on where they stood."""
        if self._resumed is not None:
            set_rng_state(self._resumed["rng"])
        self.clock.start(0.0 if self._resumed is None else self._resumed["time_s"])


@dataclass(frozen=True)
class Prepared:
    """What a training needs besides its description, once its data are found."""

    module: Callable[[], RunModule]  # made once the seeds are set
    fingerprint: str  # of the data
    files: dict[str, str] = field(default_factory=dict)  # what a checkpoint has beside weights and states, by name
    initial: Initial | None = None  # the weights that the module begins with, for the records


class Options(TypedDict, total=False):
    """How a training is run, whatever is trained: the keywords of `language.train` and of its like."""

    resume: bool  # go on from the newest checkpoint, from the beginning if there is none; default: begin anew
    device: Literal["auto", "cpu", "cuda", "mps"]  # "auto", the default: the accelerator of the machine, else the CPU
    show: Show  # told where the training stands; default: one line on stderr
    command: str | None  # how the run was started, for the records; default: this process's command line
    max_minutes: float | None  # then save and stop after a step, as a signal does; default: no limit
    mesh: str | None  # as "dp=2,cp=2,tp=1", over the processes that a launcher started; default: all of them along dp
    timeout_s: float  # longest wait for another rank of the mesh; default: 600
    probe_every: int  # put the model under the microscope in one of so many steps; default: 0, never
    max_skipped: int  # steps in a row whose gradient may be infinite or NaN, before the run ends; default: 10


def train_run(
    run: Run,
    out_dir: str | Path,
    prepare: Callable[[Path | None], Prepared],
    results: Sequence[str],
    **options: Unpack[Options],
) -> dict[str, float]:
    """Train to the end, from the newest checkpoint or the beginning; the end of every `train`.

    Args:
        run: the description.
        out_dir: folder of this one run.
        prepare: given the checkpoint to go on from, or None, finds the data.
        results: names of the records whose last values are returned.
        options: `Options`.

    Raises:
        ValueError: a run in `out_dir` already, and not `resume`; resuming with another description or other data.
        Interrupted: a signal, or max_minutes, ended it.
    """
    out_dir, limit = Path(out_dir), options.get("max_minutes")
    if limit is not None and not limit > 0.0:
        raise ValueError(f"max_minutes must be positive or None, got {limit}")
    most = options.get("max_skipped", MOST_SKIPPED)
    if most < 1:
        raise ValueError(f"max_skipped must be positive, got {most}")
    with joined(options.get("mesh"), options.get("device", "auto"), options.get("timeout_s", TIMEOUT_S)) as world:
        saver = Saver(out_dir, limit, world)
        resume = options.get("resume", False) or restarts() > 0

        def begin() -> Path | None:
            return _start(out_dir, resume)

        start = begin() if world is None else world.first(begin)
        prepared = prepare(start)
        if world is not None:
            world.same("data", prepared.fingerprint)
        _fit(run, prepared, out_dir, start, saver, options, world)
    records = read_records(out_dir / RECORDS_NAME).records
    return {r.name: r.value for r in records if r.name in results and r.value is not None}


def _start(out_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; None: the beginning.

    Raises:
        ValueError: as `train_run`.
    """
    if not resume and (checkpoints(out_dir) or (out_dir / RECORDS_NAME).exists()):
        hint = "--resume goes on with it, --out names another folder"
        raise ValueError(f"out_dir must not hold a run unless it is resumed, got {out_dir}: {hint}")
    clean(out_dir)  # what a crash left half written
    return newest_whole(out_dir)


def _fit(
    run: Run,
    prepared: Prepared,
    out_dir: Path,
    start: Path | None,
    saver: Saver,
    options: Options,
    world: Processes | None,
) -> None:
    """Train from the checkpoint `start`, or the beginning, to the end; nothing if it is there."""
    config, initial = {**run.sections(), "fingerprint": prepared.fingerprint}, prepared.initial
    if start is not None:
        check_unchanged(load_config(start), config)
    step = 0 if start is None else int(start.name.removeprefix("step-"))
    if step >= run.steps:
        return
    first = world is None or world.is_first
    if start is None and first:
        for leftover in (out_dir / FOLDER, out_dir / "tb"):
            shutil.rmtree(leftover, ignore_errors=True)
        (out_dir / RECORDS_NAME).unlink(missing_ok=True)
    torch.manual_seed(run.seed)
    random.seed(run.seed)
    np.random.seed(run.seed)
    module = prepared.module()  # before the records: what does not fit leaves nothing behind
    module.most_skipped = options.get("max_skipped", MOST_SKIPPED)
    probe_every = options.get("probe_every", 0)
    check_watchable(run, probe_every, world is not None)
    if world is not None:
        module.check_mesh(world.sizes)
    settings = run.settings() | ({} if initial is None else {"init": initial.origin})
    command = options.get("command")
    device = options.get("device", "auto")
    path, resumed = out_dir / RECORDS_NAME, None if start is None else step
    with RecordWriter(path, settings, command, resumed) if first else Muted(path) as writer, quiet_lightning():
        if initial is not None:
            writer.write("init", step=0, checkpoint=str(initial.path), sha256=initial.sha256)
        if world is None:
            # one process, wherever it runs: a cluster's variables are not read
            where = {"accelerator": {"cuda": "gpu"}.get(device, device), "devices": 1}
            where["plugins"] = [DirectoryCheckpoint(config, prepared.files), LightningEnvironment()]
            saves = None
        else:
            strategy = MeshStrategy(world, config, prepared.files, lambda path: keep_last(path, run.keep_last))
            where, saves = trainer_options(world, strategy), strategy.saves
        watchers = [Watcher(writer, probe_every)] if probe_every else []
        trainer = pl.Trainer(
            default_root_dir=out_dir,
            precision="bf16-mixed" if run.precision == "bf16" else "32-true",
            logger=_tensorboard(out_dir, step) if first else False,
            callbacks=[
                Recorder(writer, options.get("show", show_line) if first else lambda _: None, world),
                *watchers,
                saver,
            ],
            max_epochs=-1,
            max_steps=run.steps,
            accumulate_grad_batches=run.accumulate,
            check_val_every_n_epoch=None,
            val_check_interval=run.val_interval * run.accumulate,
            # Lightning's check before training, over everything, is the validation of step 0
            num_sanity_val_steps=-1 if start is None else 0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **where,
        )
        saver.listen()
        threads = torch.get_num_threads()
        if trainer.strategy.root_device.type == "cuda":
            torch.set_num_threads(1)  # idle threads spin, and Python, which launches, waits for a core
        try:
            trainer.fit(module, ckpt_path=start, weights_only=True)
            if saves is not None:
                saves.wait()
        except Interrupted as stop:
            if saves is not None:
                saves.wait()
            if first:
                print(
                    f"\nstopped by {stop.reason} after step {stop.step}, saved {stop.checkpoint}: "
                    "the same command with --resume goes on",
                    file=sys.stderr,
                )
            raise
        finally:
            torch.set_num_threads(threads)
            saver.close()


def _tensorboard(out_dir: Path, step: int) -> TensorBoardLogger | Literal[False]:
    """TensorBoard in tb/, without what lies after `step`; False where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return False
    return TensorBoardLogger(out_dir, name="tb", version="", purge_step=step + 1 if step else None)
