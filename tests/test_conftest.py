"""The fixtures that guard every other test do what they say."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import poisoned


def module(name: str) -> types.ModuleType:
    """A module of that name with one function per way to allocate."""
    made = types.ModuleType(name)
    source = """
import torch
x = torch.zeros(4, dtype=torch.bfloat16)
def empty(): return torch.empty(3)
def empty_int(): return torch.empty(3, dtype=torch.int32)
def empty_like(): return torch.empty_like(x)
def empty_strided(): return torch.empty_strided((2, 2), (2, 1))
def new_empty(): return x.new_empty(2, 3)
def meta(): return torch.empty(3, device="meta")
"""
    exec(source, made.__dict__)
    return made


@pytest.mark.parametrize("name", ["empty", "empty_like", "empty_strided", "new_empty"])
def test_memory_allocated_by_the_package_is_nan(name):
    assert getattr(module("flashsigmoid.backends.blocked"), name)().isnan().all()


def test_integers_are_the_largest():
    assert (module("flashsigmoid.nn").empty_int() == torch.iinfo(torch.int32).max).all()


def test_shape_dtype_and_device_stay():
    package = module("flashsigmoid.nn")
    assert package.new_empty().shape == (2, 3)
    assert package.new_empty().dtype == torch.bfloat16
    assert package.meta().device.type == "meta"


@pytest.mark.parametrize(
    ("name", "is_ours"), [("flashsigmoid.nn", True), ("flashsigmoid", True), ("flashsigmoid_x", False)]
)
def test_only_the_package_gets_poison(name, is_ours):
    caller = types.ModuleType(name)
    caller.__dict__["allocate"] = poisoned(lambda: torch.zeros(3))
    exec("def call(): return allocate()", caller.__dict__)
    assert caller.call().isnan().all() == is_ours


def test_a_compiled_function_still_compiles_whole():
    package = module("flashsigmoid.nn")
    compiled = torch.compile(package.empty, fullgraph=True, backend="eager")
    assert compiled().shape == (3,)


def test_every_test_has_a_seed_of_its_own(seed):
    assert torch.initial_seed() == seed
