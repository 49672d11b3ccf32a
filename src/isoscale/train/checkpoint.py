"""Checkpoints that load or are not there.

A checkpoint is a folder `checkpoints/step_00000100` with two safetensors files, two JSON files and a manifest, filled
under a temporary name and renamed when every byte is on the disk. The manifest holds size and SHA-256 of each file and
a digest of itself; all are checked before a tensor is handed out, so a flipped bit is found, not trained on.

What is lost: each file is held in memory once more while it is written, and reading hashes every byte (about 1 GB/s).
For states larger than one machine's memory use `torch.distributed.checkpoint`. One process at a time may save.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from isoscale._base.errors import CheckpointError
from isoscale._base.files import (
    atomic_dir,
    candidates,
    read_json,
    remove_tree,
    sha256,
    storage_errors,
    sweep_temps,
    write_synced,
)

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "plan.json")
Aliases = dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: optimiser steps done.
        model: tensors by name; tied names hold the same tensor object.
        optimizer: tensors by name.
        state: whatever JSON the training loop stored.
        plan: the plan's JSON.
        path: its folder.
        skipped: newer checkpoints that were damaged, each with the reason.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    plan: str
    path: Path
    skipped: tuple[tuple[Path, str], ...] = ()


def save(
    run_dir: str | Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    plan: str,
    keep: int = 2,
) -> Path:
    """Writes a checkpoint and removes old ones once the new one is durable.

    Args:
        run_dir: the run folder.
        step: optimiser steps done, >= 0. A checkpoint of the same step is replaced.
        model: tensors by name, any device and dtype. Names that share one tensor are stored once.
        optimizer: tensors by name.
        state: JSON values (counters, data position, settings). Tuples come back as lists.
        plan: JSON text.
        keep: how many checkpoints to keep, at least 1; 2 leaves one to fall back on.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: keep < 1, step < 0, values that cannot be stored, or a sound checkpoint of a later step.
        StorageError: the disk is full or read-only; older checkpoints still load and no temporary file is left.
    """
    if keep < 1:
        reason = "keep must be at least 1: with 0 the checkpoint just written would be removed"
        raise CheckpointError(reason, key="keep", value=keep, hint="keep=2 leaves one to fall back on")
    if step < 0:
        raise CheckpointError("a step cannot be negative", key="step", value=step)
    folder = Path(run_dir) / "checkpoints"
    _refuse_rewind(folder, step)
    (model_bytes, model_aliases), (optimizer_bytes, optimizer_aliases) = _pack(model, "model"), _pack(optimizer, "opt")
    contents = (model_bytes, optimizer_bytes, _dump_state(state), _checked_plan(plan))
    body = {
        "format": FORMAT,
        "step": step,
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in zip(FILES, contents)
        },
        "aliases": {"model": model_aliases, "optimizer": optimizer_aliases},
    }
    sweep_temps(folder)
    target = folder / f"step_{step:08d}"
    with atomic_dir(target, replace=True) as temp:
        for name, data in zip(FILES, contents):
            write_synced(temp / name, data)
        write_synced(temp / "manifest.json", _seal(body))
    with storage_errors(folder):
        _prune(folder, step, keep)
    return target


def load_latest(run_dir: str | Path, *, device: str | torch.device = "cpu") -> Checkpoint | None:
    """The newest checkpoint that is sound; `skipped` tells which newer ones were not. None when there are none.

    Raises:
        CheckpointError: there are checkpoints and none is sound; names each with its fault.
    """
    skipped: list[tuple[Path, str]] = []
    for _, path in _ordered(Path(run_dir) / "checkpoints"):
        try:
            return _load(path, device, tuple(skipped))
        except CheckpointError as error:
            skipped.append((path, f"{error.message} ({error.place})" if error.place else error.message))
    if skipped:
        lines = "; ".join(f"{path}: {reason}" for path, reason in skipped)
        hint = "restore one from a backup, or start again in a new run folder"
        raise CheckpointError(f"no sound checkpoint: {lines}", key="run_dir", place=str(run_dir), hint=hint)
    return None


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Checkpoint:
    """Loads one checkpoint folder.

    Raises:
        CheckpointError: it is missing or damaged; names the file.
    """
    return _load(Path(path), device, ())


def verify(path: str | Path) -> dict[str, Any]:
    """Checks every byte of a checkpoint against its manifest, and returns the manifest.

    Raises:
        CheckpointError: the first fault found; names the file.
    """
    path = Path(path)
    manifest = read_json(path / "manifest.json")
    body = {key: value for key, value in manifest.items() if key != "digest"} if isinstance(manifest, dict) else {}
    if (path / "manifest.json").read_bytes() != _seal(body):
        raise CheckpointError("damaged manifest", key="file", place=str(path / "manifest.json"))
    if body.get("format") != FORMAT:
        hint = "load it with the isoscale version that wrote it"
        raise CheckpointError("unknown checkpoint format", key="format", value=body.get("format"), hint=hint)
    try:
        files = {name: (int(body["files"][name]["size"]), str(body["files"][name]["sha256"])) for name in FILES}
        renamed = _step_of(candidates(path.parent).get(path, path.name)) not in (None, int(body["step"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("incomplete manifest", key="file", place=str(path / "manifest.json")) from error
    if renamed:
        raise CheckpointError("the folder's name and its manifest disagree on the step", key="step", place=str(path))
    for name, (want_size, want_hash) in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            found = sha256(file) if size == want_size else ""
        except OSError as error:
            raise CheckpointError(
                f"file missing or unreadable: {error.strerror}", key="file", place=str(file)
            ) from error
        if size != want_size:
            raise CheckpointError(f"file has {size} bytes, not {want_size}", key="file", place=str(file))
        if found != want_hash:
            raise CheckpointError("file is damaged: its SHA-256 differs", key="file", place=str(file))
    return body


def _load(path: Path, device: str | torch.device, skipped: tuple[tuple[Path, str], ...]) -> Checkpoint:
    manifest = verify(path)
    tensors = {}
    for part in ("model", "optimizer"):
        file = path / f"{part}.safetensors"
        try:
            found = safetensors.torch.load_file(file, device=str(device))
            found.update({alias: found[name] for alias, name in manifest["aliases"][part].items()})
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"cannot read tensors: {error}", key="file", place=str(file)) from error
        tensors[part] = found
    state = read_json(path / "state.json")
    if not isinstance(state, dict):
        raise CheckpointError("the state is no JSON object", key="file", place=str(path / "state.json"))
    plan = (path / "plan.json").read_text(encoding="utf-8")
    return Checkpoint(manifest["step"], tensors["model"], tensors["optimizer"], state, plan, path, skipped)


def _pack(tensors: Mapping[str, Tensor], part: str) -> tuple[bytes, Aliases]:
    """The safetensors bytes, and which names stand for another name's tensor."""
    plain: dict[str, Tensor] = {}
    aliases: Aliases = {}
    first: dict[object, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach()
        if type(value) is not Tensor or value.is_meta or value.layout != torch.strided:
            hint = "gather it into an ordinary tensor first (for a DTensor: full_tensor())"
            raise CheckpointError(
                "only plain tensors can be saved", key=f"{part}.{name}", value=type(tensor), hint=hint
            )
        place = value.untyped_storage().data_ptr()
        if value.numel():
            same = (str(value.device), value.data_ptr(), value.dtype, value.shape, value.stride())
            if first.setdefault(same, name) != name:
                aliases[name] = first[same]
                continue
        value = value.resolve_conj().resolve_neg()
        plain[name] = value.clone(memory_format=torch.contiguous_format) if place in storages else value.contiguous()
        storages.add(place)
    try:
        return safetensors.torch.save(plain), aliases
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(f"these tensors cannot be stored: {error}", key=part) from error


def _dump_state(state: Mapping[str, Any]) -> bytes:
    _check_json(dict(state), "state")
    return json.dumps(dict(state), indent=1).encode()


def _check_json(value: object, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError("keys of the state must be text", key=place, value=key)
            _check_json(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{place}[{index}]")
    elif value is not None and not isinstance(value, str | int | float | bool):
        hint = "numbers, text, lists and dicts; tensors belong into model or optimizer"
        raise CheckpointError("the state holds a value without a JSON form", key=place, value=type(value), hint=hint)


def _checked_plan(plan: str) -> bytes:
    try:
        json.loads(plan)
    except (ValueError, TypeError) as error:
        raise CheckpointError("the plan must be JSON text", key="plan", value=type(plan)) from error
    return plan.encode()


def _seal(body: Mapping[str, Any]) -> bytes:
    """The one byte sequence that stands for a manifest; its digest covers all the rest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, sort_keys=True, indent=1).encode()


def _step_of(name: str) -> int | None:
    match = re.fullmatch(r"step_(\d{8,})", name)
    return int(match[1]) if match else None


def _ordered(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, newest first; of one step the published one before the one it was to replace."""
    found = []
    for path, name in candidates(folder).items():
        step = _step_of(name)
        if step is not None:
            found.append((step, path.name == name, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _sound(path: Path) -> bool:
    """Whether it loads; one of an unknown format counts as sound, since it may be a newer version's."""
    try:
        verify(path)
    except CheckpointError as error:
        return error.key == "format"
    return True


def _refuse_rewind(folder: Path, step: int) -> None:
    for later, path in _ordered(folder):
        if later > step and _sound(path):
            hint = "resume from it, or move it away, or train in a new run folder"
            reason = f"a checkpoint of the later step {later} is here; two histories would mix"
            raise CheckpointError(reason, key="step", value=step, place=str(path), hint=hint)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes hidden leftovers, damaged checkpoints of later steps, and all but the newest `keep`."""
    steps = _ordered(folder)
    old = [path for later, path in steps if later > step or path.name.startswith(".")]
    current = [path for _, path in steps if path not in old]
    for path in old + current[keep:]:
        remove_tree(path)
