"""isoscale eval: the loss of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isoscale.cli.common import AsJson, Data, emit


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")],
    data: Data = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Batches of the validation split.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Evaluate the newest checkpoint of a run on validation text (its own, or yours).

    \b
    Examples:
      isoscale eval runs/train
      isoscale eval runs/train --data other.txt --batches 200
    """
    from isoscale.train.inference import evaluate_run

    result = evaluate_run(run, tuple(data) if data else None, batches)
    text = (f"{result.loss:.4f} nats/token, {result.nats_per_byte:.4f} nats/byte, perplexity {result.perplexity:.3f} "
            f"(step {result.step}, {result.tokens:,} tokens)")  # fmt: skip
    emit(as_json, vars(result), text)
