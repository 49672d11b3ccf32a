"""Named random streams from one seed, the same on every machine and with every library version.

A run has one seed; what needs randomness asks for `stream(seed, "data", epoch)`. Streams with different names are
independent, so adding one never shifts another, and two trials that share a seed see the same data order.

Why SHA-256: it is fixed for ever, unlike `hash()`. Why raw Philox words in `permutation`: NumPy keeps the words of
a bit generator stable for ever but may change what `Generator.permutation` makes of them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from isoscale._base.errors import ConfigError


def stream(seed: int, *names: str | int) -> int:
    """The seed of a named stream: 63 bits (fits a signed 64-bit integer, as `torch.Generator` wants).

    Args:
        seed: the seed of the run, any integer.
        names: what the stream is for; "1" and 1 are different names.

    Raises:
        ConfigError: a seed that is no integer, or a name that is neither text nor an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ConfigError("a seed must be an integer", key="seed", value=seed)
    parts = [f"i{int(seed)}"]
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int | np.integer):
            raise ConfigError("a stream name must be text or an integer", key="names", value=name)
        parts.append(f"s{name}" if isinstance(name, str) else f"i{int(name)}")
    text = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator (Philox) on the named stream. Raises as `stream` does."""
    return np.random.Generator(np.random.Philox(key=stream(seed, *names)))


def words(count: int, seed: int, *names: str | int) -> NDArray[np.uint64]:
    """`count` random 64-bit words of the named stream, stable across NumPy versions."""
    return np.asarray(np.random.Philox(key=stream(seed, *names)).random_raw(count), dtype=np.uint64)


def permutation(count: int, seed: int, *names: str | int) -> NDArray[np.int64]:
    """A random order of `range(count)`, stable across NumPy versions: the order that sorts `count` random words."""
    return np.argsort(words(count, seed, *names), kind="stable").astype(np.int64, copy=False)
