"""Searches over hyperparameters in base units: space, strategies, an Optuna study in the folder, worker processes."""

from isoscale.sweep.quickstart import Display, quickstart
from isoscale.sweep.result import SweepResult, TrialRow, load
from isoscale.sweep.study import Status, sweep
from isoscale.sweep.transfer import Transfer, transfer

__all__ = ["Display", "Status", "SweepResult", "Transfer", "TrialRow", "load", "quickstart", "sweep", "transfer"]
