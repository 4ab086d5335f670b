"""Language-model runs, from the demo's to the paper's. Each is a sigmoid arm; run.with_attention("softmax") its twin.

The paper trains on a web corpus of its own; here the recipes from 40M on stream FineWeb-Edu, tokenized by a BPE trained
on its first documents, and any other text takes its place by data.source.

Those that are not the paper's have alibi_bias=True, a bias for each head by its slope of ALiBi; with RoPE it must be
none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..models.gpt import GPTConfig, gpt_1b, gpt_7b, gpt_40m, gpt_85m, gpt_demo, gpt_enwik8
from ..training.data import DataConfig
from ..training.optim import OptimConfig
from ..training.run import LanguageRun

WEB = DataConfig(source="hf:HuggingFaceFW/fineweb-edu:sample-10BT", tokenizer="bpe", val_windows=256)


def demo() -> LanguageRun:
    """Bytes of the embedded Shakespeare, small enough that both arms train in four minutes on two CPU cores.

    Paper: arXiv:2409.04431, its practices at toy size. Command: flashsigmoid demo. Hardware: 2 CPU cores. Wall time:
    about 70 s an arm. Expected: 1.81 to 1.82 nats per byte over three seeds, softmax 1.81 to 1.83, with one b for all
    heads 1.83 to 1.85; a counted bigram model has 2.48, no function of the previous byte less than 2.35
    (benchmarks/results/demo-alibi).
    """
    return LanguageRun(
        name="demo",
        model=replace(gpt_demo(), alibi_bias=True),
        data=DataConfig(val_windows=128),
        optim=OptimConfig(lr=3e-3, warmup=50),
        steps=500,
        batch=16,
        val_every=50,
        save_every=50,
    )


def shakespeare() -> LanguageRun:
    """The same bytes with a model that fits them: 6 layers of 192, context 256, 10 M tokens.

    Paper: arXiv:2409.04431, its practices at small size. Command: flashsigmoid train shakespeare. Hardware: 2 CPU cores
    or any GPU. Wall time: not yet measured. Expected: not yet measured (a first look: about 1.5 nats per byte).
    """
    return LanguageRun(
        name="shakespeare",
        model=GPTConfig(vocab_size=257, seqlen=256, nlayers=6, dim=192, nheads=6, norm="hybrid", alibi_bias=True),
        optim=OptimConfig(lr=2e-3, warmup=100),
        steps=1200,
        batch=32,
        val_every=100,
        save_every=100,
    )


def enwik8() -> LanguageRun:
    """39M parameters on the bytes of enwik8 at n = 1024, 66 M of them: bits per byte of both arms in minutes.

    ALiBi, or RoPE by --set position=rope --set alibi_bias=none; hybrid-norm, or not by --set norm=pre. Softmax with
    ALiBi runs on FlexAttention, with RoPE on torch's scaled_dot_product_attention; the record attention_kernel names
    it.

    Paper: arXiv:2409.04431, its practices for language. Command: flashsigmoid train enwik8 --data enwik8:FILE, the file
    enwik8 or its zip. Hardware: 1 GPU of 40 GB. Wall time: two minutes on an H100, and two more to compile and to
    evaluate. Expected: 1.270 to 1.277 bits per byte of the test split; softmax with ALiBi 1.269 to 1.272, with RoPE
    1.271 to 1.275 (benchmarks/results/enwik8).
    """
    return LanguageRun(
        name="enwik8",
        model=replace(gpt_enwik8(), alibi_bias=True),
        data=DataConfig(source="enwik8:enwik8", val_windows=256),
        optim=OptimConfig(lr=1.5e-3, warmup=200),
        steps=2000,
        batch=32,
        precision="bf16",
        compile=True,
        val_every=500,
        save_every=500,
        log_every=20,
    )


def enwik8_4k() -> LanguageRun:
    """`enwik8` at n = 4096, with as many bytes in a step.

    Paper: arXiv:2409.04431, where hybrid-norm is needed at this length. Command: flashsigmoid train enwik8_4k --data
    enwik8:FILE. Hardware: 1 GPU of 40 GB. Wall time: 4 minutes beside another training on the same H100. Expected:
    1.294 bits per byte of the test split, softmax with RoPE 1.296, one seed (benchmarks/results/enwik8_4k).
    """
    run = enwik8()
    data = replace(run.data, val_windows=64)
    return replace(run, name="enwik8_4k", model=replace(run.model, seqlen=4096), data=data, batch=8)


def language_40m() -> LanguageRun:
    """40M parameters, 0.8 G tokens: the smallest run on web text, twenty tokens a parameter.

    Paper: arXiv:2409.04431, its practices. Command: flashsigmoid train language_40m. Hardware: 1 GPU of 24 GB.
    Wall time: not yet measured. Expected: not yet measured.
    """
    return LanguageRun(
        name="language_40m",
        model=replace(gpt_40m(), alibi_bias=True),
        data=WEB,
        optim=OptimConfig(lr=2e-3, warmup=500),
        steps=12_000,
        batch=16,
        accumulate=4,
        precision="bf16",
        val_every=500,
        save_every=500,
    )


def paper_85m() -> LanguageRun:
    """The paper's 85M at n = 2048: the size of its ablations.

    Paper: arXiv:2409.04431 (12 layers of 768, ALiBi, QK-norm, decay 1e-4, warm-up 5,000, clipping at 1). Its lr of 0.01
    is mu-parametrised; ours is plain, so lower. Command: flashsigmoid train paper_85m. Hardware: 1 GPU of 80 GB.
    Wall time: not yet measured. Expected: not yet measured (paper: parity with softmax).
    """
    return LanguageRun(
        name="paper_85m",
        model=gpt_85m(),
        data=WEB,
        optim=OptimConfig(lr=1e-3, warmup=5000, weight_decay=1e-4),
        steps=40_000,
        batch=16,
        accumulate=8,
        precision="bf16",
        val_every=1000,
        save_every=1000,
    )


def paper_1b() -> LanguageRun:
    """The paper's 1B at n = 4096, where hybrid-norm is needed.

    Paper: arXiv:2409.04431 (24 layers of 2048). Command: flashsigmoid train paper_1b. Hardware: 1 GPU of 141 GB, where
    it takes months; more by --mesh (docs/scaling.md). Wall time: not yet measured. Expected: not yet measured
    (paper: parity with softmax).
    """
    run = paper_85m()
    optim = replace(run.optim, lr=5e-4)
    data = replace(WEB, source="hf:HuggingFaceFW/fineweb-edu:sample-100BT")
    return replace(run, name="paper_1b", model=gpt_1b(), data=data, optim=optim, steps=60_000, batch=4, accumulate=128)


def paper_7b() -> LanguageRun:
    """The paper's 7B at n = 4096: a description; one device does not hold its training.

    Its state leaves no room for the activations of more than a few thousand tokens.

    Paper: arXiv:2409.04431 (32 layers of 4096). Command: flashsigmoid train paper_7b --mesh cp=8 --set
    recompute=selective. Hardware, wall time, expected: not yet measured (paper: parity with softmax).
    """
    run = paper_1b()
    return replace(
        run, name="paper_7b", model=gpt_7b(), optim=replace(run.optim, lr=3e-4), batch=1, accumulate=1024, steps=120_000
    )


RECIPES: dict[str, Callable[[], LanguageRun]] = {
    recipe.__name__: recipe
    for recipe in (demo, shakespeare, enwik8, enwik8_4k, language_40m, paper_85m, paper_1b, paper_7b)
}
