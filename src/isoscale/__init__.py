"""isoscale: tune a small model once, train any bigger one in fewer bits, and know why every number is what it is.

Public names load on first use, so `import isoscale` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoscale import (
        check,
        config,
        formats,
        models,
        nn,
        numerics,
        optim,
        planning,
        presets,
        probe,
        report,
        rules,
        scalify,
        sweep,
    )
    from isoscale._base.errors import IsoscaleError
    from isoscale.config import RunConfig, Scale
    from isoscale.planning import Plan, export, infer_roles, plan
    from isoscale.train import RunResult, train

__version__ = "0.1.0"

_NAMES = {
    "IsoscaleError": "isoscale._base.errors",
    "Plan": "isoscale.planning",
    "RunConfig": "isoscale.config",
    "RunResult": "isoscale.train",
    "Scale": "isoscale.config",
    "export": "isoscale.planning",
    "infer_roles": "isoscale.planning",
    "plan": "isoscale.planning",
    "train": "isoscale.train",
}
_FOLDERS = ("check", "config", "formats", "models", "nn", "numerics", "optim", "planning", "presets", "probe", "report",
            "rules", "scalify", "sweep")  # fmt: skip

__all__ = [
    "IsoscaleError", "Plan", "RunConfig", "RunResult", "Scale", "check", "config", "export", "formats", "infer_roles",
    "models", "nn", "numerics", "optim", "plan", "planning", "presets", "probe", "report", "rules", "scalify", "sweep",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _FOLDERS:
        return import_module(f"isoscale.{name}")
    raise AttributeError(f"module 'isoscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
