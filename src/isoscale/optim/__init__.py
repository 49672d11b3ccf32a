"""What moves weights: schedules (and, as they land, LMD and its relatives)."""

from isoscale.optim.schedule import lr_factor

__all__ = ["lr_factor"]
