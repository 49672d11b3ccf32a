"""A config into a model, its plan and its optimiser. The only place that knows which model a config means."""

from __future__ import annotations

import torch
from torch import nn

from isoscale import numerics
from isoscale.config import RunConfig, Scale
from isoscale.formats.recipes import Recipe, recipe_by_name
from isoscale.models import Decoder, DecoderConfig
from isoscale.planning import Plan, plan
from isoscale.rules import by_name, family


def decoder_config(config: RunConfig, vocab: int) -> DecoderConfig:
    """The decoder's shape, with the ops (unit-scaled or plain) that the parametrisation needs."""
    model = config.model
    return DecoderConfig(
        vocab=vocab, width=model.width, depth=model.depth, head_size=model.head_size, kv_heads=model.kv_heads,
        ffn_ratio=model.ffn_ratio, qk_norm=model.qk_norm, norm=model.norm, tied=model.tied, dropout=model.dropout,
        separate=model.separate,
        scaling="unit" if by_name(config.rules.parametrisation).unit else "plain",
    )  # fmt: skip


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe with the shares and the norm that the settings say.

    Raises:
        ConfigError: no such recipe.
    """
    said = config.numerics
    return recipe_by_name(said.recipe).changed(said.keep_first, said.keep_last, said.finish, said.norm)


def convert(config: RunConfig, model: nn.Module, plan: Plan) -> Recipe:
    """Casts a planned model as the config says; the recipe."""
    recipe = recipe_of(config)
    numerics.convert(model, recipe, plan=plan, backend=config.numerics.backend)
    return recipe


def resolved(config: RunConfig) -> RunConfig:
    """The config with its optimiser's own defaults for the hyperparameters, and the LRs of a sweep, that nobody set."""
    own = family(config.optim.name).defaults(by_name(config.rules.parametrisation).unit)
    told = config.hps.model_fields_set
    left: dict[str, object] = {f"hps.{name}": value for name, value in own.items() if name not in told}
    if "lr" in own and "space" not in config.sweep.model_fields_set:
        left["sweep.space"] = {"lr": tuple(own["lr"] * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0))}
    return config.with_values(**left) if left else config


def make_plan(config: RunConfig, model: nn.Module) -> Plan:
    """The plan of a config for its model (on any device, meta included)."""
    config = resolved(config)
    rules, base, tokens = config.rules, config.base, config.train.batch * config.data.seq_len
    sequences = config.train.sequences_before(config.train.steps)
    base_tokens = (base.batch or config.train.batch) * config.data.seq_len
    steps = base.steps or sequences // (base.batch or config.train.batch)
    small = Scale(width=base.width, depth=base.depth, batch_tokens=base_tokens, tokens=base_tokens * steps)
    return plan(
        model,
        rules.parametrisation,
        base=small if by_name(rules.parametrisation).needs_base and (base.width or base.depth) else None,
        target=Scale(batch_tokens=tokens, tokens=sequences * config.data.seq_len),
        hps=config.hps.model_dump(),
        optimizer=config.optim.name,
        alpha=rules.alpha, duration=rules.duration, duration_exponent=rules.duration_exponent,
        tau_exponent=rules.tau_exponent, betas=rules.betas, final_norm_eps=rules.final_norm_eps,
        axes=rules.axes, constant=rules.constant,
        recipe=recipe_of(config),
        decay=rules.decay,
        embedding_lr=rules.embedding_lr,
        clip=config.train.clip,
        seq_len=config.data.seq_len,
        modules=config.modules,
    )  # fmt: skip


def meta_plan(config: RunConfig, vocab: int = 256) -> Plan:
    """The plan without allocating a weight."""
    with torch.device("meta"):
        model = Decoder(decoder_config(config, vocab))
    return make_plan(config, model)


def build(config: RunConfig, vocab: int, device: torch.device) -> tuple[Decoder, Plan]:
    """The initialised model on `device`, and its plan."""
    with torch.device("meta"):
        model = Decoder(decoder_config(config, vocab))
    made = make_plan(config, model)
    model.to_empty(device=device)
    made.apply(model, seed=config.seed)
    return model, made
