"""What the device could do at best: a large matrix product and a large copy, timed in the same rounds as the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..record import Record
from .timing import Sample, Times, by_events

MATMUL, COPY = "matmul 8192", "copy"
_SIDE = 8192
_COPIED_BYTES = 2**30  # larger than any L2, so both directions go to memory


def samples(dtype: torch.dtype, *, graphs: bool) -> dict[str, Sample]:
    """The samples of both, on CUDA."""
    x, y = (torch.randn(_SIDE, _SIDE, dtype=dtype, device="cuda") for _ in range(2))
    product = torch.empty_like(x)
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    functions = {MATMUL: lambda: torch.mm(x, y, out=product), COPY: lambda: target.copy_(source)}
    torch.cuda.synchronize()
    return {name: by_events(function, torch.cuda.Stream(), graphs=graphs) for name, function in functions.items()}


def records(times: Mapping[str, Times]) -> Iterator[Record]:
    """TFLOP/s of the product, TB/s of the copy (read and written)."""
    work = {MATMUL: (2.0 * _SIDE**3, "ceiling_tflops", "TFLOP/s"), COPY: (2.0 * _COPIED_BYTES, "ceiling_tb", "TB/s")}
    for name, taken in times.items():
        amount, quantity, unit = work[name]
        yield Record(name=quantity, value=amount / taken.median_ms / 1e9, unit=unit, tags={"peer": name})
