"""Streams are named, fixed and independent."""

import numpy as np
import pytest

from isoscale._base import rng
from isoscale._base.errors import ConfigError

GOLDEN = [
    5002178623122376926,
    7109127767192644779,
    [13548193792069069483, 14113064550162232074],
    [5, 2, 7, 0, 1, 6, 3, 4],
]


def test_golden_values_never_change():
    assert rng.stream(0) == GOLDEN[0]
    assert rng.stream(1, "data", "order", 3) == GOLDEN[1]
    assert rng.words(2, 1, "data").tolist() == GOLDEN[2]
    assert rng.permutation(8, 1, "data").tolist() == GOLDEN[3]


def test_names_do_not_collide():
    every = [(), ("a",), ("a", "b"), ("ab",), (1,), ("1",), ("i1",), ("a", 1), ("a1",), ("",), ("", "")]
    seeds = {rng.stream(seed, *names) for seed in (0, 1, -1, 2**80) for names in every}
    assert len(seeds) == 4 * len(every)
    assert all(0 <= one < 2**63 for one in seeds)


def test_numpy_integers_count_as_integers():
    assert rng.stream(np.int64(3), np.int32(4)) == rng.stream(3, 4)


def test_generator_repeats_and_differs_by_name():
    draw = [rng.generator(5, "a").random(4), rng.generator(5, "a").random(4), rng.generator(5, "b").random(4)]
    assert (draw[0] == draw[1]).all()
    assert (draw[0] != draw[2]).all()


def test_permutation_is_one():
    assert sorted(rng.permutation(1000, 7, "x").tolist()) == list(range(1000))
    assert rng.permutation(0, 7).size == 0


@pytest.mark.parametrize(("seed", "names"), [(1.0, ()), (True, ()), ("1", ()), (1, (1.5,)), (1, (None,))])
def test_wrong_types_are_refused(seed, names):
    with pytest.raises(ConfigError):
        rng.stream(seed, *names)
