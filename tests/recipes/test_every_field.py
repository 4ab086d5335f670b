"""Every field of every recipe with a value of another type, or NaN: one error that names the field."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from flashsigmoid.nn.config import check_types
from flashsigmoid.recipes import language, pretraining, speech, vision

MODULES = (language, vision, speech, pretraining)


def parts(part: Any) -> Iterator[Any]:
    yield part
    for field in dataclasses.fields(part):
        if dataclasses.is_dataclass(value := getattr(part, field.name)):
            yield from parts(value)


def recipes() -> list[Any]:
    return [make() for module in MODULES for make in module.RECIPES.values()]


CONFIGS = {type(part): part for run in recipes() for part in parts(run)}


def wrong(kinds: tuple[Any, ...]) -> list[Any]:
    """Values that a field of these types cannot have, whatever its rule."""
    if float in kinds:
        return [math.nan, True, "0.1"]
    if int in kinds:
        return [math.nan, 1.5, True, "1", -1]
    if bool in kinds and str not in kinds:
        return [1, 0, "no", math.nan]
    if str in kinds:
        return [math.nan, 1, ("a",)]
    return [math.nan, 1, "nonsense", ("nonsense",)]


def cases() -> Iterator[Any]:
    for config_class, part in CONFIGS.items():
        hints = typing.get_type_hints(config_class)
        for field in dataclasses.fields(part):
            if not dataclasses.is_dataclass(getattr(part, field.name)):
                hint = hints[field.name]
                kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
                for value in wrong(kinds):
                    yield pytest.param(part, field.name, value, id=f"{config_class.__name__}.{field.name}-{value!r}")


def test_all_configurations_are_there() -> None:
    names = {config_class.__name__ for config_class in CONFIGS}
    assert {"GPTConfig", "ViTConfig", "SpeechConfig", "OptimConfig", "ViewsConfig", "MaskedRun"} <= names


@pytest.mark.parametrize(("part", "name", "value"), list(cases()))
def test_a_value_of_another_type_is_one_error_that_names_the_field(part: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*, got ") as error:
        dataclasses.replace(part, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config_class", "name", "value", "message"),
    [
        ("GPTConfig", "layer_scale", math.nan, "layer_scale must be a finite number or None, got nan"),
        ("GPTConfig", "qk_norm", 1, "qk_norm must be True or False, got 1"),
        ("GPTConfig", "gate", "no", "gate must be True or False, got 'no'"),
        ("GPTConfig", "window_size", 3, "window_size must be a tuple, each of an integer or None, got 3"),
        ("ViTConfig", "layer_scale", math.inf, "layer_scale must be a finite number or None, got inf"),
        ("SpeechConfig", "cape_scale", 0.5, "cape_scale must be at least 1, got 0.5"),
        ("SpeechConfig", "cape_shift", math.inf, "cape_shift must be finite and not negative, got inf"),
        ("OptimConfig", "weight_decay", math.inf, "weight_decay must be finite and not negative, got inf"),
    ],
)
def test_the_error_says_the_rule_then_the_value(config_class: str, name: str, value: Any, message: str) -> None:
    part = next(part for each, part in CONFIGS.items() if each.__name__ == config_class)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(part, **{name: value})


@dataclasses.dataclass(frozen=True)
class Some:
    x: float = 1
    pair: tuple[float, float] = (1, 2.0)
    window: tuple[int | None, int | None] = (None, 3)
    flag: bool | None = None


def test_what_a_file_of_json_gives_is_taken() -> None:
    """An integer for a number, a list for a tuple."""
    check_types(Some())
    check_types(Some(x=2, pair=[1, 2], window=[None, 4], flag=False))  # pyright: ignore[reportArgumentType]
