"""Runs on speech, from the embedded sample's to the paper's.

Each is a sigmoid arm; run.with_attention("softmax") its twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ..models.speech import SpeechConfig, speech_255m, speech_small
from ..training.audio import AudioConfig, SpecAugmentConfig
from ..training.ctc import SpeechRun
from ..training.optim import OptimConfig


def an4_sample() -> SpeechRun:
    """A hundred embedded utterances of digits and commands, small enough that both arms train in minutes on a CPU.

    Paper: arXiv:2409.04431, its practices for speech at toy size. Command: flashsigmoid train an4_sample. Hardware: 2
    CPU cores. Wall time: 58 and 88 s of CPU time an arm on one core; 3 minutes each beside several other processes.
    Expected: over five seeds character errors of 19.0 to 23.2 % (softmax 19.0 to 22.5 %), the best constant answer has
    68.1 % (benchmarks/results/an4_sample); alibi_bias=true changes nothing. With CAPE in
    place of ALiBi so few utterances teach less: a run of 200 steps ended at 50 %, where this one stood at 29 % after
    200.
    """
    return SpeechRun(
        name="an4_sample",
        model=SpeechConfig(
            vocab_size=29, seqlen=48, nlayers=4, dim=96, nheads=4, mels=40, position="alibi", dropout_p=0.1
        ),
        data=AudioConfig(mels=40),
        augment=SpecAugmentConfig(time_width=25, channel_width=20),
        optim=OptimConfig(lr=2e-3, warmup=100),  # with 50 sigmoid ends at 42 % in one seed of three
        steps=500,
        batch=16,
        val_every=100,
        save_every=100,
    )


def an4() -> SpeechRun:
    """CMU AN4 whole: 948 utterances to train on, 130 of other speakers to validate on; 15 M parameters, 100 epochs.

    With ALiBi; an4_cape, an4_rope and an4_sincos are the same with other positions. Its manifest names the official
    test part; choose settings on --set data.hold_out=10, every tenth training speaker.

    Paper: arXiv:2409.04431, its practices for speech. Command: flashsigmoid train an4 --set data.root=manifest.tsv, a
    file with the columns split (train, test), path, text and speaker. Hardware: 1 GPU. Wall time: three minutes alone
    on an H100 by the time of a step, 51 ms; 8 minutes beside eleven others. Expected: character errors of 6.2 to 6.4 %,
    softmax 5.7 to 6.2 %, three seeds (benchmarks/results/an4).
    """
    return SpeechRun(
        name="an4",
        model=replace(speech_small(), position="alibi"),
        data=AudioConfig(source="manifest", root="manifest.tsv", val="test"),
        augment=SpecAugmentConfig(time_width=50),
        optim=OptimConfig(lr=1e-3, warmup=300, final_lr=0.01),
        steps=3000,
        batch=32,
        precision="bf16",
        val_every=250,
        save_every=250,
        log_every=50,
    )


def an4_normed() -> SpeechRun:
    """`an4` with an RMSNorm of what each head gives and b = -log n - 3: errors stay where they are on longer audio.

    Paper: arXiv:2409.04431; the norm and the lower b are ours. Command: flashsigmoid train an4_normed --set
    data.root=manifest.tsv. Hardware, wall time: as an4. Expected: character errors of 5.7 to 6.0 %, of eight
    utterances joined 6.2 to 7.4 %, where an4 has 14.9 to 17.0 % (benchmarks/results/an4/alibi/normed).
    """
    run = an4()
    model = replace(run.model, out_norm=True, sigmoid_bias=-math.log(run.model.seqlen) - 3.0)
    return replace(run, name="an4_normed", model=model)


def an4_cape() -> SpeechRun:
    """`an4` with CAPE, sin-cos positions that are shifted, jittered and stretched while training.

    Paper: arXiv:2409.04431. Command: flashsigmoid train an4_cape --set data.root=manifest.tsv. Hardware, wall time: as
    an4. Expected: character errors of 10.3 %, softmax 8.4 %, one seed (benchmarks/results/an4).
    """
    return _an4_with("cape")


def an4_rope() -> SpeechRun:
    """`an4` with RoPE.

    Paper: arXiv:2409.04431, where sigmoid with RoPE is weak on long audio. Command: flashsigmoid train an4_rope --set
    data.root=manifest.tsv. Hardware, wall time: as an4. Expected: character errors of 6.2 %, softmax 6.2 %, one seed.
    """
    return _an4_with("rope")


def an4_sincos() -> SpeechRun:
    """`an4` with fixed sin-cos positions.

    Paper: arXiv:2409.04431. Command: flashsigmoid train an4_sincos --set data.root=manifest.tsv. Hardware, wall time:
    as an4. Expected: character errors of 11.9 %, softmax 11.5 %, one seed.
    """
    return _an4_with("sincos")


def _an4_with(position: Literal["cape", "rope", "sincos"]) -> SpeechRun:
    run = an4()
    return replace(run, name=f"an4_{position}", model=replace(run.model, position=position))


def paper_speech_255m() -> SpeechRun:
    """The paper's 255M encoder on LibriSpeech's 960 hours, characters, 100 epochs in batches of 256 utterances.

    Paper: arXiv:2409.04431, its runs on speech; what it does not state (rates, epochs, masks) is ours. Command:
    flashsigmoid train paper_speech_255m --set data.root=FOLDER that holds train-clean-100, train-clean-360,
    train-other-500 and dev-clean. Hardware: GPUs of 80 GB, eight of them by --mesh dp=8; on one it takes weeks.
    Wall time: not yet measured. Expected: not yet measured (paper: parity with softmax).
    """
    return SpeechRun(
        name="paper_speech_255m",
        model=speech_255m(),
        data=AudioConfig(
            source="librispeech", root="LibriSpeech", train="train-clean-100,train-clean-360,train-other-500",
            val="dev-clean", in_memory=False,
        ),
        augment=SpecAugmentConfig(time_masks=10, time_width=50),
        optim=OptimConfig(lr=5e-4, warmup=10_000, final_lr=0.01),
        steps=110_000,
        batch=16,
        accumulate=16,
        precision="bf16",
        workers=8,
        val_every=2000,
        save_every=2000,
        log_every=50,
    )  # fmt: skip


RECIPES: dict[str, Callable[[], SpeechRun]] = {
    recipe.__name__: recipe
    for recipe in (an4_sample, an4, an4_normed, an4_cape, an4_rope, an4_sincos, paper_speech_255m)
}
