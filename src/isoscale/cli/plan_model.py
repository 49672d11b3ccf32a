"""isoscale plan --model: the plan of anybody's model, beside what it has now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from isoscale._base.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from isoscale.config import Loaded
    from isoscale.planning import Cost, Plan


def said_roles(pairs: Sequence[str] | None) -> dict[str, str]:
    """`PATTERN=ROLE` options as a mapping.

    Raises:
        ConfigError: no `=`.
    """
    out = {}
    for pair in pairs or ():
        pattern, equals, role = pair.partition("=")
        if not equals or not pattern or not role:
            raise ConfigError("a role is given as PATTERN=ROLE", key="--role", value=pair,
                              hint="--role '*.proj=hidden'")  # fmt: skip
        out[pattern] = role
    return out


def _built(target: str, width: int | None, depth: int | None) -> tuple[nn.Module, Any]:
    """The model (a Hugging Face config: on the meta device, at full size) and an example, if its maker gives one."""
    from pathlib import Path

    import torch

    from isoscale.check.hf import from_config
    from isoscale.check.subject import resolve

    path = Path(target)
    if path.exists() or path.suffix == ".json":
        with torch.device("meta"):
            return from_config(path, width, depth), None
    subject = resolve(target, smallest=width or 1, unit=False)
    if width is None:
        raise ConfigError("a function needs to know the size", key="--width", hint="--width 1024 --base-width 128")
    if subject.has_depth and depth is None:
        raise ConfigError("the function takes a depth", key="--depth", hint="--depth 24 --base-depth 4")
    made = subject.build(width, depth or 1)
    return made.model, made.example


def model_plan(
    loaded: Loaded, target: str, sizes: tuple[int | None, int | None], base: tuple[int | None, int | None],
    roles: Sequence[str] | None,
) -> tuple[Plan, Plan, Cost]:  # fmt: skip
    """The plan of TARGET at `sizes` tuned at `base`, what it has now, and its cost.

    Raises:
        IsoscaleError: sizes or settings that do not fit.
    """
    from isoscale import planning
    from isoscale.config import Scale
    from isoscale.rules import family
    from isoscale.train.setup import recipe_of

    config = loaded.config
    rules, run = config.rules, config.train
    rule = "complete-d" if loaded.origin("rules.parametrisation") == "default" else rules.parametrisation
    if all(size is None for size in base):
        raise ConfigError("a plan needs the size where the hyperparameters were tuned", key="--base-width",
                          hint="--base-width 256 --base-depth 4")  # fmt: skip
    if loaded.origin("hps.lr") == "default" and "lr" not in family(config.optim.name).hps:
        raise ConfigError("a plan starts from the learning rate that was tuned at the base", key="hps.lr",
                          hint="--set hps.lr=0.004")  # fmt: skip
    model, example = _built(target, *sizes)
    small, _ = _built(target, base[0] or sizes[0], base[1] or sizes[1])
    tokens = run.batch * config.data.seq_len
    base_tokens = (config.base.batch or run.batch) * config.data.seq_len
    total = run.sequences_before(run.steps) * config.data.seq_len
    steps = config.base.steps or total // base_tokens
    common: dict[str, Any] = {
        "hps": {name: getattr(config.hps, name) for name in type(config.hps).model_fields
                if loaded.origin(f"hps.{name}") != "default"},
        "roles": said_roles(roles) or None, "example": example, "optimizer": config.optim.name, "alpha": rules.alpha,
        "duration": rules.duration, "duration_exponent": rules.duration_exponent, "tau_exponent": rules.tau_exponent,
        "betas": rules.betas, "final_norm_eps": rules.final_norm_eps, "axes": rules.axes, "constant": rules.constant,
        "decay": rules.decay, "clip": run.clip, "recipe": recipe_of(config),
    }  # fmt: skip
    before = Scale(batch_tokens=base_tokens, tokens=base_tokens * steps)
    made = planning.plan(model, rule, base=small, base_run=before,
                         target=Scale(batch_tokens=tokens, tokens=total), **common)  # fmt: skip
    now = planning.plan(model, rule, base=model, **common)
    told = getattr(model, "config", None)
    picked, experts = (getattr(told, name, None) for name in ("num_experts_per_tok", "num_local_experts"))
    share = picked / experts if picked and experts else 1.0
    size = planning.cost(made.rows, width=made.target.width or 0, depth=made.target.depth or 0,
                         seq_len=config.data.seq_len, active=share, lmd_bytes=config.optim.lmd_bytes)  # fmt: skip
    return made, now, size
