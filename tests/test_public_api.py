"""The public names and signatures are those written down in public_api.txt, so a change is seen in review.

python tests/test_public_api.py        writes the file anew, after a change that is meant
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path

MODULES = ("flashsigmoid", "flashsigmoid.nn", "flashsigmoid.testing")
SNAPSHOT = Path(__file__).with_name("public_api.txt")


def public_names(module: types.ModuleType) -> list[str]:
    """What a user may import: no leading underscore; of a package what it gathers, of a file its own."""

    def is_public(name: str, value: object) -> bool:
        if name.startswith("_"):
            return False
        if isinstance(value, types.ModuleType):
            return f"{module.__name__}.{name}" in MODULES
        home = getattr(value, "__module__", module.__name__)
        return home.partition(".")[0] == "flashsigmoid" if hasattr(module, "__path__") else home == module.__name__

    return sorted(name for name, value in vars(module).items() if is_public(name, value))


def signature(value: Callable[..., object]) -> str:
    """As inspect writes it, without the addresses of default functions."""
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(value)))


def described(name: str, value: object) -> Iterator[str]:
    """Lines for one public name: its signature, and for a class its public methods and fields."""
    if isinstance(value, types.ModuleType):
        yield f"{name}: module"
    elif inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        # a Protocol or an exception has the constructor of its base
        constructor = signature(value) if "__init__" in vars(value) else "(...)"
        yield f"class {name}{constructor}: {bases}"
        for attribute, member in sorted(vars(value).items()):
            if attribute.startswith("_"):
                continue
            if inspect.isfunction(member):
                yield f"    {attribute}{signature(member)}"
            elif isinstance(member, property):
                yield f"    {attribute}: property"
            elif isinstance(member, classmethod | staticmethod):
                yield f"    {type(member).__name__} {attribute}{signature(member.__func__)}"
        if dataclasses.is_dataclass(value) and "__init__" not in vars(value):
            yield from (f"    {field.name}: {field.type}" for field in dataclasses.fields(value))
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def snapshot() -> str:
    """The text of public_api.txt as the code stands."""
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines.append(f"[{module_name}]")
        for name in public_names(module):
            lines += described(name, getattr(module, name))
        lines.append("")
    return "\n".join(lines)


def test_public_names_and_signatures_are_those_written_down():
    difference = list(
        difflib.unified_diff(SNAPSHOT.read_text().splitlines(), snapshot().splitlines(), "written", "now")
    )
    assert not difference, "\n".join(["if this is meant: python tests/test_public_api.py", *difference])


def test_a_changed_signature_and_a_new_name_change_the_text():
    module = types.ModuleType("flashsigmoid.planted")
    module.__path__ = []
    exec("def attend(q, *, scale=None): ...\nclass Layer:\n    def forward(self, x): ...", module.__dict__)
    assert public_names(module) == ["Layer", "attend"]
    assert list(described("attend", module.attend)) == ["attend(q, *, scale=None)"]
    assert list(described("Layer", module.Layer)) == ["class Layer(...): object", "    forward(self, x)"]


def test_the_names_of_the_op_are_public():
    public = public_names(importlib.import_module("flashsigmoid"))
    assert {"sigmoid_attention", "explain", "BackendUnsupported"} <= set(public)


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
    print(f"wrote {SNAPSHOT}")
