"""Fields of a run read from text: every type, and errors that name the field, its type and the nearest name."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import pytest

from flashsigmoid.recipes.fields import override


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    dim: int = 4
    bias: float | None = None
    window: tuple[int | None, int | None] = (None, None)
    betas: tuple[float, ...] = (0.9,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    dim: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    model: Inner = dataclasses.field(default_factory=Inner)
    other: Other = dataclasses.field(default_factory=Other)
    steps: int = 1
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    fast: bool = False


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("steps", "7", lambda run: run.steps == 7),
        ("run.steps", "7", lambda run: run.steps == 7),
        ("model.dim", "7", lambda run: (run.model.dim, run.other.dim) == (7, 5)),
        ("bias", "-3.5", lambda run: run.model.bias == -3.5),
        ("bias", "none", lambda run: run.model.bias is None),
        ("window", "3,none", lambda run: run.model.window == (3, None)),
        ("window", "(3, 4)", lambda run: run.model.window == (3, 4)),
        ("betas", "0.5,0.6,0.7", lambda run: run.model.betas == (0.5, 0.6, 0.7)),
        ("name", "some text", lambda run: run.name == "some text"),
        ("name", "none", lambda run: run.name is None),
        ("kind", "b", lambda run: run.kind == "b"),
        ("fast", "true", lambda run: run.fast is True),
    ],
)
def test_a_field_is_read_from_text_by_its_type(name, text, read):
    changed = override(Outer(), {name: text})
    assert read(changed)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("dim", "7", "dim must name one field, got one of model.dim, other.dim"),
        ("steps", "1.5", "steps must be an integer, got '1.5'"),
        ("bias", "x", "model.bias must be a number or none, got 'x'"),
        ("kind", "c", "kind must be a or b, got 'c'"),
        ("fast", "yes", "fast must be true or false, got 'yes'"),
        ("window", "1", "model.window must be an integer or none, an integer or none, got '1'"),
        ("betas", "x", "model.betas must be a number, or several with commas, got 'x'"),
        ("model", "1", "the run has no field model"),
        ("xyz", "1", "it has model.dim, model.bias"),
    ],
)
def test_a_bad_field_is_a_clear_error(name, text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        override(Outer(), {name: text})
