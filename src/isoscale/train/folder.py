"""A run folder belongs to one config and one process. Who may write into it, and how its logs are wound back.

Why a lock: two processes that resume one run would interleave their rows and replace each other's checkpoints. The lock
is the kernel's (`flock`), so it ends with its process, however that ends. Lost: where the system has no such lock
(Windows, some network disks), nothing stops a second process.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from isoscale._base.errors import CheckpointError
from isoscale._base.files import atomic_write, storage_errors
from isoscale._base.log import truncate_after
from isoscale.config import RunConfig

# What may change between sessions of one run without changing its numbers.
_FREE = frozenset({"name", "train.threads", "train.checkpoint_every", "train.keep", "data.cache"})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def differences(config: RunConfig, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, now), for settings that change the numbers of a run."""
    now, old = _flat(json.loads(config.model_dump_json())), _flat(saved)
    keys = sorted(key for key in now.keys() | old.keys() if key not in _FREE and not key.startswith("sweep."))
    return {key: (old.get(key), now.get(key)) for key in keys if old.get(key) != now.get(key)}


def read_config(out: Path) -> RunConfig:
    """The config a run folder was made with.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = out / "run.json"
    try:
        return RunConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            "no run here", key="run.json", place=str(out), hint="give the folder that isoscale train --out made"
        ) from None
    except OSError as error:
        raise CheckpointError(f"run.json cannot be read: {error.strerror}", place=str(path)) from None
    except ValueError as error:
        reason = str(error).splitlines()
        raise CheckpointError(f"run.json is damaged: {'; '.join(reason[:3])}", place=str(path)) from None


def check(out: Path, config: RunConfig, *, resume: bool, kind: Literal["run", "sweep"] = "run") -> None:
    """Refuse a folder that `config` may not write into; changes nothing.

    Raises:
        CheckpointError: a file, a folder of the other kind, a used one while `resume` is off, or one of another config.
    """
    path = out / "run.json"
    if out.exists() and not out.is_dir():
        raise CheckpointError("this is a file, not a folder", key="--out", value=str(out), hint="another --out")
    other = "study.db" if kind == "run" else "metrics.jsonl"
    if (out / other).exists():
        holds = "sweep" if kind == "run" else "single run"
        raise CheckpointError(f"the folder holds a {holds}", key="--out", value=str(out), hint="another --out")
    if not path.exists():
        return
    if not resume:
        hint = "--resume to continue it, or another folder"
        raise CheckpointError(f"the folder holds a {kind} already", key="--out", value=str(out), hint=hint)
    changed = differences(config, json.loads(read_config(out).model_dump_json()))
    if changed:
        shown = {key: f"{old} -> {new}" for key, (old, new) in list(changed.items())[:6]}
        raise CheckpointError(
            f"the folder holds a {kind} of another config", key=", ".join(shown), value=shown, place=str(path),
            hint="another --out, or the settings it was started with",
        )  # fmt: skip


def claim(out: Path, config: RunConfig, *, resume: bool, kind: Literal["run", "sweep"] = "run") -> None:
    """Make the folder this config's own.

    Raises:
        CheckpointError: as `check`.
        StorageError: it cannot be written.
    """
    check(out, config, resume=resume, kind=kind)
    atomic_write(out / "run.json", config.model_dump_json(indent=1))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes out of a run folder.

    Raises:
        CheckpointError: another process is in it (key `lock`).
        StorageError: the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with storage_errors(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            hint = "another --out"
            raise CheckpointError("a part of this path is a file", key="--out", value=str(out), hint=hint) from None
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                hint = "wait for it, or stop it, or use another folder"
                raise CheckpointError("another process works here", key="lock", place=str(out), hint=hint) from None
            # the disk knows no locks
        yield
    finally:
        os.close(handle)


def rewind(out: Path, step: int, evaluated: int) -> None:
    """Drop the rows of steps that the checkpoint does not hold, and those of an evaluation that was cut.

    Args:
        out: run folder.
        step: optimiser steps in the checkpoint.
        evaluated: the last step whose evaluation was complete when the checkpoint was made.
    """

    def keep(row: Mapping[str, Any]) -> bool:
        if row.get("kind") in ("train", "switch"):
            return bool(row["step"] < step)
        return bool(row["step"] < step or row["step"] == step == evaluated)

    for name in ("metrics.jsonl", "timing.jsonl"):
        if (out / name).exists():
            truncate_after(out / name, keep)
