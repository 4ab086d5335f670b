"""Training a language model: its module, and `train`. What all trainings share is module.py's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Unpack, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from ..diagnostics.probes import probe_attention
from ..distributed.initialize import initialize
from ..distributed.plans import check_compiled, check_sizes, parallelize, shard_batch, unshard_batch
from ..distributed.processes import MeshSizes, is_first, ranks
from ..functional import explain
from ..models.generation import generate
from ..models.gpt import GPT
from ..nn.attention import SigmoidAttention, softmax_attention
from ..nn.flex import block_mask, fused_softmax_attention, softmax_kernel
from ..nn.position import alibi_slopes
from ..record import RecordWriter
from . import enwik8, stream
from .bits import bits_per_byte
from .checkpoint import TOKENIZER
from .data import Batch, LanguageData, load_text
from .module import Feed, Metric, Options, Prepared, RunModule, train_run
from .run import LanguageRun as LanguageRun
from .snapshots import TOKENS, is_due, write_snapshot
from .tokenizer import Tokenizer, load_tokenizer

FINAL = (
    "val/loss", "val/loss_bytes", "baseline/bigram", "baseline/bigram_floor", "bits_per_byte/val", "bits_per_byte/test",
)  # fmt: skip


def nats_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """-log p of every target of windows (batch, seqlen + 1): (batch, seqlen), float32."""
    # (batch, seqlen, vocab_size)
    logits = model(tokens[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


class LanguageModule(RunModule):
    """A GPT with its loss, its optimizer and the position of its data: what Lightning drives.

        loss = mean over tokens of -log softmax(logits)[target]       nats per token

    Args:
        run: the description.
        data: what is read.
        model: another model that gives logits of tokens. Default: a fresh GPT.
        on_meta: leave it without weights until it is laid over the mesh, whose ranks hold them in parts only. Default:
            False.
    """

    loss_unit = "nats_per_token"

    def __init__(
        self, run: LanguageRun, data: LanguageData, model: nn.Module | None = None, *, on_meta: bool = False
    ) -> None:
        softmax = {"attention_fn": fused_softmax_attention} if run.model.attention == "softmax" else {}
        undrawn = torch.get_rng_state()  # from which the weights will be drawn
        with torch.device("meta") if on_meta else nullcontext():
            model = GPT(run.model, **softmax) if model is None else model
        super().__init__(run, model)
        self._undrawn = undrawn if on_meta else None
        for block in getattr(self.model, "blocks", ()):
            block.recompute = run.recompute
        self.data = data
        # only what trains and validates is compiled: prompts of any length would each be compiled anew
        mode = "reduce-overhead" if run.cuda_graphs else None
        self._nats = torch.compile(nats_of, dynamic=False, mode=mode) if run.compile else nats_of
        self.read_per_sample = ("tokens_per_s", run.model.seqlen)
        self._val = (0.0, 0, 0)  # nats, tokens, bytes
        self._byte_lengths = torch.from_numpy(data.tokenizer.byte_lengths())

    def check_mesh(self, sizes: MeshSizes) -> None:
        """Whether it can be trained on a mesh.

        Raises:
            ValueError: a batch that dp does not divide, or a context that cp does not; CUDA graphs on several ranks; as
                `check_compiled` and `check_sizes`.
        """
        run = self.run
        if run.cuda_graphs and sizes.size > 1:
            raise ValueError(f"cuda_graphs must be false on a mesh of several ranks, got {sizes}")
        if run.compile:
            check_compiled(sizes.tp, sizes.cp, run.recompute)
        if run.batch % sizes.dp:
            raise ValueError(f"batch must be a multiple of dp={sizes.dp}, got {run.batch}")
        if sizes.cp > 1 and run.model.seqlen % (2 * sizes.cp):
            raise ValueError(f"model.seqlen must be a multiple of 2 cp = {2 * sizes.cp}, got {run.model.seqlen}")
        check_sizes(self.model, sizes.tp, sizes.cp)

    def configure_model(self) -> None:
        """Lightning's hook: over the mesh, where there is one."""
        if self.device_mesh is not None:
            run = self.run
            several = self.mesh is not None  # one rank alone compiles more than blocks
            parallelize(self.model, self.device_mesh, recompute=run.recompute, compile=run.compile and several)
        if self._undrawn is not None:
            torch.set_rng_state(self._undrawn)
            initialize(self.model, self.trainer.strategy.root_device)

    def _part_nats(self, tokens: Tensor) -> Tensor:
        """Of a mesh: the loss of the targets that this rank has, (its windows, its tokens), float32."""
        mesh = cast(DeviceMesh, self.mesh)
        inputs, targets = (shard_batch(x, mesh) for x in (tokens[:, :-1], tokens[:, 1:]))
        logits = self.model(inputs).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def nats(self, tokens: Tensor) -> Tensor:
        """Loss of every target of windows (batch, seqlen + 1): (batch, seqlen), float32. No gradient on a mesh."""
        if self.mesh is not None:
            short = -len(tokens) % self.mesh["dp"].size()
            whole = unshard_batch(self._part_nats(torch.cat([tokens, tokens[:1].expand(short, -1)])), self.mesh)
            return whole[: len(tokens)]
        # the last batch of a text may have a size of its own
        whole = tokens.shape == (self.run.batch, self.run.model.seqlen + 1)
        return (self._nats if whole else nats_of)(self.model, tokens)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean loss of windows (batch, seqlen + 1), on a mesh of this rank's part: a scalar, float32."""
        return (self.nats if self.mesh is None else self._part_nats)(tokens).mean()

    def batch_loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch of windows."""
        return self.loss(batch.tokens)

    def train_dataloader(self) -> Feed:
        """Training batches without an end; where they begin is read when they do, after a checkpoint is restored."""
        return Feed(lambda: self.data.train.batches(self.run.batch, self.position))

    def val_dataloader(self) -> Feed:
        """The validation windows."""
        return Feed(lambda: (Batch(part, {}) for part in self.data.val_windows.split(self.run.batch)))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning's hook: only the tokens move, to a GPU while it computes."""
        tokens = batch.tokens.pin_memory() if device.type == "cuda" else batch.tokens
        return Batch(tokens.to(device, non_blocking=True), batch.position)

    def on_fit_start(self) -> None:
        """FlexAttention's mask, before anything that asks for it is compiled."""
        model = self.run.model
        if self.kernel() == "flex":
            block_mask(model.seqlen, True, model.window_size, self.device)

    def kernel(self) -> str:
        """What computes the attention: "flex" or "sdpa" of torch, or our backend and, if another, its backward's."""
        model = self.run.model
        alibi = model.position == "alibi"
        if model.attention == "softmax":
            options = {"alibi": alibi, "window_size": model.window_size, "dropout_p": model.dropout_p}
            square = self.mesh is None or self.mesh["cp"].size() == 1
            return softmax_kernel(self.device, square=square, **options)
        dtype = torch.bfloat16 if self.run.precision == "bf16" else torch.float32
        head_dim, like = model.dim // model.nheads, {"dtype": dtype, "device": self.device}
        q = torch.empty(self.run.batch, model.seqlen, model.nheads, head_dim, **like)
        said = explain(
            q,
            *(q[:, :, : model.kv_heads] for _ in "kv"),
            sigmoid_bias=q.new_empty(model.nheads, dtype=torch.float32) if model.alibi_bias else model.bias,
            causal=True,
            window_size=model.window_size,
            alibi_slopes=alibi_slopes(model.nheads, self.device) if alibi else None,
            dropout_p=model.dropout_p,
        )
        return said.both

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._val = (0.0, 0, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of windows to the sums."""
        targets, (nats, tokens, size) = batch.tokens[:, 1:], self._val
        nats += float(self.nats(batch.tokens).double().sum())
        size += int(self._byte_lengths[targets.cpu()].sum())
        self._val = nats, tokens + targets.numel(), size

    def val_losses(self) -> tuple[float, float]:
        """Means of the last validation: nats per token and nats per byte."""
        nats, tokens, size = self._val
        return nats / tokens, nats / max(1, size)

    def validated(self) -> Iterator[Metric]:
        """Both means."""
        per_token, per_byte = self.val_losses()
        yield "val/loss", per_token, "nats_per_token"
        yield "val/loss_bytes", per_byte, "nats_per_byte"

    def baselines(self) -> Iterator[Metric]:
        """A bigram model on the same windows, of text files."""
        bigram = self.data.bigram
        if bigram is not None:
            yield "baseline/bigram", bigram.nats_per_byte, "nats_per_byte"
            yield "baseline/bigram_floor", bigram.floor_nats_per_byte, "nats_per_byte"

    @property
    def _has_whole_attention(self) -> bool:
        """Whether this rank has all heads and all tokens."""
        mesh = self.mesh
        return mesh is None or mesh["cp"].size() * mesh["tp"].size() == 1

    def probed(self) -> Iterator[tuple[str, float]]:
        """Attention on the first validation windows, at most a micro-batch; not where no rank has all of it."""
        model = self.run.model
        if not self._has_whole_attention:
            return
        # the explicit weights of a layer take at most 1 GiB, unless one window needs more
        windows = max(1, min(self.run.batch, 2**28 // (model.nheads * model.seqlen**2)))
        tokens = self.data.val_windows[:windows, :-1].to(self.device)
        for i, probe in enumerate(probe_attention(self.model, tokens)):
            yield f"attn_norm/layer_{i}", probe.attention_norm
            yield f"row_mass/layer_{i}", probe.row_mass
            yield f"sink/layer_{i}", probe.sink_mass

    def snapshot(self, writer: RecordWriter, step: int) -> None:
        """Attention weights on the first tokens of the first validation window; not where no rank has all of it."""
        if not self._has_whole_attention or not is_due(self.run, self.run.attention_snapshots, step):
            return
        tokens = self.data.val_windows[:1, : min(TOKENS, self.run.model.seqlen)].to(self.device)
        attentions = [module for module in self.model.modules() if isinstance(module, SigmoidAttention)]
        # FlexAttention would be compiled for this one length, and its weights are those of softmax
        plain = {fused_softmax_attention: softmax_attention}
        write_snapshot(
            writer,
            lambda: self.model(tokens),
            [(attention, plain.get(attention.attention_fn, attention.attention_fn)) for attention in attentions],
            nheads=self.run.model.nheads,
            tokens=[self.data.tokenizer.decode([token]) for token in tokens[0].tolist()],
            step=step,
        )

    def finish(self, writer: RecordWriter) -> None:
        """Bits per byte of whole splits; the first validation tokens and what the model makes of them: sample.txt."""
        run = self.run
        sizes = {"seqlen": run.model.seqlen, "stride": run.stride, "batch": run.batch, "device": self.device}
        for split, tokens in self.data.splits.items():
            with self.trainer.precision_plugin.val_step_context():
                bits = bits_per_byte(self.nats, tokens, self.data.tokenizer.byte_lengths(), **sizes)
            writer.write(f"bits_per_byte/{split}", bits, unit="bits_per_byte", step=run.steps, stride=run.stride)
        if not run.sample_tokens:
            return
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        on_mesh = self.mesh is not None
        weights = get_model_state_dict(self.model, options=whole) if on_mesh else self.model.state_dict()
        if not is_first():
            return
        model = GPT(run.model).to(self.device)  # with the attention that takes a cache
        model.load_state_dict(weights)
        prompt = self.data.val_windows[:1, : min(32, run.model.seqlen)].to(self.device)
        tokens = generate(model, prompt, run.sample_tokens, temperature=0.8, seed=run.seed)
        text = self.data.tokenizer.decode(tokens[0].tolist())
        (writer.path.parent / "sample.txt").write_text(text, "utf-8")
        writer.write("sample", step=run.steps, artifact="sample.txt", temperature=0.8)


def train(run: LanguageRun, out_dir: str | Path, **options: Unpack[Options]) -> dict[str, float]:
    """Train a language model; everything it leaves is in `out_dir`: records.jsonl, checkpoints/, sample.txt, tb/.

    On the CPU a run that was killed and resumed, however often, ends with the same bits as one that was not. Ctrl-C or
    SIGTERM, or the end of `max_minutes`, finishes the step, saves a checkpoint, prints one line and raises
    `Interrupted` (exit code 130, 143, 75). What follows the last step, whole splits and a sample, is not cut short. The
    random states of python, numpy and torch are set.

    Args:
        run: what to train.
        out_dir: folder of this one run.
        options: resume: go on from the newest checkpoint in `out_dir`, from the beginning if there is none. Default:
            False, begin anew, in a folder without a run.
            device: "auto" is the accelerator of the machine, else the CPU.
            show: told where the training stands. Default: one line on stderr.
            command: how the run was started, for the records. Default: this process's command line.
            max_minutes: save and stop after so many, counted from the call. Default: None, no limit.
            mesh: as "dp=2,cp=2,tp=1", over the processes that a launcher started. Default: all of them along dp.
            timeout_s: longest wait for another rank of the mesh. Default: 600.
            probe_every: measure norms and attention everywhere in one of so many steps, see `Watch`. Default: 0, never.
            max_skipped: so many steps in a row without a finite gradient, each skipped, end the run. Default: 10.

    Returns:
        The last validation and, where there are any, the baselines and what whole splits gave: `FINAL`.

    Raises:
        FileNotFoundError: there is no data at the path.
        ValueError: bad data; a run in `out_dir` already; resuming with another description or other data.
        Interrupted: a signal, or max_minutes, ended it.
    """

    def prepare(start: Path | None) -> Prepared:
        data = load_data(run, None if start is None else load_tokenizer(start / TOKENIZER))
        return Prepared(
            lambda: LanguageModule(run, data, on_meta=ranks() > 1),
            data.fingerprint,
            files={TOKENIZER: data.tokenizer.to_json()},
        )

    return train_run(run, out_dir, prepare, FINAL, **options)


def load_data(run: LanguageRun, tokenizer: Tokenizer | None = None) -> LanguageData:
    """The data of a run; `tokenizer` instead of training one.

    Raises:
        FileNotFoundError, ValueError: as `load_text`, `load_stream` and `load_enwik8`; the tokenizer has more tokens
            than the model.
    """
    sizes = {"vocab_size": run.model.vocab_size, "seqlen": run.model.seqlen, "tokenizer": tokenizer}
    source = run.data.source or ""
    if source.startswith(enwik8.PREFIX):
        data = enwik8.load_enwik8(run.data, seqlen=run.model.seqlen, seed=run.seed)
    elif source.startswith(stream.PREFIX):
        data = stream.load_stream(run.data, **sizes)
    else:
        data = load_text(run.data, seed=run.seed, **sizes)
    if data.tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {data.tokenizer.vocab_size}, got {run.model.vocab_size}"
        )
    return data
