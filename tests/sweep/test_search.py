"""Points, strategies, budgets and transfer, without training anything."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig
from isoscale.sweep.budget import affordable, run_cost
from isoscale.sweep.pruning import hopeless
from isoscale.sweep.result import SweepResult, TrialRow, means
from isoscale.sweep.space import Dim, Space, centre_out, identity, show, trial_config
from isoscale.sweep.strategies import Trial, make
from isoscale.sweep.strategies.trust_region import FIRST, GROW, SHRINK, SMALLEST, Box, TrustRegion
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


def search(loss, seed=0, **values):
    """Runs a strategy on a function of the point; batches asked for, and all trials."""
    config = RunConfig().with_values(seed=seed, **{f"sweep.{key}": value for key, value in values.items()})
    strategy, trials, asked = make(config, Space.of(config)), [], []
    while (points := strategy.ask(trials, 2)) is not None:
        assert points
        asked.append(points)
        trials += [Trial(point, "done", loss(point)) for point in points]
    return asked, trials


def lowest_of(trials):
    return min(trials, key=lambda trial: trial.loss)


def bowl(best):
    return lambda point: sum((math.log2(point.get(n, 1.0)) - math.log2(v)) ** 2 for n, v in best.items())


def test_lr_line_asks_for_each_value_once():
    asked, _ = search(bowl({"lr": 4.0}), space={"lr": POWERS})
    assert [point["lr"] for point in asked[0]] == centre_out(POWERS)
    assert len(asked) == 1


@pytest.mark.parametrize("best", list(itertools.product((0.5, 4.0), (0.25, 1.0, 8.0), (1.0, 2.0))))
def test_independent_search_finds_the_separable_optimum_in_a_sum_of_runs_not_a_product(best):
    target = dict(zip(("lr", "alpha_attn", "alpha_res"), best))
    asked, trials = search(bowl(target), strategy="independent", space=dict.fromkeys(target, POWERS))
    found = lowest_of(trials)
    assert {name: found.point.get(name, 1.0) for name in target} == target
    assert found.loss == 0
    assert sum(map(len, asked)) <= 3 * 7 + 1


RIDGE = {"lr": POWERS, "alpha_attn": POWERS}


def ridge(point):
    lr, attn = (math.log2(point.get(name, 1.0)) for name in RIDGE)
    return abs(lr + attn - 2) + 2 * abs(attn - lr)


def test_control_independent_search_misses_an_optimum_that_is_not_separable():
    _, trials = search(ridge, strategy="independent", space=RIDGE)
    assert lowest_of(trials).loss > ridge({"lr": 2.0, "alpha_attn": 2.0})


def test_a_phase_waits_for_what_is_open():
    config = RunConfig().with_values(**{"sweep.strategy": "independent", "sweep.space": {"lr": (1.0, 2.0), "alpha_res": (0.5, 2.0)}})
    strategy = make(config, Space.of(config))
    first = strategy.ask([], 9)
    half = [Trial(first[0], "done", 1.0), Trial(first[1], "open", math.nan)]
    assert strategy.ask(half, 9) == []
    second = strategy.ask([half[0], Trial(first[1], "done", 2.0)], 9)
    assert {point["lr"] for point in second} == {first[0]["lr"]}


def test_grid_is_every_combination_from_the_middle_out():
    asked, trials = search(ridge, strategy="grid", space=RIDGE)
    assert len(trials) == 49 == len({tuple(sorted(t.point.items())) for t in trials})
    assert asked[0][0] == {"lr": 2.0, "alpha_attn": 2.0}
    assert lowest_of(trials).loss == 0
    with pytest.raises(ConfigError, match="823,543 points"):
        search(ridge, strategy="grid", space=dict.fromkeys(("lr", "alpha_attn", "alpha_res", "alpha_emb", "alpha_out", "eps", "alpha_loss"), POWERS))


def valley(point):
    lr, attn = (math.log2(point.get(name, 1.0)) for name in RIDGE)
    return (lr - attn) ** 2 + 2 * (attn - 2) ** 2


def test_coordinate_search_goes_round_where_one_round_is_not_enough():
    _, trials = search(valley, strategy="coordinate", space=RIDGE)
    assert lowest_of(trials).loss == 0
    assert lowest_of(search(valley, strategy="independent", space=RIDGE)[1]).loss == 3  # the control
    points = [tuple(sorted(t.point.items())) for t in trials]
    assert len(set(points)) == len(points)
    _, cut = search(valley, strategy="coordinate", space=RIDGE, trials=10)
    assert cut == trials[:10]


@pytest.mark.parametrize("strategy", ["random", "tpe", "gp", "trust-region"])
def test_drawn_points_are_reproducible_inside_the_box_and_do_not_hang_on_when_one_asks(strategy):
    how = {"strategy": strategy, "trials": 21, "space": {"lr": (0.25, 16.0), "alpha_res": (0.5, 2.0)}}
    loss = bowl({"lr": 4.0, "alpha_res": 0.7})
    _, trials = search(loss, **how)
    assert trials == search(loss, **how)[1]
    assert trials[1:] != search(loss, seed=1, **how)[1][1:]
    assert len(trials) == 21
    assert all(0.25 <= t.point.get("lr", 1) <= 16 and 0.5 <= t.point.get("alpha_res", 1) <= 2 for t in trials)
    config = RunConfig().with_values(**{f"sweep.{key}": value for key, value in how.items()})
    for cut in {"trust-region": (9, 13)}.get(strategy, (8, 12)):  # another process goes on where this one stopped
        assert make(config, Space.of(config)).ask(trials[:cut], 4)[0] == trials[cut].point
    if strategy == "random":
        assert 0.3 < sum(t.point["lr"] < 2 for t in trials) / 21 < 0.7  # log-uniform


def test_what_learns_beats_random_on_a_bowl_in_many_dimensions():
    """The controls: random search in the same box, and a trust region that cannot recentre."""
    names = ("lr", "alpha_attn", "alpha_res", "alpha_ffn_act", "alpha_emb", "alpha_out", "alpha_loss", "lr_embedding")
    target = {name: 2.0 ** (1.5 * (-1) ** i) for i, name in enumerate(names)}
    how = {"trials": 81, "space": dict.fromkeys(names, (1 / 16, 16.0))}
    found = {s: [lowest_of(search(bowl(target), seed, strategy=s, **how)[1]).loss for seed in range(3)]
             for s in ("random", "trust-region")}  # fmt: skip
    assert max(found["trust-region"]) < min(found["random"])


def test_the_trust_region_grows_on_success_shrinks_on_failure_and_starts_anew():
    space = Space((Dim("lr", 2**-9, 2.0**9, 1.0),))
    region = TrustRegion(space, 1000, 1, 0)
    trials = [Trial({}, "done", 1.0)]
    assert region.box(trials).radius == FIRST
    better = [*trials, Trial({"lr": 2.0}, "done", 0.5)]
    assert region.box(better).radius == FIRST * GROW
    assert region.box(better).centre == (1.0,)
    for bad in (Trial({"lr": 4.0}, "done", math.inf), Trial({"lr": 4.0}, "failed", math.nan),
                Trial({"lr": 4.0}, "pruned", 0.1), Trial({"lr": 4.0}, "done", 9.0)):  # fmt: skip
        box = region.box([*better, bad])
        assert (box.radius, box.centre) == (FIRST * GROW * SHRINK, (1.0,))
    long = [*better, *[Trial({"lr": 4.0}, "done", math.inf)] * 40]
    restarts = [region.box(long[:n]).restarts for n in range(1, len(long))]
    assert restarts[-1] >= 2
    assert sorted(restarts) == restarts
    assert SMALLEST <= min(region.box(long[:n]).radius for n in range(1, len(long))) < SMALLEST / SHRINK
    drawn = [p["lr"] for p in TrustRegion(space, 1000, 50, 0).candidates(Box((3.0,), 0.5, 0.25), 1)]
    assert all(2**2.75 <= lr <= 2**3.25 for lr in drawn)
    assert len(set(drawn)) == 50


@pytest.mark.parametrize(("values", "key"), [
    ({"space": {"eps": (1e-8,)}}, "sweep.space.lr"), ({"space": {"lr": (1.0,), "eps": (1e-8,)}}, "sweep.space"),
    ({"strategy": "random"}, "sweep.trials"), ({"strategy": "trust-region"}, "sweep.trials"),
    ({"strategy": "grid", "modules": {"hps": ["lr"]}}, "sweep.strategy"),
    ({"strategy": "lr", "modules": {"hps": ["lr"]}}, "sweep.strategy"),
    ({"strategy": "trust-region", "trials": 9, "modules": {"hps": ["weight_decay"]}}, "sweep.modules.hps"),
    ({"strategy": "trust-region", "trials": 9, "modules": {"hps": ["lr"], "types": ["atn"]}}, "sweep.modules.types"),
    ({"space": {"lr": (0.0, 1.0)}}, "sweep.space.lr"), ({"space": {"lr/head@2": (1.0,)}}, "sweep.space.lr/head@2"),
])  # fmt: skip
def test_a_strategy_that_lacks_something_or_would_ignore_something_is_refused(values, key):
    with pytest.raises(ConfigError) as error:
        search(bowl({}), **values)
    assert error.value.key == key
    assert error.value.hint


def test_every_run_diverged_is_an_error():
    with pytest.raises(ConfigError, match="every run"):
        search(lambda point: math.inf, strategy="independent", space={"lr": (1.0,), "eps": (1e-8,)})


PER_MODULE = {"model.separate": True, "model.qk_norm": True, "model.norm": "trainable", "rules.parametrisation": "mup",
              "base.width": 64, "hps.weight_decay": 0.1, "sweep.strategy": "trust-region", "sweep.trials": 9}  # fmt: skip


@pytest.mark.parametrize(("form", "dims"), [("kronecker", 14 + 4 + 2 + 4), ("types", 14 + 2), ("free", 3 + 11 * 4 + 2 * 4)])
def test_a_per_module_space_has_a_number_per_type_and_per_depth(form, dims):
    """14 module types of which 11 are in the blocks, 2 residual branches, 4 blocks; a factor of 1 is not named."""
    config = RunConfig().with_values(**PER_MODULE, **{
        "sweep.space": {"lr": (0.1, 10.0)}, "sweep.modules": {"hps": ["lr", "residual"], "form": form, "reach": 8.0}})  # fmt: skip
    space = Space.of(config)
    assert len(space.dims) == 1 + dims
    assert space.point(space.octaves({})) == {}
    far = space.point([9.0] * len(space.dims))
    assert set(far.values()) == {10.0, 8.0}
    made = trial_config(config, far, 3)
    assert made.hps.lr == 10.0
    assert len(made.modules) == dims
    row, plain = (meta_plan(c).row("blocks.2.attn.q.weight") for c in (made, config.with_values(**{"hps.lr": 10.0})))
    assert row.lr == pytest.approx(plain.lr * (64 if form == "kronecker" else 8))
    assert "lr by " in str(space)
    assert all(len(line) < 400 for line in str(space).splitlines())


def test_a_curve_is_named_whole_or_not_at_all():
    """One knot alone would be the factor of every block."""
    config = RunConfig().with_values(**PER_MODULE, **{"sweep.space": {}, "sweep.modules": {"hps": ["lr"], "depth": 2}})
    space = Space.of(config)
    point = space.point([1.0 if dim.name == "lr@0.5" else at for dim, at in zip(space.dims, space.octaves({}))])
    assert point == {"lr@0": 1.0, "lr@0.5": 2.0}
    plain, made = meta_plan(config), meta_plan(trial_config(config, point, 0))
    ratios = [made.row(f"blocks.{i}.attn.q.weight").lr / plain.row(f"blocks.{i}.attn.q.weight").lr for i in range(4)]
    assert ratios == pytest.approx([1.0, 2**0.5, 2.0, 2.0])


def test_betas_move_in_their_distance_from_one():
    config = RunConfig().with_values(**{"sweep.space": {"beta2": (0.9, 0.99)}})
    (dim,) = Space.of(config).dims
    assert dim.ends == pytest.approx((math.log2(0.01), math.log2(0.1)))
    assert dim.value(dim.octaves(0.97)) == pytest.approx(0.97)


CURVES = {f"t{i}": {0.1: 3.0 - 0.1 * i, 0.2: 2.0 - 0.1 * i} for i in range(8)}


@pytest.mark.parametrize(("rule", "loss", "stops"), [
    ("none", 99.0, False), ("median", 1.5, False), ("median", 2.0, True), ("asha", 1.4, False), ("asha", 1.65, True),
    ("median", math.nan, True), ("asha", math.inf, True),
])  # fmt: skip
def test_pruning_compares_at_equal_tokens(rule, loss, stops):
    others = list(CURVES.values())
    assert hopeless(rule, {0.1: 0.0, 0.2: loss}, others) is stops
    assert not hopeless(rule, {0.1: 0.0, 0.2: loss}, others[:3])  # too few to say
    assert not hopeless(rule, {0.1: 0.0, 0.2: loss, 0.3: 9.0}, others)  # none of them is there yet
    assert not hopeless(rule, {}, others)


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
