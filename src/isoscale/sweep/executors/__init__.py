"""Where trials run: in this process, in processes of this machine, on a Ray cluster."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig
from isoscale.sweep.executors.base import Died, Executor, Finished, Hear, Message, Reported, cards_of

__all__ = ["Died", "Executor", "Finished", "Hear", "Message", "Reported", "make", "workers_of"]


def workers_of(config: RunConfig, on_line: Callable[[str], None] | None = None) -> tuple[int, float]:
    """How many trials run at a time, and the seconds a step of each takes (nan: not measured); `auto` measures both.

    Args:
        config: the sweep's.
        on_line: gets a line per count that was measured.
    """
    wanted = config.sweep.workers
    if config.sweep.executor == "inline":
        return 1, math.nan
    if wanted != "auto":
        return wanted, math.nan
    from isoscale.sweep.measure import pick_workers

    found = pick_workers(config, on_line=on_line)
    return found.workers, found.seconds_per_step


def make(config: RunConfig, out: Path, hear: Hear, workers: int) -> Executor:
    """The executor that a config names.

    Args:
        config: the sweep's.
        out: sweep folder, for the workers' logs.
        hear: see `Hear`.
        workers: trials at a time.

    Raises:
        ConfigError: it cannot be had here.
        MissingDependencyError: Ray is not installed.
    """
    kind = config.sweep.executor
    if kind != "ray" and config.sweep.ray_address:
        raise ConfigError("an address of a Ray cluster, and the executor is another", key="sweep.ray_address",
                          value=config.sweep.ray_address, hint='sweep.executor = "ray"')  # fmt: skip
    if kind == "inline":
        from isoscale.sweep.executors.inline import Inline

        return Inline(hear)
    if kind == "processes":
        from isoscale.sweep.executors.processes import Processes

        return Processes(workers, out, cards_of(config))
    from isoscale.sweep.executors.ray import Ray

    return Ray(workers, config.sweep.ray_address, gpus=config.train.device != "cpu")
