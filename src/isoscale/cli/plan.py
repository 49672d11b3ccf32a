"""isoscale plan: what every tensor gets, and why, before anything is spent."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoscale.cli.common import AsJson, ConfigFile, Preset, Sets, emit, load_config

if TYPE_CHECKING:
    from isoscale.planning import Change


def plan(
    config: ConfigFile = None, preset: Preset = None, set_: Sets = None,
    explain: Annotated[str | None, typer.Option("--explain", help="A parameter or site; says where its numbers come "
                                                "from.", metavar="NAME")] = None,
    against: Annotated[str | None, typer.Option("--diff", help="Another config file or preset; prints what changes "
                                                "from it to this one.", metavar="OTHER")] = None,
    vocab: Annotated[int, typer.Option("--vocab", min=2, max=2**24, help="Number of token ids.")] = 256,
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
    """
    from pathlib import Path

    from isoscale.planning import cost
    from isoscale.train.setup import meta_plan

    loaded = load_config(preset, config, set_)
    settings = loaded.config
    made = meta_plan(settings, vocab)
    if explain:
        text = made.explain(explain)
        used = [name for name in type(settings.hps).model_fields if re.search(rf"[=x(] ?{name} [\d(]", text)]
        origins = [f"  hps.{name} = {getattr(settings.hps, name)!r}, {loaded.origin(f'hps.{name}')}" for name in used]
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
    size = cost(made.rows, width=settings.model.width, depth=settings.model.depth, seq_len=settings.data.seq_len)
    tokens = settings.train.steps * settings.train.batch * settings.data.seq_len
    tail = (
        f"parameters {size.parameters:,} ({size.state_bytes / 2**20:.1f} MiB with gradients and AdamW state, fp32)\n"
        f"tokens {tokens:,}, training FLOPs {size.flops_per_token * tokens:.3g}"
        f", {size.low_precision_share:.0%} of the linear FLOPs below 16 bits,\n"
        f"{size.weight_bits:.3g} bits per matmul weight in the forward"
    )
    emit(as_json, {"plan": json.loads(made.to_json()), "cost": vars(size), "tokens": tokens}, f"{made}\n\n{tail}")


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
