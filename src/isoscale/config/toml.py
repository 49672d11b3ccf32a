"""A config as a TOML file that says what each setting is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from isoscale.config.run import RunConfig


def _literal(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = {name: item for name, item in value if item is not None}
    if isinstance(value, dict):
        keys = [key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key) for key in value]
        return "{ " + ", ".join(f"{key} = {_literal(item)}" for key, item in zip(keys, value.values())) + " }"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return json.dumps(value)


def _line(name: str, field: FieldInfo, value: Any, *, open: bool = False) -> str:
    """One setting; `open`: as a comment, since its default depends on other settings (on the optimiser)."""
    note = f"  # {field.description}" if field.description else ""
    if value is None:
        return f"# {name} ={note}"
    return f"{'# ' if open else ''}{name} = {_literal(value)}{note}"


def to_toml(config: RunConfig, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """The config as TOML lines, each field with its description.

    Args:
        config: any.
        skip: sections left out.
    """
    sections: list[tuple[str, BaseModel]] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            if name not in skip:
                sections.append((name, value))
        else:
            yield _line(name, field, value)
    for title, section in sections:
        yield f"\n[{title}]"
        for name, field in type(section).model_fields.items():
            hangs = title == "hps" or (title, name) == ("sweep", "space")
            yield _line(name, field, getattr(section, name), open=hangs and name not in section.model_fields_set)
