"""Whether the fields of a frozen configuration hold what their annotations say. Their ranges are its own business."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any

_WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "text", types.NoneType: "None"}


def check_types(config: Any) -> None:
    """Of a dataclass every field that is a bool, an int, a float, text, None, or a tuple of such.

    A bool is no number, an integer is one; a list is a tuple, as in a file of JSON. What else a field may be, as one of
    some words or a configuration of its own, is not looked at, and neither are the values.

    Raises:
        ValueError: a field holds another type; names it.
    """
    for name, hint in _hints(type(config)):
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ValueError(f"{name} must be {_words(hint)}, got {value!r}")


def check_layer_scale(layer_scale: float | None) -> None:
    """Raises ValueError for a first factor of a branch that is no finite number."""
    if layer_scale is not None and not math.isfinite(layer_scale):
        raise ValueError(f"layer_scale must be a finite number or None, got {layer_scale}")


@functools.cache
def _hints(config_class: type) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(config_class)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(config_class))


def _fits(value: Any, hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(_is(value, kind) for kind in kinds)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            return False
        # how many there must be is a rule of the configuration
        hints = inner[:1] if inner[-1] is Ellipsis else inner
        return all(any(_fits(x, hint) for hint in hints) for x in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in _WORDS else True


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_words(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a tuple, each of {_words(typing.get_args(hint)[0])}"
    return _WORDS.get(hint, str(hint))
