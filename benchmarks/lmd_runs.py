"""One training run of the LMD studies: a decoder (Llama-style or GPT-2) on text, or a ViT on images; any optimiser, any
formats. The cell's label says everything; see `run`.

Each optimiser's LR moves all it trains: where embeddings, norms and biases go to AdamW, that has a fixed ratio to it.
Validation under the formats of training, with mean weights where the optimiser samples.
"""

from __future__ import annotations

import functools
import math
import time
from contextlib import nullcontext
from typing import Any

import study
import torch
from recipes_vit import digits
from study import Cell
from torch import Tensor, nn

import isoscale as iso
from isoscale import formats, numerics
from isoscale.formats.layers import LayerFormats
from isoscale.formats.recipes import HEADS, BF16, Recipe
from isoscale.models import Decoder, DecoderConfig, ViT, ViTConfig
from isoscale.optim import LMD, Lion, Madam, lr_factor, split_parameters
from isoscale.train.data import TokenStream, eval_batches, load_corpus

SEQ = 64
SIX, SIX_B, FOUR, EIGHT = "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxfp8_e4m3"


def forward_only(name: str) -> LayerFormats:
    """That format in the forward, BF16 operands in the backward pass."""
    return LayerFormats(f"{name}/floor", f"{name}/floor", "bf16", backward_weight="bf16", backward_input="bf16")


def both(forward: str, backward: str) -> LayerFormats:
    """One format in the forward, one in the backward pass, rounded to nearest, scales that clip nothing there."""
    back = f"{backward}/rceil"
    return LayerFormats(f"{forward}/floor", f"{forward}/floor", back, backward_weight=back, backward_input=back)


FORMATS: dict[str, LayerFormats | str | None] = {
    "fp32": None, "6/16": forward_only(SIX), "6b/16": forward_only(SIX_B), "4/16": forward_only(FOUR),
    "6/8": both(SIX, EIGHT), "6/6": both(SIX, SIX), "6/4": both(SIX, FOUR), "4/4": both(FOUR, FOUR), "4/4 sr": "mxfp4",
}  # fmt: skip
"""Bits of the forward / of the backward pass; 6 is E3M2, 6b is E2M3; `4/4 sr` is the recipe mxfp4 (stochastic rounding
and Hadamard transforms in the backward pass)."""

TUNED: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.7, 0.95]},
    "lmd": {"betas": [0.8, 0.9], "sigma": 0.02},
    "hypentropy": {"betas": [0.8, 0.9]},
    "lion": {"betas": [0.8, 0.8], "weight_decay": 0.2},
}  # fmt: skip
"""Settings that gained more than 0.02 nats/byte, what a run scatters by, in `lmd_tune.py`."""
NOISE = (" LMD's first rows were made while its noise was hashed element by element (now one hash serves sixteen; the same "
         "distribution, other bits), and the one-vector form's first rows with `gradient=\"sample\"`, where the median is "
         "the default now.")
"""A word on every page that has such rows."""
AUX = {"lmd": 0.15, "hypentropy": 0.15, "madam": 0.3}
"""LR of AdamW for what an optimiser does not train, over its own."""
LRS = {"adamw": range(-12, -3), "lmd": range(-9, 0), "hypentropy": range(-9, 0), "lion": range(-14, -5),
       "madam": range(-11, -2), "ivon": range(-2, 7)}  # fmt: skip
"""log2 of the LRs tried: nine each, with the usual best one in the middle."""


def optimizer(kind: str, model: nn.Module, lr: float, **more: Any) -> torch.optim.Optimizer:
    """An optimiser of a study by name."""
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, **{"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True, **more})
    if kind == "lion":
        return Lion(model.parameters(), lr=lr, **{"weight_decay": 0.5, **more})
    if kind == "ivon":  # pip install isoscale[bench]; GPL-3.0, so neither vendored nor needed
        from ivon import IVON

        return IVON(model.parameters(), lr=lr, **{"ess": 1e6, "hess_init": 0.05, "beta2": 0.9995, "weight_decay": 1e-4, "clip_radius": 1e-2, **more})
    aux = {"lr": lr * AUX[kind], "betas": (0.9, 0.95), "fused": True}
    groups = split_parameters(model)
    if kind == "madam":
        matrices, rest = ([p for _, p in group["params"]] for group in groups)
        return iso.optim.Together([Madam(matrices, lr=lr, **more), torch.optim.AdamW(rest, weight_decay=0.0, **aux)])
    form = {"lmd": "split", "hypentropy": "hypentropy"}[kind]
    return LMD(groups, lr=min(lr, 1.0), form=form, aux=aux, **more)


@functools.cache
def corpus() -> Any:
    """The embedded text, as bytes."""
    return load_corpus("builtin:austen+web", "bytes", val_fraction=0.1, seq_len=SEQ)


def build(kind: str, width: int, depth: int, seed: int) -> nn.Module:
    """A freshly initialised model; standard init."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(vocab_size=256, n_positions=SEQ, n_embd=width, n_layer=depth, n_head=width // 16, use_cache=False,
                            initializer_range=0.06, bos_token_id=0, eos_token_id=0, **drop)  # fmt: skip
        return GPT2LMHeadModel(config)
    if kind == "vit":
        return ViT(ViTConfig(width=width, depth=depth, head_size=16, norm="trainable", scaling="plain"))
    model = Decoder(DecoderConfig(vocab=256, width=width, depth=depth, head_size=16, norm="trainable", scaling="plain"))
    iso.plan(model, "sp", hps={"init_std": 0.06}).apply(model, seed=seed)
    return model


def loss_of(kind: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """nats per byte, or per image."""
    if kind == "gpt2":
        return nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    return model(inputs, targets)


def recipe_of(name: str) -> Recipe | str | None:
    """The recipe of a name of `FORMATS`; heads in BF16."""
    formats = FORMATS[name]
    return Recipe(name, ((HEADS, BF16), (("*",), formats)), "") if isinstance(formats, LayerFormats) else formats


def stored(model: nn.Module, how: dict[str, Any] | None, step: int) -> None:
    """Rounds the matrices in place to the format they are kept in: no wider copy survives the step."""
    if how is None:
        return
    matrices = [p for group in split_parameters(model) if group["optimizer"] == "lmd" for _, p in group["params"]]
    for number, p in enumerate(matrices):
        seed = step * 1000 + number if how["rounding"] == "stochastic" else None
        p.data.copy_(formats.fake_cast(p.data, how["format"], rounding=how["rounding"], seed=seed))


def run(cell: Cell) -> dict[str, Any]:
    """One run of the label {model, optimizer, formats, log2_lr, seed} and the config {width, depth, batch, steps,
    optimizer: more settings of it, store: {format, rounding} that matrices are kept in}."""
    torch.set_num_threads(1)
    label, config = cell["label"], cell["config"]
    kind, seed, steps, batch = label["model"], label["seed"], config["steps"], config["batch"]
    model = build(kind, config["width"], config["depth"], seed)
    recipe = recipe_of(label["formats"])
    images = digits() if kind == "vit" else None
    if recipe is not None:
        example = images[0][:2] if images else torch.zeros(2, SEQ, dtype=torch.long)
        numerics.convert(model, recipe, example=example)
    moves = optimizer(label["optimizer"], model, 2.0 ** label["log2_lr"], **config.get("optimizer", {}))
    peaks = [group["lr"] for group in moves.param_groups]
    if images is None:
        stream = TokenStream(corpus().train, SEQ, batch, seed)
        held = [tuple(map(torch.from_numpy, pair)) for pair in eval_batches(corpus().val, SEQ, 32, 16)]
    else:
        held = [(images[2], images[3])]
    draw = torch.Generator().manual_seed(1000 + seed)
    started, recent = time.perf_counter(), []
    for step in range(steps):
        factor = lr_factor(step, steps, warmup=0.1, kind="cosine", final=0.05)
        for group, peak in zip(moves.param_groups, peaks):
            group["lr"] = peak * factor
        if images is None:
            inputs, targets = (torch.from_numpy(part) for part in stream.span(step * batch, batch))
        else:
            picked = torch.randint(0, len(images[0]), (batch,), generator=draw)
            inputs, targets = images[0][picked], images[1][picked]
        moves.zero_grad()
        with getattr(moves, "sampled_params", lambda train: nullcontext())(train=True):  # IVON's way to sample
            loss = loss_of(kind, model, inputs, targets)
            loss.backward()
        moves.step()
        stored(model, config.get("store"), step)
        recent = [*recent, float(loss.detach())][-max(1, steps // 10) :]
        if not math.isfinite(recent[-1]):
            break
    model.eval()
    with torch.no_grad(), getattr(moves, "mean", nullcontext)():
        val = sum(float(loss_of(kind, model, *pair)) for pair in held) / len(held)
        largest = max(float(p.abs().max()) for p in model.parameters() if p.dim() > 1)
    val = val if math.isfinite(val) and len(recent) and math.isfinite(recent[-1]) else math.inf
    return {
        "key": study.key(cell), **cell, "val_loss": val if math.isfinite(val) else "inf",
        "train_loss": sum(recent) / len(recent) if math.isfinite(recent[-1]) else "inf", "largest": largest,
        "parameters": sum(p.numel() for p in model.parameters()), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def cell(model: str, kind: str, formats: str, log2_lr: float, seed: int, *, steps: int = 400, width: int = 64, depth: int = 4,
         batch: int = 8, **more: Any) -> Cell:  # fmt: skip
    """A cell of `run`."""
    return {
        "label": {"model": model, "optimizer": kind, "formats": formats, "log2_lr": log2_lr, "seed": seed, **more.pop("label", {})},
        "config": {"steps": steps, "width": width, "depth": depth, "batch": batch, **more},
    }  # fmt: skip
