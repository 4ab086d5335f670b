"""The embedded text for small studies: its bytes, batches of training, windows of validation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..samples import tinyshakespeare
from .trials import Budget, Draw, generator_at

BYTES = 256


def text_bytes() -> tuple[Tensor, Tensor]:
    """The embedded Shakespeare as bytes: the first nine tenths to train on, the last to validate on; uint8."""
    text = torch.frombuffer(bytearray(tinyshakespeare().read_bytes()), dtype=torch.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def text_draw(text: Tensor, budget: Budget, seed: int, device: torch.device | str = "cpu") -> Draw:
    """Random windows of the text, and the byte after each byte: a pure function of seed and step, drawn on a device."""
    text, places = text.to(device), torch.arange(budget.seqlen + 1, device=device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = generator_at(seed, step, device)
        starts = torch.randint(0, len(text) - budget.seqlen, (budget.batch, 1), generator=generator, device=device)
        # (batch, seqlen + 1)
        windows = text[starts + places].long()
        return windows[:, :-1], windows[:, 1:]

    return draw


def text_windows(text: Tensor, seqlen: int, tokens: int) -> Tensor:
    """Windows (count, seqlen + 1) spread evenly over the text, `tokens` predicted bytes in all, whatever seqlen."""
    count = max(1, tokens // seqlen)
    starts = torch.linspace(0, len(text) - seqlen - 1, count).long()[:, None]
    return text[starts + torch.arange(seqlen + 1)].long()
