"""Entry of the command `flashsigmoid` and of `python -m flashsigmoid`: exit codes, and errors as one line.

The commands themselves are in cli/; nothing here needs more than torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import sys
from types import FrameType
from typing import NoReturn

OK, ERROR, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C: what saves on one saves on the other."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 0, 1 error, 2 usage, 130 Ctrl-C, 143 SIGTERM.

    An error is one red line on stderr; `--debug` shows the traceback instead.

    Args:
        arguments: the words after the program's name. Default: sys.argv[1:].

    Raises:
        SystemExit: always.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words  # anywhere: one adds it to the end of the line that failed
    received = []

    def terminate(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Terminated

    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, terminate)
    try:
        code = _run([word for word in words if word != "--debug"])
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader left, as in `flashsigmoid explain | head -1`; say nothing more to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ERROR
    except Exception as error:
        if debug:
            raise
        code = getattr(error, "exit_code", ERROR)  # typer's usage errors bring a 2
        _print_error(error)
    sys.exit(TERMINATED if received else code)


def _run(words: list[str]) -> int:
    try:
        from . import cli
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise ModuleNotFoundError("the command line needs typer and rich", name=error.name) from error
    return cli.app(words, prog_name="flashsigmoid", standalone_mode=False) or OK


def _print_error(error: Exception) -> None:
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("flashsigmoid"):
        text = f'{error}: pip install "flashsigmoid[{_extra_with(error.name)}]"'
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif message := getattr(error, "format_message", None):  # typer's
        context = getattr(error, "ctx", None)
        if not (text := message()):  # the help was asked for by giving no command, and is printed
            return
        text += f" (see {context.command_path} --help)" if context else ""
    elif isinstance(error, ValueError | OSError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.replace("Value error, ", "").split())  # pydantic's, under typer
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[31merror: {line}\033[0m" if red else f"error: {line}", file=sys.stderr)


def _extra_with(module: str) -> str:
    """The smallest extra of flashsigmoid that installs a module, "all" if none says so."""
    try:
        requirements = importlib.metadata.requires("flashsigmoid") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    wanted = module.partition(".")[0].replace("_", "-").lower()
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and extra:
            extras.setdefault(extra[1], []).append(name[0].replace("_", "-").lower())
    having = [extra for extra, names in extras.items() if wanted in names]
    return min(having, key=lambda extra: len(extras[extra]), default="all")


if __name__ == "__main__":
    main()
