"""An append-only log of JSON lines: one row, one line, one write.

Why JSON lines: a killed writer can only hurt the last line, and every tool reads them. JSON has no NaN or infinity, so
these become the strings "nan", "inf" and "-inf" and come back as floats; a text that is spelt so comes back as a float
too, which is the price.

Damage in the middle of a file is never skipped in silence: it raises. Only a torn tail is cut.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from isoscale._base.errors import CheckpointError, ConfigError
from isoscale._base.files import atomic_write, failpoint, storage_errors

Row = dict[str, Any]
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonLog:
    """Appends rows to a file.

    A torn last line left by a killed writer is cut when the log is opened. One writer at a time.

    Args:
        path: the file; made, with its folder, when missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            repair(self.path)
            self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, row: Row, *, fsync: bool = False) -> None:
        """Adds one row.

        Args:
            row: JSON values; scalars of numpy and torch are turned into Python numbers.
            fsync: wait until the disk has it (milliseconds); without it a power cut may lose the last rows.

        Raises:
            ConfigError: a value has no JSON form.
            StorageError: the disk is full or read-only; the file is cut back to whole rows.
        """
        line = (json.dumps(_plain(row, "row"), allow_nan=False, separators=(",", ":")) + "\n").encode()
        size = os.fstat(self._handle).st_size
        with storage_errors(self.path):
            try:
                failpoint("write", self.path)
                done = os.write(self._handle, line)
                while done < len(line):
                    done += os.write(self._handle, line[done:])
            except OSError:
                os.ftruncate(self._handle, size)
                raise
            if fsync:
                failpoint("fsync", self.path)
                os.fsync(self._handle)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(value: object, place: str) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        return _plain(item(), place)
    raise ConfigError("this value has no JSON form", key=place, value=value, hint="a number, text, list or dict")


def dumps(value: object, *, indent: int | None = None) -> str:
    """Plain values as strict JSON text; NaN and infinities become strings, as in rows.

    Raises:
        ConfigError: a value has no JSON form.
    """
    return json.dumps(_plain(value, "value"), allow_nan=False, indent=indent)


def _restore(value: object) -> Any:
    if isinstance(value, str):
        return _FLOATS.get(value, value)
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return value


def _lines(path: Path) -> tuple[list[tuple[bytes, Row]], int]:
    """The whole rows with their bytes, and the length in bytes of the sound part of the file."""
    rows: list[tuple[bytes, Row]] = []
    data = path.read_bytes() if path.exists() else b""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]  # what follows the last newline: empty, or a torn row
    lines, sound = [line for line in lines if line], 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
            if not line.endswith(b"\n") or not isinstance(row, dict):
                raise ValueError("not a whole row")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            hint = "restore the file, or remove that line"
            raise CheckpointError(f"damaged row: {error}", key="log", place=f"{path}:{number}", hint=hint) from error
        rows.append((line, _restore(row)))
        sound += len(line)
    return rows, sound


def read(path: str | Path) -> list[Row]:
    """All whole rows; a torn last line is left out, a missing file is an empty log.

    Raises:
        CheckpointError: a row before the last is damaged; names the line.
    """
    return [row for _, row in _lines(Path(path))[0]]


def repair(path: str | Path) -> int:
    """Cuts a torn last line off. Returns the number of bytes cut, 0 for a sound or missing file."""
    path = Path(path)
    if not path.exists():
        return 0
    _, sound = _lines(path)
    torn = path.stat().st_size - sound
    if torn:
        with storage_errors(path):
            os.truncate(path, sound)
    return torn


def truncate_after(path: str | Path, predicate: Callable[[Row], bool]) -> int:
    """Rewrites the log as a whole with the rows for which `predicate` is true; kept rows keep their bytes.

    Used at resume to drop the rows of steps after the checkpoint. Call it before a `JsonLog` is opened on the file.

    Returns:
        The number of rows dropped.
    """
    path = Path(path)
    if not path.exists():
        return 0
    rows, sound = _lines(path)
    kept = [line for line, row in rows if predicate(row)]
    if len(kept) < len(rows) or sound < path.stat().st_size:
        atomic_write(path, b"".join(kept))
    return len(rows) - len(kept)
