"""isoscale formats: what formats there are, what values they have, and what they lose on a checkpoint."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoscale.cli.common import AsJson, emit

if TYPE_CHECKING:
    from torch import Tensor

    from isoscale.formats import Format
    from isoscale.probe.advice import Advice

app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, add_completion=False)


def _facts(fmt: Format) -> dict[str, Any]:
    """A format's row: plain values."""
    from isoscale.formats import BlockFormat, ElementFormat
    from isoscale.probe.advice import bits_of

    element: Format = fmt
    layout: dict[str, str | None] = dict.fromkeys(("element", "block", "scale", "rule"))
    if isinstance(fmt, BlockFormat):
        element = fmt.element
        shape = {(0, 0): "tensor", (1, 0): "row"}.get(fmt.block, "x".join(map(str, fmt.block)))
        layout = {"element": element.name, "block": shape, "scale": fmt.scale, "rule": fmt.scale_rule}
    assert isinstance(element, ElementFormat)
    ends = {"max": element.max, "min_normal": element.min_normal, "min_subnormal": element.min_subnormal}
    return {"name": fmt.name, "bits_per_value": bits_of(fmt), **layout, **ends}


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    full = f"{value:.6g}"
    return full if len(full) <= 8 else f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+")


def _table(head: list[str], rows: list[list[str]], gap: str = "  ") -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [gap.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
             for row in [head, *rows]]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


@app.callback()
def formats(context: typer.Context, as_json: AsJson = False) -> None:
    """List the number formats; show one; measure what they lose on a checkpoint.

    \b
    Examples:
      isoscale formats
      isoscale formats show mxfp6_e3m2
      isoscale formats error model.safetensors --out page.html
    """
    if context.invoked_subcommand is not None:
        return
    from isoscale.formats import by_name, names

    facts = [_facts(by_name(name)) for name in names()]
    shown = [{**row, "bits_per_value": f"{row['bits_per_value']:.4g}"} for row in facts]
    head = ["format", "bits", "element", "block", "scale", "rule", "max", "min norm", "min sub"]
    text = _table(head, [[_short(value) for value in row.values()] for row in shown], " ")
    notes = ("bits: per value, with its share of the block's scale. block: values that share a scale. rule: the "
             "default; others as in mxfp4/rceil. max and min: of the elements, before the scale.")  # fmt: skip
    text += "\n\n" + textwrap.fill(notes, 80)
    emit(as_json, {"formats": facts}, text)


@app.command("show", short_help="Describe one format and list its values.")
def show(name: Annotated[str, typer.Argument(help="A format, e.g. e4m3 or mxfp4/rceil.", metavar="NAME")],
         as_json: AsJson = False) -> None:  # fmt: skip
    """Describe one format: what its bits mean, its range, every value.

    \b
    Examples:
      isoscale formats show mxfp6_e3m2
      isoscale formats show mxfp4/rceil --json
    """
    from isoscale.formats import BlockFormat, by_name

    fmt = by_name(name)
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    facts = {key: value for key, value in _facts(fmt).items() if value is not None}
    facts["name"] = str(fmt) if isinstance(fmt, BlockFormat) else fmt.name
    if element.layout == "scale":
        del facts["min_subnormal"]
        facts["code"] = "a bare power of two, 2^(code - 127); code 255 is NaN"
    else:
        fixed = f"two's complement, value = code / {2**element.mantissa_bits}"
        parts = f"{element.exponent_bits} exponent bits (bias {element.bias}), {element.mantissa_bits} mantissa bits"
        facts["code"] = fixed if element.layout == "twos" else f"sign, {parts}"
        facts["specials"] = {"ieee": "inf and NaN as in IEEE 754", "fn": "NaN, no inf", "none": "no inf, no NaN",
                             "fnuz": "one NaN, no inf, no -0"}[element.specials]  # fmt: skip
    width = max(map(len, facts))
    lines = [f"{key.replace('_', ' ').ljust(width)}  {value}" for key, value in facts.items()]
    data: dict[str, Any] = {**facts}
    if element.bits <= 8:
        data["values"] = [element.value(code) for code in range(element.code_count)]
        lines.append("")
        if element.layout == "scale":
            lines.append(f"values: every power of two from 2^{-element.bias} to 2^{element.emax}")
        else:
            lines.append("values (their negatives too):")
            lines += _values([v for v in element.values().tolist() if v >= 0], element.mantissa_bits, element.layout)
    else:
        lines += ["", f"{element.code_count:,} codes: too many to list"]
    emit(as_json, data, "\n".join(lines))


def _values(values: list[float], mantissa_bits: int, layout: str) -> list[str]:
    """The values in rows of one exponent each, within 80 columns."""
    cells = [f"{value:.6g}" for value in values]
    wide = max(map(len, cells))
    count = 1 << mantissa_bits if layout == "sign" and (1 << mantissa_bits) * (wide + 1) <= 78 else 78 // (wide + 1)
    return ["  " + " ".join(c.rjust(wide) for c in cells[i : i + count]) for i in range(0, len(cells), count)]


def _file(path: Path) -> Path:
    """The safetensors file that a path means: itself, or that of a checkpoint or run folder."""
    from isoscale._base.errors import CheckpointError

    if path.is_dir():
        steps = sorted((path / "checkpoints").glob("step_*/model.safetensors"))
        found = path / "model.safetensors" if (path / "model.safetensors").exists() else steps[-1] if steps else None
        if found is None:
            raise CheckpointError("no model.safetensors in this folder", key="FILE", value=str(path),
                                  hint="give a safetensors file, a checkpoint folder, or a run folder")  # fmt: skip
        return found
    if not path.exists():
        raise CheckpointError("no such file", key="FILE", value=str(path))
    return path


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one at a time."""
    from safetensors import SafetensorError, safe_open

    from isoscale._base.errors import CheckpointError

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no iterator of its own)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        hint = "isoscale formats error model.safetensors"
        raise CheckpointError(f"not a safetensors file: {error}", key="FILE", value=str(path), hint=hint) from None


def _why_skipped(x: Tensor, axis: int) -> str:
    """Why a tensor is not measured; empty where it is."""
    import torch

    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"{str(x.dtype).removeprefix('torch.')}, no float to be cast"
    if x.numel() == 0:
        return "empty"
    return "" if -max(x.dim(), 1) <= axis < max(x.dim(), 1) else f"{x.dim()} axes, none with number {axis}"


@app.command("error", short_help="What each format loses on the tensors of a file.")
def error(
    file: Annotated[Path, typer.Argument(help="safetensors file; checkpoint or run folder.", metavar="FILE")],
    format_: Annotated[list[str] | None, typer.Option("--format", help="Only this; repeatable. Default: every block "
                                                      "format, plain FP8.", metavar="NAME")] = None,
    axis: Annotated[int, typer.Option("--axis", help="Axis along which the blocks lie.")] = -1,
    min_sqnr: Annotated[float, typer.Option("--min-sqnr", help="dB that the recommended format keeps.")] = 25.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write an HTML page: histograms, ranges.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure what each format loses on every float tensor of a file: SQNR, clipped and flushed shares.

    Recommended is the format of the fewest bits whose SQNR is at least --min-sqnr (default 25 dB: noise of 0.3 % of the
    signal's power); among equals the one with the higher SQNR. It looks at stored values alone: gradients and
    activations have ranges of their own.

    \b
    Examples:
      isoscale formats error model.safetensors
      isoscale formats error runs/train --format mxfp4 --format nvfp4
      isoscale formats error model.safetensors --out page.html
    """
    from isoscale._base.errors import CheckpointError, ConfigError
    from isoscale.formats import by_name
    from isoscale.probe.advice import DEFAULT, advise

    wanted = tuple(format_) if format_ else DEFAULT
    for name in wanted:
        by_name(name)
    if not -1000 < min_sqnr < 1000:
        raise ConfigError("no such number of dB", key="--min-sqnr", value=min_sqnr, hint="such as 25")
    if out is not None and out.is_dir():
        raise ConfigError("a folder where a file is wanted", key="--out", value=str(out), hint=f"{out}/formats.html")
    path, found, skipped = _file(file), [], {}
    for name, x in _tensors(path):
        why = _why_skipped(x, axis)
        if why:
            skipped[name] = why
        else:
            found.append(advise(name, x, wanted, axis=axis, min_sqnr=min_sqnr))
    if not found:
        raise CheckpointError("no float tensor to measure", key="FILE", value=str(path),
                              hint="; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5]))  # fmt: skip
    rule = f"recommended: the fewest bits with an SQNR of at least {min_sqnr:g} dB"
    rows = [asdict(advice) for advice in found]
    if out is not None:
        from isoscale.report import write_formats_page

        write_formats_page(rows, skipped, f"{path.name}: {rule}, blocks along axis {axis}", out)
    parts = [_advice(advice) for advice in found]
    parts += ["\n".join(["skipped:", *(f"  {name}: {why}" for name, why in skipped.items())])] if skipped else []
    parts.append(rule + (f"\nwrote {out}" if out else ""))
    data = {"file": str(path), "axis": axis, "min_sqnr": min_sqnr, "tensors": rows, "skipped": skipped,
            "page": str(out) if out else None}  # fmt: skip
    emit(as_json, data, "\n\n".join(parts))


def _advice(advice: Advice) -> str:
    """One tensor's table."""
    shape = "x".join(map(str, advice.shape)) or "scalar"
    found = advice.format or "no format is good enough"
    if advice.special or not advice.histogram:
        found = f"{advice.special} inf or NaN: no advice" if advice.special else "all zero: nothing to lose"
    if not advice.histogram and not advice.special:
        return f"{advice.name}  {shape} {advice.dtype}: {found}"
    rows = [["  " + loss.format, f"{loss.bits:.4g}", f"{loss.sqnr_db:.1f}", f"{loss.clipped:.2%}",
             f"{loss.flushed:.2%}",
             "<- recommended" if loss.format == advice.format else ""] for loss in advice.losses]  # fmt: skip
    table = _table(["  format", "bits", "SQNR dB", "clipped", "flushed", ""], rows)
    return f"{advice.name}  {shape} {advice.dtype}: {found}\n{table}"
