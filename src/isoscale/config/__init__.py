"""The settings of a run: typed, validated at birth, each value knows which layer set it. No torch here."""

from isoscale.config.hps import HpsSection
from isoscale.config.load import Loaded, build, known_keys, load
from isoscale.config.run import (
    BaseSection,
    DataSection,
    ModelSection,
    NumericsSection,
    OptimSection,
    RulesSection,
    RunConfig,
    TrainSection,
)
from isoscale.config.scale import Scale
from isoscale.config.sweep import SweepSection

__all__ = [
    "BaseSection",
    "DataSection",
    "HpsSection",
    "Loaded",
    "ModelSection",
    "NumericsSection",
    "OptimSection",
    "RulesSection",
    "RunConfig",
    "Scale",
    "SweepSection",
    "TrainSection",
    "build",
    "known_keys",
    "load",
]
