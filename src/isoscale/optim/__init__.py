"""What moves weights: LMD and its relatives, the optimiser of a plan, LR schedules."""

from isoscale.optim.lmd import LMD
from isoscale.optim.lmd_routes import split_parameters
from isoscale.optim.make import Together, make_optimizer
from isoscale.optim.relatives import ExponentiatedGradient, LieGroup, Lion, Madam
from isoscale.optim.schedule import lr_factor

__all__ = [
    "LMD", "ExponentiatedGradient", "LieGroup", "Lion", "Madam", "Together", "lr_factor", "make_optimizer",
    "split_parameters",
]  # fmt: skip
