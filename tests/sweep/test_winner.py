"""Intervals and winners, against scipy and by hand."""

from __future__ import annotations

import json
import math
import random

import pytest
from scipy import stats

from isoscale.sweep.winner import Confidence, candidates, choose, fresh_seeds, interval, student

A, B, C = {"lr": 1.0}, {"lr": 2.0}, {"lr": 4.0}


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 30, 99, 1000])
def test_the_quantile_is_students(df):
    assert student(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)


def test_an_interval_is_scipys():
    values = [2.0, 2.1, 2.3, 1.9]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, stats.tmean(values), stats.sem(values))
    assert (found.low, found.high, found.count) == (pytest.approx(low), pytest.approx(high), 4)
    assert math.isnan(interval([1.0]).low)
    assert interval([1.0, math.inf]).mean == math.inf


def test_an_interval_holds_the_truth_as_often_as_it_says():
    draw = random.Random(1)
    inside = sum(abs((found := interval([draw.gauss(0, 1) for _ in range(4)])).mean) <= found.high - found.mean
                 for _ in range(4000))  # fmt: skip
    assert 0.94 < inside / 4000 < 0.96


def test_the_mean_decides_and_the_pairs_say_how_sure_that_is():
    found = choose([(A, {5: 2.0, 6: 3.0, 7: 4.0}), (B, {5: 1.9, 6: 2.9, 7: 3.9}), (C, {})])
    assert [one.point for one in found.contenders] == [B, A]
    assert found.gap.mean == pytest.approx(0.1)
    assert found.settled  # far smaller than the spread of either, and yet sure, since the seeds are paired
    assert found.contenders[0].interval.low < found.contenders[1].interval.mean
    crossed = choose([(A, {5: 2.0, 6: 3.0, 7: 4.0}), (B, {5: 3.9, 6: 1.9, 7: 2.9})])
    assert not crossed.settled


def test_one_contender_a_diverged_one_and_none():
    assert choose([(A, {1: 2.0})]).gap is None
    assert not choose([(A, {1: 2.0})]).settled
    found = choose([(A, {1: 1.0, 2: math.inf}), (B, {1: 5.0, 2: 5.0})])
    assert found.contenders[0].point == B
    assert choose([]).contenders == ()


def test_it_survives_the_file():
    from isoscale._base.log import dumps

    found = choose([(A, {1: 1.0, 2: math.inf}), (B, {1: 5.0, 2: 5.5})])
    assert Confidence.from_dict(json.loads(dumps(found.to_dict()))) == found


def test_candidates_are_finite_and_seeds_are_fresh():
    means = [(A, 3.0), (B, math.inf), (C, 2.0)]
    assert candidates(means, 5) == [C, A]
    assert candidates(means, 1) == [C]
    assert fresh_seeds([0, 7, 3], 2) == [8, 9]
