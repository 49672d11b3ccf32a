"""preset < file < flag -> one checked config, with the layer that set each value.

All problems are reported at once, each with its key, value, the layer it came from and the nearest valid key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from isoscale._base.errors import ConfigError, IsoscaleError, ManyErrors, did_you_mean, nearest
from isoscale.config.run import RunConfig

_MOVED = {"train.optimizer": "optim.name"}


@dataclass(frozen=True)
class Loaded:
    """A config and, per dotted key, the layer that set it (keys left out have their default)."""

    config: RunConfig
    origins: Mapping[str, str]

    def origin(self, key: str) -> str:
        """Which layer set the value: `default`, `preset NAME`, a file's path or `--set`."""
        return self.origins.get(key, "default")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key != "sweep.space":
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _merge(low: dict[str, Any], high: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = dict(low)
    for name, value in high.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and isinstance(out.get(name), Mapping) and key != "sweep.space":
            out[name] = _merge(dict(out[name]), value, f"{key}.")
        else:
            out[name] = value
    return out


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def known_keys() -> tuple[str, ...]:
    """Every dotted key of a config."""
    return tuple(_known_keys(RunConfig))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a tree.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML (with the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such config file", key="--config", value=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file cannot be read: {error}", place=str(path)) from None
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError, or a number or nesting beyond all bounds
        raise ConfigError(f"not valid TOML: {error}", place=str(path)) from None


def _path(text: str) -> tuple[list[str], str, str]:
    """The parts of a setting's key, the `=`, the value; a part in quotes may hold dots, as in TOML."""
    quoted = re.match(r'\s*((?:[^"=.]+\.)*)"([^"]+)"\s*(=)(.*)', text, re.DOTALL)
    if quoted:
        return [*quoted[1].split(".")[:-1], quoted[2]], quoted[3], quoted[4]
    key, sep, raw = text.partition("=")
    return key.strip().split("."), sep, raw


def parse_set(text: str) -> dict[str, Any]:
    """`a.b=value` as a tree; the value is read as TOML, else kept as a string.

    Raises:
        ConfigError: there is no `=`, or the key is empty.
    """
    path, sep, raw = _path(text)
    if not sep or not all(path):
        raise ConfigError("a setting is written key=value", key="--set", value=text, hint="--set model.width=256")
    try:
        value: Any = tomllib.loads(f"x = {raw}")["x"]
    except (ValueError, RecursionError):
        value = raw
    for part in reversed(path):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


def _place(key: str, origins: Mapping[str, str]) -> str:
    """The layer that set a key, or the key it is an item of, or, for a section, whatever was set in it last."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in origins:
            return origins[name]
    return next((origin for name, origin in reversed(list(origins.items())) if name.startswith(f"{key}.")), "")


def _explain(error: ValidationError, origins: Mapping[str, str]) -> IsoscaleError:
    found: list[IsoscaleError] = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        place = _place(key, origins)
        if item["type"] == "together":
            ctx, section = item["ctx"], item["input"]
            full, value = f"{key}.{ctx['key']}", None
            if isinstance(section, Mapping):
                value = section.get(str(ctx["key"]).partition(".")[0])
                value = value.get(ctx["key"].partition(".")[2]) if isinstance(value, Mapping) else value
            found.append(ConfigError(item["msg"], key=full, value=value, place=_place(full, origins) or place,
                                     hint=ctx["hint"][:300]))  # fmt: skip
        elif item["type"] == "extra_forbidden":
            tail = key.rsplit(".", 1)[-1]
            same = [known for known in known_keys() if known.rsplit(".", 1)[-1] == tail]
            near = _MOVED.get(key) or (same[0] if same else "")
            hint = f"did you mean {near}?" if near else did_you_mean(key, known_keys())
            found.append(ConfigError("unknown key", key=key, value=item["input"], place=place, hint=hint[:300]))
        else:
            text = item["msg"].removeprefix("Value error, ")
            value = item["input"] if not isinstance(item["input"], Mapping) else None
            allowed = item.get("ctx", {}).get("expected", "")
            hint = ""
            if item["type"] == "literal_error":
                close = nearest(str(value), re.findall("'([^']*)'", allowed))
                hint = f"did you mean {close[0]!r}?" if close else f"one of {allowed}"
            found.append(ConfigError(text, key=key, value=value, place=place, hint=hint))
    if len(found) == 1:
        return found[0]
    return ManyErrors(found, f"{len(found)} problems in the configuration")


def build(tree: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> RunConfig:
    """A checked config from a tree of plain values.

    Raises:
        ConfigError, ManyErrors: what does not fit, all of it at once.
    """
    try:
        return RunConfig.model_validate(dict(tree))
    except ValidationError as error:
        raise _explain(error, origins or {}) from None


def load(
    preset: RunConfig | None = None, preset_name: str = "", file: Path | None = None, sets: Sequence[str] = ()
) -> Loaded:
    """The config from its layers, lowest first: defaults, preset, file, `--set` flags.

    Raises:
        ConfigError, ManyErrors: a layer cannot be read or the result does not fit.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    layers: list[tuple[str, dict[str, Any]]] = []
    if preset is not None:
        layers.append((f"preset {preset_name}", preset.model_dump(mode="python", exclude_unset=True)))
    if file is not None:
        layers.append((str(file), read_toml(file)))
    layers += [(f"--set {text}", parse_set(text)) for text in sets]
    for name, layer in layers:
        tree = _merge(tree, layer)
        for key, _ in _leaves(layer):
            origins.pop(key, None)  # so that the order is that of the setting
            origins[key] = name
    return Loaded(build(tree, origins), origins)
