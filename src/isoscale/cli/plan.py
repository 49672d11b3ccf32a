"""isoscale plan: what every tensor gets, and why, before anything is spent."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoscale._base.errors import ConfigError
from isoscale.cli.common import AsJson, ConfigFile, Preset, Sets, emit, load_config

if TYPE_CHECKING:
    from isoscale.config import RunConfig
    from isoscale.planning import Change, Cost, Plan


def plan(
    config: ConfigFile = None, preset: Preset = None, set_: Sets = None,
    explain: Annotated[str | None, typer.Option("--explain", help="A parameter or site; says where its numbers come "
                                                "from.", metavar="NAME")] = None,
    against: Annotated[str | None, typer.Option("--diff", help="Another config file or preset; prints what changes "
                                                "from it to this one.", metavar="OTHER")] = None,
    vocab: Annotated[int, typer.Option("--vocab", min=2, max=2**24, help="Number of token ids.")] = 256,
    model: Annotated[str | None, typer.Option("--model", help="Your own model: module:function of (width, depth), or "
                                              "a Hugging Face config.json or its folder.", metavar="TARGET")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="With --model: its width.")] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="With --model: its depth.")] = None,
    base_width: Annotated[int | None, typer.Option("--base-width", min=1, help="With --model: width where the "
                                                   "hyperparameters were tuned.")] = None,
    base_depth: Annotated[int | None, typer.Option("--base-depth", min=1, help="Likewise the depth.")] = None,
    role: Annotated[list[str] | None, typer.Option("--role", help="With --model: what parameters are for, where you "
                                                   "know better; repeatable.", metavar="PATTERN=ROLE")] = None,
    now: Annotated[bool, typer.Option("--now", help="With --model: print what changes against one LR for all and the "
                                      "model's own init.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Print the plan: init, learning rate, decay, factors and formats per tensor, with reasons.

    \b
    Examples:
      isoscale plan
      isoscale plan --set model.width=4096 --set model.depth=32 \\
          --set model.head_size=128
      isoscale plan --preset target --explain blocks.0.attn.qkv.weight
      isoscale plan --preset target --diff proxy
      isoscale plan --model llama-7b/config.json --base-width 256 \\
          --base-depth 4 --set hps.lr=0.004 --now
      isoscale plan --model my_model:build --width 1024 --depth 24 \\
          --base-width 128 --base-depth 4 --set optim.name=lmd
    """
    import warnings
    from pathlib import Path

    from isoscale.planning import PlanWarning, cost
    from isoscale.train.setup import meta_plan, resolved

    warnings.simplefilter("ignore", PlanWarning)  # the plan prints its notes itself
    loaded = load_config(preset, config, set_)
    settings = resolved(loaded.config)
    if model is not None:
        from isoscale.cli.plan_model import model_plan

        if against:
            raise ConfigError("--diff compares configs of isoscale's decoder", key="--diff", value=against,
                              hint="--now compares with what the model has")  # fmt: skip
        made, before, size = model_plan(loaded, model, (width, depth), (base_width, base_depth), role)
        if explain:
            emit(as_json, {"name": explain, "text": made.explain(explain)}, made.explain(explain))
            return
        if now:
            changes = before.diff(made)
            text = "\n".join(line for c in changes for line in describe(c))
            emit(as_json, {"changes": [vars(c) for c in changes]}, text or "no difference")
            return
        _show(made, size, settings, as_json)
        return
    given = {"--width": width, "--depth": depth, "--base-width": base_width, "--base-depth": base_depth, "--role": role,
             "--now": now or None}  # fmt: skip
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(f"{flag} goes with --model", key=flag, value=value, hint="--set model.width=256")
    made = meta_plan(settings, vocab)
    if explain:
        text = made.explain(explain)
        used = [name for name in type(settings.hps).model_fields if re.search(rf"[=x(] ?{name} [\d(]", text)]
        chosen = settings.hps.model_fields_set - loaded.config.hps.model_fields_set
        origins = [
            f"  hps.{name} = {getattr(settings.hps, name)!r}, "
            + (f"default of {settings.optim.name}" if name in chosen else loaded.origin(f"hps.{name}"))
            for name in used
        ]
        text = "\n".join([text, "set by:", *origins]) if origins else text
        emit(as_json, {"name": explain, "text": text}, text)
        return
    if against:
        is_file = Path(against).exists()
        other = load_config(None if is_file else against, Path(against) if is_file else None, None)
        changes = meta_plan(other.config, vocab).diff(made)
        lines = [line for c in changes for line in describe(c)]
        emit(as_json, {"changes": [vars(c) for c in changes]}, "\n".join(lines) or "no difference")
        return
    size = cost(made.rows, width=settings.model.width, depth=settings.model.depth, seq_len=settings.data.seq_len,
                lmd_bytes=settings.optim.lmd_bytes)  # fmt: skip
    _show(made, size, settings, as_json)


def _show(made: Plan, size: Cost, settings: RunConfig, as_json: bool) -> None:
    """The plan and what a run of it costs."""
    tokens = settings.train.sequences_before(settings.train.steps) * settings.data.seq_len
    tail = (
        f"parameters {size.parameters:,} ({_bytes(size.state_bytes)} with gradients and the optimiser's state)\n"
        f"tokens {tokens:,}, training FLOPs {size.flops_per_token * tokens:.3g}"
        f", {size.low_precision_share:.0%} of the linear FLOPs below 16 bits,\n"
        f"{size.weight_bits:.3g} bits per matmul weight in the forward"
    )
    emit(as_json, {"plan": json.loads(made.to_json()), "cost": vars(size), "tokens": tokens}, f"{made}\n\n{tail}")


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


def describe(change: Change, *, reason: bool = True) -> list[str]:
    """One change in a line or two that fit 80 columns where they can."""
    left, right = show_value(change.left), show_value(change.right)
    why = [f"    = {change.reason.partition(' = ')[2] or change.reason}"] if change.reason and reason else []
    if change.quantity == "formats":
        line = f"{change.name}  formats: {change.left} -> {change.right}"
        if len(line) > 80:
            line = f"{change.name}  formats:\n    {change.left} ->\n    {change.right}"
        return [line, *why]
    if change.quantity == "factors":
        left, right = _apart(change.left, change.right)
    return [f"{change.name}  {change.quantity}: {left} -> {right}", *why]


def _apart(left: Any, right: Any) -> tuple[str, str]:
    """Only the fields in which two records differ."""
    try:
        names = [name for name in left.__dataclass_fields__ if getattr(left, name) != getattr(right, name)]
        sides = [", ".join(f"{name} {show_value(getattr(side, name))}" for name in names) for side in (left, right)]
    except AttributeError:
        return show_value(left), show_value(right)
    return sides[0], sides[1]


def show_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and len(value) > 4:
        return f"{show_value(value[0])} .. {show_value(value[-1])}"
    if isinstance(value, tuple):
        return "(" + ", ".join(show_value(item) for item in value) + ")"
    fields = getattr(value, "__dataclass_fields__", None)
    if fields:
        return ", ".join(f"{name} {show_value(getattr(value, name))}" for name in fields)
    return str(value)
