"""Verdicts from synthetic rows: thresholds, what may shrink, which tensor is suspected, which blocks are compared."""

import math

import pytest

from isoscale.check.judge import findings, suspect, tensors, trends, word
from isoscale.check.match import group, phases, twins


def rows(axis, tensors_, sizes=(2, 4, 8), seeds=2, stacks=None, params=None):
    """`tensors_`: name -> (kind, init slope, value slope, change slope)."""
    out = {}
    for size in sizes:
        for seed in range(seeds):
            acts = {}
            for name, (kind, init, value, change) in tensors_.items():
                acts[name] = {"kind": kind, "value": [size**init, size**value], "change": [0.0, size**change]}
            out[size, seed] = {"acts": acts, "params": params or {}, "stacks": stacks(size) if stacks else {}}
    return out


def judged(axis, found):
    here = findings(tensors(found, axis), axis)
    return {(one.name, one.quantity): one for one in here}, suspect(here, trends(found, axis))


@pytest.mark.parametrize(("slope", "stderr", "said"), [
    (0.0, 0.0, "flat"), (-0.2, 0.5, "flat"), (0.25, 0.0, "undecided"), (0.31, 0.01, "grows"), (-0.5, 0.1, "vanishes"),
    (0.5, 0.2, "undecided"), (math.nan, math.nan, "not finite"), (0.5, math.nan, "grows"),
])  # fmt: skip
def test_words(slope, stderr, said):
    assert word(slope, stderr) == said


def test_flat_tensors_have_no_suspect():
    found, first = judged("width", rows("width", {"a": ("embedding", 0, 0, 0), "b": ("mlp", 0, 0.1, -0.1)}))
    assert all(one.ok for one in found.values())
    assert first is None


def test_the_first_that_grows_is_suspected_and_its_lr_blamed():
    found, first = judged("width", rows("width", {
        "a": ("embedding", 0, 0, 0), "b": ("mlp", 0, 0.1, -0.5), "c": ("mlp", 0, 0.1, 0.9), "d": ("mlp", 0, 0.8, 0.9),
    }))  # fmt: skip
    assert found["b", "change"].verdict == "vanishes"
    assert first.name == "c"
    assert first.quantity == "change"
    assert "LR does not shrink with fan-in" in first.why


def test_a_tensor_that_grows_at_init_has_its_init_blamed():
    _, first = judged("width", rows("width", {"a": ("embedding", 0, 0, 0), "b": ("mlp", 0.5, 0.5, 0.9)}))
    assert first.quantity == "value"
    assert "init does not shrink" in first.why


def test_a_stream_that_grows_with_depth_is_blamed_on_its_branches():
    _, first = judged("depth", rows("depth", {"x": ("residual stream", 0.5, 0.6, 0.8)}))
    assert "x + depth^-alpha f(x)" in first.why


def test_logits_may_vanish_at_init_but_their_change_may_not():
    found, first = judged("width", rows("width", {"out": ("logits", -1, -0.5, 0)}))
    assert found["out", "value"].verdict == "vanishes"
    assert found["out", "value"].ok is True
    assert first is None
    _, first = judged("width", rows("width", {"out": ("logits", -1, -0.5, -0.5)}))
    assert first.name == "out"
    found, _ = judged("width", rows("width", {"hidden": ("mlp", -1, -0.5, 0)}))
    assert found["hidden", "value"].ok is False


def test_a_tensor_that_never_changes_is_not_judged():
    found = rows("width", {"table": ("other", 1, 1, 0)})
    for row in found.values():
        row["acts"]["table"]["change"] = [0.0, 0.0]
    here, first = judged("width", found)
    assert here["table", "value"].verdict == "constant"
    assert first is None


def test_gradients_near_eps_are_named():
    params = {"b.weight": {"eps": 1e-8, "grad": [5e-8], "update": [1.0], "change": 1.0},
              "c.weight": {"eps": 1e-8, "grad": [5e-7], "update": [1.0], "change": 1.0}}  # fmt: skip
    found = rows("width", {"a": ("mlp", 0, 0, 0), "b": ("mlp", 0, 0, -0.5)}, params=params)
    assert [one.name for one in trends(found, "width") if one.eps_dominates] == ["b.weight"]
    assert "eps" in judged("width", found)[1].why


@pytest.mark.parametrize(("few", "many", "phase", "blocks"), [
    (2, 2, 0.0, {0, 1}), (2, 8, 0.0, {0, 4}), (2, 8, 1.0, {3, 7}), (2, 8, 0.5, {1, 2, 5, 6}), (1, 8, 1.0, {7}),
    (1, 8, 0.0, {0}), (2, 3, 0.0, {0, 1, 2}), (4, 8, 1.0, {1, 3, 5, 7}),
])  # fmt: skip
def test_twins_stand_at_the_same_relative_depth(few, many, phase, blocks):
    assert twins(few, many, phase) == blocks


def block(stack, index):
    at = f"{stack}.{index}"
    return {f"{at}.norm": ("norm", 0, 0, 0), f"{at}.attn": ("attention", 0, 0, 0), f"{at}.mlp": ("mlp", 0, 0, 0),
            at: ("residual stream", 0, 0, 0)}  # fmt: skip


def test_phases_follow_the_forward_order():
    acts = rows("depth", block("h", 0), sizes=(2,))[2, 0]["acts"]
    assert phases(acts, "h") == {"norm": 0.0, "attn": 0.0, "mlp": 0.5, "": 1.0}


def test_a_first_block_that_differs_does_not_look_like_a_slope():
    """Pooling all blocks would: the odd one is half of two and an eighth of eight."""
    found = {}
    for size in (2, 4, 8):
        acts = {}
        for index in range(size):
            height = 10.0 if index == 0 else 1.0
            acts[f"h.{index}.attn"] = {"kind": "attention", "value": [height] * 2, "change": [0.0, height]}
        found[size, 0] = {"acts": acts, "params": {}, "stacks": {"h": size}}
    here, first = judged("depth", found)
    assert here["h.*.attn", "change"].slope == pytest.approx(0.0, abs=1e-9)
    assert first is None
    assert len(group(found, "depth", "acts")[8, 0]["h.*.attn"]) == 2


def test_over_width_every_block_has_its_own_name():
    found = rows("width", block("h", 0) | block("h", 1), stacks=lambda size: {"h": 2})
    assert ("h.1.mlp", "change") in judged("width", found)[0]
