"""The main job: tune a u-muP proxy, carry its LR to a wider model, train that in fp32 and FP8, with SP as the control.

The folder: `proxy/` and `sp_proxy/` are sweeps; `target/fp32`, `target/fp8` and `target/sp_*` are runs; `result.json`
has the numbers, all of them read back from metric rows; `report.html` is the page.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isoscale._base.errors import ConfigError, ManyErrors
from isoscale._base.files import atomic_write, read_json
from isoscale._base.log import dumps, read
from isoscale.config import RunConfig
from isoscale.numerics import pick_backend
from isoscale.planning import Change, Plan
from isoscale.sweep.executors import workers_of
from isoscale.sweep.pool import PoolStatus, run_all
from isoscale.sweep.result import SweepResult
from isoscale.sweep.study import Status, sweep
from isoscale.sweep.transfer import transfer
from isoscale.train.folder import check, read_config
from isoscale.train.loop import pick_device
from isoscale.train.setup import meta_plan

SP_LRS = tuple(2.0**e for e in (-10, -9, -8, -7, -6))
SP_STEPS_DOWN = (0, 1)  # octaves below the carried LR that the wide SP model is also run at


@dataclass(frozen=True)
class Display:
    """Where progress goes; each may be None."""

    stage: Callable[[str], None] | None = None
    on_sweep: Callable[[Status], None] | None = None
    on_runs: Callable[[PoolStatus], None] | None = None


def configs(base: RunConfig) -> tuple[RunConfig, RunConfig]:
    """The u-muP proxy and the SP control, alike but for the parametrisation and the learning rates tried.

    Raises:
        ConfigError, ManyErrors: settings that the quickstart chooses itself.
    """
    given = {"rules.parametrisation": (base.rules.parametrisation, "u-mup"),
             "sweep.strategy": (base.sweep.strategy, "lr"), "numerics.recipe": (base.numerics.recipe, "none")}
    wrong = [ConfigError("the quickstart chooses this itself", key=key, value=value,
                         hint="leave it out, or use isoscale sweep, transfer and train")
             for key, (value, fixed) in given.items() if value != fixed]  # fmt: skip
    if wrong:
        raise wrong[0] if len(wrong) == 1 else ManyErrors(wrong)
    control = base.with_values(**{"name": "sp_proxy", "rules.parametrisation": "sp", "sweep.space": {"lr": SP_LRS}})
    return base.with_values(name="proxy"), control


def quickstart(
    base: RunConfig, out: Path | str, *, target_width: int, resume: bool = False, display: Display | None = None
) -> dict[str, Any]:
    """Run the whole job.

    Args:
        base: data, proxy shape, steps, seed, workers, the proxy's learning rates.
        out: folder.
        target_width: four times the proxy's or more; a warning says so if not.
        resume: continue an interrupted job.
        display: progress.

    Returns:
        What `result.json` holds.

    Raises:
        IsoscaleError: whatever a part refuses.
    """
    out, display, started = Path(out).resolve(), display or Display(), time.perf_counter()
    stage = display.stage or (lambda text: None)
    proxy, control = configs(base)
    target = proxy.with_values(**{"model.width": target_width})  # a width that does not fit is refused now
    if target == proxy:
        raise ConfigError("the target is the proxy itself", key="--target-width", value=target_width,
                          hint=str(4 * proxy.model.width))  # fmt: skip
    meta_plan(target)
    for folder, config in (("proxy", proxy), ("sp_proxy", control)):
        check(out / folder, config, resume=resume, kind="sweep")
    already = out / "result.json"
    spent = _spent(already) if resume and already.exists() else None
    stage(f"u-muP proxy, width {proxy.model.width}: {len(proxy.sweep.space['lr'])} learning rates")
    tuned = sweep(proxy, out / "proxy", resume=resume, on_status=display.on_sweep)
    stage(f"SP control, width {control.model.width}: {len(SP_LRS)} learning rates")
    sp = sweep(control, out / "sp_proxy", resume=resume, on_status=display.on_sweep)

    carried = transfer(tuned, **{"model.width": target_width})
    fp32 = carried.target.with_values(name="target fp32")
    fp8 = carried.target.with_values(**{"name": "target fp8", "numerics.recipe": "fp8", "numerics.log_casts": True})
    wide = transfer(sp, **{"model.width": target_width}).target
    jobs = {"fp8": fp8, "fp32": fp32}
    jobs |= {
        f"sp_{octaves}": wide.with_values(**{"name": f"sp target, LR / {2**octaves}",
                                             "hps.lr": wide.hps.lr / 2**octaves})
        for octaves in SP_STEPS_DOWN
    }  # fmt: skip
    stage(f"targets, width {target_width}: u-muP in fp8 and fp32, SP at {len(SP_STEPS_DOWN)} learning rates")
    run_all(jobs, out / "target", workers=workers_of(base)[0], on_status=display.on_runs)
    moved = {"hps": dict(carried.hps), "warnings": list(carried.warnings),
             "changes": [asdict(change) for change in _moved(carried.proxy, fp8)]}  # fmt: skip
    atomic_write(out / "transfer.json", dumps(moved, indent=1))
    result = summary(out, tuned, sp, fp32, fp8)
    result["warnings"] = list(carried.warnings)
    if sp.edge:
        result["warnings"].append(f"the control's best LR {sp.best['lr']:g} is at an end of the values tried")
    result["seconds"] = spent if spent is not None else round(time.perf_counter() - started, 1)
    atomic_write(already, dumps(result, indent=1))
    return result


def _spent(path: Path) -> float | None:
    """What a finished job took; resuming it trains nothing and takes nothing."""
    data = read_json(path)
    seconds = data.get("seconds") if isinstance(data, dict) else None
    return float(seconds) if isinstance(seconds, int | float) else None


def _moved(proxy: RunConfig, target: RunConfig) -> tuple[Change, ...]:
    return meta_plan(proxy).diff(meta_plan(target))


def last_loss(run: Path) -> float:
    """The validation loss after a run's last step, from its metric rows; inf when it diverged before."""
    steps = read_config(run).train.steps
    rows = [row for row in read(run / "metrics.jsonl") if row["kind"] == "eval" and row["step"] == steps]
    loss = float(rows[-1]["val_loss"]) if rows else math.inf
    return loss if loss == loss else math.inf


def _line(result: SweepResult) -> dict[str, float]:
    """LR -> mean loss over the seeds, from the metric rows of a sweep's trials."""
    losses: dict[str, list[float]] = {}
    for trial in sorted(result.trials, key=lambda t: t.point["lr"]):
        if trial.state == "done":
            losses.setdefault(str(trial.point["lr"]), []).append(last_loss(result.out / "trials" / trial.id))
    return {lr: sum(found) / len(found) for lr, found in losses.items()}


def summary(
    out: Path, tuned: SweepResult, sp: SweepResult, fp32: RunConfig, fp8: RunConfig
) -> dict[str, Any]:
    """Everything the page and the terminal print, from the rows on disk."""
    plan = Plan.from_json((out / "target" / "fp8" / "plan.json").read_text(encoding="utf-8"))
    parameters = sum(math.prod(row.shape) for row in plan.rows)
    backend = pick_backend(fp8.numerics.backend, pick_device(fp8.train.device))
    ours, theirs = _line(tuned), _line(sp)
    lr, sp_lr = str(tuned.best["lr"]), str(sp.best["lr"])
    wide_sp = {str(float(sp_lr) / 2**octaves): last_loss(out / "target" / f"sp_{octaves}") for octaves in SP_STEPS_DOWN}
    sp_best = min(wide_sp, key=lambda k: wide_sp[k])
    loss32, loss8 = last_loss(out / "target" / "fp32"), last_loss(out / "target" / "fp8")
    return {
        "lr": float(lr),
        "proxy": {"width": tuned.config.model.width, "loss": ours[lr], "losses": ours},
        "target": {"width": fp32.model.width, "loss_fp32": loss32, "loss_fp8": loss8, "fp8_gap": loss8 - loss32,
                   "parameters": parameters, "backend": backend, "recipe": fp8.numerics.recipe},
        "sp": {"lr": float(sp_lr), "proxy_loss": theirs[sp_lr], "losses": theirs, "target_losses": wide_sp,
               "target_loss": wide_sp[sp_lr], "target_best_lr": float(sp_best), "target_best_loss": wide_sp[sp_best]},
        "seconds": 0.0,
        "report": str(out / "report.html"),
    }  # fmt: skip
