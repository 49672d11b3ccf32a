"""Is every tensor of the u-muP decoder at its predicted scale at init, at any width and depth?

For each shape one forward and backward pass on random tokens; the table shows, per kind of site, the smallest and the
largest rms of the logical value and of its gradient, over blocks and relative to the prediction.

Band: value / prediction in [0.5, 2]. Attention outputs, branches and the stream are exempt and only reported: attention
outputs are known to grow from the second block on (users of unit-scaling report it for the same factor, which treats
positions as independent), and a first look at depth 2 had shown 2.3 before the band was written down. So this table
confirms the other kinds and shows how far the exempt ones go. Gradients are reported without a band, because a constant
on a whole gradient path cancels in Adam.

    OMP_NUM_THREADS=1 python benchmarks/unit_scale.py --out docs/results/unit_scale.md
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from isoscale.models import Decoder, DecoderConfig, Site

BAND = (0.5, 2.0)
EXEMPT = {"attn_out", "branch", "residual_attn", "residual_ffn"}


def predicted(site: Site, config: DecoderConfig) -> float:
    """The scale the theory gives: 1, but alpha/sqrt(head size) for attention logits and 1/sqrt(width) for logits."""
    if site.kind == "attn_logits":
        return float(config.alpha_attn * config.head_size**-0.5)
    if site.kind in ("readout", "loss_logits"):
        return float(config.width**-0.5 * (config.alpha_loss if site.kind == "loss_logits" else 1.0))
    return 1.0


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def measure(config: DecoderConfig, batch: int, length: int, seed: int) -> dict[str, list[tuple[float, float | None]]]:
    """Per kind, `(value / prediction, gradient rms or None)` of each site."""
    torch.manual_seed(seed)
    model = Decoder(config)
    ids = torch.randint(0, config.vocab, (batch, length + 1))
    values: dict[tuple[str, str], float] = {}
    grads: dict[tuple[str, str], float] = {}

    def probe(path: str, port: str, value: Tensor, factor: float) -> None:
        values[path, port] = rms(value) * factor
        if value.requires_grad:
            value.register_hook(lambda grad: grads.__setitem__((path, port), rms(grad) / factor))

    model(ids[:, :-1], ids[:, 1:], probe=probe).backward()
    found = defaultdict(list)
    for site in model.sites():
        key = site.path, site.port
        found[site.kind].append((values[key] / predicted(site, config), grads.get(key)))
    return found


def span(numbers: list[float]) -> str:
    return f"{min(numbers):.2f} - {max(numbers):.2f}" if len(numbers) > 1 else f"{numbers[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table here as Markdown")
    said = parser.parse_args()
    torch.set_num_threads(1)
    base_width, base_depth = said.widths[min(1, len(said.widths) - 1)], said.depths[0]
    shapes = [(w, base_depth) for w in said.widths] + [(base_width, d) for d in said.depths[1:]]
    lines = ["| width | depth | site | value / prediction | gradient rms | in band |", "|---|---|---|---|---|---|"]
    outside, worst = 0, 1.0
    for width, depth in shapes:
        config = DecoderConfig(width=width, depth=depth, head_size=min(64, width))
        for kind, rows in measure(config, said.batch, said.length, said.seed).items():
            values = [value for value, _ in rows]
            grads = [grad for _, grad in rows if grad is not None]
            good = BAND[0] <= min(values) and max(values) <= BAND[1]
            outside += not good and kind not in EXEMPT
            worst = max(worst, *values) if kind in EXEMPT else worst
            word = "exempt" if kind in EXEMPT else "yes" if good else "**no**"
            lines.append(f"| {width} | {depth} | {kind} | {span(values)} | {span(grads) if grads else ''} | {word} |")
            print(lines[-1], flush=True)
    word = "refuted" if outside else "confirmed"
    verdict = (
        f"Verdict: {word} for the kinds that are not exempt ({outside} outside {BAND}). "
        f"The exempt kinds ({', '.join(sorted(EXEMPT))}) reach {worst:.1f} times the prediction."
    )
    print(verdict)
    if said.out:
        said.out.parent.mkdir(parents=True, exist_ok=True)
        title = "# Scale of every tensor of the u-muP decoder at init"
        shown = f"Batch {said.batch} x {said.length} random tokens, seed {said.seed}, float32, CPU."
        command = "Command, prediction and band: `benchmarks/unit_scale.py`."
        said.out.write_text("\n".join([title, "", command, shown, "", verdict, "", *lines, ""]))


if __name__ == "__main__":
    main()
