"""The training loop, its state on disk, its data."""

from isoscale.train.loop import RunResult, Tick, pick_device, train

__all__ = ["RunResult", "Tick", "pick_device", "train"]
