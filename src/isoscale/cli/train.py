"""isoscale train: one run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from isoscale.cli.common import AsJson, ConfigFile, Data, Preset, Quiet, Resume, Sets, emit, load_config


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.", metavar="DIR")] = Path("runs/train"),
    config: ConfigFile = None, preset: Preset = None, set_: Sets = None, data: Data = None,
    resume: Resume = False, quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train one model.

    \b
    Examples:
      isoscale train --preset proxy --set hps.lr=2
      isoscale train --data my_texts/ --set model.width=256 \\
          --set numerics.recipe=fp8 --out runs/mine
      isoscale train --out runs/mine --data my_texts/ --resume
    """
    from isoscale.cli.progress import training_bar
    from isoscale.train import train as run

    loaded = load_config(preset, config, set_, data, resumed=out if resume else None)
    with training_bar(loaded.config.name, quiet) as bar:
        result = run(loaded.config, out, resume=resume, on_step=bar)
    text = (f"validation loss {result.val_loss:.4f} nats/token after {result.steps} steps ({result.tokens:,} tokens, "
            f"{result.seconds:.0f} s)\ncasts: {result.backend}; run folder: {result.out}")  # fmt: skip
    if result.skipped:
        text += f"\n{result.skipped} steps left out for non-finite values"
    emit(as_json, asdict(result), text)
