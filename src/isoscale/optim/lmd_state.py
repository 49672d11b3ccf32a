"""What LMD keeps of a parameter: how it is made of weights, which piece of the whole it is, the numbers of a step.

Everything works on the local piece of a tensor, with the piece's place in the whole: noise depends on an element's
index in the whole tensor, so that shards, replicas and other world sizes draw the same bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale._base.sharded import is_sharded
from isoscale.kernels.lmd import GRIDS, HIGH, LOW, Draw, Numbers, Spec, grid_log
from isoscale.kernels.normals import Place, base_keys, indices, step_keys, uniform, words

FORMS = ("split", "hypentropy")
REGULARISERS = ("log-normal", "constant", "half-normal", "exponential")
STATES = {"fp32": ("fp32", "fp32"), "bf16": ("log16", "bf16"), "int8-log": ("log8", "log8")}
"""State -> storage of the log-medians, storage of the momenta."""
MOMENTA = {"fp32": torch.float32, "bf16": torch.bfloat16, "log8": torch.int8}
CHOICES = {
    "form": FORMS, "regulariser": REGULARISERS, "state": tuple(STATES), "split": ("max", "product"),
    "direction": ("sign", "raw"), "gradient": ("auto", "sample", "median"), "momentum": ("state", *MOMENTA),
}  # fmt: skip
_NOISE, _ROUNDING, _FRESH = 0, 2, 4  # streams; of each vector one
_SILENT = ((0, 0), (0, 0))  # keys of what nothing rounds by
_HEADROOM = 3.0  # octaves between the largest first gradient and the largest 8-bit momentum


@cache
def _spec(form: str, regulariser: str, state: str, momentum: str, direction: str, gradient: str, single: bool) -> Spec:
    medians, kept = STATES[state]
    at_median = gradient == "median" or (gradient == "auto" and form == "hypentropy")
    return Spec(form, regulariser, medians, kept if momentum == "state" else momentum, direction == "raw", single,
                at_median)  # fmt: skip


def betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Both betas; one that stands alone is both."""
    betas = group["betas"]
    return (betas, betas) if isinstance(betas, (int, float)) else (betas[0], betas[-1])


def spec_of(group: Mapping[str, Any]) -> Spec:
    """The kernel's spec of a group."""
    betas = group["betas"]
    return _spec(group["form"], group["regulariser"], group["state"], group["momentum"], group["direction"],
                 group["gradient"], isinstance(betas, (int, float)) or len(betas) == 1)  # fmt: skip


def vectors_of(group: Mapping[str, Any]) -> int:
    """Medians per weight."""
    return 2 if group["form"] == "split" else 1


def check_group(group: Mapping[str, Any]) -> None:
    """Refuses settings that cannot be meant.

    Raises:
        ConfigError: says which, and the nearest valid choice.
    """
    for key, known in CHOICES.items():
        if group[key] not in known:
            raise ConfigError(f"unknown {key}", key=key, value=group[key], hint=did_you_mean(str(group[key]), known))
    if group["form"] == "hypentropy" and group["regulariser"] == "constant":
        hint = "regulariser='log-normal', or form='split'"
        raise ConfigError("a constant shrink moves both medians alike, and one vector holds their difference only",
                          key="regulariser", value="constant", hint=hint)  # fmt: skip
    sigma = group["sigma"]
    if not isinstance(sigma, int | float) or not 0 < sigma <= 1:
        hint = "0.03 to 0.1; 1e-6 leaves the noise out"
        raise ConfigError("sigma, the noise in log units, lies in (0, 1]", key="sigma", value=sigma, hint=hint)
    betas = (group["betas"],) if isinstance(group["betas"], int | float) else tuple(group["betas"])
    if not 1 <= len(betas) <= 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError("betas are one or two numbers in [0, 1)", key="betas", value=betas, hint="(0.9, 0.99)")
    for key, least in (("decay", 0.0), ("offset", 1e-6)):
        if not isinstance(group[key], int | float) or not least <= group[key] < math.inf:
            hint = "0.1" if key == "decay" else "0.1 of the weights' rms; 0.02 to 0.5"
            raise ConfigError(f"{key} is a number from {least:g} on", key=key, value=group[key], hint=hint)
    check_lr(group["lr"])


def check_weights(name: str, p: Tensor) -> None:
    """Refuse weights that have no medians.

    Raises:
        ConfigError: complex, not finite, or all zeros.
    """
    if p.is_complex():
        raise ConfigError(f"{name} is complex", key=name, value=str(p.dtype), hint="a group with optimizer='adamw'")
    if p.is_meta or not p.numel():
        return
    if not bool(torch.isfinite(local(p)).all()):
        raise ConfigError(f"{name} is not finite", key=name, hint="initialise or load the weights first")
    if p.requires_grad and not local(p).any() and not p.detach().abs().any():
        raise ConfigError(
            f"{name} is all zeros: its medians have no scale", key=name, value=0.0,
            hint="start it from a normal init, or train it with AdamW: a group with optimizer='adamw'",
        )  # fmt: skip


def check_lr(lr: object) -> None:
    """Refuses a rate that moves a weight by more than a factor e a step.

    Raises:
        ConfigError: it is no number in [0, 1].
    """
    value = float(lr) if isinstance(lr, int | float | Tensor) else math.nan
    if not 0 <= value <= 1:
        raise ConfigError("lr is in log units per step: at most 1, a factor e", key="lr", value=value,
                          hint="0.01 to 0.05 for short runs, less for long ones")  # fmt: skip


def local(x: Tensor) -> Tensor:
    """This process's piece, detached; a plain tensor is its own."""
    if x.requires_grad:
        x = x.detach()
    return x.to_local() if is_sharded(x) else x


def place_of(x: Tensor) -> Place:
    """Where the local piece of a tensor lies in the whole.

    Raises:
        ConfigError: a sharding whose pieces are no regular part of the whole.
    """
    if not is_sharded(x):
        n = max(1, x.numel())
        return Place(0, n, n)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    cut = [dim for dim in range(1, x.dim()) if shape[dim] != x.shape[dim]]
    strided = any(type(p).__name__ == "_StridedShard" for p in x.placements)
    if len(cut) > 1 or strided or any(p.is_partial() for p in x.placements):
        raise ConfigError("LMD takes tensors sharded over their rows and at most one other dimension", key="placements",
                          value=x.placements, hint="Shard(0), or Shard(0) with Shard(1)")  # fmt: skip
    start = 0
    for extent, first in zip(x.shape, offset):
        start = start * extent + first
    dim = cut[0] if cut else 0
    return Place(start, max(1, math.prod(shape[dim:])), max(1, math.prod(x.shape[dim:])))


def _whole(x: Tensor) -> float:
    return float(x.full_tensor() if is_sharded(x) else x)


def _amax(x: Tensor) -> float:
    return _whole(x.detach().abs().amax())


def rms_of(p: Tensor) -> float:
    """Root mean square of the whole tensor."""
    norm = torch.linalg.vector_norm(p.detach().float())
    return _whole(norm) / math.sqrt(max(1, p.numel()))


def new_state(p: Tensor, group: Mapping[str, Any], name: str, number: int) -> dict[str, Tensor] | None:
    """The state of a parameter, from its weights and its first gradient; None while that is zero and a range is wanted.

    Raises:
        ConfigError: the weights are all zero, or not finite.
    """
    spec, sigma = spec_of(group), group["sigma"]
    rms = rms_of(p)
    if not 0 < rms < math.inf:
        raise ConfigError(
            f"{name} is {'all zeros' if rms == 0 else 'not finite'}: its medians have no scale", key=name, value=rms,
            hint="start it from a normal init, or train it with AdamW: a group with optimizer='adamw'",
        )  # fmt: skip
    scale = group["offset"] * rms
    state = {"draws": torch.tensor(0), "noise": torch.tensor(0.0), "centre": torch.tensor(math.log(scale))}
    if spec.momentum == "log8":
        largest = 0.0 if p.grad is None else _amax(p.grad) * _amax(p)
        if not largest > 0:
            return None
        state["range"] = torch.tensor(math.ceil(math.log2(largest)) + _HEADROOM)
    x = local(p).float() * (math.exp(-sigma * sigma / 2) / scale)
    if spec.form == "hypentropy":
        logs = [torch.asinh(x / 2)]
    elif group["split"] == "max":
        logs = [torch.log1p(x.clamp(min=0)), torch.log1p((-x).clamp(min=0))]
    else:
        logs = [torch.asinh(x / 2), torch.asinh(x / -2)]
    dtype = torch.float32 if spec.medians == "fp32" else GRIDS[spec.medians][0]
    keys = base_keys(group["seed"], number, _ROUNDING)
    index = indices(x.shape, place_of(p), x.device)
    for at, (key, a) in enumerate(zip(names(spec), logs)):
        a = a.clamp(LOW if spec.form == "split" else -HIGH, HIGH)
        u = uniform(words(step_keys(keys, 0), index), at)
        state[key] = torch.empty_like(p.detach(), dtype=dtype)
        local(state[key]).copy_(grid_log(a, dtype, u))
        state[momentum_of(key)] = torch.zeros_like(p.detach(), dtype=MOMENTA[spec.momentum])
    return state


def names(spec: Spec) -> tuple[str, ...]:
    """Keys of the log-medians in the state."""
    return ("log_pos", "log_neg") if spec.form == "split" else ("theta",)


def momentum_of(key: str) -> str:
    """Key of a vector's momentum in the state."""
    return "momentum" + key.removeprefix("log").removeprefix("theta")


_base_keys = lru_cache(maxsize=16384)(base_keys)


def _all_keys(seed: int, number: int, stream: int, draws: Any, count: int) -> tuple[Any, ...]:
    return tuple(step_keys(_base_keys(seed, number, stream + at), draws) for at in range(count))


_known_keys = lru_cache(maxsize=4096)(_all_keys)  # a draw is asked for by the step that makes it, and by the next one


def _keys(group: Mapping[str, Any], number: int, stream: int, draws: Any) -> tuple[Any, ...]:
    """Keys of the normals, or of the rounding, of each vector."""
    make = _known_keys if isinstance(draws, int) else _all_keys
    return make(group["seed"], number, stream, draws, vectors_of(group))


def mean_draw(group: Mapping[str, Any]) -> Draw:
    """The mean weights: no noise, and the factor e^(sigma^2 / 2) of a log-normal's mean over its median."""
    return Draw(0.0, group["sigma"] ** 2 / 2, ((0, 0),) * vectors_of(group))


def fresh_draw(group: Mapping[str, Any], number: int, draws: int, which: int) -> Draw:
    """A sample that training does not see."""
    return Draw(group["sigma"], 0.0, _keys(group, number, _FRESH + 2 * which, draws))


def current_draw(group: Mapping[str, Any], number: int, draws: Any, noise: Any) -> Draw:
    """The sample that the parameter holds between steps; the first one is the mean."""
    lift, keys = group["sigma"] ** 2 / 2, _keys(group, number, _NOISE, draws)
    if isinstance(noise, Tensor):
        return Draw(noise, torch.where(noise == 0, lift, 0.0), keys)
    return Draw(noise, 0.0 if noise else lift, keys)


def numbers_of(
    group: Mapping[str, Any], state: Mapping[str, Tensor], number: int, place: Place, rounds: bool, *,
    captured: bool = False, ok: Tensor | None = None,
) -> Numbers:  # fmt: skip
    """The numbers of a step that draws one sample more, or none where `ok` is false.

    `rounds`: whether anything is rounded by chance. `captured`: 0-d tensors in place of Python numbers.
    """
    take = (lambda x: x) if captured else Tensor.item
    draws, noise, centre = (take(state[key]) for key in ("draws", "noise", "centre"))
    range_ = take(state["range"]) if "range" in state else 0.0
    beta1, beta2 = betas_of(group)
    now, coming = current_draw(group, number, draws, noise), draws + (1 if ok is None else ok.to(torch.int64))
    sigma: Any = group["sigma"]
    lift: Any = 0.0
    if ok is not None:
        sigma, lift = torch.where(ok, sigma, now.sigma), torch.where(ok, 0.0, now.lift)
    elif not captured:
        sigma = ctypes.c_float(sigma).value  # as it is stored: `redraw` then makes the same bits
    return Numbers(
        group["lr"] if captured else float(group["lr"]), group["decay"], beta1, beta2, group["sigma"], centre, range_,
        now=now, next=Draw(sigma, lift, _keys(group, number, _NOISE, coming)),
        rounding=_keys(group, number, _ROUNDING, coming) if rounds else _SILENT, place=place,
    )  # fmt: skip
