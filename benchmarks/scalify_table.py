"""The table of the Scalify paper on real text: which parts of training survive FP16 and FP8 when scales are carried along.

Pre-registered (before any row of this study was run):
  S1  arms fp16-master (the paper's FP16 #1), fp16 (#2), fp8 (#3) and fp8-fp16 (#4): final validation loss within 0.01
      nats/byte of plain float32, each: the mean of the paired differences (3 seeds at least, 8 planned) is at most 0.01 and the upper end of its
      95 % interval at most 0.02; refuted if the mean is above 0.01 and the lower end above 0. (The paper: +0.05 to +0.06 a token.)
  S2  float32, the oracle: differs from plain float32 by less than 0.001 at every seed.
  S3  controls that must fail (worse than plain float32 by more than 0.05, or not finite): half: `model.half()` and plain
      AdamW; state: float32 weights, m and v in unscaled fp16.
  S4  low learning rate, cosine to zero, where updates fall below half an ulp of FP16 weights: rounding to nearest (fp16-nearest) loses
      more than 0.005 against float32; stochastic rounding (fp16) and masters (fp16-master) less than that.
  S5  (added after the rows of S1 to S4, which overflowed at width 128 in another study, and before its own) the same three arms with
      rescales of inputs of linear layers and of their gradients too (`+`): as S1. The recipes' default now stands behind the products
      of linear layers (outputs, and gradients of inputs), which a later look at width 128 showed to be better.
  S6  (added before its rows) the recipes as shipped (`*`): as S1.
The arms of S1 to S4 have the paper's rescales (`as_published`). Their rows were made before weights took the nearest power of two instead of the one below, and RMSNorm a rule of its own: scales only, exact, but other roundings.
Beside them: loss scaling (plain fp16 model, float32 masters, `GradScaler`'s rule), fp16-fp16, fp16-fp8 and bf16-bf16.
Setting: decoder, width 64, 2 blocks, heads of 16, FFN ratio 3, trainable RMSNorm, bytes of Austen and WEB, 128 tokens a
sequence, 8 a step, 300 steps, AdamW (0.9, 0.95), eps 1e-8, decay 0.1, LR 2^-7 (low: 2^-12), 10 % warm-up, cosine to 10 % (low: to
zero), norm of the gradient not clipped. Eager mode: every intermediate result is rounded to fp16. Plain half-precision
matmuls of the controls accumulate in float32 and round once, as tensor cores do (a CPU's own fp16 loop takes 20 times as long).

    OMP_NUM_THREADS=1 python benchmarks/scalify_table.py --workers 1
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import study
import torch
from scipy import stats
from study import Cell, publish, verdict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from isoscale import scalify as sc
from isoscale._base.rng import stream
from isoscale.config import RunConfig
from isoscale.nn import Linear
from isoscale.nn.cast_linear import CastLinear
from isoscale.train.data import TokenStream, eval_batches, load_corpus
from isoscale.train.setup import build

STEPS, BATCH, SEQ, LR, LOW, SEEDS = 300, 8, 128, 2.0**-7, 2.0**-12, tuple(range(8))
PAPER = ("fp16-master", "fp16", "fp8", "fp8-fp16")
OURS = ("fp16-fp16", "fp16-fp8", "bf16-bf16")
PLUS = ("fp16+", "fp8+", "fp8-fp16+")
SHIPPED = ("fp16*", "fp8*", "fp8-fp16*")
CONTROLS = ("half", "state", "loss-scale")
LOW_ARMS = ("plain", "fp16-nearest", "fp16", "fp16-master", "fp8-fp16")


class Upcast(TorchDispatchMode):
    """Half-precision matmuls as tensor cores do them: float32 sums, rounded once."""

    OPS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.OPS and args[-1].dtype == torch.float16 and not isinstance(args[-1], sc.ScaledTensor):
            return func(*(x.float() for x in args), **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


class Fp16StateAdamW(torch.optim.Optimizer):
    """The control: AdamW whose m and v lie in fp16 without a scale."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                s = self.state[p] or self.state[p].update(m=torch.zeros_like(p).half(), v=torch.zeros_like(p).half(), t=0) or self.state[p]
                s["t"] += 1
                s["m"] = (b1 * s["m"].float() + (1 - b1) * p.grad).half()
                s["v"] = (b2 * s["v"].float() + (1 - b2) * p.grad.square()).half()
                denominator = (s["v"].float() / (1 - b2 ** s["t"])).sqrt() + 1e-8
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * s["m"].float() / (1 - b1 ** s["t"]) / denominator)


def schedule(step: int, low: bool) -> float:
    """Factor of the LR: 10 % warm-up, cosine to 10 %, or to zero."""
    warm = STEPS // 10
    if step < warm:
        return (step + 1) / warm
    end = 0.0 if low else 0.1
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (step - warm) / (STEPS - warm)))


def make(arm: str, model: nn.Module, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimiser of an arm."""
    settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if arm == "state":
        return model, Fp16StateAdamW(model.parameters(), **settings)
    if arm == "half":
        model = model.half()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    if arm in ("plain", "half", "loss-scale"):
        return model, optimizer
    if arm in PLUS:
        model, scaled = sc.scalify(model, optimizer, sc.as_published(arm[:-1]), seed=seed)
        for path, module in list(model.named_modules()):
            if isinstance(module, (Linear, CastLinear)):
                sc.place(model, path, "l2", "both")
        return model, scaled
    if arm in SHIPPED:
        return sc.scalify(model, optimizer, arm[:-1], seed=seed)
    recipe = sc.as_published("fp16").changed(stochastic=False) if arm == "fp16-nearest" else sc.as_published(arm)
    return sc.scalify(model, optimizer, recipe, seed=seed)


def run(cell: Cell) -> dict[str, Any]:
    """One training run."""
    torch.set_num_threads(1)
    label, began = cell["label"], time.perf_counter()
    low, arm, seed = label["lr"] == "low", label["arm"], label["seed"]
    config = RunConfig().with_values(**{
        "model.width": 64, "model.depth": 2, "model.norm": "trainable", "rules.parametrisation": "sp", "seed": seed,
        "data.seq_len": SEQ, "train.batch": BATCH, "train.steps": STEPS,
    })  # fmt: skip
    corpus = load_corpus(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction, cache=None, seq_len=SEQ)
    model, _ = build(config, corpus.vocab, torch.device("cpu"))
    data = TokenStream(corpus.train, SEQ, BATCH, stream(seed, "data"))
    batches = [tuple(torch.from_numpy(x) for x in pair) for pair in eval_batches(corpus.val, SEQ, BATCH, 32)]
    lr = LOW if low else LR
    net, optimizer = make(arm, model, lr, seed)
    step = _loss_scaled(net, optimizer) if arm == "loss-scale" else _plain(net, optimizer)
    losses = []
    for at in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(at, low)
        ids, targets = (torch.from_numpy(x) for x in data.span(at * BATCH, BATCH))
        losses.append(step(ids, targets))
        if not math.isfinite(losses[-1]):
            break
    net.eval()
    found = math.inf
    if math.isfinite(losses[-1]):
        with torch.no_grad(), Upcast():
            half = net.half() if arm == "loss-scale" else net
            found = sum(float(half(*pair)) for pair in batches) / len(batches)
    found = found if math.isfinite(found) else math.inf
    row = {"val_loss": "inf" if found == math.inf else found, "steps": len(losses)}
    return {"key": study.key(cell), **cell, **row, "seconds": round(time.perf_counter() - began, 1)}


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], float]:
    def step(ids: Tensor, targets: Tensor) -> float:
        with Upcast():
            loss = model(ids, targets)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _loss_scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], float]:
    """float32 masters, an fp16 copy that computes, one dynamic factor: doubled after 50 good steps, halved after a bad one."""
    import copy

    low = copy.deepcopy(model).half()
    state = {"scale": 2.0**16, "good": 0}

    def step(ids: Tensor, targets: Tensor) -> float:
        with torch.no_grad():
            for mine, master in zip(low.parameters(), model.parameters()):
                mine.copy_(master)
        with Upcast():
            loss = low(ids, targets)
            (loss.float() * state["scale"]).backward()
        grads = [p.grad.float() / state["scale"] for p in low.parameters()]
        low.zero_grad()
        if all(torch.isfinite(g).all() for g in grads):
            for master, g in zip(model.parameters(), grads):
                master.grad = g
            optimizer.step()
            state["good"] += 1
            if state["good"] % 50 == 0:
                state["scale"] *= 2
        else:
            state["scale"] /= 2
        return float(loss.detach())

    return step


def cells() -> list[Cell]:
    """Seed by seed; the low LR last."""
    out = []
    for seed in SEEDS:
        rest = ("float32", *OURS, *CONTROLS) if seed < 3 else ()
        for arm in ("plain", *PAPER, *rest):
            out.append({"label": {"arm": arm, "lr": "tuned", "seed": seed}})
        for arm in LOW_ARMS if seed < 3 else ():
            out.append({"label": {"arm": arm, "lr": "low", "seed": seed}})
    for seed in SEEDS:
        out += [{"label": {"arm": arm, "lr": "tuned", "seed": seed}} for arm in (*PLUS, *SHIPPED)]
    return out


def differences(rows: dict[str, dict[str, Any]], arm: str, lr: str) -> list[float]:
    """Loss minus that of plain float32, by seed."""
    at = {(r["label"]["arm"], r["label"]["lr"], r["label"]["seed"]): float(r["val_loss"]) for r in rows.values()}
    return [at[arm, lr, s] - at["plain", lr, s] for s in SEEDS if (arm, lr, s) in at and ("plain", lr, s) in at]


def interval(d: list[float]) -> tuple[float, float]:
    """95 % interval of the mean; infinite below two seeds."""
    if len(d) < 2 or not all(map(math.isfinite, d)):
        return -math.inf, math.inf
    half = stats.t.ppf(0.975, len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.mean(d) - half, statistics.mean(d) + half


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/scalify_table.md."""
    text = ["# Scalify: the paper's table on real text", "",
            "Command, setting and pre-registration: `benchmarks/scalify_table.py`. Losses in nats/byte; differences are paired "
            "with plain float32 by seed, with a 95 % interval.", "",
            "| LR | arm | seeds | loss, mean | minus float32 | interval |", "|---|---|---|---|---|---|"]  # fmt: skip
    for lr, arms in (("tuned", ("plain", "float32", *PAPER, *PLUS, *SHIPPED, *OURS, *CONTROLS)), ("low", LOW_ARMS)):
        for arm in arms:
            found = [float(r["val_loss"]) for r in rows.values() if (r["label"]["arm"], r["label"]["lr"]) == (arm, lr)]
            if not found:
                continue
            d = differences(rows, arm, lr)
            low, high = interval(d)
            mean = statistics.mean(found)
            shown = f"{mean:.4f}" if math.isfinite(mean) else "not finite"
            gap = f"{statistics.mean(d):+.4f}" if d and math.isfinite(sum(d)) else "-"
            text.append(f"| {lr} | {arm} | {len(found)} | {shown} | {gap} | "
                        f"{f'{low:+.4f} to {high:+.4f}' if math.isfinite(low) else '-'} |")  # fmt: skip
    text += ["", "## Verdicts", ""]
    for arm in (*PAPER, *PLUS, *SHIPPED):
        d = differences(rows, arm, "tuned")
        low, high = interval(d)
        bad = bool(d) and (not all(map(math.isfinite, d)) or (statistics.mean(d) > 0.01 and low > 0))
        good = len(d) >= 3 and statistics.mean(d) <= 0.01 and high <= 0.02
        text.append(f"- {'S5' if arm in PLUS else 'S6' if arm in SHIPPED else 'S1'} {arm}: **{verdict(False if bad else True if good else None)}**")
    d = differences(rows, "float32", "tuned")
    text.append(f"- S2 float32 is the plain model: **{verdict(max(map(abs, d)) < 0.001 if len(d) >= 3 else None)}**")
    for arm in ("half", "state"):
        d = differences(rows, arm, "tuned")
        failed = all(not math.isfinite(x) or x > 0.05 for x in d) if d else None
        text.append(f"- S3 control {arm} fails: **{verdict(failed)}**")
    for arm, fails in (("fp16-nearest", True), ("fp16", False), ("fp16-master", False)):
        d = differences(rows, arm, "low")
        low, high = interval(d)
        passed = None if len(d) < 3 or low < 0.005 < high else (statistics.mean(d) > 0.005) == fails
        text.append(f"- S4 {arm} {'loses' if fails else 'does not lose'} 0.005 at the low LR: **{verdict(passed)}**")
    publish("scalify_table", "\n".join(text) + "\n")


if __name__ == "__main__":
    study.main("scalify_table", __doc__ or "", cells(), judge, run)
