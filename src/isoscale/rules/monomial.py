"""A rule's atom: coefficient x hyperparameters^p x sizes^q, which evaluates to a number *and* the sentence behind it.

Every parametrisation in use (SP, muP, u-muP, Complete(d)P) is a table of such products, so a table of them can be
printed, multiplied (the abc symmetry) and compared without running a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from isoscale._base.errors import PlanError


@dataclass(frozen=True)
class Value:
    """A number and its reason, e.g. `0.125 = lr 1 x fan_in^-1/2 (fan_in 64)`."""

    number: float
    reason: str


def show_number(number: float) -> str:
    """Six significant digits, without trailing zeros."""
    return f"{number:.6g}"


def _show_power(power: float) -> str:
    if power == 1:
        return ""
    return f"^{Fraction(power).limit_denominator(64)}"


def _merge(left: Mapping[str, float], right: Mapping[str, float], sign: float = 1.0) -> dict[str, float]:
    out = dict(left)
    for name, power in right.items():
        out[name] = out.get(name, 0.0) + sign * power
    return {name: power for name, power in out.items() if power != 0.0}


@dataclass(frozen=True)
class Monomial:
    """coefficient x product of hps^power x product of sizes^power.

    Args:
        coefficient: a plain number.
        hps: exponents of hyperparameters, by name (`lr`, `init_std`, `alpha_out`, ...).
        sizes: exponents of sizes, by name (`fan_in`, `fan_out`, `stack_depth`, `fan_in_ratio`, `head_size`, ...).
    """

    coefficient: float = 1.0
    hps: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hps", MappingProxyType(dict(self.hps)))
        object.__setattr__(self, "sizes", MappingProxyType(dict(self.sizes)))

    def __hash__(self) -> int:
        return hash((self.coefficient, tuple(sorted(self.hps.items())), tuple(sorted(self.sizes.items()))))

    def __mul__(self, other: Monomial | float) -> Monomial:
        if not isinstance(other, Monomial):
            return Monomial(self.coefficient * other, self.hps, self.sizes)
        return Monomial(
            self.coefficient * other.coefficient, _merge(self.hps, other.hps), _merge(self.sizes, other.sizes)
        )

    def __truediv__(self, other: Monomial) -> Monomial:
        return Monomial(
            self.coefficient / other.coefficient, _merge(self.hps, other.hps, -1), _merge(self.sizes, other.sizes, -1)
        )

    def __pow__(self, power: float) -> Monomial:
        return Monomial(
            self.coefficient**power,
            {name: p * power for name, p in self.hps.items()},
            {name: p * power for name, p in self.sizes.items()},
        )

    def of_sizes(self) -> Monomial:
        """Only how it moves with sizes: no coefficient, no hyperparameters."""
        return Monomial(sizes=self.sizes)

    def formula(self) -> str:
        """The product in words, without numbers: `lr x fan_in^-1/2`."""
        parts = [] if self.coefficient == 1 and (self.hps or self.sizes) else [show_number(self.coefficient)]
        parts += [f"{name}{_show_power(power)}" for name, power in self.hps.items()]
        parts += [f"{name}{_show_power(power)}" for name, power in self.sizes.items()]
        return " x ".join(parts)

    def evaluate(self, hps: Mapping[str, float], sizes: Mapping[str, float]) -> Value:
        """The number under these hyperparameters and sizes, with its reason.

        Raises:
            PlanError: a hyperparameter or size that the rule needs is not known.
        """
        number, parts, legend = self.coefficient, [], []
        if self.coefficient != 1 or not (self.hps or self.sizes):
            parts.append(show_number(self.coefficient))
        for name, power in self.hps.items():
            if name not in hps:
                raise PlanError(f"the rule needs the hyperparameter {name}", key=name, hint=f"hps={{'{name}': 1.0}}")
            number *= _power(hps[name], power, name)
            parts.append(
                f"{name} {show_number(hps[name])}"
                if power == 1
                else f"({name} {show_number(hps[name])}){_show_power(power)}"
            )
        for name, power in self.sizes.items():
            if name not in sizes:
                raise PlanError(
                    f"the rule needs the size {name}", key=name, hint="give base= and target= scales that carry it"
                )
            number *= _power(sizes[name], power, name)
            if sizes[name] == 1 and name.endswith("_ratio") and parts:
                continue  # base and target agree: a factor of 1 explains nothing
            parts.append(f"{name}{_show_power(power)}")
            legend.append(f"{name} {show_number(sizes[name])}")
        tail = f" ({', '.join(legend)})" if legend else ""
        return Value(number, f"{show_number(number)} = {' x '.join(parts)}{tail}")


def _power(base: float, power: float, name: str) -> float:
    if not math.isfinite(base) or (base <= 0 and power != int(power)) or (base == 0 and power < 0):
        raise PlanError(f"{name} = {base} cannot be raised to {power}", key=name, value=base)
    return float(base**power)


def hp(name: str, power: float = 1.0) -> Monomial:
    """The monomial of one hyperparameter."""
    return Monomial(hps={name: power})


def size(name: str, power: float = 1.0) -> Monomial:
    """The monomial of one size."""
    return Monomial(sizes={name: power})


ONE = Monomial()
