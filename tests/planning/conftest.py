"""Small decoders for the plan's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from isoscale.models import Decoder, DecoderConfig


@pytest.fixture(scope="session")
def make() -> Callable[..., Decoder]:
    """A decoder of 2 blocks, width 32, unless said otherwise."""

    def build(**changes: object) -> Decoder:
        settings = {"vocab": 64, "width": 32, "depth": 2, "head_size": 16, **changes}
        return Decoder(DecoderConfig(**settings))  # type: ignore[arg-type]

    return build
