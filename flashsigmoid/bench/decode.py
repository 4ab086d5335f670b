"""One new token against a cache: named problems, ours and everybody's softmax, fractions of the copy rate.

How long a step takes is how fast the keys and values of all sequences are read: next to the time stands the cache's
bytes divided by it, over what a copy reaches (read and written).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kvcache import sigmoid_attention_with_kvcache, sigmoid_attention_with_prefix
from ..record import Record, RecordWriter, Scalar
from ..testing import errors_over_budget
from .ceilings import COPY
from .ceilings import records as ceiling_records
from .ceilings import samples as ceiling_samples
from .gate import relative_rms
from .timing import CaptureError, Sample, Times, by_events, interleaved, side_stream

Step = Callable[[], Tensor]  # out (batch, 1, nheads, head_dim)


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One query of every sequence against `seqlen` keys: `prefix` shared by all, the rest their own."""

    name: str
    batch: int
    seqlen: int
    prefix: int = 0
    page_size: int = 0
    nheads: int = 32
    nheads_k: int = 8
    head_dim: int = 128

    def row(self) -> dict[str, str]:
        """What it is, in words, for a table."""
        options = [f"prefix of {self.prefix}"] * (self.prefix > 0) + [f"pages of {self.page_size}"] * (
            self.page_size > 0
        )
        return {
            "problem": self.name,
            "batch": str(self.batch),
            "seqlen": f"1, {self.seqlen} keys",
            "nheads": f"{self.nheads}, {self.nheads_k} of keys",
            "head_dim": str(self.head_dim),
            "options": ", ".join(options),
        }

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values that a step reads at least, of a shared prefix once."""
        tokens = self.batch * (self.seqlen - self.prefix) + self.prefix
        return 2 * tokens * self.nheads_k * self.head_dim * dtype.itemsize


def _named() -> Iterator[Decode]:
    for batch in (1, 8, 64):
        for label, seqlen in (("4k", 4096), ("64k", 65536), ("512k", 524288)):
            yield Decode(name=f"decode-b{batch}-{label}", batch=batch, seqlen=seqlen)
    yield Decode(name="decode-b8-64k-paged16", batch=8, seqlen=65536, page_size=16)
    yield Decode(name="decode-b8-64k-paged256", batch=8, seqlen=65536, page_size=256)
    yield Decode(name="decode-b64-32k-prefix", batch=64, seqlen=32768 + 512, prefix=32768)


PROBLEMS = {problem.name: problem for problem in _named()}


def choose(wanted: Iterable[str]) -> list[str]:
    """The decode problems meant by names, globs or beginnings, each once; of other words, none."""
    chosen: dict[str, None] = {}
    for word in wanted:
        found = [word] if word in PROBLEMS else fnmatch.filter(PROBLEMS, word)
        chosen.update(dict.fromkeys(found or [name for name in PROBLEMS if name.startswith(word)]))
    return list(chosen)


@dataclass
class Inputs:
    """q (batch, 1, nheads, head_dim); the cache (batch, seqlen, nheads_k, head_dim), with a prefix only what follows.

    Normals, the sequences' made one by one: a cache may be nearly as large as the memory.
    """

    problem: Decode
    q: Tensor
    k: Tensor
    v: Tensor
    k_prefix: Tensor
    v_prefix: Tensor
    lengths: Tensor

    @property
    def bias(self) -> float:
        """b = -log n."""
        return -math.log(self.problem.seqlen)

    def whole(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence and the last head, (1, seqlen, 1, head_dim)."""
        pairs = ((self.k_prefix, self.k), (self.v_prefix, self.v))
        k, v = (torch.cat((a[:, -1:], x[sequence, :, -1:]))[None] for a, x in pairs)
        return k, v


def make_inputs(problem: Decode, dtype: torch.dtype, device: str) -> Inputs:
    """The same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        for part in x if len(shape) == 4 else (x,):
            part.copy_(torch.randn(part.shape, generator=generator, dtype=dtype, device=device))
        return x

    p = problem
    own = (p.batch, p.seqlen - p.prefix, p.nheads_k, p.head_dim)
    shared = (p.prefix, p.nheads_k, p.head_dim)
    lengths = torch.full((p.batch,), own[1], dtype=torch.int32, device=device)
    q = normal(p.batch, 1, p.nheads, p.head_dim)
    k, v, k_prefix, v_prefix = (normal(*x) for x in (own, own, shared, shared))
    return Inputs(p, q, k, v, k_prefix, v_prefix, lengths)


def _ours(inputs: Inputs) -> Step:
    p = inputs.problem
    options = {"cache_seqlens": inputs.lengths, "sigmoid_bias": inputs.bias}
    if p.prefix:
        prefix = (inputs.k_prefix, inputs.v_prefix)
        return lambda: sigmoid_attention_with_prefix(inputs.q, *prefix, inputs.k, inputs.v, **options)
    if not p.page_size:
        return lambda: sigmoid_attention_with_kvcache(inputs.q, inputs.k, inputs.v, **options)
    # pages in no order
    each = p.seqlen // p.page_size
    order = torch.randperm(p.batch * each, generator=torch.Generator().manual_seed(0)).to(inputs.q.device)
    k, v = (x.reshape(-1, p.page_size, *x.shape[2:]) for x in (inputs.k, inputs.v))
    k, v = (torch.empty_like(x).index_copy_(0, order, x) for x in (k, v))
    options["page_table"] = order.view(p.batch, each).int()
    return lambda: sigmoid_attention_with_kvcache(inputs.q, k, v, **options)


def _ours_unshared(inputs: Inputs) -> Step:
    """The prefix in front of every sequence's own keys, and read with them."""
    if not inputs.problem.prefix:
        raise ValueError("no prefix")
    k, v = _copied(inputs)
    lengths = inputs.lengths + inputs.problem.prefix
    options = {"cache_seqlens": lengths, "sigmoid_bias": inputs.bias}
    return lambda: sigmoid_attention_with_kvcache(inputs.q, k, v, **options)


def _copied(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """All keys and values of every sequence."""
    if not inputs.problem.prefix:
        return inputs.k, inputs.v
    both = ((inputs.k_prefix, inputs.k), (inputs.v_prefix, inputs.v))
    k, v = (torch.cat((a.expand(x.shape[0], *a.shape), x), 1) for a, x in both)
    return k, v


def _sdpa(kernel: SDPBackend) -> Callable[[Inputs], Step]:
    def prepare(inputs: Inputs) -> Step:
        # views: a cache is laid out as decoding writes it
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, *_copied(inputs)))

        def step() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return step

    return prepare


def _fa3(inputs: Inputs) -> Step:
    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        raise ValueError("torch.ops.flash_attn_3.fwd is not loaded, see --load-library")
    k, v = _copied(inputs)
    options = {"softmax_scale": inputs.problem.head_dim**-0.5, "is_causal": False, "num_splits": 0}  # its own choice
    return lambda: torch.ops.flash_attn_3.fwd(inputs.q, k, v, **options)[0]


PEERS: dict[str, tuple[str, Callable[[Inputs], Step]]] = {
    "triton": ("ours", _ours),
    "triton, prefix not shared": ("ours", _ours_unshared),
    "sdpa flash": ("softmax", _sdpa(SDPBackend.FLASH_ATTENTION)),
    "sdpa cudnn": ("softmax", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    "sdpa efficient": ("softmax", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    "fa3": ("softmax", _fa3),
}


class Gate:
    """The last sequence and the query heads of the last key head, against float64.

    The witness has its weights and its result rounded, as a kernel's are, and sums in float32: the one of the other
    gates takes 16 keys at a time, half a million would be seconds.
    """

    def __init__(self, inputs: Inputs) -> None:
        p = inputs.problem
        group = p.nheads // p.nheads_k
        self.heads = slice(p.nheads - group, p.nheads)
        k, v = (x[0, :, 0].double() for x in inputs.whole(p.batch - 1))
        s = inputs.q[-1, 0, self.heads].double() @ k.T * p.head_dim**-0.5  # (group, seqlen)
        a = torch.sigmoid(s + inputs.bias)
        self.exact, self.softmax = ((x @ v)[None, None] for x in (a, s.softmax(-1)))
        dtype = inputs.q.dtype
        self.near = (a.to(dtype).float() @ v.float()).to(dtype)[None, None]

    def errors(self, out: Tensor, kind: str) -> tuple[float, float | None]:
        """(relative rms error, times over the budget: of ours)."""
        part = out[-1:, :, self.heads]
        if kind == "softmax":
            return relative_rms(part, self.softmax), None
        return relative_rms(part, self.exact), max(errors_over_budget(part, self.exact, self.near))


def run(
    problems: Iterable[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 15,
    names: Iterable[str] = (),
    out: Path | None = None,
    show: Callable[[str], object] = lambda _: None,
) -> list[Record]:
    """Time a step of every candidate as a CUDA graph, interleaved with the others and with a copy; records.

    `time_ms` with p10 and p90, `read_fraction`: bytes of the cache (with the prefix once) over time, over the copy's
    rate; `speedup_over_softmax`: over the fastest softmax of the problem. A cache that does not fit the GPU is skipped
    with its reason.

    Raises:
        ValueError: no CUDA device, or an unknown candidate.
        AssertionError: ours is outside the error budget.
    """
    if not torch.cuda.is_available():
        raise ValueError("decoding must be timed on a CUDA device, got none")
    names = list(names) or list(PEERS)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": "cuda", "rounds": rounds, "bias": "-log n"}
    settings |= {"graphs": True, "l2": "not flushed", "work": "decode"}
    records: list[Record] = []
    writer = None if out is None else RecordWriter(out, settings=settings)
    try:
        for name in problems:
            found = list(_measured(PROBLEMS[name], names, dtype, rounds))
            for record in found:
                if writer is not None:
                    writer.write(record.name, record.value, unit=record.unit, **record.tags)  # pyright: ignore[reportArgumentType]
            records += found
            for line in _lines(found):
                show(line)
            torch.cuda.empty_cache()
    finally:
        if writer is not None:
            writer.close()
    return records


def _measured(problem: Decode, names: list[str], dtype: torch.dtype, rounds: int) -> Iterator[Record]:
    free, _ = torch.cuda.mem_get_info()
    # paged: a copy in another order
    need = problem.cache_bytes(dtype) * (2 if problem.page_size else 1)
    if need > 0.95 * free:
        reason = f"{need / 2**30:.0f} GiB of keys and values in {free / 2**30:.0f} GiB of memory"
        yield Record(name="unavailable", tags={"problem": problem.name, "peer": "all", "reason": reason})
        return
    inputs = make_inputs(problem, dtype, "cuda")
    gate = Gate(inputs)
    samples: dict[str, Sample] = {}
    for name in names:
        tags: dict[str, Scalar] = {"problem": problem.name, "peer": name}
        kind, prepare = PEERS[name]
        stream = torch.cuda.Stream()
        try:
            with torch.no_grad(), side_stream(stream):
                step = prepare(inputs)
                result = step()
            rms, over = gate.errors(result, kind)
            with torch.no_grad():
                sample = by_events(step, stream, graphs=True)
        except (CaptureError, RuntimeError, ValueError) as error:
            if kind == "ours" and not isinstance(error, (CaptureError, ValueError, torch.OutOfMemoryError)):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            yield Record(name="unavailable", tags={**tags, "reason": reason})
            continue
        yield Record(name="error_rms", value=rms, tags={**tags, "tensor": "out", "kind": kind})
        if over is not None:
            assert over <= 1.0, f"{name} must be inside the error budget on {problem.name}, got {over:.3g} times over"
            yield Record(name="error_over_budget", value=over, unit="times", tags=tags)
        samples[name] = sample
    copy = ceiling_samples(dtype, graphs=True)[COPY]
    times = interleaved({**samples, COPY: copy}, rounds=rounds)
    ceilings = list(ceiling_records({COPY: times.pop(COPY)}))
    yield from (Record(name=x.name, value=x.value, unit=x.unit, tags={**x.tags, "of": problem.name}) for x in ceilings)
    yield from _speeds(problem, dtype, times, float(ceilings[0].value or 0.0))


def _speeds(problem: Decode, dtype: torch.dtype, times: dict[str, Times], copy_tb: float) -> Iterator[Record]:
    softmaxes = [name for name in times if PEERS[name][0] == "softmax"]
    fastest = min(softmaxes, key=lambda name: times[name].median_ms, default=None)
    for name, taken in times.items():
        tags: dict[str, Scalar] = {"problem": problem.name, "work": "decode", "peer": name}
        yield Record(name="time_ms", value=taken.median_ms, unit="ms", tags=tags)
        yield Record(name="time_p10_ms", value=taken.quantile_ms(0.1), unit="ms", tags=tags)
        yield Record(name="time_p90_ms", value=taken.quantile_ms(0.9), unit="ms", tags=tags)
        tb = problem.cache_bytes(dtype) / taken.median_ms / 1e9
        yield Record(name="read_fraction", value=tb / copy_tb, unit="of the copy rate", tags=tags)
        if fastest is not None:
            over = taken.speedup_over(times[fastest])
            yield Record(name="speedup_over_softmax", value=over, unit="times", tags={**tags, "softmax": fastest})


def _lines(records: list[Record]) -> Iterator[str]:
    numbers: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if record.name == "unavailable":
            yield f"{record.tags['problem']}: no {record.tags['peer']}: {record.tags['reason']}"
        elif "problem" in record.tags and record.value is not None:
            numbers.setdefault((str(record.tags["problem"]), str(record.tags["peer"])), {})[record.name] = record.value
    form = "{:24}{:27}{:>9}{:>12}{:>7}{:>9}{:>8}"
    yield form.format("problem", "", "us", "of copy", "x", "error", "budget")
    for (problem, peer), found in numbers.items():
        if "time_ms" in found:
            cells = (
                f"{1e3 * found['time_ms']:.1f}",
                f"{found['read_fraction']:.3f}",
                f"{found['speedup_over_softmax']:.2f}" if "speedup_over_softmax" in found else "",
                f"{found['error_rms']:.1e}",
                f"{found['error_over_budget']:.2f}" if "error_over_budget" in found else "",
            )
            yield form.format(problem, peer, *cells)
