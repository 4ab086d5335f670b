"""A training under the microscope: norms of everything, and what each attention does, every so many steps.

Of one forward alone: probes.py. Files are the caller's business: what is measured is handed to a function.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from .seeing import Seen, attention_layers, seeing
from .theory.layers import layer_bound, unbounded
from .weights import attention_norm, effective_keys, row_mass, saturation, sink_mass

Write = Callable[..., object]
_STACKED = 2**16  # elements up to which tensors of one shape are copied side by side, for the sake of fewer kernels
_Key = tuple[str, str]  # what it is, and of which layer or parameter


class Watch:
    """Measure a model while it trains: a context manager around the loop, over any model and optimizer of torch.

    In one of `every` steps it hands over numbers without a unit:

        probe_output, probe_output_grad     of each module's output and the gradient there, L2 norms of its vectors,
                                            those along the last dimension: their mean, with tags max and min
        probe_param, probe_param_grad,      of each parameter, its gradient as the optimizer got it, and what the
        probe_exp_avg, ...                  optimizer keeps of it, the same of its rows; a vector is one row
        probe_attn_norm/layer_0 ...         of each attention, numbered as they run: |A V|,
        probe_attn_grad                     the norm of the gradient at A V, mean over tokens,
        probe_row_mass, probe_effective_keys, probe_sink, probe_sink_4, probe_saturation
        probe_gain                          |dL/dX| / |dL/dY| of its input X and output Y: what the Jacobian does to
                                            the gradient that is there, so at most its norm
        probe_bound, probe_bound_share      `theory.layers.layer_bound` and probe_gain over it, for nn.SigmoidAttention

    A step is one of the optimizer's, the first has number 1 and is measured; if several batches make one, all of them
    count. Parameters and the optimizer's state are those after the step, all else is before it. Attention is that of
    `seeing`: what `probe_attention` sees; a layer of ours that is given packed sequences refuses. A, the gain and the
    bound are those of the first sequences of a batch, and need O(seqlen^2) memory. Only forwards of the model itself,
    in training mode and with gradients, count. Of what reentrant checkpointing recomputes, only layers of ours are
    seen, since it runs in the backward. Training goes on to the same bits, and between the steps measured
    nothing is left in the model but two hooks, afterwards nothing.

    Args:
        model: eager, on one device.
        optimizer: whose steps are counted.
        every: Default: 10.
        write: called as write(name, value, step=, **tags), for instance `RecordWriter.write`.
        only: patterns, as of file names, of the modules and parameters whose norms are measured. Default: all.
        sequences: of a batch, for A, the gain and the bound. Default: 1.
        start: steps done already. Default: 0.

    Raises:
        ValueError: every or sequences is below 1; the model is compiled, in whole or in part; it is on a mesh or on
            several devices; no module and no parameter is called like one of `only`.

    Source: what is measured of modules and parameters is what the simulator of arXiv:2409.04431 tracks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        write: Write,
        every: int = 10,
        only: Sequence[str] = (),
        sequences: int = 1,
        start: int = 0,
    ) -> None:
        for name, number in {"every": every, "sequences": sequences}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        for module in model.modules():  # torch.compile(model), and model.compile() in place
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise ValueError(f"model must not be compiled, got a {type(module).__name__} of torch.compile")
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise ValueError("model must be on one device, got parameters on a mesh")
        if len(devices := {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}) > 1:
            raise ValueError(f"model must be on one device, got {' and '.join(sorted(devices))}")
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        for pattern in only:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"only must be patterns of modules or parameters, got {pattern!r}, which matches none")
        self.model, self.optimizer, self.write = model, optimizer, write
        self.every, self.only, self.sequences, self.step = every, tuple(only), sequences, start
        self._mode: Any = None  # while the hooks are in place
        self._open = ExitStack()
        self._forget()

    def __enter__(self) -> Self:
        # modes must nest, so this one is entered and left with the model itself
        within = ExitStack()
        with ExitStack() as stack:
            for hook in (
                self.optimizer.register_step_post_hook(lambda *_: self._end_step()),
                self.model.register_forward_pre_hook(lambda *_: self._begin_forward(within)),
                self.model.register_forward_hook(lambda *_: within.close(), always_call=True),
            ):
                stack.callback(hook.remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._close()
        self._forget()

    def _forget(self) -> None:
        self._norms: dict[_Key, list[Tensor]] = defaultdict(list)  # of vectors, one tensor for each batch
        self._numbers: dict[_Key, list[Tensor]] = defaultdict(list)  # scalars, the same
        self._layers: list[str] = []  # the attentions, as they run

    def _close(self) -> None:
        self._open.close()
        self._mode = None

    def _begin_forward(self, within: ExitStack) -> None:
        """Put every hook in place, if the step is one to measure and they are not."""
        if self.step % self.every or not self._counts():
            return
        if self._mode is None:
            with ExitStack() as stack:
                self._mode = stack.enter_context(seeing(self.model, self._see))
                for hook in self._hooks_within():
                    stack.callback(hook.remove)
                self._open = stack.pop_all()
        within.enter_context(self._mode)

    def _hooks_within(self) -> Iterator[Any]:
        for name, module in self.model.named_modules():
            if self._is_chosen(name) and not isinstance(module, nn.Identity):
                yield module.register_forward_hook(lambda _, args, out, name=name: self._see_output(name, out))
        for name, layer in attention_layers(self.model).items():
            if unbounded(layer) is None:
                yield layer.register_forward_hook(
                    lambda layer, args, kwargs, out, name=name: self._see_layer(name, layer, args, kwargs),
                    with_kwargs=True,
                )
            yield layer.register_full_backward_hook(
                lambda _, grads, grads_out, name=name: self._see_gain(name, grads, grads_out)
            )

    def _end_step(self) -> None:
        if self._mode is not None:
            self._close()
            with torch.no_grad():
                self._see_parameters()
                self._hand_over()
            self._forget()
        self.step += 1

    def _is_chosen(self, name: str) -> bool:
        return not self.only or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.only)

    def _counts(self) -> bool:
        return self.model.training and torch.is_grad_enabled()

    def _see_output(self, name: str, out: Any) -> None:
        if not (isinstance(out, Tensor) and out.is_floating_point() and out.dim() > 1 and self._counts()):
            return
        self._norms["probe_output", name].append(_vector_norms(out.detach()))

        def see_grad(grad: Tensor) -> None:
            if self._mode:
                self._norms["probe_output_grad", name].append(_vector_norms(grad))

        if out.requires_grad:
            out.register_hook(see_grad)

    def _see(self, seen: Seen) -> None:
        if not self._counts():
            return
        layer = self._layer(seen.name)
        with torch.no_grad():
            a = seen.weights(self.sequences)
            measured = {
                "probe_attn_norm": attention_norm(seen.out.detach()),
                "probe_row_mass": row_mass(a),
                "probe_effective_keys": effective_keys(a),
                "probe_sink": sink_mass(a),
                "probe_sink_4": sink_mass(a, 4),
                "probe_saturation": saturation(a),
            }
        for name, value in measured.items():
            self._numbers[name, layer].append(value)

        def see_grad(grad: Tensor) -> None:
            if self._mode:
                self._numbers["probe_attn_grad", layer].append(attention_norm(seen.arrange(grad)))

        if seen.returned.requires_grad:
            seen.returned.register_hook(see_grad)

    def _layer(self, name: str) -> str:
        if name not in self._layers:
            self._layers.append(name)
        return name

    def _see_layer(self, name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("x", "key_mask", "cache", "packing"), args, strict=False)) | kwargs
        x, key_mask = given["x"], given.get("key_mask")
        if self._counts() and given.get("cache") is None and given.get("packing") is None:
            some = None if key_mask is None else key_mask[: self.sequences]
            self._numbers["probe_bound", name].append(layer_bound(layer, x.detach()[: self.sequences], some))

    def _see_gain(self, name: str, grads: Any, grads_out: Any) -> None:
        if not (self._mode and grads and grads[0] is not None and grads_out[0] is not None):
            return
        at_x, at_y = (
            torch.linalg.vector_norm(grad[0][: self.sequences].flatten(1), dim=1, dtype=_wide(grad[0]))
            for grad in (grads, grads_out)
        )
        self._numbers["probe_gain", name].append(at_x / at_y)

    def _see_parameters(self) -> None:
        found: dict[_Key, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if not self._is_chosen(name):
                continue
            found["probe_param", name] = parameter.detach()
            if parameter.grad is not None:
                found["probe_param_grad", name] = parameter.grad
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    found[f"probe_{key}", name] = value
        alike: dict[Any, list[_Key]] = defaultdict(list)
        for key, x in found.items():
            alike[(x.shape, x.dtype) if x.numel() <= _STACKED else key].append(key)
        for keys in alike.values():
            first = found[keys[0]]
            x = torch.stack([found[key] for key in keys]) if len(keys) > 1 else first[None]
            norms = _vector_norms(x.reshape(len(keys), 1, -1) if first.dim() < 2 else x).reshape(len(keys), -1)
            for key, some in zip(keys, norms, strict=True):
                self._norms[key].append(some)

    def _hand_over(self) -> None:
        """One wait for the device, for all numbers of the step."""
        means = {
            key: torch.stack([value.float().mean() for value in some]).mean() for key, some in self._numbers.items()
        }
        for name, layer in list(means):
            if name == "probe_bound" and ("probe_gain", layer) in means:
                means["probe_bound_share", layer] = means["probe_gain", layer] / means[name, layer]
        scalars: list[tuple[_Key, str]] = []
        values: list[Tensor] = []
        alike: dict[int, list[_Key]] = defaultdict(list)
        joined = {key: torch.cat(some) if len(some) > 1 else some[0] for key, some in self._norms.items()}
        for key, norms in joined.items():
            alike[len(norms)].append(key)
        for keys in alike.values():
            norms = torch.stack([joined[key].float() for key in keys])
            values += [norms.mean(1), norms.amax(1), norms.amin(1)]
            scalars += [(key, which) for which in ("mean", "max", "min") for key in keys]
        values += [mean[None] for mean in means.values()]
        scalars += [(key, "") for key in means]
        read = torch.cat(values).tolist() if values else []
        found: dict[_Key, dict[str, float]] = defaultdict(dict)
        for (key, which), value in zip(scalars, read, strict=True):
            found[key][which] = value
        for (name, layer), numbers in found.items():
            if "mean" in numbers:
                tags = {"layer": layer, "max": numbers["max"], "min": numbers["min"]}
                self.write(name, numbers["mean"], step=self.step + 1, **tags)
            else:
                number = self._layers.index(layer) if layer in self._layers else layer
                self.write(f"{name}/layer_{number}", numbers[""], step=self.step + 1, layer=layer)


def _vector_norms(x: Tensor) -> Tensor:
    """L2 norms of the vectors along the last dimension, flat, in at least float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x)).flatten()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
