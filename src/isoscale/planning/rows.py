"""The two kinds of rows a plan is made of. Immutable, plain data, JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from isoscale.formats.recipes import LayerFormats
from isoscale.nn.factors import Factors


@dataclass(frozen=True)
class Relative:
    """What the optimiser gets, over what was tuned at the base: the factors that a user's own groups are scaled by."""

    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class ParamRow:
    """One parameter: everything that init, optimiser and casts need to know, and why.

    Args:
        name: normalised parameter name.
        role: see `isoscale.rules.ROLES`.
        shape: of the tensor.
        fan_in, fan_out: features in and out of the weight.
        factors: see `Factors`.
        init_std: standard deviation of the normal init; 0 for constants.
        init_value: the constant for gains (1) and biases (0); None for a normal init.
        lr, eps, weight_decay, betas: what the optimiser gets, at peak.
        formats: of its matmuls, see `LayerFormats`.
        reasons: quantity -> readable product.
        optimizer: the family that trains it.
        relative: lr, eps and weight decay over the base's.
        own_init: whether the initial values are the model's own, scaled to `init_std` (constants: to `init_value`).
        own_std: standard deviation that the model itself gave these values, where it was known.
        hook: a multiplier on the weight that init and LR could not take, applied by a parametrization.
        sigma: standard deviation of the noise on the log of the weight; None where the optimiser adds none. Where it
            does, `lr` is in log units per step and `weight_decay` is the coefficient of the regulariser.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    factors: Factors
    init_std: float
    init_value: float | None
    lr: float
    eps: float
    weight_decay: float
    betas: tuple[float, float]
    formats: LayerFormats
    reasons: Mapping[str, str]
    optimizer: str = "adamw"
    relative: Relative = Relative()
    own_init: bool = False
    own_std: float | None = None
    hook: float = 1.0
    sigma: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", MappingProxyType(dict(self.reasons)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return _plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ParamRow:
        """The row back from `to_dict`."""
        return ParamRow(
            **{
                **data,
                "shape": tuple(data["shape"]),
                "betas": tuple(data["betas"]),
                "factors": Factors(**data["factors"]),
                "formats": LayerFormats(**data["formats"]),
                "relative": Relative(**data["relative"]),
            }
        )


@dataclass(frozen=True)
class SiteRow:
    """One place in the forward.

    Args:
        path, port: module path and the place at it.
        kind: the rule's name for such a place.
        multiplier: the factor set there; None where the rule sets none.
        attr: the module attribute that carries it; None where nothing can be set.
        expected_scale: predicted rms at init; None where the parametrisation predicts none.
        format: cast format of the tensor there; `fp32` means not cast.
        cast_scale: static power-of-two scale before the cast, where a recipe wants one.
        reasons: quantity -> readable product.
        own: what the attribute held before, on a model of another class; None elsewhere.
    """

    path: str
    port: str
    kind: str
    multiplier: float | None
    attr: str | None
    expected_scale: float | None
    format: str
    cast_scale: float | None
    reasons: Mapping[str, str]
    own: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", MappingProxyType(dict(self.reasons)))

    @property
    def name(self) -> str:
        """`path.port`, as users type it."""
        return f"{self.path}.{self.port}" if self.path else self.port

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return _plain(self)


def _plain(row: ParamRow | SiteRow) -> dict[str, Any]:
    data = {name: getattr(row, name) for name in row.__dataclass_fields__}
    data["reasons"] = dict(row.reasons)
    if isinstance(row, ParamRow):
        data["factors"], data["formats"] = asdict(row.factors), row.formats.to_dict()
        data["relative"] = asdict(row.relative)
    return data
