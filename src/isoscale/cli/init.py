"""isoscale init: a commented config file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isoscale import presets
from isoscale._base.errors import ConfigError
from isoscale._base.files import atomic_write
from isoscale.cli.common import AsJson, emit
from isoscale.config.toml import to_toml


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
