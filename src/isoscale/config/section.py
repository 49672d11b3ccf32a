"""What all sections of a config share, and the kinds of numbers in them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# The bounds are far outside of what anybody trains; inside them no product of settings over- or underflows a float.


def _not_tiny(value: float) -> float:
    if value < 1e-30:
        raise ValueError("Input should be at least 1e-30")
    return value


Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False), AfterValidator(_not_tiny)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def wrong(key: str, message: str, hint: str) -> PydanticCustomError:
    """A refusal that involves several fields: which key to look at, what is wrong, what to write."""
    # pydantic fills {key} and {hint} in, so the parts travel as context
    return PydanticCustomError("together", "{text}", {"text": message, "key": key, "hint": hint})


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
