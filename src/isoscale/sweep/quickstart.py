"""The main job: tune a u-muP proxy, carry its LR to a wider model, train that in fp32 and FP8, with SP as the control.

The folder: `proxy/` and `sp_proxy/` are sweeps; `target/fp32`, `target/fp8` and `target/sp_*` are runs; `result.json`
has the numbers, all of them read back from metric rows; `report.html` is the page.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isoscale._base.files import atomic_write
from isoscale._base.log import read
from isoscale.config import RunConfig
from isoscale.planning import Change
from isoscale.sweep.pool import PoolStatus, run_all
from isoscale.sweep.result import SweepResult
from isoscale.sweep.study import Status, sweep
from isoscale.sweep.transfer import transfer
from isoscale.train.setup import meta_plan

PROXY_LRS = tuple(2.0**e for e in (-2, -1, 0, 1, 2, 3, 4))
SP_LRS = tuple(2.0**e for e in (-10, -9, -8, -7, -6))
SP_STEPS_DOWN = (0, 1)  # octaves below the carried LR that the wide SP model is also run at


@dataclass(frozen=True)
class Display:
    """Where progress goes; each may be None."""

    stage: Callable[[str], None] | None = None
    on_sweep: Callable[[Status], None] | None = None
    on_runs: Callable[[PoolStatus], None] | None = None


def configs(base: RunConfig) -> tuple[RunConfig, RunConfig]:
    """The u-muP proxy and the SP control, alike but for the parametrisation."""
    proxy = base.with_values(**{"name": "proxy", "rules.parametrisation": "u-mup", "sweep.strategy": "lr-line",
                                "sweep.space": {"lr": PROXY_LRS}})  # fmt: skip
    control = base.with_values(**{"name": "sp_proxy", "rules.parametrisation": "sp", "sweep.strategy": "lr-line",
                                  "sweep.space": {"lr": SP_LRS}})  # fmt: skip
    return proxy, control


def quickstart(
    base: RunConfig, out: Path | str, *, target_width: int, resume: bool = False, display: Display | None = None
) -> dict[str, Any]:
    """Run the whole job.

    Args:
        base: data, proxy shape, steps, seed, workers.
        out: folder.
        target_width: at least four times the proxy's.
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
    again = {folder: resume and (out / folder / "run.json").exists() for folder in ("proxy", "sp_proxy")}
    stage(f"u-muP proxy, width {proxy.model.width}: {len(PROXY_LRS)} learning rates")
    tuned = sweep(proxy, out / "proxy", resume=again["proxy"], on_status=display.on_sweep)
    stage(f"SP control, width {control.model.width}: {len(SP_LRS)} learning rates")
    sp = sweep(control, out / "sp_proxy", resume=again["sp_proxy"], on_status=display.on_sweep)

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
    run_all(jobs, out / "target", workers=base.sweep.workers, on_status=display.on_runs)
    moved = {"hps": dict(carried.hps), "warnings": list(carried.warnings),
             "changes": [asdict(change) for change in _moved(carried.proxy, fp8)]}  # fmt: skip
    atomic_write(out / "transfer.json", json.dumps(moved, indent=1))
    result = summary(out, tuned, sp, fp32, fp8, time.perf_counter() - started)
    atomic_write(out / "result.json", json.dumps(result, indent=1))
    return result


def _moved(proxy: RunConfig, target: RunConfig) -> tuple[Change, ...]:
    return meta_plan(proxy).diff(meta_plan(target))


def last_loss(run: Path) -> float:
    """The last validation loss in a run's metric rows; inf when the run has none (it diverged)."""
    rows = [row for row in read(run / "metrics.jsonl") if row["kind"] == "eval"]
    return float(rows[-1]["val_loss"]) if rows else float("inf")


def _line(result: SweepResult) -> dict[str, float]:
    """LR -> loss of a sweep, from the metric rows of its trials."""
    return {str(t.point["lr"]): last_loss(result.out / "trials" / t.id) for t in result.trials}


def summary(
    out: Path, tuned: SweepResult, sp: SweepResult, fp32: RunConfig, fp8: RunConfig, seconds: float
) -> dict[str, Any]:
    """Everything the page and the terminal print, from the rows on disk."""
    run = json.loads((out / "target" / "fp8" / "result.json").read_text(encoding="utf-8"))
    ours, theirs = _line(tuned), _line(sp)
    lr, sp_lr = min(ours, key=lambda k: ours[k]), min(theirs, key=lambda k: theirs[k])
    wide_sp = {str(float(sp_lr) / 2**octaves): last_loss(out / "target" / f"sp_{octaves}") for octaves in SP_STEPS_DOWN}
    sp_best = min(wide_sp, key=lambda k: wide_sp[k])
    loss32, loss8 = last_loss(out / "target" / "fp32"), last_loss(out / "target" / "fp8")
    return {
        "lr": float(lr),
        "proxy": {"width": tuned.config.model.width, "loss": ours[lr], "losses": ours},
        "target": {"width": fp32.model.width, "loss_fp32": loss32, "loss_fp8": loss8, "fp8_gap": loss8 - loss32,
                   "parameters": run["parameters"], "backend": run["backend"], "recipe": fp8.numerics.recipe},
        "sp": {"lr": float(sp_lr), "proxy_loss": theirs[sp_lr], "losses": theirs, "target_losses": wide_sp,
               "target_loss": wide_sp[sp_lr], "target_best_lr": float(sp_best), "target_best_loss": wide_sp[sp_best]},
        "seconds": round(seconds, 1),
        "report": str(out / "report.html"),
    }  # fmt: skip
