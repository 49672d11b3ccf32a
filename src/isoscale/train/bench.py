"""What several runs of one process share: tokenised texts, and the model of each shape with its compiled step.

A run of minutes spends seconds before its first step: the text is hashed, the model built and, where it is compiled,
compiled. Runs that differ in hyperparameters and seed only can share all of that, since a plan draws every weight and
sets every multiplier anew: a shared model starts at the same bits as a fresh one. The caller owns the bench and hands
it to `train`; nothing is global. Runs of one bench take turns: it is not for threads.

A compiled step is shared by all runs of a shape: another LR, beta, eps, decay, init or seed compiles nothing. A
multiplier is a constant of the graph until a run has another one; then a second form is compiled in which it is an
argument, as slow as a tensor's pass or two more, and that form serves every value. The fused step (`train.fused`) has
nothing to compile.

Not shared: models whose layers were swapped (casts) or parametrised (hooks), which are built anew each time. What is
lost: a text that changes on disk is not read again, and a held model keeps its memory until the bench is dropped or
`shapes` newer ones have taken its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoscale.config import RunConfig
from isoscale.formats.recipes import Recipe
from isoscale.models import Decoder
from isoscale.planning import Plan
from isoscale.train.data import Corpus, load_corpus
from isoscale.train.setup import convert, decoder_config, make_plan

# Older releases of torch have no such argument.
_ISOLATED: Any = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
Step = Callable[..., Tensor]
"""The model, or its compiled form: `(ids, targets, tokens=...)` to the loss."""


@dataclass
class Ready:
    """A model at the start of a run.

    Args:
        model: initialised, converted, on its device.
        plan: the run's.
        recipe: the casts.
        step: what to call; compiled where the config says so.
    """

    model: Decoder
    plan: Plan
    recipe: Recipe
    step: Step


@dataclass
class _Held:
    """A model between two runs: the classes it was born with, and its compiled forms."""

    model: Decoder
    kinds: list[type]
    compiled: dict[Any, Step] = field(default_factory=dict)


def _kinds(model: Decoder) -> list[type]:
    return [type(module) for module in model.modules()]


class Bench:
    """Shared corpora and models; see the module.

    Args:
        shapes: how many models are held at most; the one used longest ago leaves first.
    """

    def __init__(self, shapes: int = 4) -> None:
        self.shapes = shapes
        self._corpora: dict[Any, Corpus] = {}
        self._held: dict[Any, _Held] = {}

    def corpus(self, config: RunConfig) -> Corpus:
        """The tokens of a config's data section. Raises as `load_corpus`."""
        data = config.data
        if data not in self._corpora:
            self._corpora[data] = load_corpus(
                data.source, data.tokenizer, val_fraction=data.val_fraction, seq_len=data.seq_len,
                cache=Path(data.cache) if data.cache else None,
            )  # fmt: skip
        return self._corpora[data]

    def ready(self, config: RunConfig, vocab: int, device: torch.device) -> Ready:
        """The model of a config, initialised with its seed; the bits do not depend on what the bench did before."""
        with torch.device("meta"):
            blank = Decoder(decoder_config(config, vocab))
        plan = make_plan(config, blank)
        key = (blank.config, str(device), config.numerics)
        held = self._held.pop(key, None) or _Held(blank.to_empty(device=device), _kinds(blank))
        held.model.zero_grad(set_to_none=True)
        held.model.train()
        held.model.fused = config.train.fused
        plan.apply(held.model, seed=config.seed)
        recipe = convert(config, held.model, plan)
        whole = all(site.multiplier is not None for site in plan.sites if site.attr is not None)
        if whole and _kinds(held.model) == held.kinds:  # the next plan overwrites all that this one set
            self._held[key] = held
            while len(self._held) > self.shapes:
                del self._held[next(iter(self._held))]
        return Ready(held.model, plan, recipe, self._step(config, held))

    def _step(self, config: RunConfig, held: _Held) -> Step:
        if not config.train.compile:
            return held.model
        key = (config.train.precision, config.train.batch, config.data.seq_len)
        if key not in held.compiled:
            # Isolated: else the ninth form of one model would be over torch's limit, and run eagerly without a word.
            compiled = torch.compile(held.model, **_ISOLATED)

            def step(ids: Tensor, targets: Tensor, **rest: Any) -> Tensor:
                for tensor in (ids, targets):  # numbers may become arguments, sizes must not: their kernels are slower
                    torch._dynamo.mark_static(tensor)
                loss: Tensor = compiled(ids, targets, **rest)
                return loss

            held.compiled[key] = step
        return held.compiled[key]
