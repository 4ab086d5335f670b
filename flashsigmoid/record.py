"""Records: one number and where it came from, one JSON line each, written by training, studies and bench.

No tensors, no plots and no statistics live here; the standard library is enough to read a run.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import operator
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

RECORDS_NAME = "records.jsonl"

Scalar = str | int | float | bool | None

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_GUESTS = (
    "torch",
    "triton",
    "numpy",
    "pytorch_lightning",
    "safetensors",
    "tokenizers",
    "datasets",
    "transformers",
    "timm",
    "lightly",
    "torchvision",
    "soundfile",
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number of a run, or one file beside the records.

    Args:
        name: what was measured, words joined by "/", as "val/loss" or "attn_norm/layer_3".
        value: the number; nan and infinities are legal, they are results too. None: only the artifact counts.
        unit: of the value, as "nats_per_token"; "" is a pure number.
        step: optimizer steps done when it was measured, None if it belongs to no step.
        time_s: seconds of training when it was measured.
        tags: what else distinguishes it, plain scalars.
        artifact: name of a file in the folder of the records.

    Raises:
        ValueError: an empty name, a negative step, an artifact elsewhere, a tag that is not a scalar.
    """

    name: str
    value: float | None = None
    unit: str = ""
    step: int | None = None
    time_s: float | None = None
    tags: dict[str, Scalar] = field(default_factory=dict)
    artifact: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty string, got {self.name!r}")
        for key in ("value", "time_s"):
            number = getattr(self, key)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                raise ValueError(f"{key} must be a number or None, got {number!r}")
        if not isinstance(self.unit, str):
            raise ValueError(f"unit must be a string, got {self.unit!r}")
        if self.step is not None and (type(self.step) is not int or self.step < 0):
            raise ValueError(f"step must be a non-negative integer or None, got {self.step!r}")
        if not isinstance(self.tags, dict):
            raise ValueError(f"tags must be a dict, got {self.tags!r}")
        for key, tag in self.tags.items():
            _check_scalar(f"tag {key}", tag)
        if self.artifact is not None and not _is_file_name(self.artifact):
            raise ValueError(f"artifact must be the name of a file beside the records, got {self.artifact!r}")


@dataclass(frozen=True)
class RecordFile:
    """A records file as read: `header` (settings, hardware, versions, commit, ...) and the records."""

    header: dict[str, Any]
    records: list[Record]

    @property
    def settings(self) -> dict[str, Any]:
        """Every field of the run's configuration, flat."""
        return self.header["settings"]


class RecordWriter:
    """Appends records to a jsonl file, flushed one by one: a crash loses at most the line being written.

    Line 1 is the header, {"header": {"settings": {...}, **provenance()}}; it appears together with the file,
    atomically. A non-finite number is written as the string "nan", "inf" or "-inf": every line is JSON.

    Args:
        path: the file; missing folders are made. Without `resume_step` an existing file is replaced.
        settings: flat dict of scalars or lists of scalars that describes the run.
        command: how the run was started. Default: the command line of this process.
        resume_step: continue an existing file after this step. Its header is kept and gains an entry in
            "resumed"; records of later steps and a torn last line are dropped, those without a step kept.
            A missing file is begun.

    Raises:
        ValueError: settings that are not flat; a file to resume that cannot be read; a negative resume_step.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any] | None = None,
        command: str | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(path)
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step must be a non-negative integer or None, got {resume_step}")
        origin = provenance(command)
        if resume_step is None or not self.path.exists():
            header = {"settings": _check_settings(settings or {}), **origin}
            records = []
        else:
            past = read_records(self.path)
            resumed = [*past.header.get("resumed", []), {"step": resume_step, **origin}]
            header = {**past.header, "resumed": resumed}
            records = [record for record in past.records if record.step is None or record.step <= resume_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".tmp")
        with draft.open("w", encoding="utf-8") as file:
            for line in ({"header": header}, *map(_fields, records)):
                file.write(_dumps(line))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(
        self,
        name: str,
        value: SupportsFloat | None = None,
        *,
        unit: str = "",
        step: SupportsIndex | None = None,
        time_s: SupportsFloat | None = None,
        artifact: str | None = None,
        **tags: Scalar,
    ) -> Record:
        """Append one record and flush it. A number is anything `float()` takes, as a tensor of one element.

        Raises:
            ValueError: as `Record`; or the writer is closed.
        """
        record = Record(
            name=name,
            value=None if value is None else float(value),
            unit=unit,
            step=None if step is None else operator.index(step),
            time_s=None if time_s is None else float(time_s),
            tags=tags,
            artifact=artifact,
        )
        self._file.write(_dumps(_fields(record)))
        self._file.flush()
        return record

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_records(path: str | Path) -> RecordFile:
    """Read a records file. A torn last line, what a crash leaves, is dropped; any other damage is an error.

    Raises:
        ValueError: a missing or empty file, a missing header, a damaged line (the message has its number).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"records must be an existing file, got {path}")
    # whatever follows the last newline was being written when the process died, or is empty
    *lines, last = path.read_bytes().split(b"\n")
    if not lines and not last:
        raise ValueError(f"records must start with a header, got an empty file {path}")
    if last and _is_json(last):
        lines.append(last)
    header = _parse(lines[0], path, 1).get("header") if lines else None
    if not isinstance(header, dict) or not isinstance(header.get("settings"), dict):
        raise ValueError(f"records must start with a header line, got none in {path}")
    header["settings"] = {key: _decode(value) for key, value in header["settings"].items()}
    return RecordFile(header, [_record(line, path, number) for number, line in enumerate(lines[1:], 2)])


def find_runs(path: str | Path) -> list[Path]:
    """Every folder at or below `path` that holds a records.jsonl, sorted by name.

    Raises:
        ValueError: `path` is not a folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"runs must be in an existing folder, got {path}")
    return sorted(file.parent for file in path.rglob(RECORDS_NAME) if file.is_file())


def provenance(command: str | None = None) -> dict[str, Any]:
    """Where and by what this process computes: hardware, versions, commit, dirty, command, started (UTC).

    commit and dirty are of the package's source, None outside git. The GPU is named only if torch is loaded.
    """
    commit, dirty = _source_state()
    return {
        "hardware": _hardware(),
        "versions": _versions(),
        "commit": commit,
        "dirty": dirty,
        "command": command_line() if command is None else command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command of this process as typed, quoted for a shell, with folders of this machine shortened.

    The home folder becomes ~, the working folder is dropped, another absolute path keeps its last part.
    """
    words = [str(word) for word in sys.orig_argv]
    # a console script lies beside its interpreter and is what was typed
    if len(words) > 1 and Path(words[1]).is_absolute() and Path(words[1]).parent == Path(words[0]).parent:
        del words[0]
    words[0] = Path(words[0]).name
    return " ".join(_shorten(word) for word in words)


def _shorten(word: str) -> str:
    option, equals, rest = word.partition("=") if word.startswith("-") else ("", "", word)
    prefix = shlex.quote(option) + equals if option else ""
    path = Path(rest)
    if not path.is_absolute() or "\n" in rest:
        return prefix + shlex.quote(rest) if rest or not option else prefix
    if path.is_relative_to(Path.cwd()):
        return prefix + shlex.quote(str(path.relative_to(Path.cwd())))
    if path.is_relative_to(Path.home()):
        below = str(path.relative_to(Path.home()))
        return prefix + ("~" if below == "." else "~/" + shlex.quote(below))
    return prefix + shlex.quote(".../" + path.name)


def _hardware() -> dict[str, Scalar]:
    hardware: dict[str, Scalar] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": None,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "flashsigmoid": getattr(sys.modules.get(__name__.rpartition(".")[0]), "__version__", "unknown"),
    }
    for guest in _GUESTS:
        try:
            versions[guest] = importlib.metadata.version(guest)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _source_state() -> tuple[str | None, bool | None]:
    """(commit, whether the package differs from it); (None, None) if this file is not tracked by git."""
    # a package installed inside somebody else's repository must not report that repository's commit
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
    return commit, None if changes is None else bool(changes)


def _git(*words: str) -> str | None:
    """What git says in the folder of this file; None if it fails or there is no git."""
    hidden = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set inside a git hook, for another repository
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    command = ("git", "-C", str(Path(__file__).resolve().parent), "--no-optional-locks", *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=env, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _check_scalar(what: str, value: object) -> None:
    if not isinstance(value, Scalar):
        raise ValueError(f"{what} must be a string, a number, True, False or None, got {value!r}")
    if isinstance(value, str) and value in _NON_FINITE:
        raise ValueError(f"{what} must not be the string of a non-finite number, got {value!r}")


def _check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in settings.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            _check_scalar(f"setting {key}", item)
    return dict(settings)


def _fields(record: Record) -> dict[str, Any]:
    """The fields of a record that say something."""
    return {key: value for key, value in asdict(record).items() if value not in (None, "", {})}


def _dumps(line: dict[str, Any]) -> str:
    return json.dumps(_encode(line), allow_nan=False) + "\n"


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, tuple | list) else value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} must be JSON, got {line[:60]!r}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"line {number} of {path} must be a JSON object, got {line[:60]!r}")
    return fields


def _record(line: bytes, path: Path, number: int) -> Record:
    fields = _parse(line, path, number)
    tags = fields.pop("tags", {})
    fields = {key: _decode(value) if key in ("value", "time_s") else value for key, value in fields.items()}
    if isinstance(tags, dict):
        tags = {key: _decode(value) for key, value in tags.items()}
    try:
        return Record(**fields, tags=tags)
    except (TypeError, ValueError) as error:
        raise ValueError(f"line {number} of {path} must be a record: {error}") from error
