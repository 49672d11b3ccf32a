"""isoscale scalify: what scales predict for a model, and what is measured."""

from __future__ import annotations

import math
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoscale._base.errors import ConfigError
from isoscale._base.files import atomic_write
from isoscale._base.log import dumps
from isoscale._base.optional import need
from isoscale.cli.common import AsJson, ConfigFile, Data, Preset, Quiet, Sets, emit, load_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from isoscale.scalify import Watched

_NAME, _OP = 26, 28


def scalify(
    target: Annotated[str, typer.Argument(
        help="isoscale (the decoder of the settings), module:function, or a config.json.", metavar="[TARGET]",
        show_default=False)] = "isoscale",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="What the model is made into.")] = "fp16",
    width: Annotated[int | None, typer.Option("--width", min=1, help="Of a TARGET: 128 if not given.")] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Of a TARGET: 2 if not given.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Trained before looking.")] = 20,
    lr: Annotated[float, typer.Option("--lr", help="AdamW's, for those steps.")] = 1e-3,
    octaves: Annotated[float, typer.Option("--octaves", "-k", help="A prediction off by more is told.")] = 3.0,
    worst: Annotated[int, typer.Option("--worst", min=0, help="Rows printed.")] = 12,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("runs/scalify"),
    report: Annotated[bool, typer.Option("--report", help="Write an HTML page too.")] = False,
    config: ConfigFile = None, preset: Preset = None, set_: Sets = None, data: Data = None,
    quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Every operator's predicted scale against its measured RMS, worst first.

    The model is made into its scaled form, trained for a few steps, and looked
    at in one forward and backward pass.

    \b
    Examples:
      isoscale scalify --report
      isoscale scalify --recipe fp8-fp16 --set model.depth=8 --steps 100
      isoscale scalify my_model:build --width 256 --report --out runs/mine
    """
    from isoscale.scalify import measure
    from isoscale.scalify import scalify as transform
    from isoscale.scalify.recipe import recipe_of

    chosen = recipe_of(recipe)
    for key, number in (("--octaves", octaves), ("--lr", lr)):
        if not 0 < number < math.inf:
            raise ConfigError("must be above 0, and finite", key=key, value=number)
    own = target == "isoscale"
    misplaced = {"--width": width, "--depth": depth} if own else \
                {"--set": set_, "--config": config, "--preset": preset, "--data": data}  # fmt: skip
    for key, given in misplaced.items():
        if given is not None:
            hint = f"--set model.{key[2:]}={given}" if own else "--width and --depth size a TARGET"
            raise ConfigError(f"{target} does not look at it", key=key, value=str(given), hint=hint)
    if report:
        need("plotly", "report")  # before the training, not behind it
    import torch

    torch.manual_seed(0)
    model, batch, loss = _subject(target, width or 128, depth or 2, load_config(preset, config, set_, data).config)
    model, optimizer = transform(model, torch.optim.AdamW(model.parameters(), lr=lr), chosen)
    _train(model, optimizer, lambda step: loss(model, batch(step)), steps, quiet or as_json)
    seen = measure(model, lambda: loss(model, batch(steps)))
    out.mkdir(parents=True, exist_ok=True)
    seen.save(out / "tensors.jsonl")
    found = _summary(seen, target, chosen.name, steps, octaves, optimizer)
    atomic_write(out / "scalify.json", dumps(found, indent=1) + "\n")
    page = ""
    if report:
        from isoscale.report.scalify_page import write_scalify_page

        page = str(write_scalify_page(out))
        found["page"] = page
    emit(as_json, found, _text(seen, found, worst, page))


def _subject(
    target: str, width: int, depth: int, config: Any
) -> tuple[nn.Module, Callable[[int], Any], Callable[[nn.Module, Any], Tensor]]:
    """The model, its batches and its loss."""
    import torch

    if target == "isoscale":
        from isoscale._base.rng import stream
        from isoscale.train.data import TokenStream, load_corpus
        from isoscale.train.setup import build

        corpus = load_corpus(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction,
                             cache=Path(config.data.cache) if config.data.cache else None,
                             seq_len=config.data.seq_len)  # fmt: skip
        model, _ = build(config, corpus.vocab, torch.device("cpu"))
        tokens = TokenStream(corpus.train, config.data.seq_len, config.train.batch, stream(config.seed, "data"))

        def batch(step: int) -> Any:
            return tuple(torch.from_numpy(part) for part in tokens.batch(step))

        return model, batch, lambda net, pair: net(*pair)
    from isoscale.check.subject import resolve
    from isoscale.check.task import make_task

    built = resolve(target, smallest=width, unit=False).build(width, depth)
    task = make_task(built, 0, None)
    return built.model, task.batch, task.loss


def _train(model: nn.Module, optimizer: Any, loss: Callable[[int], Tensor], steps: int, quiet: bool) -> None:
    """A few steps, so that the picture is not that of the init."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from isoscale.cli.progress import clock

    columns = (TextColumn("train"), BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[info]}"))
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not steps) as bar:
        task, began = bar.add_task("train", total=steps, info=""), time.perf_counter()
        for step in range(steps):
            value = loss(step)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            left = (time.perf_counter() - began) / (step + 1) * (steps - step - 1)
            bar.update(task, completed=step + 1, info=f"loss {float(value.detach()):.3f}  {clock(left)} left")


def _summary(seen: Watched, target: str, recipe: str, steps: int, octaves: float, optimizer: Any) -> dict[str, Any]:
    directions = {
        name: {"tensors": len(seen.measured(name)), "within": seen.within(octaves, name)}
        for name in ("forward", "backward")
    }
    worst: dict[str, dict[str, Any]] = {}  # an operator of a module often has several such tensors
    for row, text in seen.proposals(octaves):
        tensor = f"{_op(row.op)} in {row.module or '(loss)'} ({row.direction})"
        if tensor not in worst or abs(worst[tensor]["off"]) < row.off:
            worst[tensor] = {"tensor": tensor, "off": row.rms, "proposal": text}
    kept = optimizer.bytes_per_parameter()
    return {
        "model": target, "recipe": recipe, "steps": steps, "octaves": octaves, "directions": directions,
        "bytes_per_parameter": kept, "proposals": list(worst.values()),
        "note": f"weights and optimiser state take {kept['all']:.2f} bytes a parameter",
    }  # fmt: skip


def _op(name: str) -> str:
    return name.removeprefix("aten.").removesuffix(".default")


def _head(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "~"


def _tail(text: str, size: int) -> str:
    return text if len(text) <= size else "~" + text[1 - size :]


def _text(seen: Watched, found: dict[str, Any], worst: int, page: str) -> str:
    lines = textwrap.wrap(f"{found['model']} under {found['recipe']}, after {found['steps']} steps; "
                          f"{found['bytes_per_parameter']['all']:.2f} bytes a parameter", 80)  # fmt: skip
    for name, part in found["directions"].items():
        share, band = f"{100 * part['within']:5.1f} %", f"{found['octaves']:g} octaves"
        lines.append(f"{name:9} {part['tensors']:5} tensors, {share} within {band} of the prediction")
    lines += ["", f"{'off by':>8}  {'predicted':>9}  {'':1}  {'operator':{_OP}} module"]
    for row in seen.worst(worst):
        scale = "any" if row.scale is None else f"2^{row.scale:g}"
        lines.append(f"{f'2^{row.rms:+.1f}':>8}  {scale:>9}  {row.direction[0]}  {_head(_op(row.op), _OP):{_OP}} "
                     f"{_tail(row.module or '(loss)', _NAME)}")  # fmt: skip
    for proposal in found["proposals"][:5]:
        lines += ["", *textwrap.wrap(f"{proposal['tensor']}, off by 2^{proposal['off']:+.1f}:", 80)]
        lines += textwrap.wrap(proposal["proposal"], 80, initial_indent="  ", subsequent_indent="    ")
    if len(found["proposals"]) > 5:
        lines.append(f"\nand {len(found['proposals']) - 5} more, in scalify.json")
    if page:
        lines += ["", f"page: {page}"]
    return "\n".join(lines)
