"""Runs the source of the Hopper kernels on a CPU: a warp or warpgroup is a thread, shared memory is bytes.

What the hardware does in its own time is looked at twice: what a product reads when it is issued and when it is waited
for, a copy to memory likewise. If it changed between, the result is NaN: on a GPU it would be one or the other. Memory
that nobody wrote is NaN, too, and so is what a copy brings until somebody waits for it. A barrier that nobody completes
is an error after a while. Not imitated: registers, the order of a warp's threads, fences between proxies, and the
formulas' text in PTX, in whose place torch's sigmoid is.
"""

from __future__ import annotations

import builtins
import random
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import flashsigmoid.backends.hopper as hopper

SHARED_BYTES = 227 * 1024
PATIENCE_S = 20.0
PAUSE_S = 0.0  # of who waits for what it has issued
_here = threading.local()  # of a thread: machine, and what it has issued and not waited for


class Barrier:
    """Counts arrivals, and bytes that are on their way; both at zero end a phase."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.count = machine, 0
        self.left = self.bytes = self.phases = 0
        self.coming: list[tuple[Memory, Tensor]] = []

    def change(self, arrivals: int, expected: int) -> None:
        with self.machine.changed:
            self.left -= arrivals
            self.bytes += expected
            assert self.left >= 0, "more arrivals than a phase has"
            if self.left == 0 and self.bytes == 0:
                self.left = self.count
                self.phases += 1
                self.machine.changed.notify_all()

    def wait(self, parity: int) -> None:
        while True:
            with self.machine.changed:
                done = self.machine.changed.wait_for(
                    lambda: self.machine.errors or self.coming or self.phases & 1 != parity, timeout=PATIENCE_S
                )
                if self.machine.errors or not done:
                    raise TimeoutError("a barrier was not completed")
                if not self.coming:
                    return
                block, x = self.coming.pop()
            block.store(x)
            self.change(0, -block.nbytes)

    def bring(self, block: Memory, x: Tensor) -> None:
        """A copy is on its way: whoever waits brings it."""
        with self.machine.changed:
            self.coming.append((block, x))
            self.machine.changed.notify_all()


class Barriers(list):
    """What memory for barriers is."""

    def index(self, i: Any) -> Barriers:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert 0 <= i < len(self), f"barrier {i} of {len(self)}"
        return Barriers([self[int(i)]])


class Memory:
    """A block of shared memory by the address of each element."""

    def __init__(self, machine: Machine, at: Tensor, dtype: torch.dtype) -> None:
        self.machine, self.at, self.dtype = machine, at, dtype

    def index(self, i: Any) -> Memory:
        assert 0 <= i < len(self.at), f"block {i} of {len(self.at)}"
        return Memory(self.machine, self.at[int(i)], self.dtype)

    def slice(self, start: int, length: int, dim: int) -> Memory:
        return Memory(self.machine, self.at.narrow(dim, start, length), self.dtype)

    def reshape(self, shape: list[int]) -> Memory:
        return Memory(self.machine, self.at.reshape(shape), self.dtype)

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.machine, self.at.permute(order), self.dtype)

    def load(self, layout: Any = None) -> Tensor:
        places = self.at[..., None] + torch.arange(self.dtype.itemsize)
        return self.machine.shared[places].view(self.dtype).squeeze(-1)

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.dtype, (x.dtype, self.dtype)
        assert x.shape == self.at.shape, (x.shape, self.at.shape)
        places = self.at[..., None] + torch.arange(self.dtype.itemsize)
        self.machine.shared[places] = x.contiguous()[..., None].view(torch.uint8)

    @property
    def nbytes(self) -> int:
        return self.at.numel() * self.dtype.itemsize


class Machine:
    """One program: its shared memory and its barriers."""

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.shared = torch.full((SHARED_BYTES,), 255, dtype=torch.uint8)  # NaN as any float
        self.used = 0
        self.changed = threading.Condition()
        self.errors: list[BaseException] = []

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if layout == "barriers":
            return Barriers(Barrier(self) for _ in range(prod(shape)))
        base = -(-self.used // 1024) * 1024
        self.used = base + prod(shape) * dtype.itemsize
        assert self.used <= SHARED_BYTES, f"{self.used} bytes of shared memory"
        return Memory(self, base + _places(shape, dtype), dtype)


def _places(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Addresses as the swizzled layouts have them, but for the swizzle within 128 bytes: slabs of 128 bytes a row."""
    *lead, rows, columns = shape
    width = min(columns, 128 // dtype.itemsize)
    at = torch.arange(prod(shape)).reshape(*lead, columns // width, rows, width)
    return at.transpose(-3, -2).reshape(shape) * dtype.itemsize


class Descriptor:
    """What the copies of a tensor know of it."""

    def __init__(self, real: Any) -> None:
        self.base, self.shape, self.strides = real.base, list(real.shape), list(real.strides)
        self.block = list(real.block_shape)
        self.dtype, self.layout = real.base.dtype, "swizzled"
        self.block_type = SimpleNamespace(nbytes=prod(self.block) * self.dtype.itemsize)

    def part(self, at: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Of the tensor and of a block, where they meet."""
        begin = [int(i) for i in at]
        pairs = list(zip(begin, self.block, self.shape, strict=True))
        whole = tuple(slice(max(0, i), max(0, min(n, i + size))) for i, size, n in pairs)
        block = tuple(slice(s.start - i, max(s.start, s.stop) - i) for (i, _, _), s in zip(pairs, whole, strict=True))
        return whole, block


class Pointer:
    """The address of an element, or of each of some elements."""

    def __init__(self, x: Tensor, offset: Any = None) -> None:
        self.x, self.offset = x, x.storage_offset() if offset is None else offset

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.x, self.offset + steps)

    def values(self) -> Tensor:
        return self.x.new_empty(0).set_(self.x.untyped_storage())


class Product:
    """One in flight."""

    def __init__(self, a: Any, b: Memory, acc: Tensor) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.first = self.operands()
        self.result: Tensor | None = None

    def operands(self) -> list[Tensor]:
        return [x.load() if isinstance(x, Memory) else x for x in (self.a, self.b)]

    def finish(self) -> None:
        a, b = self.first
        result = self.acc + a.float() @ b.float()
        for x, y in zip(self.first, self.operands(), strict=True):
            if not torch.equal(x.view(torch.int16), y.view(torch.int16)):
                result.fill_(float("nan"))
        self.result = result


def warpgroup_mma(a: Any, b: Memory, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    assert isinstance(acc, Tensor), "the sums are still in flight"
    product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
    _here.products.append(product)
    return product


def _pause() -> None:
    """Now and then, for long: the others come as far as they may."""
    if PAUSE_S and random.random() < 0.2:
        time.sleep(PAUSE_S)


def warpgroup_mma_wait(left: int, deps: list[Any]) -> Any:
    _pause()
    while len(_here.products) > left:
        _here.products.pop(0).finish()
    found = tuple(x.result if isinstance(x, Product) and x.result is not None else x for x in deps)
    return found if len(found) > 1 else found[0]


class mbarrier:  # as the language spells it
    MBarrierLayout = staticmethod(lambda: "barriers")

    @staticmethod
    def init(barrier: Barriers, count: int) -> None:
        barrier[0].count = barrier[0].left = count

    @staticmethod
    def wait(barrier: Barriers, parity: Any) -> None:
        barrier[0].wait(int(parity))

    @staticmethod
    def arrive(barrier: Barriers, count: int) -> None:
        barrier[0].change(count, 0)

    @staticmethod
    def expect(barrier: Barriers, nbytes: int) -> None:
        barrier[0].change(1, nbytes)


class tma:
    @staticmethod
    def async_load(source: Descriptor, at: list[Any], barrier: Barriers, block: Memory) -> None:
        x = torch.zeros(source.block, dtype=source.dtype)
        whole, part = source.part(at)
        x[part] = source.base[whole]
        block.store(torch.full_like(x, float("nan")))
        barrier[0].bring(block, x)

    @staticmethod
    def async_store(target: Descriptor, at: list[Any], block: Memory) -> None:
        _here.stores.append((target, list(at), block, block.load(), False))

    @staticmethod
    def store_wait(left: int) -> None:
        _pause()
        while len(_here.stores) > left:
            target, at, block, x, is_sum = _here.stores.pop(0)
            after = block.load()
            if not torch.equal(x.view(torch.uint8), after.view(torch.uint8)):
                x = torch.full_like(x, float("nan"))
            whole, part = target.part(at)
            with _memory:
                target.base[whole] = x[part] + target.base[whole] if is_sum else x[part]


_memory = threading.Lock()


def _add(target: Descriptor, at: list[Any], block: Memory) -> None:
    _here.stores.append((target, list(at), block, block.load(), True))


def _view(block: Memory, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
    assert prod(shape) * dtype.itemsize == block.nbytes
    return Memory(block.machine, block.at.min() + _places(shape, dtype), dtype)


def _sigmoid(y: Tensor, FORMULA: Any) -> Tensor:
    return FORMULA.gain * torch.sigmoid((y - FORMULA.shift) / FORMULA.unit)


def _load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    values, at = pointer.values(), torch.as_tensor(pointer.offset)
    if mask is None:
        found = values[at].clone()
        return found if found.dim() or found.is_floating_point() else Integer(found)
    return torch.where(mask, values[torch.where(mask, at, 0)], other)


def _store(pointer: Pointer, x: Tensor, mask: Tensor) -> None:
    with _memory:
        pointer.values()[torch.as_tensor(pointer.offset)[mask]] = x[mask]


def _atomic_add(pointer: Pointer, x: int) -> Integer:
    with _memory:
        before = _load(pointer)
        pointer.values()[pointer.offset] += x
    return before


def _specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    machine = _here.machine
    threads = [threading.Thread(target=_run, args=(machine, *one), daemon=True) for one in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run(machine: Machine, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    _here.machine, _here.products, _here.stores = machine, [], []
    try:
        function(*args)
        assert not _here.products, "a product was not waited for"
        tma.store_wait(0)
    except BaseException as error:
        with machine.changed:
            machine.errors.append(error)
            machine.changed.notify_all()


class Integer(int):
    """A number of the language: `+=` makes another."""

    def to(self, dtype: torch.dtype) -> Any:
        return Integer(self) if dtype == torch.int64 else torch.tensor(int(self), dtype=dtype)


def _closed(operation: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
    def result(self: int, other: Any) -> Any:
        found = operation(self, other)
        return Integer(found) if isinstance(found, int) else found

    return result


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "xor", "rshift"):
    for _side in ("", "r"):
        setattr(Integer, f"__{_side}{_name}__", _closed(getattr(int, f"__{_side}{_name}__")))


def _where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


_language = SimpleNamespace(
    constexpr=None, float32=torch.float32, int32=torch.int32, int64=torch.int64,
    program_id=lambda axis: Integer(_here.machine.program), num_programs=lambda axis: _here.machine.programs,
    arange=lambda start, stop, layout: torch.arange(start, stop), cdiv=lambda x, y: -(-x // y),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, x, dtype, layout: torch.full(shape, int(x), dtype=dtype),
    where=_where, minimum=lambda *x: Integer(min(x)), maximum=lambda *x: Integer(max(x)), abs=torch.abs,
    max=lambda x, axis: Integer(x.amax(axis)),
    convert_layout=lambda x, layout: x, load=_load, store=_store, atomic_add=_atomic_add, static_range=range,
    static_assert=lambda condition: None, warp_specialize=_specialize,
    inline_asm_elementwise=lambda asm, constraints, args, **_: args[0],  # the one that is left makes x uniform
    allocate_shared_memory=lambda dtype, shape, layout: _here.machine.allocate(dtype, shape, layout),
    **dict.fromkeys(
        ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout", "SwizzledSharedLayout"),
        lambda *_, **__: None,
    ),
    NVMMASharedLayout=lambda **_: "swizzled",
)  # fmt: skip
_names = SimpleNamespace(
    gluon=SimpleNamespace(jit=lambda f=None, **_: f if f else lambda g: g), language=_language, ir=None,
    _unwrap_if_constexpr=None, builtin=lambda f: f, fence_async_shared=lambda: None, mbarrier=mbarrier, tma=tma,
    warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
)  # fmt: skip


def load_kernels(changes: dict[str, tuple[str, str]] | None = None) -> dict[str, Callable[..., None]]:
    """The kernels by name, from their files, with all that Gluon has for them imitated.

    `changes`: file -> (some text in it, what stands in its place), for faults.
    """
    modules: dict[str, SimpleNamespace] = {}

    def find(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level:
            return modules[name]
        return _names if name.startswith("triton") else builtins.__import__(name, globals, locals, fromlist, level)

    for name in ("partitions", "sequences", "fwd", "bwd", "grad", "dqdk"):
        path = Path(hopper.__file__).with_name(f"{name}.py")
        found: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": find}, "__name__": name}
        text = path.read_text()
        if changes and name in changes:
            old, new = changes[name]
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}.py"
            text = text.replace(old, new)
        exec(compile(text, path, "exec"), found)
        imitated = {"partitions": {"add": _add, "sigmoid": _sigmoid}, "sequences": {"view": _view}}
        found.update(imitated.get(name, {}))
        modules[name] = SimpleNamespace(**found)
    return {key: x for one in modules.values() for key, x in vars(one).items() if key.endswith("_kernel")}


def launch(
    kernels: dict[str, Callable[..., None]],
    _triton: Any,
    _launches: Any,
    _key: Any,
    kernel: Any,
    programs: int,
    loaded: tuple[Tensor, ...],
    tensors: tuple[Tensor | None, ...],
    describe: Callable[..., Any],
) -> None:
    """In place of backends.gpu.launch."""
    descriptors, rest, constants = describe(loaded, tensors)
    constants = {key: x for key, x in constants.items() if key.isupper()}
    pointers = (None if x is None else Pointer(x) for x in tensors)
    args = (*map(Descriptor, descriptors), *pointers, *rest)
    for program in reversed(range(programs)):  # in no order that a launch promises
        machine = _here.machine = Machine(program, programs)
        kernels[kernel.fn.__name__](*args, **constants)
        if machine.errors:
            raise machine.errors[0]
