"""isoscale init: a commented config file to start from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from isoscale import presets
from isoscale._base.errors import ConfigError
from isoscale._base.files import atomic_write
from isoscale.cli.common import AsJson, emit
from isoscale.config import RunConfig


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return json.dumps(value)


def _line(name: str, field: FieldInfo, value: Any, *, open: bool = False) -> str:
    """One setting; `open`: as a comment, since its default depends on other settings (on the optimiser)."""
    note = f"  # {field.description}" if field.description else ""
    if value is None:
        return f"# {name} ={note}"
    return f"{'# ' if open else ''}{name} = {_literal(value)}{note}"


def to_toml(config: RunConfig) -> Iterator[str]:
    """The config as TOML lines, each field with its description."""
    sections: list[tuple[str, BaseModel]] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            sections.append((name, value))
        else:
            yield _line(name, field, value)
    for title, section in sections:
        yield f"\n[{title}]"
        for name, field in type(section).model_fields.items():
            hangs = title == "hps" or (title, name) == ("sweep", "space")
            yield _line(name, field, getattr(section, name), open=hangs and name not in section.model_fields_set)


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("isoscale.toml"),
    preset: Annotated[str, typer.Option("--preset", "-p", help="proxy, target, sp or mup.")] = "proxy",
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented config file.

    \b
    Examples:
      isoscale init
      isoscale init target.toml --preset target
    """
    if file.exists() and not force:
        raise ConfigError("the file exists already", key="FILE", value=str(file), hint="--force to overwrite it")
    atomic_write(file, "\n".join(to_toml(presets.by_name(preset))) + "\n")
    emit(as_json, {"file": str(file), "preset": preset}, f"wrote {file}\nnext: isoscale plan --config {file}")
