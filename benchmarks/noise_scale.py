"""Is the batch of the axis study below the critical one? The gradient noise scale of the base, during training.

B_simple = tr(Sigma) / |G|^2 (arXiv 1812.06162, appendix A.1), in sequences, from gradients of 256 single sequences at
the base of axes.py (scheme d-1-qk, LR 2^-6) after 50, 100, 200 and 400 steps: with g_i the gradient of sequence i,
|G|^2 and tr(Sigma) follow from E|g_i|^2 and |mean g_i|^2 without bias.
Pre-registered: B_simple exceeds 32 sequences, the largest batch of the study, at every point of the last 3/4 of the run.

    OMP_NUM_THREADS=1 python benchmarks/noise_scale.py
"""

from __future__ import annotations

import json

import axes
import torch
from study import DATA, publish, verdict

from isoscale._base.rng import stream
from isoscale.config import RunConfig
from isoscale.optim import lr_factor, make_optimizer
from isoscale.train.data import TokenStream, load_corpus
from isoscale.train.setup import build

STEPS, LOOK, COUNT = 400, (50, 100, 200, 400), 256


def noise_scale(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """B_simple in sequences, and |G|^2."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    single = 0.0
    for ids, targets in batches:
        grads = torch.autograd.grad(model(ids, targets), parameters)
        single += sum(float(g.square().sum()) for g in grads)
        for mean, g in zip(total, grads):
            mean.add_(g)
    n = len(batches)
    big = sum(float((g / n).square().sum()) for g in total)
    signal = (n * big - single / n) / (n - 1)
    noise = (single / n - big) / (1 - 1 / n)
    return noise / signal, signal


def main() -> None:
    """Train the base, look at it four times, publish."""
    torch.set_num_threads(1)
    config = RunConfig().with_values(**{**axes.RUN, **axes.SCHEMES["d-1-qk"][0], "hps.lr": 2.0**-6})
    corpus = load_corpus(config.data.source, "bytes", val_fraction=0.1, seq_len=128)
    model, plan = build(config, corpus.vocab, torch.device("cpu"))
    optimizer = make_optimizer(plan, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    feed = TokenStream(corpus.train, 128, 8, stream(0, "data"))
    probe = TokenStream(corpus.train, 128, 1, stream(1, "noise"))
    singles = [tuple(torch.from_numpy(part) for part in probe.batch(i)) for i in range(COUNT)]
    rows = []
    for step in range(STEPS):
        factor = lr_factor(step, STEPS)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        ids, targets = (torch.from_numpy(part) for part in feed.batch(step))
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in LOOK:
            scale, signal = noise_scale(model, singles)
            rows.append({"step": step + 1, "b_simple": scale, "signal": signal, "loss": float(loss.detach())})
            print(rows[-1], flush=True)
    (DATA / "noise_scale.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = all(row["b_simple"] > 32 for row in rows if row["step"] >= STEPS / 4)
    text = ["# Gradient noise scale at the base of the axis study", "",
            "Command and pre-registration: `benchmarks/noise_scale.py`.", "",
            "| step | B_simple, sequences of 128 | training loss |", "|---|---|---|"]
    text += [f"| {row['step']} | {row['b_simple']:.1f} | {row['loss']:.3f} |" for row in rows]
    text += ["", f"The study's largest batch, 32 sequences, lies below it in the last 3/4 of the run: **{verdict(good)}**"]
    publish("noise_scale", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
