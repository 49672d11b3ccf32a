"""Options that several commands share, and how they print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from isoscale import presets
from isoscale.config import Loaded, load

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.", metavar="FILE")]
Preset = Annotated[str | None, typer.Option("--preset", "-p", help="Starting point: a preset, e.g. complete-d.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting, e.g. model.width=256; repeatable.")]
Data = Annotated[list[str] | None, typer.Option("--data", help="Text file or folder; repeatable.", metavar="PATH")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what is in the folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def load_config(
    preset: str | None, file: Path | None, sets: list[str] | None, data: list[str] | None = None, *,
    resumed: Path | None = None,
) -> Loaded:  # fmt: skip
    """preset < file < --set (and --data); without the first two a `resumed` folder's own config is the lowest."""
    flags = list(sets or [])
    if data:
        flags.append(f"data.source={json.dumps(data)}")
    if resumed is not None and preset is None and file is None and (resumed / "run.json").exists():
        from isoscale.train.folder import read_config

        return load(read_config(resumed), str(resumed), None, flags)
    return load(presets.by_name(preset) if preset else None, preset or "", file, flags)


def emit(as_json: bool, data: dict[str, Any], text: str) -> None:
    """One JSON object (strict: NaN and infinities are strings), or the text."""
    typer.echo(json.dumps(_strict(data), default=str, allow_nan=False) if as_json else text)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _strict(asdict(value))
    return value
