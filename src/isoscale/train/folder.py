"""A run folder belongs to one config. Who may write into it, and how its logs are wound back at a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoscale._base.errors import CheckpointError
from isoscale._base.files import atomic_write
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
    except FileNotFoundError:
        raise CheckpointError(
            "no run here", key="run.json", place=str(out), hint="give the folder that isoscale train --out made"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"run.json is damaged: {error}", place=str(path)) from None


def claim(out: Path, config: RunConfig, *, resume: bool) -> None:
    """Make the folder this config's own.

    Raises:
        CheckpointError: it holds a run and `resume` is off, or a run of another config.
        StorageError: it cannot be written.
    """
    path = out / "run.json"
    if path.exists():
        if not resume:
            raise CheckpointError(
                "the folder holds a run already",
                key="--out",
                value=str(out),
                hint="--resume to continue it, or another folder",
            )
        saved = json.loads(read_config(out).model_dump_json())
        other = differences(config, saved)
        if other:
            shown = {key: f"{old} -> {new}" for key, (old, new) in list(other.items())[:6]}
            raise CheckpointError(
                "the folder holds a run of another config",
                key=", ".join(shown),
                value=shown,
                place=str(path),
                hint="another --out, or the settings it was started with",
            )
    atomic_write(path, config.model_dump_json(indent=1))


def rewind(out: Path, step: int) -> None:
    """Drop metric rows of steps that the checkpoint does not hold."""
    for name in ("metrics.jsonl", "timing.jsonl"):
        path = out / name
        if path.exists():
            truncate_after(path, lambda row: row["step"] < step or (row.get("kind") != "train" and row["step"] <= step))
