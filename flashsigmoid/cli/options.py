"""Options that several commands have, and texts of the form FIELD=VALUE."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def device_type(name: str) -> str:
    """The type of a device of torch, "cuda" of "cuda:1"; it need not be there.

    Raises:
        ValueError: torch has no such device.
    """
    import torch

    try:
        return torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device must be a device of torch, as cpu, cuda, cuda:1 or mps, got {name}") from error


def _present(name: str) -> str:
    if name in ("auto", "cpu"):
        return name
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] if found is None else ["cpu", found.type]
    if device_type(name) not in here:
        raise ValueError(f"--device must be a device of this machine, {' or '.join(here)}, got {name}")
    return name


Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option("--device", "--accelerator", help="Where to train.", callback=_present),
]
AnyDevice = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ...", callback=_present)]
Recipe = Annotated[str, typer.Argument(help="Name of a recipe, see flashsigmoid train --list.", show_default=False)]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any field of the run, as model.dim=256; may be repeated.",
        show_default=False,
    ),
]


def read_assignments(texts: list[str] | None, option: str = "--set") -> dict[str, str]:
    """{"model.dim": "256"} of ["model.dim=256"]."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{option} must be FIELD=VALUE, got {text}")
        if name in found:
            raise ValueError(f"{name} must be set once, got it twice")
        found[name] = value
    return found


def read_named_fields(option: str, texts: list[str] | None) -> dict[str, dict[str, str]]:
    """{"wide": {"dim": "256", "betas": "0.9,0.95"}} of ["wide:dim=256,betas=0.9,0.95"]."""
    found: dict[str, dict[str, str]] = {}
    for text in texts or ():
        name, _, rest = text.partition(":")
        if name in found:
            raise ValueError(f"{option} must be given once for each name, got {name} twice")
        pieces: list[str] = []
        for piece in rest.split(",") if rest else ():
            if pieces and "=" not in piece:  # of a value with commas
                pieces[-1] += f",{piece}"
            else:
                pieces.append(piece)
        found[name] = read_assignments(pieces, option)
    return found
