"""isoscale transfer: the sweep's winner on a bigger model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isoscale._base.errors import ConfigError
from isoscale.cli.common import AsJson, Quiet, Resume, Sets, emit
from isoscale.config.load import parse_set


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


def transfer(
    source: Annotated[Path, typer.Argument(help="Sweep folder.", metavar="SWEEP")],
    width: Annotated[int | None, typer.Option("--width", min=1, help="Target width.")] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Target depth.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Low-precision recipe of the target: fp8, mxfp8, nvfp4, ...")
    ] = None,
    set_: Sets = None,
    train: Annotated[bool, typer.Option("--train", help="Train the target too.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder of the target.")] = Path("runs/target"),
    resume: Resume = False, quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Carry a sweep's best hyperparameters to a bigger model; print what changes, and train it if asked.

    \b
    Examples:
      isoscale transfer runs/sweep --width 256
      isoscale transfer runs/sweep --width 256 --depth 8 --recipe fp8 \\
          --train --out runs/target
    """
    from dataclasses import asdict

    from isoscale.cli.plan import describe
    from isoscale.sweep import load
    from isoscale.sweep import transfer as carry
    from isoscale.sweep.space import show
    from isoscale.train.data import load_corpus

    values = flatten(set_ or [])
    flags = {"model.width": width, "model.depth": depth, "numerics.recipe": recipe}
    values |= {key: value for key, value in flags.items() if value is not None}
    if not values:
        raise ConfigError("say what the target is", key="--width", hint="--width 256")
    result = load(source)
    data = result.config.data
    vocab = load_corpus(data.source, data.tokenizer, val_fraction=data.val_fraction, seq_len=data.seq_len,
                        cache=Path(data.cache) if data.cache else None).vocab  # fmt: skip
    made = carry(result, vocab, **values)
    lines = [f"carried over, in base units: {show(made.hps)} (proxy loss {result.loss:.4f})", "",
             "what the target's tensors get:"]  # fmt: skip
    for change in made.changes:
        if change.quantity in ("lr", "init_std", "weight_decay", "eps", "multiplier", "formats"):
            lines += [f"  {line}" for line in describe(change, reason=False)]
    lines += [f"warning: {text}" for text in made.warnings]
    summary: dict[str, object] = {"hps": dict(made.hps), "warnings": list(made.warnings),
                                  "target": made.target.model_dump(mode="json")}  # fmt: skip
    if train:
        from isoscale.cli.progress import training_bar
        from isoscale.train import train as run

        with training_bar("target", quiet) as bar:
            trained = run(made.target, out, resume=resume, on_step=bar)
        summary["result"] = asdict(trained)
        lines += ["", f"target: validation loss {trained.val_loss:.4f} (proxy {result.loss:.4f}); folder: {out}"]
    else:
        lines += ["", "add --train to train it"]
    emit(as_json, summary, "\n".join(lines))
