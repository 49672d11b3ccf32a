"""Points, strategies, budgets and transfer, without training anything."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig, SweepSection
from isoscale.sweep.budget import affordable, run_cost
from isoscale.sweep.result import SweepResult, TrialRow, means
from isoscale.sweep.space import centre_out, identity, show
from isoscale.sweep.strategies import make
from isoscale.sweep.transfer import transfer
from isoscale.train.setup import meta_plan

POWERS = tuple(2.0**e for e in range(-2, 5))


def test_identity_is_of_the_point_and_the_seed_alone():
    assert identity({"lr": 1, "eps": 1e-8}, 0) == identity({"eps": 1e-8, "lr": 1.0}, 0)
    names = {identity({"lr": lr}, seed) for lr in POWERS for seed in (0, 1)}
    assert len(names) == 14
    assert identity({"lr": 1.0}, 0) == "d88463bc0d52"  # folders of old sweeps bear these names


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9, unique=True))
def test_centre_out_is_an_order_that_brackets_when_cut(values):
    order, ranked = centre_out(values), sorted(values)
    assert sorted(order) == ranked
    for cut in range(1, len(order) + 1):
        positions = sorted(ranked.index(value) for value in order[:cut])
        assert positions == list(range(positions[0], positions[0] + cut))  # no hole
    if len(order) >= 3:
        assert ranked[0] not in order[:-2]
        assert ranked[-1] not in order[:-2]


def test_a_point_in_words():
    assert show({"lr": 0.125, "eps": 0.3}) == "lr=2^-3 eps=0.3"
    assert show({}) == "defaults"


def search(section, loss, seed=0):
    strategy, results, phase, asked = make(section, seed), [], 0, []
    while (points := strategy.next_points(phase, results)) is not None:
        asked.append(points)
        results += [(point, loss(point)) for point in points]
        phase += 1
    return asked, results


def bowl(best):
    return lambda point: sum((math.log2(point.get(n, 1.0)) - math.log2(v)) ** 2 for n, v in best.items())


def test_lr_line_asks_for_each_value_once():
    asked, _ = search(SweepSection(space={"lr": POWERS}), bowl({"lr": 4.0}))
    assert [point["lr"] for point in asked[0]] == centre_out(POWERS)
    assert len(asked) == 1


@pytest.mark.parametrize("best", list(itertools.product((0.5, 4.0), (0.25, 1.0, 8.0), (1.0, 2.0))))
def test_independent_search_finds_the_separable_optimum_in_a_sum_of_runs_not_a_product(best):
    target = dict(zip(("lr", "alpha_attn", "alpha_res"), best))
    section = SweepSection(strategy="independent", space=dict.fromkeys(target, POWERS))
    asked, results = search(section, bowl(target))
    point, loss = min(results, key=lambda pair: pair[1])
    assert {name: point.get(name, 1.0) for name in target} == target
    assert loss == 0
    assert sum(map(len, asked)) <= 3 * 7 + 1


def test_control_independent_search_misses_an_optimum_that_is_not_separable():
    ridge = lambda p: abs(math.log2(p["lr"]) + math.log2(p.get("alpha_attn", 1.0)) - 2) + 2 * abs(math.log2(p.get("alpha_attn", 1.0)) - math.log2(p["lr"]))  # noqa: E731
    _, results = search(SweepSection(strategy="independent", space=dict.fromkeys(("lr", "alpha_attn"), POWERS)), ridge)
    assert min(loss for _, loss in results) > ridge({"lr": 2.0, "alpha_attn": 2.0})


def test_random_search_is_reproducible_and_inside_the_box():
    section = SweepSection(strategy="random", trials=50, space={"lr": (0.25, 16.0), "alpha_res": (0.5, 2.0)})
    (points,), _ = search(section, bowl({"lr": 1.0}))
    assert (points,) == tuple(search(section, bowl({"lr": 1.0}))[0])
    assert points != search(section, bowl({"lr": 1.0}), seed=1)[0][0]
    assert all(0.25 <= p["lr"] <= 16 and 0.5 <= p["alpha_res"] <= 2 for p in points)
    assert 0.3 < sum(p["lr"] < 2 for p in points) / 50 < 0.7  # log-uniform


@pytest.mark.parametrize(("values", "key"), [
    ({"space": {"eps": (1e-8,)}}, "sweep.space.lr"), ({"space": {"lr": (1.0,), "eps": (1e-8,)}}, "sweep.space"),
    ({"strategy": "random"}, "sweep.trials"),
])  # fmt: skip
def test_a_strategy_that_lacks_something_or_would_ignore_something_is_refused(values, key):
    with pytest.raises(ConfigError) as error:
        make(SweepSection(**values), 0)
    assert error.value.key == key
    assert error.value.hint


def test_every_run_diverged_is_an_error():
    with pytest.raises(ConfigError, match="every run"):
        search(SweepSection(strategy="independent", space={"lr": (1.0,), "eps": (1e-8,)}), lambda point: math.inf)


def test_budgets_pay_for_whole_runs_and_the_tightest_counts(tiny):
    config = tiny()
    tokens, flops = run_cost(config)
    assert tokens == 8 * 4 * 32
    assert flops == pytest.approx(tokens * (6 * sum(  # by hand: every matrix but the embedding, and causal attention
        math.prod(row.shape) for row in meta_plan(config).rows if row.role != "embedding") + 6 * 16 * 32))
    assert affordable(config) == math.inf
    assert affordable(tiny(**{"sweep.budget_runs": 5})) == 5
    assert affordable(tiny(**{"sweep.budget_tokens": 3.9 * tokens})) == 3
    assert affordable(tiny(**{"sweep.budget_flops": 2.5 * flops, "sweep.budget_runs": 5})) == 2
    for key, one in (("sweep.budget_tokens", tokens), ("sweep.budget_flops", flops)):
        with pytest.raises(ConfigError, match="pays for no run") as error:
            affordable(tiny(**{key: 0.9 * one}))
        assert error.value.key == key


def row(lr, loss, seed=0, state="done"):
    return TrialRow(identity({"lr": lr}, seed), {"lr": lr}, seed, state, loss, 1.0, 1)


def test_means_are_over_the_seeds_that_are_done():
    trials = (row(1.0, 2.0), row(1.0, 4.0, 1), row(2.0, math.inf), row(2.0, 1.0, 1), row(4.0, math.nan, state="running"))
    assert means(trials) == [({"lr": 1.0}, 3.0), ({"lr": 2.0}, math.inf)]


def result(config, best=2.0, edge=False, tmp="x"):
    from pathlib import Path

    return SweepResult(Path(tmp), config, (row(best, 1.0),), {"lr": best}, 1.0, edge, 1.0)


def test_transfer_carries_base_units_unchanged_and_says_what_each_tensor_gets():
    made = transfer(result(RunConfig()), **{"model.width": 256, "numerics.recipe": "fp8"})
    assert (made.target.hps.lr, made.proxy.hps.lr, made.target.model.width) == (2.0, 2.0, 256)
    changes = {(change.name, change.quantity): change for change in made.changes}
    change = changes["blocks.*.attn.qkv.weight", "lr"]
    assert change.left / change.right == pytest.approx(2.0)  # 4x the width, fan_in^-1/2
    assert ("blocks.*.attn.qkv.weight", "formats") in changes
    assert made.warnings == ()


def test_transfer_fills_the_base_in_where_rules_have_ratios():
    config = RunConfig().with_values(**{"rules.parametrisation": "mup", "base.width": 64, "base.depth": 4})
    bare = RunConfig().with_values(**{"rules.parametrisation": "mup"})
    for source in (config, bare):
        made = transfer(result(source, 0.01), **{"model.width": 256})
        assert (made.target.base.width, made.target.base.depth) == (64, 4)
        change = next(c for c in made.changes if (c.name, c.quantity) == ("blocks.*.attn.qkv.weight", "lr"))
        assert change.left / change.right == pytest.approx(4.0)


def test_a_transfer_under_complete_d_moves_along_four_axes():
    config = RunConfig().with_values(**{"rules.parametrisation": "complete-d", "hps.weight_decay": 0.1})
    steps = config.train.steps
    made = transfer(result(config, 0.01), **{"model.width": 256, "model.depth": 8, "train.batch": 32, "train.steps": steps})
    base = made.target.base
    assert (base.width, base.depth, base.batch, base.steps) == (64, 4, 8, steps)
    quantities = {change.quantity for change in made.changes}
    assert {"lr", "eps", "weight_decay", "init_std"} <= quantities
    lr = next(c for c in made.changes if (c.name, c.quantity) == ("head.weight", "lr"))
    assert lr.left / lr.right == pytest.approx(4.0)  # width alone: batch and tokens grow together, s = 1
    assert not any("depth differs" in warning for warning in made.warnings)
    assert any("contested" in warning for warning in made.warnings)


@pytest.mark.parametrize(("proxy", "values", "edge", "text"), [
    ({}, {"model.width": 256}, True, "an end of the values"), ({}, {"model.width": 128}, False, "only 2x wider"),
    ({}, {"model.width": 32}, False, "narrower"), ({"model.width": 32}, {"model.width": 256}, False, "below the sizes"),
    ({"rules.parametrisation": "sp"}, {"model.width": 256}, False, "under SP the optimum moves"),
    ({"model.norm": "trainable"}, {"model.width": 256}, False, "non-parametric norms"),
    ({}, {"model.width": 256, "train.steps": 600}, False, "token count differs (307,200 -> 614,400)"),
    ({}, {"model.width": 256, "model.depth": 8}, False, "the depth differs (4 -> 8)"),
])  # fmt: skip
def test_transfer_warns(proxy, values, edge, text):
    made = transfer(result(RunConfig().with_values(**proxy), edge=edge), **values)
    assert any(text in warning for warning in made.warnings), made.warnings


@pytest.mark.parametrize("values", [{}, {"model.width": 64}, {"model.width": 100}, {"model.widht": 256}])
def test_transfer_refuses_no_target_and_a_wrong_one(values):
    with pytest.raises(ConfigError):
        transfer(result(RunConfig()), **values)
