"""The settings of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from isoscale._base.errors import did_you_mean
from isoscale.config.hps import MODULE_HPS, HpsSection, parse_key
from isoscale.config.section import Count, Positive, Section, wrong

STRATEGIES = ("lr", "independent", "coordinate", "grid", "random", "tpe", "gp", "trust-region")


def _default_space() -> dict[str, tuple[Positive, ...]]:
    return {"lr": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)}


class PerModuleSection(Section):
    """Factors on hyperparameters by module type and depth, searched in log space (Complete(d)P section 5)."""

    hps: tuple[Literal["lr", "weight_decay", "beta1", "beta2", "eps", "init_std", "residual"], ...] = Field(
        (), description="which hyperparameters may differ by module; none: no per-module search"
    )
    form: Literal["kronecker", "types", "free"] = Field(
        "kronecker", description="a factor per type times a curve over depth; types alone; one per type and knot"
    )
    types: tuple[str, ...] = Field((), description="module types searched; none: all of the model")
    depth: Count | None = Field(None, description="knots of a depth curve, at l / L = 0, 1/n, ...; none: one per block")
    reach: Annotated[float, Field(gt=1, le=1e6)] = Field(16.0, description="a factor lies in 1 / reach ... reach")


class SweepSection(Section):
    """Which hyperparameters are tried, how, where, and what may be spent."""

    strategy: Literal["lr", "independent", "coordinate", "grid", "random", "tpe", "gp", "trust-region"] = Field(
        "lr", description="lr: one line; independent, coordinate: a line per HP; the rest: the whole space"
    )
    space: dict[str, tuple[Positive, ...]] = Field(
        default_factory=_default_space,
        description="hyperparameter, or factor such as lr/attn.q -> values tried; drawing strategies: between the ends",
    )
    modules: PerModuleSection = Field(default_factory=PerModuleSection)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="each point is trained once per seed; empty: the run's own seed"
    )
    trials: Count | None = Field(None, description="random, tpe, gp, trust-region: how many points")
    batch: Count = Field(4, description="tpe, gp, trust-region: points chosen at once, for any number of workers")
    prune: Literal["none", "median", "asha"] = Field(
        "none", description="stop trials early, by their curves at equal tokens"
    )
    confirm: Count = Field(3, description="confirm_seeds: how many of the best points are trained again")
    confirm_seeds: Annotated[int, Field(ge=0, le=100)] = Field(
        0, description="fresh seeds for each of the best points; the winner is theirs; 0: no confirmation"
    )
    enough: Positive | None = Field(
        None, description="stop when a further trial would improve by more than this, nats, with < 10 % (at 95 %)"
    )
    executor: Literal["inline", "processes", "ray"] = Field("processes", description="where trials run")
    workers: Count | Literal["auto"] = Field(2, description="trials at a time, one pinned thread each; auto: measured")
    storage: str | None = Field(None, description="database URL of the study; none: SQLite in the folder")
    ray_address: str | None = Field(None, description="ray: a running cluster; none: one on this machine")
    command: tuple[str, ...] = Field(
        (), description="a trial's own command, e.g. torchrun ... train.py; none: isoscale train"
    )
    max_failures: Count = Field(3, description="points that may fail with an error before the search stops")
    budget_runs: Count | None = None
    budget_tokens: Positive | None = None
    budget_flops: Positive | None = None
    budget_seconds: Positive | None = Field(None, description="wall time of the search")

    @field_validator("space", mode="before")
    @classmethod
    def _above_zero(cls, space: object) -> object:
        for name, values in space.items() if isinstance(space, Mapping) else ():
            listed = values if isinstance(values, list | tuple) else ()
            zero = [x for x in listed if isinstance(x, int | float) and x <= 0]
            if zero:
                fix = f", or fix the value: hps.{name} = 0" if zero[0] == 0 else ""
                raise wrong(f"{name}", f"{name}: a log range cannot reach {zero[0]:g}", f"start it at 1e-4 or so{fix}")
        return space

    @model_validator(mode="after")
    def _known(self) -> SweepSection:
        known = set(HpsSection.model_fields)
        for name, values in self.space.items():
            try:
                factor = parse_key(name) is not None
            except ValueError as error:
                raise wrong(f"space.{name}", str(error), f"one of {', '.join(MODULE_HPS)}") from None
            if not factor and name not in known:
                raise wrong(f"space.{name}", f"{name!r} is no hyperparameter", did_you_mean(name, sorted(known)))
            if not values:
                raise wrong(f"space.{name}", "no values to try", f"sweep.space = {{ {name} = [0.5, 1.0, 2.0] }}")
            for value in values if not factor else ():
                try:
                    HpsSection.model_validate({name: value})
                except ValidationError as error:
                    text = error.errors()[0]["msg"]
                    raise wrong(f"space.{name}", f"{name} cannot be {value}: {text}", "other values") from None
        if self.modules.hps and self.strategy in ("lr", "independent"):
            raise wrong("strategy", f"{self.strategy} does not search per module",
                        'sweep.strategy = "trust-region" (or coordinate, random, tpe, gp)')  # fmt: skip
        return self
