"""Is every tensor of the u-muP decoder at the scale that its site row predicts, at init, at any width and depth?

For each shape one forward and backward pass; every site's rms against the plan's `expected_scale`, and, as the control,
against closed-form unit scaling, which takes positions as independent and predicts 1 (alpha/sqrt(head size) for
attention logits, 1/sqrt(width) for the readout).

Band: measured / predicted in [0.5, 2].
  S1  the plan's prediction holds at every site, every width (64 to 1024) and depth (2 to 32), on random tokens.
  S2  the same on real text, whose tokens repeat more than the uniform ones that the prediction assumes.
  S3  the control: closed-form unit scaling leaves the band at some site (if it never does, S1 says nothing).
S1's prediction for attention outputs and the residual stream was written after a first look had shown that the closed
form is off by 2.3 at depth 2; its recursion has no free constant. Gradients are shown without a band: a constant on a
whole gradient path cancels in Adam.

    OMP_NUM_THREADS=1 python benchmarks/unit_scale.py
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch

import isoscale as iso
from isoscale.models import Decoder, DecoderConfig
from isoscale.probe import site_scales
from isoscale.train.data import eval_batches, load_corpus

BAND = (0.5, 2.0)
SHAPES = ((64, 4), (128, 4), (256, 4), (512, 4), (1024, 4), (128, 2), (128, 8), (128, 16), (128, 32))
BATCH, LENGTH, HEAD = 4, 128, 16


def tokens(kind: str) -> torch.Tensor:
    """[BATCH, LENGTH + 1] token ids: uniform, or real text."""
    if kind == "random":
        return torch.randint(0, 256, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    corpus = load_corpus("builtin:austen+web", seq_len=LENGTH)
    ids, targets = next(iter(eval_batches(corpus.val, LENGTH, BATCH, 1)))
    return torch.cat([torch.from_numpy(ids), torch.from_numpy(targets[:, -1:])], 1)


def measure(width: int, depth: int, kind: str) -> list[dict[str, object]]:
    """One row per site: measured, predicted by the plan, predicted by the closed form, gradient rms."""
    model = Decoder(DecoderConfig(width=width, depth=depth, head_size=HEAD))
    plan, closed = iso.plan(model, "u-mup", seq_len=LENGTH), iso.plan(model, "u-mup")
    plan.apply(model, seed=0)
    ids = tokens(kind)
    found = {(s.path, s.port): s for s in site_scales(model, ids[:, :-1], ids[:, 1:])}
    return [
        {"kind": ours.kind, "name": ours.name, "rms": found[ours.path, ours.port].rms, "plan": ours.expected_scale,
         "closed": theirs.expected_scale, "grad": found[ours.path, ours.port].grad_rms}
        for ours, theirs in zip(plan.sites, closed.sites)
    ]  # fmt: skip


def span(values: list[float]) -> str:
    """Smallest to largest."""
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def figure(rows: list[dict[str, object]], title: str) -> object:
    """Measured and predicted rms of every site in forward order (plotly)."""
    import plotly.graph_objects as go

    fig = go.Figure()
    for name, label, symbol in (("rms", "measured", "circle"), ("plan", "plan's prediction", "line-ew-open"),
                                ("closed", "closed form (independent positions)", "x-thin-open")):  # fmt: skip
        fig.add_scatter(x=[r["name"] for r in rows], y=[r[name] for r in rows], name=label, mode="markers",
                        marker={"symbol": symbol, "size": 8, "line": {"width": 2}})  # fmt: skip
    fig.update_layout(template="plotly_white", title=title, height=620, width=1250, yaxis_type="log",
                      yaxis_title="rms", legend={"orientation": "h", "y": 1.06}, margin={"b": 180})  # fmt: skip
    return fig


def main() -> None:
    """Measure every shape, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results" / "unit_scale.md")
    parser.add_argument("--plot", type=Path, help="also write an HTML plot of width 128, depth 8")
    said = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    outside: dict[str, list[str]] = {"random": [], "text": []}
    control = 0
    for kind in ("random", "text"):
        lines += ["", f"## {'Random tokens' if kind == 'random' else 'Real text'}", "",
                  "| width | depth | site | measured rms | measured / plan | measured / closed form | gradient rms |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for width, depth in SHAPES:
            rows = measure(width, depth, kind)
            if said.plot and (width, depth, kind) == (128, 8, "random"):
                page = figure(rows, "u-muP decoder at init, width 128, 8 blocks, 4 x 128 random tokens")
                said.plot.write_text(page.to_html())  # type: ignore[attr-defined]
            groups: dict[str, list[dict[str, object]]] = defaultdict(list)
            for row in rows:
                groups[str(row["kind"])].append(row)
            for site, members in groups.items():
                ours = [float(m["rms"]) / float(m["plan"]) for m in members]  # type: ignore[arg-type]
                closed = [float(m["rms"]) / float(m["closed"]) for m in members]  # type: ignore[arg-type]
                grads = [float(m["grad"]) for m in members if m["grad"] is not None]  # type: ignore[arg-type]
                if min(ours) < BAND[0] or max(ours) > BAND[1]:
                    outside[kind].append(f"{site} at width {width}, depth {depth}: {span(ours)}")
                control += kind == "random" and (min(closed) < BAND[0] or max(closed) > BAND[1])
                measured = span([float(m["rms"]) for m in members])  # type: ignore[arg-type]
                lines.append(f"| {width} | {depth} | {site} | {measured} | {span(ours)} | {span(closed)} | "
                             f"{span(grads) if grads else ''} |")  # fmt: skip
            print(kind, width, depth, flush=True)
    verdicts = []
    for claim, kind in (("S1", "random"), ("S2", "text")):
        bad = outside[kind]
        verdicts.append(f"- **{claim}** every site within a factor 2 of its row's prediction, {kind} tokens: "
                        f"**{'refuted' if bad else 'confirmed'}**" + (f" ({'; '.join(bad[:4])})" if bad else ""))  # fmt: skip
    verdicts.append(f"- **S3** the closed form leaves the band ({control} times): "
                    f"**{'confirmed' if control else 'refuted'}**")  # fmt: skip
    head = ["# Is every tensor at its predicted scale?", "",
            "Command, prediction and band: `benchmarks/unit_scale.py`. At init, seed 0, fp32, 4 x 128 tokens, head size "
            f"{HEAD}.", "", "![measured and predicted rms of every site](unit_scale.png)", "", "## Verdicts", ""]
    text = "\n".join([*head, *verdicts, *lines, ""])
    said.out.write_text(text)
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
