"""Language-model runs, from the demo's to the paper's. Each is the sigmoid arm; its twin is run.with_attention("softmax")."""

from __future__ import annotations

from collections.abc import Callable

from ..models.gpt import gpt_1b, gpt_7b, gpt_40m, gpt_85m, gpt_demo
from ..training.data import DataConfig
from ..training.optim import OptimConfig
from ..training.run import LanguageRun


def demo() -> LanguageRun:
    """Bytes of the embedded Shakespeare, small enough that both arms train in four minutes on two CPU cores.

    Paper: arXiv:2409.04431, its practices at toy size. Command: flashsigmoid demo. Hardware: 2 CPU cores, no GPU.
    Wall time, expected: not yet measured.
    """
    return LanguageRun(
        name="demo",
        model=gpt_demo(),
        data=DataConfig(val_windows=128),
        optim=OptimConfig(lr=3e-3, warmup=50),
        steps=500,
        batch=16,
        val_every=50,
        save_every=50,
    )


RECIPES: dict[str, Callable[[], LanguageRun]] = {"demo": demo}
