"""Fields of a run description read from text, for a command line: model.dim=256. What the fields mean is elsewhere."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

Run = TypeVar("Run")


def override(run: Run, *texts: dict[str, str]) -> Run:
    """A frozen dataclass with fields replaced by values read from text, all at once.

    Args:
        run: the dataclass; its parts may be dataclasses too.
        texts: name to value. A name is a field, also as "run.steps", a part's field ("model.dim"), or its last word if
            unique.

    Raises:
        ValueError: a name that is unknown, ambiguous or set twice; a value of another type.
    """
    fields = dict(_fields(run))
    values: dict[str, Any] = {}
    for name, text in (pair for each in texts for pair in each.items()):
        path = _field_named(name, list(fields))
        if path in values:
            raise ValueError(f"{path} must be set once, got it twice")
        values[path] = parse(path, text, fields[path])
    return _replaced(run, values)


def field_path(run: Any, name: str) -> str:
    """The dotted name of a field of a run, as "model.dim" of "dim".

    Raises:
        ValueError: the name is unknown or ambiguous.
    """
    return _field_named(name, [path for path, _ in _fields(run)])


def _fields(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field that is not a dataclass itself."""
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def _field_named(name: str, paths: list[str]) -> str:
    if name.removeprefix("run.") in paths:  # as config.json and the errors of --resume name a run's own fields
        return name.removeprefix("run.")
    found = [path for path in paths if path.rpartition(".")[2] == name]
    if not found:
        words = {path.rpartition(".")[2]: path for path in paths} | {path: path for path in paths}
        near = difflib.get_close_matches(name, words, n=1)
        hint = f"; did you mean {words[near[0]]}?" if near else f"; it has {', '.join(paths)}"
        raise ValueError(f"the run has no field {name}{hint}")
    if len(found) > 1:
        raise ValueError(f"{name} must name one field, got one of {', '.join(found)}")
    return found[0]


def _replaced(part: Any, values: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        inner = {
            path.partition(".")[2]: value for path, value in values.items() if path.partition(".")[0] == field.name
        }
        if inner:
            changes[field.name] = inner[""] if "" in inner else _replaced(getattr(part, field.name), inner)
    return dataclasses.replace(part, **changes)


def parse(name: str, text: str, hint: Any) -> Any:
    """A value of a field's type from text: numbers, text, true or false, none, one of a Literal, a tuple with commas.

    Raises:
        ValueError: the text is no such value; names the field and the type.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in sorted(kinds, key=lambda kind: kind is not types.NoneType):  # "none" is text too
        try:
            return _read(text, kind)
        except ValueError:
            continue
    raise ValueError(f"{name} must be {_words(hint)}, got {text!r}")


def _read(text: str, kind: Any) -> Any:
    arguments = typing.get_args(kind)
    if kind is types.NoneType and text.lower() == "none":
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float, str, Path):
        return kind(text)
    if typing.get_origin(kind) is Literal and text in arguments:
        return text
    if typing.get_origin(kind) is tuple:
        pieces = text.strip("()").split(",")
        hints = arguments[:1] * len(pieces) if arguments[-1] is Ellipsis else arguments
        return tuple(parse("", piece.strip(), hint) for piece, hint in zip(pieces, hints, strict=True))
    raise ValueError


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_words(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            return f"{_words(kinds[0])}, or several with commas"
        return ", ".join(map(_words, kinds))
    names = {int: "an integer", float: "a number", bool: "true or false", types.NoneType: "none", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
