"""Searches over hyperparameters in base units: space, strategies, an Optuna study in the run folder, worker processes."""

from isoscale.sweep.result import SweepResult, TrialRow, load
from isoscale.sweep.study import Status, sweep
from isoscale.sweep.transfer import Transfer, transfer

__all__ = ["Status", "SweepResult", "TrialRow", "Transfer", "load", "sweep", "transfer"]
