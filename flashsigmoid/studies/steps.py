"""A step of training: forward, backward, clip, AdamW. On an NVIDIA GPU it is one CUDA graph for each shape of a batch.

A step of a small model is some three hundred kernels of a few microseconds each: launched one by one from Python they
take five times as long as they run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..training.optim import OptimConfig, adamw

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]  # a function that is only recorded -> what does it
_EAGER = 3  # steps of a shape before it is captured: kernels are compiled, the optimizer's state is made


class Steps:
    """Trains a model by whole steps.

    Args:
        model: on its device; trained are its parameters that want a gradient.
        loss: inputs and targets -> a scalar, by the model.
        config: rates, decay and the largest norm of the gradient.
        device: where the batches are. On "cuda" steps are captured.
        capture: Default: a CUDA graph where the device is "cuda", else none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        config: OptimConfig,
        device: torch.device,
        *,
        capture: Capture | None = None,
    ) -> None:
        self.model, self.loss, self.clip = model, loss, config.clip
        self.optimizer = adamw(model, config)
        self.rate = torch.zeros((), device=device)
        if capture is None and device.type == "cuda":
            capture = CudaGraphs(device)
        self.capture = capture
        for group in self.optimizer.param_groups if capture is not None else ():
            group["capturable"] = device.type == "cuda"
            group["lr"] = self.rate  # a graph reads it, a number it would keep
        self._seen: dict[tuple[torch.Size, torch.dtype, torch.Size], int] = {}
        self._captured: dict[tuple[torch.Size, torch.dtype, torch.Size], _Captured] = {}

    def __call__(self, inputs: Tensor, targets: Tensor, lr: float) -> Tensor:
        """One step with a batch and a learning rate; the loss before it, a scalar that nothing waited for."""
        if self.capture is None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            return self._step(inputs, targets)
        self.rate.fill_(lr)
        shape = (inputs.shape, inputs.dtype, targets.shape)
        if shape not in self._captured:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= _EAGER:
                return self._step(inputs, targets)
            self._captured[shape] = _Captured(self, inputs, targets, self.capture)
        return self._captured[shape](inputs, targets)

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        lost = self.loss(inputs, targets)
        lost.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return lost.detach()


class _Captured:
    """A step for batches of one shape, which are copied to where the recorded step reads them."""

    def __init__(self, steps: Steps, inputs: Tensor, targets: Tensor, capture: Capture) -> None:
        self.inputs, self.targets = inputs.clone(), targets.clone()
        self.lost = torch.empty((), device=inputs.device)
        steps.optimizer.zero_grad(set_to_none=True)  # gradients of the recorded step are its own

        def step() -> None:
            self.lost.copy_(steps._step(self.inputs, self.targets))

        self.replay = capture(step)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.replay()
        return self.lost.clone()


class CudaGraphs:
    """Records functions as CUDA graphs that share their memory: what one leaves there, the next may overwrite."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Replay:
        """Record a function on the device, without running it."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            function()
        return graph.replay
