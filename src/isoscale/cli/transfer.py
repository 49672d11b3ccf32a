"""isoscale transfer: the sweep's winner on a bigger model."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isoscale._base.errors import ConfigError
from isoscale._base.files import atomic_write
from isoscale.cli.common import AsJson, Quiet, Resume, Sets, emit
from isoscale.config.load import parse_set, read_toml
from isoscale.config.toml import to_toml

if TYPE_CHECKING:
    from isoscale.sweep import Transfer


def flatten(sets: list[str]) -> dict[str, object]:
    """`--set a.b=c` flags as dotted values."""
    out: dict[str, object] = {}
    for text in sets:
        key = text.partition("=")[0].strip()
        node: object = parse_set(text)
        for part in key.split("."):
            assert isinstance(node, dict)
            node = node[part]
        out[key] = node
    return out


def _read_target(path: Path) -> dict[str, object]:
    """A target's TOML file as dotted values; `modules` as one."""

    def leaves(tree: dict[str, object], prefix: str) -> dict[str, object]:
        out: dict[str, object] = {}
        for name, value in tree.items():
            whole = f"{prefix}{name}"
            if isinstance(value, dict) and whole not in ("modules", "sweep.space", "sweep.modules"):
                out |= leaves(value, f"{whole}.")
            else:
                out[whole] = value
        return out

    return leaves(read_toml(path), "")


def _save(made: Transfer, vocab: int, folder: Path) -> None:
    """The target's config and plan, with every reason."""
    from isoscale.planning.show import explain_row
    from isoscale.train.setup import meta_plan

    folder.mkdir(parents=True, exist_ok=True)
    plan = meta_plan(made.target, vocab)
    atomic_write(folder / "config.toml", "\n".join(to_toml(made.target, ("sweep",))) + "\n")
    atomic_write(folder / "plan.json", plan.to_json())
    reasons = [*map(explain_row, plan.rows), *map(explain_row, plan.sites)]
    atomic_write(folder / "plan.txt", "\n\n".join([str(plan), "Where each number comes from", *reasons]) + "\n")


def transfer(
    source: Annotated[Path, typer.Argument(help="Sweep folder.", metavar="SWEEP")],
    target: Annotated[Path | None, typer.Option("--target", help="TOML file: what differs from the proxy.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Target width.")] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Target depth.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Low-precision recipe of the target: fp8, mxfp8, nvfp4, ...")
    ] = None,
    set_: Sets = None,
    ladder: Annotated[list[Path] | None, typer.Option(
        "--ladder", help="Finished run or sweep of another size, to predict the loss; repeatable.")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Default: SWEEP/target; with --train DIR/target.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train the target too.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder of the target.")] = Path("runs/target"),
    resume: Resume = False, quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Carry a sweep's best hyperparameters to a bigger model; print what changes, predict its loss, train it if asked.

    Writes the target's whole config (config.toml) and its plan with reasons (plan.txt, plan.json).

    \b
    Examples:
      isoscale transfer runs/sweep --width 256
      isoscale transfer runs/sweep --target target.toml \\
          --ladder runs/w96 --ladder runs/w128
      isoscale transfer runs/sweep --width 256 --depth 8 --recipe fp8 \\
          --train --out runs/target
    """
    from dataclasses import asdict

    from isoscale.cli.plan import describe
    from isoscale.sweep import load
    from isoscale.sweep import transfer as carry
    from isoscale.sweep.ladder import predict, rung
    from isoscale.sweep.space import show
    from isoscale.train.data import load_corpus

    values = (_read_target(target) if target else {}) | flatten(set_ or [])
    flags = {"model.width": width, "model.depth": depth, "numerics.recipe": recipe}
    values |= {key: value for key, value in flags.items() if value is not None}
    if not values:
        raise ConfigError("say what the target is", key="--target", hint="--width 256, or --target target.toml")
    result = load(source)
    data = result.config.data
    vocab = load_corpus(data.source, data.tokenizer, val_fraction=data.val_fraction, seq_len=data.seq_len,
                        cache=Path(data.cache) if data.cache else None).vocab  # fmt: skip
    made = carry(result, vocab, **values)
    carried = f"carried over, in base units: {show(made.hps)} (proxy loss {result.loss:.4f})"
    lines = [textwrap.fill(carried, 80, subsequent_indent="  "), "", "what the target's tensors get:"]
    for change in made.changes:
        if change.quantity in ("lr", "init_std", "weight_decay", "eps", "multiplier", "formats"):
            lines += [f"  {line}" for line in describe(change, reason=False)]
    folder = save or (out if train else source) / "target"  # a rung that is trained leaves the sweep's own target alone
    _save(made, vocab, folder)
    lines += [f"warning: {text}" for text in made.warnings]
    summary: dict[str, object] = {"hps": dict(made.hps), "warnings": list(made.warnings), "saved": str(folder),
                                  "target": made.target.model_dump(mode="json")}  # fmt: skip
    if ladder:
        found = predict([rung(place, vocab) for place in (source, *ladder)], made.target, vocab)
        summary["prediction"] = asdict(found) if found.slope > 0 else None
        says = [f"predicted loss {found.loss:.4f} ({found.low:.4f} to {found.high:.4f}, 95 % of single runs), "
                  f"from {len(found.rungs)} rungs", f"  loss falls as FLOPs^-{found.slope:.3g}; the target takes "
                  f"{found.flops:.3g} FLOPs, {found.reach:.3g}x the largest rung"]  # fmt: skip
        lines += ["", *(says if found.slope > 0 else ["no prediction"])]
        lines += [f"warning: {text}" for text in found.notes]
    lines += ["", f"config and plan: {folder}"]
    if train:
        from isoscale.cli.progress import training_bar
        from isoscale.train import train as run

        with training_bar("target", quiet) as bar:
            trained = run(made.target, out, resume=resume, on_step=bar)
        summary["result"] = asdict(trained)
        lines += [f"target: validation loss {trained.val_loss:.4f} (proxy {result.loss:.4f}); folder: {out}"]
    else:
        lines += [f"next: isoscale train --config {folder / 'config.toml'}, or add --train"]
    emit(as_json, summary, "\n".join(lines))
