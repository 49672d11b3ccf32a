"""What goes wrong in set-ups that people have: one function per finding, each read off a `View`, each with its numbers.

A ratio is a value at the larger size over the one at the base. What it should be is taken from the rule tables, never
written here again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isoscale.check.findings_view import ADAM, Entry, View, uses
from isoscale.rules import Options, Table, by_name

FAMILIES: Mapping[str, Callable[[], Table]] = {
    "constant": lambda: by_name("sp", "adamw", Options()),
    "complete-d": lambda: by_name("complete-d", "adamw", Options()),
    "complete-d, alpha 1/2": lambda: by_name("complete-d", "adamw", Options(alpha=0.5)),
    "mup": lambda: by_name("mup", "adamw", Options()),
}
_POWERS = {1.0: "^-1", 0.5: "^-1/2"}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        name: stable, for scripts.
        what: with the numbers.
        why: it matters.
        remedy: what to do.
        tensors: by name, at the larger size.
    """

    name: str
    what: str
    why: str
    remedy: str
    tensors: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _is(value: float | None, other: float) -> bool:
    return value is not None and math.isclose(value, other, rel_tol=1e-6)


def _adam(entries: Iterable[tuple[str, Entry]]) -> list[tuple[str, Entry]]:
    return [(axis, entry) for axis, entry in entries if entry.big.optimizer in ADAM and entry.small.optimizer in ADAM]


def follows(view: View) -> str:
    """Which of the known laws the LRs of Adam's tensors follow best over all axes; `none` without an optimiser."""
    seen = [(entry, entry.ratio("lr")) for _, entry in _adam(view.all())]
    pairs = [(entry, ratio) for entry, ratio in seen if ratio]
    if not pairs:
        return "none"

    def misfit(name: str) -> float:
        table = FAMILIES[name]()
        return sum(min(math.log(ratio / wanted) ** 2 for wanted in entry.lr_forms(table)) for entry, ratio in pairs)

    return min(FAMILIES, key=lambda name: round(misfit(name), 9))


def _table(view: View) -> Table:
    """The law that is followed, or Complete(d)P to compare a constant one with."""
    name = follows(view)
    return FAMILIES["complete-d" if name in ("constant", "none") else name]()


def _first(found: Sequence[tuple[str, Entry]], quantity: str, table: Table) -> str:
    axis, entry = max(found, key=lambda one: abs(math.log(one[1].wanted(quantity, table))))
    little, large = getattr(entry.small, quantity), getattr(entry.big, quantity)
    return (f"{entry.name} has {little:g} at the base and {large:g} at {axis} {_at(entry, axis)}, a rule would have "
            f"{little * entry.wanted(quantity, table):.3g}")  # fmt: skip


def _at(entry: Entry, axis: str) -> str:
    grown = entry.sizes["width_ratio" if axis == "width" else "depth_ratio"]
    return f"x{grown:g}"


def _names(found: Iterable[tuple[str, Entry]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.name for _, entry in found))


def constant_lr(view: View) -> Fault | None:
    """Width grows and no LR moves."""
    entries = _adam((axis, entry) for axis, entry in view.all() if axis == "width")
    table = FAMILIES["complete-d"]()
    found = [(axis, entry) for axis, entry in entries if not _is(entry.wanted("lr", table), 1.0)]
    if not found or not all(_is(entry.ratio("lr"), 1.0) for _, entry in entries):
        return None
    return Fault(
        "constant-lr", f"no LR depends on width: {_first(found, 'lr', table)}",
        "the best LR of hidden matrices falls as the model gets wider, so what was tuned small is too large",
        "scale LRs per tensor: optimizer = AdamW(plan.param_groups(model, your_groups))", _names(found),
    )  # fmt: skip


def constant_init(view: View) -> Fault | None:
    """Hidden matrices start equally large at any width, as with one std for all layers."""
    table = FAMILIES["complete-d"]()
    hidden = [(axis, entry) for axis, entry in view.all() if axis == "width" and entry.info.role == "hidden"
              and entry.small.std and entry.wanted("std", table) < 0.9]  # fmt: skip
    found = [(axis, entry) for axis, entry in hidden if abs((entry.ratio("std") or 0) - 1) < 0.1]
    if not found or len(found) < len(hidden) / 2:
        return None
    _, one = found[0]
    return Fault(
        "constant-init", f"the initial std of hidden matrices does not fall with fan-in: {one.name} has "
        f"{one.small.std:.3g} at the base and {one.big.std:.3g} at width, a rule would have "
        f"{one.small.std * one.wanted('std', table):.3g}",
        "what a layer puts out then grows as sqrt(width), and the residual stream with it",
        "plan.apply(model) scales the model's own init; or std ~ 1 / sqrt(fan_in)", _names(found),
    )  # fmt: skip


def one_eps(view: View) -> Fault | None:
    """LRs are scaled per tensor, eps is not."""
    if follows(view) in ("constant", "none"):
        return None
    table = FAMILIES["complete-d, alpha 1/2" if "alpha" in follows(view) else "complete-d"]()
    entries = [(axis, entry) for axis, entry in _adam(view.all()) if entry.small.eps]
    found = [(axis, entry) for axis, entry in entries if not _is(entry.wanted("eps", table), 1.0)]
    if not found or not all(_is(entry.ratio("eps"), 1.0) for _, entry in entries):
        return None
    return Fault(
        "one-eps", f"LRs are scaled per tensor, eps is one number for all: {_first(found, 'eps', table)}",
        "gradients shrink with width and depth, and where they come near eps the update shrinks with them",
        "give each group its eps: plan.param_groups(model, your_groups) scales it with the LR", _names(found),
    )  # fmt: skip


def decay_not_scaled(view: View) -> Fault | None:
    """AdamW multiplies decay with the LR: where the LR falls with width, the decay has to rise."""
    found = [
        (axis, entry) for axis, entry in view.all()
        if axis == "width" and entry.big.optimizer == "AdamW" and entry.info.role == "hidden" and entry.small.decay
        and (ratio := entry.ratio("lr")) and ratio < 0.999 and _is(entry.ratio("decay"), 1.0)
    ]  # fmt: skip
    if not found:
        return None
    axis, entry = found[0]
    was, now = entry.small.lr or 0.0, entry.big.lr or 0.0
    return Fault(
        "decay-not-scaled",
        f"the LR of hidden matrices falls with width and their decay stays: {entry.name} has lr x decay "
        f"{was * (entry.small.decay or 0):.3g} at the base and {now * (entry.big.decay or 0):.3g} at {axis} "
        f"{_at(entry, axis)}",
        "torch's AdamW decays by lr x weight_decay a step, so wide matrices are decayed less and less",
        f"multiply weight_decay by 1 / the LR's factor: {(entry.small.decay or 0) * was / now:.3g} for this one",
        _names(found),
    )  # fmt: skip


def muon_scaled_twice(view: View) -> Fault | None:
    """Muon's own adjustment to shapes leaves a known factor; any other one is too much or too little."""
    found, words = [], []
    for axis, entry in view.all():
        ratio = entry.ratio("lr")
        if axis != "width" or "muon" not in (entry.big.optimizer or "").lower() or not ratio:
            continue
        kind = "muon-rms" if entry.big.adjust == "match_rms_adamw" else "muon"
        wanted = entry.wanted("lr", by_name("complete-d", kind, Options())) if entry.info.role == "hidden" else 1.0
        if not math.isclose(ratio, wanted, rel_tol=1e-3):
            found.append((axis, entry))
            own = entry.big.adjust or "original"
            words.append(f"{entry.name}: the LR is multiplied by {ratio:.3g} at width {_at(entry, axis)}, and with "
                         f"adjust_lr_fn {own!r} it would have to be by {wanted:.3g}")  # fmt: skip
    if not found:
        return None
    return Fault(
        "muon-scaled-twice", words[0],
        "Muon adjusts its update to the shape itself, so a 1 / width comes on top; match_rms_adamw makes updates of "
        "Adam's size, and those have to shrink with width",
        "iso.plan(model, 'complete-d', optimizer='muon') (or 'muon-rms') has the factor that is left", _names(found),
    )  # fmt: skip


def _power(values: Sequence[tuple[float, float]]) -> float | None:
    """The x in (1, 1/2) for which value x size^x is one number for all (size, value)."""
    for power in _POWERS:
        first = values[0][1] * values[0][0] ** power
        if all(_is(value * size**power, first) for size, value in values):
            return power
    return None


def absolute_ratio(view: View) -> Fault | None:
    """A raw size stands where a ratio to the base belongs: the base itself is changed."""
    words: list[str] = []
    found: list[tuple[str, Entry]] = []
    adam = _adam(view.all())
    hidden = [(axis, entry) for axis, entry in adam if entry.info.role == "hidden" and entry.small.lr]
    rest = Counter(entry.small.lr for _, entry in adam if entry.info.role in ("embedding", "input", "bias", "gain"))
    usual = rest.most_common(1)[0][0] if rest else None
    by_fan = sorted({(float(entry.base.fan_in), float(entry.small.lr or 0)) for _, entry in hidden})
    if len({lr for _, lr in by_fan}) > 1 and (power := _power(by_fan)) is not None:
        low = max(hidden, key=lambda one: one[1].base.fan_in)
        times = max(lr for _, lr in by_fan) / (low[1].small.lr or 1)
        words.append(f"at the base {low[1].name} has a {times:g} times smaller LR than others, fan_in{_POWERS[power]}")
        found = hidden
    elif usual and hidden:
        for size, axis in (("fan_in", "width"), ("depth", "depth")):
            mine = [(one, entry) for one, entry in hidden if one == axis and (size == "fan_in" or entry.info.in_stack)]
            power = _absolute(view, [entry for _, entry in mine], size, usual)
            if power is not None:
                entry = mine[0][1]
                words.append(f"at the base {entry.name} has the LR of others x {(entry.small.lr or 0) / usual:.3g}, "
                             f"which is {size}{_POWERS[power]} and not 1")  # fmt: skip
                found = mine
    if (power := _raw_branches(view)) is not None:
        words.append(f"at the base residual branches are multiplied by depth{_POWERS[power]} and not by 1")
    if not words:
        return None
    return Fault(
        "absolute-ratio", "; ".join(words),
        "rules are ratios to the base: a raw size changes the model that was tuned, and its tensors against each other",
        "divide by the base's size: (fan_in / base_fan_in)^-1, (depth / base_depth)^-alpha", _names(found),
    )  # fmt: skip


def _raw_branches(view: View) -> float | None:
    """The power of the raw depth that every residual branch is multiplied by, at the base and at the larger depth."""
    small, big = view.branches
    if not small or not big or view.base.depth == 1:
        return None
    depths = [(view.base.depth, factor) for factor in small] + [(view.setups["depth"].depth, factor) for factor in big]
    return next((power for power in _POWERS if all(_is(abs(x), depth**-power) for depth, x in depths)), None)


def _absolute(view: View, entries: Sequence[Entry], size: str, usual: float) -> float | None:
    """The power of the raw size that hidden LRs over the usual LR are, at the base and at the larger size."""

    def fits(entry: Entry, power: float) -> bool:
        small, big = ((entry.base.fan_in, entry.info.fan_in) if size == "fan_in"
                      else (view.base.depth, view.setups["depth"].depth))  # fmt: skip
        return small > 1 and _is(entry.small.lr, usual * small**-power) and _is(entry.big.lr, usual * big**-power)

    return next((power for power in _POWERS if entries and all(fits(entry, power) for entry in entries)), None)


def tied_rescaled(view: View) -> Fault | None:
    """An embedding that is the readout too cannot take the readout's factor."""
    found, words = [], []
    for axis, entry in view.all():
        for quantity, least in (("std", 0.9), ("lr", 0.999)):
            ratio = entry.ratio(quantity) if axis == "width" and entry.tied else None
            if ratio is not None and ratio < least:
                found.append((axis, entry))
                little, large = getattr(entry.small, quantity), getattr(entry.big, quantity)
                name = "init std" if quantity == "std" else "LR"
                words.append(f"{entry.name} is embedding and readout in one, and its {name} falls with width: "
                             f"{little:.3g} to {large:.3g}")  # fmt: skip
    if not found:
        return None
    return Fault(
        "tied-rescaled", "; ".join(words),
        "as an embedding it has to keep both: the stream would start smaller, or learn slower, in wide models",
        "leave the shared weight alone and put 1 / width on logits, or into the final norm's gain, as a plan does",
        _names(found),
    )  # fmt: skip


def inlined_attention_scale(view: View) -> Fault | None:
    """Heads grow and the code holds their scale."""
    if not view.inlined:
        return None
    return Fault(
        "inlined-attention-scale", view.inlined[0],
        "queries and keys align in training, so logits grow as the head size and not as its root",
        "read the scale from an attribute that a plan can set, or grow the width by heads of one size",
    )  # fmt: skip


def frozen_groups(view: View) -> Fault | None:
    """Trainable tensors that no group trains, or that two do."""
    words, names = [], []
    for setup in view.setups.values():
        if not setup.optimizers:
            continue
        found = uses(setup)
        left, twice = ([name for name, n in found.items() if n == 0], [name for name, n in found.items() if n > 1])
        for some, text in ((left, "in no group"), (twice, "in two groups or of another model")):
            if some:
                more = f" and {len(some) - 3} more" if len(some) > 3 else ""
                words.append(f"trainable tensors {text} at width {setup.width}, depth {setup.depth}: "
                             f"{', '.join(some[:3])}{more}")  # fmt: skip
                names += some
    if not words:
        return None
    return Fault(
        "frozen-groups", words[0], "a tensor in no group keeps its initial values, one in two is moved twice a step",
        "make groups by plan.param_groups(model), or freeze on purpose: requires_grad_(False)",
        tuple(dict.fromkeys(names)),
    )  # fmt: skip


def clip_binds(norms: Mapping[str, tuple[float, Sequence[float]]]) -> Fault | None:
    """Every gradient of a few steps is longer than the clip.

    Args:
        norms: size in words -> the clip there, and gradient norms before clipping.
    """
    bound = {size: (clip, found) for size, (clip, found) in norms.items() if found and min(found) > clip}
    if not bound:
        return None
    told = "; ".join(f"{clip:g} against {min(found):.3g} to {max(found):.3g} at {size}"
                     for size, (clip, found) in bound.items())  # fmt: skip
    steps = len(next(iter(bound.values()))[1])
    return Fault(
        "clip-binds", f"the clip is below the gradient's norm on each of {steps} steps: {told}",
        "a clip that always binds sets every step's length, and the gradient's norm moves with width, depth and batch",
        "raise it until it binds on outliers only; iso.plan(..., clip=...) says what it is at another size",
    )  # fmt: skip


JUDGES: tuple[Callable[[View], Fault | None], ...] = (
    frozen_groups, constant_lr, constant_init, absolute_ratio, one_eps, decay_not_scaled, muon_scaled_twice,
    tied_rescaled, inlined_attention_scale,
)  # fmt: skip
"""In the order of the report; `clip_binds` comes last, it trains."""
