"""The four sizes along which hyperparameters move: width, depth, batch and training length."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from isoscale._base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One point in the space of sizes. A field left at None is unknown, and a rule that needs it says so.

    Args:
        width: model width (d_model), in features.
        depth: number of blocks (not of residual branches).
        batch_tokens: tokens in one optimiser step, over all devices.
        tokens: tokens of the whole run (the m_D of Complete(d)P is a ratio of these).

    Raises:
        ConfigError: a size is not a positive number.
    """

    width: int | None = None
    depth: int | None = None
    batch_tokens: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ConfigError(
                    f"Scale.{name} must be a positive number", key=f"Scale.{name}", value=value, hint="for example 256"
                )
