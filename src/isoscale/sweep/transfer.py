"""From a sweep to a bigger model: the winner's hyperparameters in base units, unchanged, and what they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig
from isoscale.planning import Change
from isoscale.rules import by_name
from isoscale.sweep.result import SweepResult, load
from isoscale.sweep.space import trial_config
from isoscale.train.setup import meta_plan


@dataclass(frozen=True)
class Transfer:
    """A transfer.

    Args:
        hps: what was carried over, in base units.
        proxy: config of the winner at proxy size.
        target: the config to train.
        changes: the plan diff proxy -> target: what every tensor gets instead.
        warnings: what may spoil the transfer, in words.
    """

    hps: Mapping[str, float]
    proxy: RunConfig
    target: RunConfig
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]


def transfer(source: Path | str | SweepResult, vocab: int = 256, **values: object) -> Transfer:
    """Carry a sweep's winner to a target.

    Args:
        source: a sweep folder or its loaded result.
        vocab: of the corpus.
        values: dotted config keys of the target, e.g. `**{"model.width": 256, "numerics.recipe": "fp8"}`.

    Raises:
        ConfigError: the target is the proxy itself, or its values do not fit.
        CheckpointError: no finished sweep there.
    """
    result = source if isinstance(source, SweepResult) else load(source)
    proxy = trial_config(result.config, result.best, result.config.seed)
    if not values:
        raise ConfigError(
            "a transfer needs a target that differs from the proxy",
            key="--set",
            hint="--width 256, or --set model.width=256",
        )
    needs_base = by_name(proxy.rules.parametrisation).needs_base
    base: dict[str, object] = {}
    if needs_base:  # what the proxy's config leaves open is the proxy itself
        own = {"width": proxy.model.width, "depth": proxy.model.depth, "batch": proxy.train.batch,
               "steps": proxy.train.steps}  # fmt: skip
        base = {f"base.{name}": size for name, size in own.items() if getattr(proxy.base, name) is None}
    target = proxy.with_values(**{"name": "target", **base, **values})
    if target.with_values(name=proxy.name) == proxy.with_values(**base):
        hint = f"--width {proxy.model.width * 4}"
        raise ConfigError("the target is the proxy itself", key="model.width", value=proxy.model.width, hint=hint)
    changes = meta_plan(proxy.with_values(**base), vocab).diff(meta_plan(target, vocab))
    said = [name for name in result.best if f"hps.{name}" in values]
    doubled = [f"the target sets {', '.join(said)} itself: what the search found for it is not carried"] if said else []
    return Transfer(dict(result.best), proxy, target, changes, (*doubled, *_warnings(result, target)))


def _warnings(result: SweepResult, target: RunConfig) -> list[str]:
    out = []
    proxy = result.config
    if result.edge:
        out.append(f"the best LR {result.best['lr']:g} is at an end of the values tried: the optimum may lie outside")
    knots = [name for name in result.best if "@" in name]
    if knots and target.model.depth > 4 * proxy.model.depth:
        out.append(f"depth curves of {proxy.model.depth} blocks are stretched over {target.model.depth}")
    if proxy.rules.parametrisation.startswith("sp") and target.model.width != proxy.model.width:
        out.append("under SP the optimum moves with width: expect the carried LR to be too high for a wider model")
    growth = target.model.width / proxy.model.width
    if 1 < growth < 4:
        out.append(f"the target is only {growth:.3g}x wider than the proxy: a sweep at the target may cost little more")
    table = by_name(proxy.rules.parametrisation)
    deep = "depth_ratio" in {**table.stack_lr.sizes, **table.stack_grad.sizes, **table.tau_share.sizes}
    if target.model.depth != proxy.model.depth and not deep:
        out.append(f"the depth differs ({proxy.model.depth} -> {target.model.depth}): the LR carries over width, much "
                   "less over depth (docs/results/depth.md); tune the proxy at the target's depth")  # fmt: skip
    if proxy.model.width < 64:
        out.append(f"a proxy of width {proxy.model.width} is below the sizes at which transfer is reliable (64 and up)")
    if target.model.width < proxy.model.width:
        out.append(f"the target is narrower ({target.model.width}) than the proxy ({proxy.model.width})")
    if proxy.model.norm == "trainable" and proxy.rules.parametrisation == "u-mup":
        out.append("u-muP's transfer was shown with non-parametric norms (model.norm = plain)")
    tokens = [c.train.sequences_before(c.train.steps) * c.data.seq_len for c in (proxy, target)]
    if tokens[0] != tokens[1] and not table.run.lr.sizes:
        name = proxy.rules.parametrisation
        out.append(f"the token count differs ({tokens[0]:,} -> {tokens[1]:,}): {name} has no rule for duration")
    if tokens[0] != tokens[1] and table.run.lr.sizes:
        out.append(f"the token count differs ({tokens[0]:,} -> {tokens[1]:,}): the duration rule is contested "
                   "(docs/batch_and_tokens.md); rules.duration and rules.duration_exponent set it")  # fmt: skip
    return out
