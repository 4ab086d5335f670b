"""Longer audio than was trained on: utterances of one speaker joined, 2, 4 and 8 at a time, and the errors on them.

Short and joined audio is the same audio: what a length costs is not mixed up with what is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.ctc_decode import greedy
from ..models.speech import SpeechEncoder
from ..record import RecordWriter
from .audio import AudioConfig, Utterance, Utterances, load_audio, log_mel, read_audio
from .checkpoint import find_checkpoint, load_config
from .ctc import error_rates, load_recogniser

NAME = "long-audio.jsonl"  # beside records.jsonl
FACTORS = (1, 2, 4, 8)
Heard = tuple[str, str, float]  # what the model answers, what was said, seconds


def joined(utterances: Sequence[Utterance], factor: int, most: int) -> list[list[Utterance]]:
    """Groups of `factor` utterances of one speaker, in the order given.

    Of every speaker only the first k * most are taken, whatever the factor, so that all factors have the same audio; a
    speaker of fewer than `most` is left out.

    Args:
        utterances: of any speakers.
        factor: a divisor of most.
        most: the largest factor.

    Raises:
        ValueError: no speaker has so many, or factor divides not.
    """
    if factor < 1 or most % factor:
        raise ValueError(f"factor must divide the largest factor, {most}, got {factor}")
    speakers: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        speakers.setdefault(utterance.speaker, []).append(utterance)
    groups = []
    for own in speakers.values():
        used = own[: len(own) // most * most]
        groups += [used[i : i + factor] for i in range(0, len(used), factor)]
    if not groups:
        got = max(map(len, speakers.values()))
        raise ValueError(f"a speaker must have at least {most} utterances, the largest factor, got {got}")
    return groups


def hear_joined(
    model: SpeechEncoder, audio: AudioConfig, utterances: Sequence[Utterance], factor: int, most: int
) -> list[Heard]:
    """What the model hears in utterances joined, by the best path, one group after the other.

    Samples are joined without a pause, their texts by a space; features are normalised over the whole.

    Args:
        model: in eval mode; b stays that of its training.
        audio: how it is read.
        utterances, factor, most: as `joined`.

    Raises:
        ValueError: as `joined`; audio that cannot be used.
    """
    device, found = next(model.parameters()).device, []
    for group in joined(utterances, factor, most):
        try:
            parts = [read_audio(each.path, audio.rate, each.start, each.frames) for each in group]
        except ValueError as error:
            raise ValueError(f"audio must be usable, got {', '.join(map(str, group))}: {error}") from error
        samples = np.concatenate(parts)
        features = log_mel(samples, audio.rate, audio.mels)
        with torch.no_grad():
            logits, lengths = model(features[None].to(device), torch.tensor([len(features)], device=device))
        heard = audio.decode(greedy(logits, lengths)[0])
        found.append((heard, " ".join(each.text for each in group), len(samples) / audio.rate))
    return found


def _usable(data: Utterances) -> list[Utterance]:
    """All utterances; where the run leaves out what cannot be used, those that can, the others named."""
    if data.config.on_corrupt == "fail":
        return list(data.utterances)
    return [each for number, each in enumerate(data.utterances) if data[number] is not None]


def long_audio(
    run: str | Path,
    *,
    factors: Sequence[int] = FACTORS,
    device: str = "cpu",
    root: str | None = None,
    show: Callable[[str], None] = print,
) -> Path:
    """The errors of a trained recogniser on joined validation utterances, as records in long-audio.jsonl of its run.

        long/cer, long/cer_se, long/wer, long/wer_se, long/seconds (median of a group)       tags: factor, groups

    Args:
        run: a run folder, whose newest checkpoint is taken.
        factors: how many utterances are joined; divisors of the largest. Default: 1, 2, 4, 8.
        device: where it runs, in float32. Default: cpu.
        root: where the data are now; default: where they were.
        show: told about every factor.

    Returns:
        The path of the records.

    Raises:
        ValueError: no checkpoint of a recogniser; data that cannot be used, unless the run leaves such out; factors
            that do not fit them.
    """
    if not factors or min(factors) < 1:
        raise ValueError(f"factors must be positive, at least one, got {tuple(factors)}")
    checkpoint = find_checkpoint(run)
    model, audio = load_recogniser(checkpoint, device)
    audio = audio if root is None else replace(audio, root=root)
    utterances = _usable(load_audio(audio, model.config.positions).val)
    most, step = max(factors), int(checkpoint.name.removeprefix("step-"))
    heard = {factor: hear_joined(model, audio, utterances, factor, most) for factor in factors}
    path = Path(run) / NAME
    path.unlink(missing_ok=True)
    settings = {name: load_config(checkpoint)["run"][name] for name in ("name", "seed")}
    settings |= {name: getattr(model.config, name) for name in ("attention", "position", "alibi_bias")}
    with RecordWriter(path, settings) as writer:
        for factor, answers in heard.items():
            tags: dict[str, Any] = {"step": step, "factor": factor, "groups": len(answers)}
            rates = error_rates([answer for answer, _, _ in answers], [said for _, said, _ in answers])
            for name, value in rates.items():
                writer.write(f"long/{name}", value, **tags)
            seconds = statistics.median(length for _, _, length in answers)
            writer.write("long/seconds", seconds, unit="s", **tags)
            show(
                f"{factor} x: {len(answers)} of {seconds:.1f} s, "
                f"CER {rates['cer']:.1%} ± {rates['cer_se']:.1%}, WER {rates['wer']:.1%} ± {rates['wer_se']:.1%}"
            )
    return path
