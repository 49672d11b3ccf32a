"""Searches over hyperparameters in base units: spaces, strategies, an Optuna storage, executors, transfer.

Names load on first use, so that a worker process costs no torch before its job does.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoscale.sweep.quickstart import Display, quickstart
    from isoscale.sweep.result import SweepResult, TrialRow, load
    from isoscale.sweep.space import Space
    from isoscale.sweep.status import Status
    from isoscale.sweep.study import Study, sweep
    from isoscale.sweep.transfer import Transfer, transfer

_NAMES = {"Display": "quickstart", "Space": "space", "Status": "status", "Study": "study", "SweepResult": "result",
          "Transfer": "transfer", "TrialRow": "result", "load": "result", "quickstart": "quickstart", "sweep": "study",
          "transfer": "transfer"}  # fmt: skip

__all__ = ["Display", "Space", "Status", "Study", "SweepResult", "Transfer", "TrialRow", "load", "quickstart", "sweep",
           "transfer"]  # fmt: skip


class _Package(ModuleType):
    """Importing the module `transfer` binds it to the name of its function; the function stays."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in _NAMES else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'isoscale.sweep' has no attribute {name!r}")
    value = getattr(import_module(f"isoscale.sweep.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
