"""LR curves: known parabolas come back, seeds make the interval, and the verdict needs an interior, learned optimum."""

import math

import pytest

from isoscale.check.fit import cost_of, optimum, shift
from isoscale.check.slopes import fit_slope
from isoscale.check.transfer import bracket, judge


def parabola(at, seeds=(0.0, 0.0, 0.0), lrs=range(-12, -3), curvature=0.1, floor=2.0):
    """log2 LR -> seed -> loss; each seed's optimum is off by the number given."""
    return {float(x): {seed: floor + curvature * (x - at - off) ** 2 for seed, off in enumerate(seeds)} for x in lrs}


def test_a_parabola_gives_its_vertex_and_no_spread():
    best = optimum(parabola(-7.3))
    assert best.at == pytest.approx(-7.3)
    assert best.loss == pytest.approx(2.0)
    assert (best.low, best.high) == (pytest.approx(-7.3), pytest.approx(-7.3))
    assert best.interior


def test_seeds_that_differ_widen_the_interval():
    best = optimum(parabola(-7.0, (-0.5, 0.0, 0.5)))
    assert best.low < -7.2 < -6.8 < best.high


def test_an_optimum_at_the_edge_is_not_interior():
    assert not optimum(parabola(-3.0)).interior


def test_what_another_lr_costs():
    assert cost_of(parabola(-7.0), -6.0)[0] == pytest.approx(0.1)
    assert cost_of(parabola(-7.0), -7.0)[0] == pytest.approx(0.0)


def test_a_diverged_run_counts_as_twenty_and_does_not_pull_the_optimum():
    curve = parabola(-7.0)
    curve[-4.0] = dict.fromkeys(curve[-4.0], math.inf)
    assert optimum(curve).at == pytest.approx(-7.0)


def test_the_shift_is_paired_by_seed():
    """Seeds that move both optima together say nothing against a shift of exactly one octave."""
    mean, low, high = shift(parabola(-7.0, (-0.4, 0.0, 0.4)), parabola(-6.0, (-0.4, 0.0, 0.4)))
    assert (mean, low, high) == (pytest.approx(1.0), pytest.approx(1.0, abs=0.02), pytest.approx(1.0, abs=0.02))


@pytest.mark.parametrize(("moved", "baseline", "said"), [
    (0.2, 2.4, "confirmed"), (-0.2, None, "confirmed"), (1.5, 2.4, "refuted"), (-1.5, 2.4, "refuted"),
    (0.2, 1.9, "undecided"), (1.5, 1.9, "undecided"), (3.9, 2.4, "refuted"),
])  # fmt: skip
def test_verdicts(moved, baseline, said):
    found = judge(parabola(-7.0), parabola(-7.0 + moved), baseline)
    assert found.verdict == said
    assert found.learned == (baseline != 1.9)


def test_a_flat_basin_transfers_though_its_optimum_moves():
    """The cost decides where the curve is too flat for octaves to matter."""
    found = judge(parabola(-7.0, curvature=0.004), parabola(-6.0, curvature=0.004), None)
    assert found.cost[2] < 0.01
    assert found.verdict == "undecided"  # the ends are not 0.05 nats worse: nothing is bracketed
    assert found.edge


def test_a_noisy_shift_is_undecided():
    assert judge(parabola(-7.0), parabola(-6.4, (-0.6, 0.0, 0.6)), None).verdict == "undecided"


@pytest.mark.parametrize("at", [-3, 0, 3])
def test_the_grid_grows_to_the_side_of_the_optimum(at):
    asked = []

    def run(octave):
        asked.append(octave)
        return {0: 2 + 0.1 * (octave - at) ** 2}

    curve = bracket([-1, 0, 1], 1.0, run)
    assert optimum(curve).interior
    assert optimum(curve).at == pytest.approx(at)
    assert len(asked) == len(set(asked)) <= 9


def test_the_grid_stops_growing_at_nine():
    assert len(bracket([-1, 0, 1], 1.0, lambda octave: {0: -float(octave)})) == 9


def test_slopes_are_exponents():
    found = fit_slope({(size, seed): 3.0 * size**-0.5 for size in (32, 64, 256) for seed in (0, 1)})
    assert found.slope == pytest.approx(-0.5)
    assert found.stderr == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_a_slope_is_that_over_seeds():
    power = {0: 0.0, 1: 0.2, 2: 0.4}
    found = fit_slope({(size, seed): float(size) ** power[seed] for size in (32, 64, 128) for seed in power})
    assert found.slope == pytest.approx(0.2)
    assert found.stderr == pytest.approx(0.2 / math.sqrt(3))


def test_one_seed_has_the_error_of_the_line():
    assert fit_slope({(1, 0): 1.0, (2, 0): 2.0, (4, 0): 4.0}).stderr == pytest.approx(0.0, abs=1e-9)
    assert fit_slope({(1, 0): 1.0, (2, 0): 2.0, (4, 0): 2.0}).stderr > 0.1
    assert math.isnan(fit_slope({(1, 0): 1.0, (2, 0): 2.0}).stderr)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_what_is_no_positive_number_has_no_slope(bad):
    assert math.isnan(fit_slope({(1, 0): 1.0, (2, 0): bad, (4, 0): 1.0}).slope)
