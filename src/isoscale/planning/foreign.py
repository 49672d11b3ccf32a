"""A plan for any nn.Module: roles from its own forward, ratios from a base of the same class, no surgery.

Forward multipliers (the branch factor m_L^-alpha, a readout's 1/m) are moved into init, LR, eps and decay of the
weights that end the branch, by the abc symmetry, where that is exact for the optimiser; else a parametrization applies
them. A tied readout's 1/m goes into the gain of the norm before it. So the trained model stays a plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isclose, prod

from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.clip import clip_norm
from isoscale.planning.foreign_roles import foreign_infos
from isoscale.planning.growth import named, partners
from isoscale.planning.hf import base_from_scale, config_scale
from isoscale.planning.inits import Initial, config_of, initial, read, real_base
from isoscale.planning.names import normalise
from isoscale.planning.notes import range_notes
from isoscale.planning.numbers import Setting, make_row, rule_of
from isoscale.planning.plan import Plan
from isoscale.planning.roles import ParamInfo
from isoscale.planning.rows import ParamRow
from isoscale.planning.sizes import Ratios, ratios, shared_sizes, sizes_of
from isoscale.planning.temperature import temperature_sites
from isoscale.planning.trace import Trace, trace
from isoscale.rules import Monomial, Options, RoleRule, Scale, Table, family
from isoscale.rules.monomial import show_number
from isoscale.rules.shift import move

_ONE = Monomial()


@dataclass(frozen=True)
class _Subject:
    """The model and its base, looked at."""

    model: nn.Module
    base: nn.Module
    seen: Trace
    base_seen: Trace
    infos: Mapping[str, ParamInfo]
    base_infos: Mapping[str, ParamInfo]


def _base_of(model: nn.Module, base: Scale | nn.Module | None) -> nn.Module:
    if base is None:
        return model
    if isinstance(base, nn.Module):
        if type(base) is not type(model):
            raise PlanError(f"base is a {type(base).__name__}, the model a {type(model).__name__}", key="base",
                            hint="build both from one class")  # fmt: skip
        return base
    own = config_scale(model)
    for name in ("width", "depth"):
        small, big = getattr(base, name), getattr(own, name)
        if small and big and small > big:
            raise PlanError(f"the base is larger than the target: {name} {small} > {big}", key=f"base.{name}",
                            value=small, hint="base= is where the hyperparameters were tuned")  # fmt: skip
    if all(getattr(base, name) in (None, getattr(own, name)) for name in ("width", "depth")):
        return model
    return base_from_scale(model, base)


def _same_config(model: nn.Module, base: nn.Module) -> bool:
    mine, other = config_of(model), config_of(base)
    return model is base or (mine is not None and mine.to_dict() == other.to_dict())


def _look(model: nn.Module, base: nn.Module, roles: Mapping[str, str] | None, example: object) -> _Subject:
    pairs = partners(model, base)  # refuses what cannot be compared before a forward is spent
    seen = trace(model, example)
    base_seen = seen if base is model else trace(base, example)
    infos, base_infos = foreign_infos(model, base, pairs, seen, roles)
    return _Subject(model, base, seen, base_seen, infos, base_infos)


def _scales(
    s: _Subject, base: Scale | nn.Module | None, base_run: Scale | None, target: Scale | None
) -> tuple[Scale, Scale]:
    """Base and target, sizes of the run included."""
    run = base if isinstance(base, Scale) else base_run or Scale()
    out = []
    for model, infos, said in ((s.base, s.base_infos, run), (s.model, s.infos, target or Scale())):
        read = config_scale(model)
        wide = [info.fan_out for info in infos.values() if info.role in ("embedding", "input") and len(info.shape) > 1]
        last = [info.fan_in for info in infos.values() if info.role == "readout"]
        width = read.width or (last[-1] if last else max(wide, default=None))
        for name, found in (("width", width), ("depth", read.depth)):
            told = getattr(said, name)
            if told is not None and found is not None and told != found:
                side = "base" if model is s.base and model is not s.model else "target"
                raise PlanError(f"{side} says {name} {told}, the model has {found}", key=f"{side}.{name}", value=told,
                                hint="leave it out: it is read from the model")  # fmt: skip
        depth = read.depth or said.depth
        out.append(Scale(width=width, depth=depth, batch_tokens=said.batch_tokens, tokens=said.tokens))
    return out[0], out[1]


def _found_ratios(s: _Subject, small: Scale, big: Scale, options: Options) -> Ratios:
    parameters = sum(prod(i.shape) for i in s.infos.values()) / sum(prod(i.shape) for i in s.base_infos.values())
    found = ratios(small, big, parameters, options)
    if "depth" in options.axes:
        branches, base_branches = len(s.seen.branches), len(s.base_seen.branches)
        if base_branches and branches:
            found = replace(found, depth=branches / base_branches)
        elif found.depth != 1 or len({info.name for info in s.base_infos.values()}) < len(s.infos):  # more layers
            raise PlanError(
                "the depth differs and the model has no residual branches: no depth rule holds for it",
                key="base.depth", value=big.depth,
                hint="compare models of one depth, or axes=('width', 'batch', 'duration')",
            )  # fmt: skip
    return found


def _pure(site: object) -> Monomial:
    return site if isinstance(site, Monomial) else _ONE


def _multipliers(
    s: _Subject, table: Table, shared: Mapping[str, float], hps: Mapping[str, float]
) -> dict[str, Monomial]:
    """Parameter -> the forward factor that it has to take."""
    out: dict[str, Monomial] = {}
    branch = _pure(table.sites["residual_attn"].multiplier)
    if not isclose(branch.evaluate(hps, shared).number, 1.0):
        for one in s.seen.branches:
            if not one.ends:
                raise PlanError(
                    f"the residual branch added in {one.path or type(s.model).__name__} does not end in a weight or a "
                    f"gain, so its multiplier {branch.evaluate(hps, shared).number:g} has nowhere to go", key=one.path,
                    hint="end the branch with a linear layer, a norm or a layer scale; or transfer at one depth",
                )  # fmt: skip
            out.update(dict.fromkeys(one.ends, branch))
    tied = table.tied_readout if table.tied_readout is not None else _pure(table.sites["readout"].multiplier)
    for name, info in s.infos.items():
        use = s.seen.uses.get(name)  # None: never used, its role was said
        if use is not None and info.role == "embedding" and "matmul" in use.kinds and name in s.seen.feeds:
            sizes = {**shared, "fan_in_ratio": shared["width_ratio"], "fan_in": info.fan_out}
            if isclose(tied.evaluate(hps, sizes).number, 1.0):
                continue
            gains = s.seen.feeds[name]
            if not gains:
                raise PlanError(
                    f"{name} is tied to the readout with no norm in between that could take the logits' factor "
                    f"{tied.evaluate(hps, sizes).number:g}", key=name, hint="untie it, or add a final norm with a gain",
                )  # fmt: skip
            fixed = Monomial(tied.evaluate(hps, sizes).number)
            out.update({gain: out.get(gain, _ONE) * fixed for gain in gains})
    return out


def _rule(info: ParamInfo, rule: RoleRule, table: Table) -> RoleRule:
    """The role's rule with the site multipliers that act on this weight itself."""
    if info.role in ("embedding", "readout"):
        return replace(rule, forward=_pure(table.sites[info.role].multiplier))
    if info.role == "router":
        return replace(rule, forward=Monomial(sizes=rule.forward.sizes))
    return rule


def foreign_plan(
    model: nn.Module, base: Scale | nn.Module | None, base_run: Scale | None, target: Scale | None, setting: Setting,
    options: Options, *, said: Mapping[str, float], roles: Mapping[str, str] | None, clip: float | None, absorb: bool,
    example: object,
) -> Plan:  # fmt: skip
    """See `isoscale.plan`; `said` are the hyperparameters that the user gave."""
    for name in ("alpha_ffn_act", "alpha_loss", "alpha_res_attn_ratio"):
        if said.get(name, 1.0) != 1.0:
            raise PlanError(f"{name} cannot be set on a {type(model).__name__}: it has no such place",
                            key=f"hps.{name}", value=said[name], hint="isoscale.models.Decoder has one")  # fmt: skip
    named(model)
    s = _look(model, _base_of(model, base), roles, example)
    same = all(info.shape == s.base_infos[name].shape for name, info in s.infos.items())
    small, big = _scales(s, base, base_run, target)
    found = _found_ratios(s, small, big, options)
    if same and not _same_config(model, s.base) and found.depth == 1:
        raise PlanError("nothing differs between base and target: the model has no width to transfer over", key="base",
                        hint="build the base smaller; for base = target pass base=model")  # fmt: skip
    table, hps = setting.table, setting.hps
    setting = replace(setting, beta_ratio=found.of_a_run)
    shared = shared_sizes(found, big.depth or len(s.seen.branches) or 1, None, None)
    extra = _multipliers(s, table, shared, hps)
    values = real_base(s.base, model)
    tensors, config = named(values), config_of(values)
    modules = {normalise(path): module for path, module in values.named_modules()}
    parameters = named(model)
    rows, sized = [], []
    for name, info in s.infos.items():
        little = s.base_infos[name]
        sizes = sizes_of(info, little, shared, options)
        start = initial(little, tensors[little.name], modules[little.name.rpartition(".")[0]], config)
        rule, owner = rule_of(info, table, at_zero=start.constant == 0)
        rule = _rule(info, rule, table)
        now = None if parameters[name].is_meta else read(parameters[name], info.fan_in, config_of(model))
        own = replace(setting, hps={**hps, "init_std": _spread(start.std, said, hps)})
        row = _foreign_row(info, own, rule, owner, sizes, extra.get(name), start,
                           absorb and parameters[name].requires_grad, asked="init_std" in said)  # fmt: skip
        rows.append(_of_target(row, parameters[name], now))
        sized.append((info, sizes))
    sites = temperature_sites(model, s.seen, s.base_seen, hps["alpha_attn"], example,
                              ratios="width" in options.axes and table.needs_base)  # fmt: skip
    limit = clip_norm(clip, table, sized, sum(prod(i.shape) for i in s.base_infos.values()))[0] if clip else None
    frozen = sum(not parameter.requires_grad for parameter in parameters.values())
    free = "lr" in said or table.unit or "lr" in family(table.optimizer).hps
    words = [*([f"{frozen} frozen parameters keep their values and are in no group"] if frozen else []),
             *([] if free else ["no lr was given: the rows are for a base LR of 1"])]  # fmt: skip
    notes = range_notes(found, table, hps, words)
    return Plan(
        table.name, tuple(rows), sites, hps, small if table.needs_base else None, big, setting.casts.recipe.name,
        optimizer=table.optimizer, options=asdict(options), beta_ratio=found.of_a_run, clip=limit, notes=notes,
        finish=setting.casts.recipe.finish, norm=setting.casts.recipe.norm,
    )  # fmt: skip


def _of_target(row: ParamRow, parameter: nn.Parameter, now: Initial | None) -> ParamRow:
    """The row with what the target itself starts at."""
    if not parameter.requires_grad:
        reasons = {**row.reasons, "init_std": "frozen: kept as it is"}
        return replace(row, init_std=0.0, init_value=None, own_init=True, reasons=reasons)
    return replace(row, own_std=now.std if now is not None else None)


def _spread(read: float | None, said: Mapping[str, float], hps: Mapping[str, float]) -> float:
    if "init_std" in said and read:
        return said["init_std"]
    return read if read is not None else hps["init_std"]


def _foreign_row(
    info: ParamInfo, setting: Setting, rule: RoleRule, table: Table, sizes: Mapping[str, float],
    extra: Monomial | None, start: Initial, absorb: bool, asked: bool,
) -> ParamRow:  # fmt: skip
    factor = rule.forward * extra if extra is not None else rule.forward
    number = factor.evaluate(setting.hps, sizes).number
    law, hook = family(table.optimizer), 1.0
    if isclose(number, 1.0, rel_tol=1e-12):
        rule = replace(rule, forward=_ONE)
    elif absorb and law.exact:
        rule = move(replace(rule, forward=factor), factor, law.lr_power)
    else:
        rule, hook = replace(rule, forward=_ONE), number
    row = make_row(info, nn.Identity(), setting, rule, table, sizes)
    reasons = dict(row.reasons)
    if hook != 1:
        reasons["forward"] = f"{show_number(hook)}, applied by a parametrization: no exact shift for {law.name}"
    elif number != 1 and not isclose(number, 1.0, rel_tol=1e-12):
        reasons["forward"] = f"1: the multiplier {show_number(number)} = {factor.formula()} is in init, lr, eps, decay"
    if start.constant is not None:
        value = start.constant * rule.init.evaluate({**setting.hps, "init_std": 1.0}, sizes).number
        if rule.init_kind == "normal":
            value = start.constant if start.constant == 0 or not (absorb and number != 1) else start.constant * number
        reasons["init_std"] = f"constant {show_number(value)}, the model's own {show_number(start.constant)}"
        return replace(row, init_std=0.0, init_value=value, own_init=True, hook=hook, reasons=reasons)
    if start.std is None:
        reasons["init_std"] = "kept as the model has it"
        return replace(row, init_std=0.0, init_value=None, own_init=True, hook=hook, reasons=reasons)
    if rule.init_kind != "normal":  # a vector or table with random values and no width rule for them
        value = start.std * rule.init.evaluate({**setting.hps, "init_std": 1.0}, sizes).number
        reasons["init_std"] = f"{show_number(value)}, the model's own ({start.law})"
        return replace(row, init_std=value, init_value=None, own_init=True, hook=hook, reasons=reasons)
    if "init_std" in rule.init.hps and not asked:
        reasons["init_std"] += f"; init_std is the base's own, {start.law}"
    return replace(row, own_init=True, hook=hook, reasons=reasons)
