"""isoscale generate: text from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isoscale.cli.common import AsJson, emit


def generate(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")] = "\n",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many to add.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Only the k likeliest.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Sample text from the newest checkpoint of a run.

    \b
    Examples:
      isoscale generate runs/train --prompt "It is a truth"
      isoscale generate runs/train --temperature 0 --tokens 50
    """
    from isoscale.train.inference import generate_text

    text = generate_text(run, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)
    emit(as_json, {"prompt": prompt, "text": text}, text)
