"""What small studies share: trials with one file of records each, side by side or not, and the loop that trains them.

A trial whose file is complete is taken as it is, so a study may be run in parts, side by side or on several machines.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diagnostics.probes import probe_attention
from ..models.gpt import GPTConfig
from ..record import Record, RecordFile, RecordWriter, command_line, read_records
from ..training.callbacks import Progress, Show, show_line
from ..training.optim import OptimConfig, lr_at
from . import load
from .steps import Steps

Device = Literal["auto", "cpu", "cuda", "mps"]
Draw = Callable[[int], tuple[Tensor, Tensor]]  # step -> inputs and targets, best on the model's device
Loss = Callable[[Tensor, Tensor], Tensor]  # what the model says in float32, targets -> a scalar
IGNORED = -100  # as a target: no loss there
_DONE = "train_s"  # the last record of a complete trial


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every arm of a study gets: the same steps, batches and learning rates."""

    steps: int
    batch: int
    seqlen: int  # of training, in tokens
    lr: float
    clip: float = 1.0  # largest norm of the whole gradient
    weight_decay: float = 0.1

    @property
    def optim(self) -> OptimConfig:
        """AdamW with a tenth of the steps as warm-up, then a cosine."""
        return OptimConfig(lr=self.lr, warmup=self.steps // 10, clip=self.clip, weight_decay=self.weight_decay)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets that are not `IGNORED` of -log softmax(logits)[target], in nats.

    Args:
        logits: (batch, count, classes).
        targets: (batch, count) int64.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def generator_at(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of a step's batch on a device: a pure function of seed and step."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a study.

    Args:
        arm: what is compared; with the seed the name of its file.
        seed: of the parameters and the data.
        settings: flat; whatever its numbers depend on.
        run: writes its records, and trains by `train`.
        tags: names of settings that each of its records gets as tags when the study is gathered.
    """

    arm: str
    seed: int
    settings: dict[str, Any]
    run: Callable[[Bench], None]
    tags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its file, and where it is shown."""
        return f"{self.arm}-seed-{self.seed}"


@dataclass(kw_only=True)
class Bench:
    """Where a trial runs: its records, its device, and who is told how far it is."""

    trial: Trial
    writer: RecordWriter
    device: torch.device
    show: Show
    stage: str = ""  # shown behind the name of a trial that trains more than once
    spent_s: float = field(default=0.0)

    def train(
        self,
        model: nn.Module,
        draw: Draw,
        budget: Budget,
        *,
        loss: Loss = token_loss,
        unit: str = "nats",
        at: Callable[[int], None] | None = None,
    ) -> None:
        """Train a model, recording train/loss ten times; stop at a loss that is not finite.

        No other step waits for the device. On an NVIDIA GPU steps are CUDA graphs (`steps.Steps`).

        Args:
            model: on the device; in bfloat16 under autocast on a GPU, its parameters in float32.
            draw: the batch of each step.
            budget: steps, rates.
            loss: of what the model says. Default: `token_loss`.
            unit: of the loss. Default: nats.
            at: called before step 0, about ten times between, and after the last step, with the number of steps done.
        """
        steps = Steps(
            model, lambda inputs, targets: loss(self.logits(model, inputs), targets), budget.optim, self.device
        )
        looks = {round(budget.steps * share / 10) for share in range(11)}
        for step in range(budget.steps + 1):
            if at is not None and step in looks:
                at(step)
            if step == budget.steps:
                break
            start = time.perf_counter()
            model.train()
            inputs, targets = (x.to(self.device, non_blocking=True) for x in draw(step))
            lost = steps(inputs, targets, lr_at(step, budget.steps, budget.optim))
            done = step + 1
            if done not in looks:
                self.spent_s += time.perf_counter() - start
                continue
            value = float(lost)  # waits for the device, so that the clock is right
            self.spent_s += time.perf_counter() - start
            self.writer.write("train/loss", value, unit=unit, step=done, **self._stage())
            self._tell(done, budget.steps, {"train/loss": value}, done == budget.steps)
            if not math.isfinite(value):
                return

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What the model says of tokens, or other inputs, on the device, in float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return model(inputs).float()

    def text_loss(self, model: nn.Module, windows: Tensor, batch: int = 8) -> float:
        """Mean loss of windows (count, seqlen + 1) of the text, in nats per byte."""
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for some in windows.to(self.device).split(batch):
                logits = self.logits(model, some[:, :-1]).flatten(0, 1)
                total += F.cross_entropy(logits, some[:, 1:].flatten(), reduction="sum")
        return float(total) / (windows.shape[0] * (windows.shape[1] - 1))

    def probe(self, model: nn.Module, tokens: Tensor, step: int) -> None:
        """Record |A V| and the mass of a row of each layer for some tokens (batch, seqlen)."""
        for i, probe in enumerate(probe_attention(model, tokens.to(self.device))):
            self.writer.write("attn_norm", probe.attention_norm, step=step, layer=i, **self._stage())
            self.writer.write("row_mass", probe.row_mass, step=step, layer=i, **self._stage())

    def _stage(self) -> dict[str, Any]:
        return {"stage": self.stage} if self.stage else {}

    def _tell(self, step: int, steps: int, metrics: dict[str, float], last: bool) -> None:
        name = f"{self.trial.name} {self.stage}".strip()
        self.show(Progress(name, step, steps, self.spent_s, metrics, last))


def run_trials(
    study: str,
    trials: Sequence[Trial],
    out_dir: str | Path,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    device: Device = "auto",
    jobs: int = 1,
    show: Show = show_line,
    command: str | None = None,
) -> Path:
    """Run what is missing of some trials, and gather all that the folder holds.

    Args:
        study: its name.
        trials: all of the study, in the order in which they are shown.
        out_dir: folder of the study; a trial is out_dir/trials/ARM-seed-N.jsonl.
        only: arms, or patterns of them as of file names. Default: all.
        seeds: Default: all.
        device: "auto" is the accelerator of the machine, else the CPU.
        jobs: trainings at once, each in a process of its own, which share the machine; they print a line when they end.
            One that fails stops no other. Default: 1, in this process.
        show: told where each training of this process stands. Default: a line on stderr.
        command: how this came about. Default: that of the process.

    Returns:
        out_dir/STUDY.jsonl, of `gather`.

    Raises:
        ValueError: an arm or a seed that no trial has; a file of other settings than the trial's; jobs below 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    out_dir = Path(out_dir)
    missing = [
        trial
        for trial in _chosen(trials, only, seeds)
        if not _is_complete(out_dir / "trials" / f"{trial.name}.jsonl", _settings(study, trial))
    ]
    if jobs > 1 and len(missing) > 1:
        _run_side_by_side(study, missing, out_dir, device, jobs, command or command_line())
        return gather(study, trials, out_dir, command)
    for trial in missing:
        torch.manual_seed(trial.seed)
        path = out_dir / "trials" / f"{trial.name}.jsonl"
        with RecordWriter(path, _settings(study, trial), command) as writer:
            bench = Bench(trial=trial, writer=writer, device=_device(device), show=show)
            trial.run(bench)
            writer.write(_DONE, bench.spent_s, unit="s")
    return gather(study, trials, out_dir, command)


def _run_side_by_side(
    study: str, trials: Sequence[Trial], out_dir: Path, device: Device, jobs: int, command: str
) -> None:
    """Each trial in a process; a process takes the next one when it is done, so that torch is imported once in each."""
    jobs = min(jobs, len(trials))
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_share_cores, initargs=(jobs,)) as pool:
        # by name: what a trial runs cannot be sent to another process
        futures = [
            pool.submit(_run_alone, study, trial.arm, trial.seed, trial.settings["quick"], out_dir, device, command)
            for trial in trials
        ]
        try:
            wait(futures)
        except BaseException:  # a signal: leaving the block would wait for all trials
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    for future in futures:
        future.result()


def _share_cores(jobs: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // jobs))


def _run_alone(study: str, arm: str, seed: int, quick: bool, out_dir: Path, device: Device, command: str) -> None:
    options: dict[str, Any] = {"device": device, "show": _show_end, "command": command}
    load(study)(out_dir, quick=quick, only=(glob.escape(arm),), seeds=(seed,), **options)


def _show_end(progress: Progress) -> None:
    if progress.validated:
        show_line(progress)


def gather(study: str, trials: Sequence[Trial], out_dir: str | Path, command: str | None = None) -> Path:
    """One file of every complete trial in the folder: their records with the tags arm and seed, and the trial's own.

    The settings that all share stand in its header; train_s, the last record of a trial, has the tags hardware,
    commit and dirty.
    """
    out_dir = Path(out_dir)
    files: list[tuple[Trial, RecordFile]] = []
    for trial in trials:
        path = out_dir / "trials" / f"{trial.name}.jsonl"
        if _is_complete(path, _settings(study, trial)):
            files.append((trial, read_records(path)))
    first = files[0][1].settings if files else {}
    shared = {key: x for key, x in first.items() if all(file.settings.get(key) == x for _, file in files)}
    # shards may gather at the same time
    target, draft = out_dir / f"{study}.jsonl", out_dir / f"{study}-{os.getpid()}.jsonl"
    with RecordWriter(draft, {"study": study, **shared}, command) as writer:
        for trial, file in files:
            own = {"arm": trial.arm, "seed": trial.seed} | {name: trial.settings[name] for name in trial.tags}
            for record in file.records:
                tags: Any = own | record.tags | _origin(record, file)
                writer.write(record.name, record.value, unit=record.unit, step=record.step, **tags)
    draft.replace(target)
    return target


def _origin(record: Record, file: RecordFile) -> dict[str, Any]:
    if record.name != _DONE:
        return {}
    hardware = file.header.get("hardware", {})
    of_source = {key: file.header.get(key) for key in ("commit", "dirty")}
    return {"hardware": hardware.get("gpu") or hardware.get("cpu"), **of_source}


def _chosen(trials: Sequence[Trial], only: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    arms = list(dict.fromkeys(trial.arm for trial in trials))
    for pattern in only:
        if not fnmatch.filter(arms, pattern):
            raise ValueError(f"an arm must be one of {', '.join(arms)}, or a pattern of them, got {pattern}")
    known = list(dict.fromkeys(trial.seed for trial in trials))
    for seed in seeds:
        if seed not in known:
            raise ValueError(f"a seed of the study must be one of {', '.join(map(str, known))}, got {seed}")
    return [
        trial
        for trial in trials
        if (not seeds or trial.seed in seeds) and (not only or any(fnmatch.fnmatch(trial.arm, p) for p in only))
    ]


def _settings(study: str, trial: Trial) -> dict[str, Any]:
    return json.loads(json.dumps({"study": study, "arm": trial.arm, "seed": trial.seed, **trial.settings}))


def _is_complete(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a file holds the whole trial.

    Raises:
        ValueError: it holds another.
    """
    if not path.exists():
        return False
    file = read_records(path)
    for key in dict.fromkeys((*settings, *file.settings)):
        if file.settings.get(key) != settings.get(key):
            raise ValueError(f"{key} must be that of {path}, {file.settings.get(key)!r}, got {settings.get(key)!r}")
    return any(record.name == _DONE for record in file.records)


def _device(name: Device) -> torch.device:
    if name != "auto":
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def described(config: GPTConfig, budget: Budget, **more: Any) -> dict[str, Any]:
    """Settings of a trial: the fields of both, and more."""
    fields = {key: value for key, value in asdict(config).items() if key not in ("seqlen", "vocab_size")}
    return {**fields, "window_size": list(config.window_size), **asdict(budget), **more}
