"""What moves weights: schedules (and, as they land, LMD and its relatives)."""

from isoscale.optim.make import Together, make_optimizer
from isoscale.optim.schedule import lr_factor

__all__ = ["Together", "lr_factor", "make_optimizer"]
