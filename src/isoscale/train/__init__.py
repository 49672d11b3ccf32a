"""The training loop, its state on disk, its data.

`isoscale.train` is this package *and* the function: importing any module below it makes Python bind the package to that
name, so the package itself is callable and `iso.train(config, out)` works in either case.
"""

import sys
from types import ModuleType
from typing import Any

from isoscale.train.bench import Bench
from isoscale.train.loop import RunResult, Tick, pick_device, train

__all__ = ["Bench", "RunResult", "Tick", "pick_device", "train"]


class _Train(ModuleType):
    """The package, callable as `isoscale.train.train`."""

    def __call__(self, *args: Any, **kwargs: Any) -> RunResult:
        """See `isoscale.train.train`."""
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Train
