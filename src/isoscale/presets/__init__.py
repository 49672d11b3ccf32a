"""Named starting points: functions that return a full config. A variant is a base and two changed lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.config import RunConfig


def proxy() -> RunConfig:
    """A u-muP proxy that a laptop sweeps in minutes."""
    return RunConfig().with_values(**{
        "name": "proxy", "model.width": 64, "model.depth": 4, "train.steps": 300, "train.batch": 8,
    })  # fmt: skip


def target() -> RunConfig:
    """The proxy at four times the width, in u-muP's FP8."""
    return proxy().with_values(**{"name": "target", "model.width": 256, "numerics.recipe": "fp8"})


def sp() -> RunConfig:
    """The control: the proxy in the standard parametrisation."""
    return proxy().with_values(**{
        "name": "sp", "rules.parametrisation": "sp", "hps.lr": 2.0**-7,
        "sweep.space": {"lr": tuple(2.0**e for e in range(-11, -3))},
    })  # fmt: skip


def mup() -> RunConfig:
    """The proxy in muP, with itself as the base."""
    return sp().with_values(**{"name": "mup", "rules.parametrisation": "mup", "base.width": 64, "base.depth": 4})


def complete_d() -> RunConfig:
    """The proxy in Complete(d)P, with itself as the base: transfers over width, depth, batch and training length."""
    return sp().with_values(**{
        "name": "complete-d", "rules.parametrisation": "complete-d", "base.width": 64, "base.depth": 4, "base.batch": 8,
        "base.steps": 300, "model.qk_norm": True, "model.norm": "trainable", "hps.lr": 2.0**-6, "hps.init_std": 0.06,
        "hps.lr_embedding": 16.0, "hps.weight_decay": 0.1, "sweep.space": {"lr": tuple(2.0**e for e in range(-9, -3))},
    })  # fmt: skip


_PRESETS: Mapping[str, Callable[[], RunConfig]] = MappingProxyType(
    {"proxy": proxy, "target": target, "sp": sp, "mup": mup, "complete-d": complete_d}
)


def names() -> tuple[str, ...]:
    """Every preset's name."""
    return tuple(_PRESETS)


def by_name(name: str) -> RunConfig:
    """The config of a preset.

    Raises:
        ConfigError: no such name; the nearest ones are suggested.
    """
    if name not in _PRESETS:
        raise ConfigError(f"unknown preset {name!r}", key="--preset", value=name, hint=did_you_mean(name, _PRESETS))
    return _PRESETS[name]()
