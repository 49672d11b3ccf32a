"""A search in a folder: `sweep()`, and the `Study` behind it.

The folder: `run.json` (the config), `study.json` (what is searched, what was spent, what was found), `study.db` (every
trial, unless the storage is elsewhere; open to optuna-dashboard), `best.toml` (the winner's values, a layer for any
`--config`), `trials/` (a run folder each), `worker_*.log`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import isoscale
from isoscale._base.errors import CheckpointError, ConfigError
from isoscale._base.files import atomic_write, read_json
from isoscale._base.log import dumps
from isoscale.config import RunConfig
from isoscale.sweep.budget import Budget, run_cost, run_tokens
from isoscale.sweep.driver import Driver
from isoscale.sweep.executors import Executor, make, workers_of
from isoscale.sweep.job import LAUNCH, TRAIN, find
from isoscale.sweep.lease import Lease
from isoscale.sweep.planner import Setup
from isoscale.sweep.result import FORMAT, SweepResult, TrialRow, best_toml, load, summarise
from isoscale.sweep.space import Space, trial_config
from isoscale.sweep.status import Status
from isoscale.sweep.store import NAME, Store, shown, url
from isoscale.sweep.strategies import make as make_strategy
from isoscale.train.data import load_corpus
from isoscale.train.folder import check, claim, locked, read_config
from isoscale.train.setup import meta_plan, resolved

__all__ = ["Status", "Study", "sweep"]


def sweep(
    config: RunConfig, out: Path | str, *, resume: bool = False, objective: str | None = None,
    on_status: Callable[[Status], None] | None = None, on_line: Callable[[str], None] | None = None,
) -> SweepResult:  # fmt: skip
    """Search hyperparameters with the config's strategy; every trial is a resumable run under `out/trials`.

    Args:
        config: the proxy and its sweep section.
        out: sweep folder.
        resume: continue the sweep that is there; trials that failed get another chance.
        objective: what a trial is, "module:function" (see `sweep.job`); None: `sweep.command`, or a training run.
        on_status: called about twice a second.
        on_line: gets what `sweep.workers = "auto"` measures, a line per count.

    Raises:
        IsoscaleError: a bad config, an unpayable budget, a folder of another sweep, a storage that refuses, too many
            points that fail (with the first one's words).
    """
    return Study(config, out, objective=objective).run(resume=resume, on_status=on_status, on_line=on_line)


class Study:
    """A search that has a folder.

    Args:
        config: the proxy and its sweep section.
        out: its folder; nothing is written before `run`.
        objective: see `sweep`.
    """

    def __init__(self, config: RunConfig, out: Path | str, *, objective: str | None = None) -> None:
        self.out, config = Path(out).resolve(), resolved(config)
        self.address = config.sweep.storage  # its password stays here: no file gets it
        hidden: dict[str, object] = {"sweep.storage": shown(self.address)} if self.address else {}
        self.config = config.with_values(**hidden) if hidden else config
        self.objective = objective or (LAUNCH if config.sweep.command else TRAIN)

    @staticmethod
    def open(out: Path | str) -> Study:
        """The study of a folder.

        Raises:
            CheckpointError: there is none.
        """
        saved = _saved(Path(out))
        if not saved:
            raise CheckpointError("no sweep here", key="study.json", place=str(out),
                                  hint="give the folder that isoscale sweep --out made")  # fmt: skip
        return Study(read_config(Path(out)), out, objective=saved["search"]["objective"])

    @property
    def trials(self) -> tuple[TrialRow, ...]:
        """One row per (point, seed). Raises as `load`."""
        return load(self.out).trials

    @property
    def best(self) -> Mapping[str, float]:
        """The best point so far. Raises as `load`."""
        return load(self.out).best

    def run(
        self, *, resume: bool = True, on_status: Callable[[Status], None] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> SweepResult:  # fmt: skip
        """Search until the strategy, a budget or an interruption ends it. Arguments and errors as `sweep`."""
        out, config = self.out, self.config
        check(out, config, resume=resume, kind="sweep")
        setup = self._setup()
        saved = _saved(out)
        warnings = _same(saved, self._search(setup), out) if saved else ()
        if not saved and (out / "study.db").exists():
            raise _other_format(out, 1)
        spent = float(saved["spent"]["wall_seconds"]) if saved else 0.0
        workers, step = workers_of(config, on_line)
        setup = replace(setup, workers=workers, spent=spent, pace=step * config.train.steps / workers)
        with locked(out), self._store(setup) as (store, lease):
            claim(out, config, resume=resume, kind="sweep")
            driver = Driver(setup, store, lease, on_status)
            self._write(setup, driver, warnings, finished=False)
            try:
                driver.begin(retry=resume)
                executor = make(config, out, driver.hear, setup.workers)
                with _closing(executor, driver):
                    driver.run(executor)
            except BaseException:
                self._write(setup, driver, warnings, finished=False)
                raise
            result = self._write(setup, driver, warnings, finished=True)
        if math.isnan(result.loss):
            errors = list(driver.ledger.failed().values())
            raise ConfigError(
                "every run of the sweep diverged or failed" + (f"; the first error: {errors[0]}" if errors else ""),
                key="sweep.space", place=str(out), hint="lower learning rates; the trials' folders hold the details",
            )  # fmt: skip
        return result

    def _setup(self) -> Setup:
        """Everything that can be refused before a file is written."""
        config, vocab, flops = self.config, 256, math.nan
        if self.objective == TRAIN:
            corpus = load_corpus(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction,
                                 cache=Path(config.data.cache) if config.data.cache else None,
                                 seq_len=config.data.seq_len)  # fmt: skip
            vocab = corpus.vocab
            meta_plan(config, vocab)  # a config that no trial could run
        else:
            find(self.objective)
        words, elsewhere = config.sweep.command, config.sweep.executor == "ray"
        if self.objective == LAUNCH and not elsewhere and which(words[0]) is None:
            raise ConfigError("the command cannot be started: no such program", key="sweep.command", value=words[0],
                              hint="is it on the PATH?")  # fmt: skip
        space = Space.of(config, vocab)
        for dim in space.dims if self.objective == TRAIN else ():
            if dim.values:
                meta_plan(trial_config(config, {dim.name: dim.high}, config.seed), vocab)
        if self.objective == TRAIN or config.sweep.budget_flops is not None:
            flops = run_cost(config, vocab)[1]
        budget = Budget(config, run_tokens(config), flops)
        return Setup(self.out, config, self.objective, space, make_strategy(config, space), budget)

    def _search(self, setup: Setup) -> dict[str, Any]:
        """What makes two searches the same one."""
        section = self.config.sweep
        return {
            "strategy": section.strategy, "space": setup.space.to_dict(), "objective": self.objective,
            "command": list(section.command), "storage": section.storage or "",
        }  # fmt: skip

    @contextmanager
    def _store(self, setup: Setup) -> Iterator[tuple[Store, Lease | None]]:
        """The storage, and the standing among other drivers where there may be some."""
        address = self.address
        if address is None:
            store = Store(url(self.out))
        else:
            tree = json.loads(self.config.model_dump_json(exclude={"sweep", "name"}))
            text = json.dumps([tree, self._search(setup)], sort_keys=True)
            store = Store(address, f"{NAME}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")
        try:
            with nullcontext() if address is None else Lease(store) as lease:
                yield store, lease
        finally:
            store.close()

    def _write(self, setup: Setup, driver: Driver, warnings: tuple[str, ...], *, finished: bool) -> SweepResult:
        """Write `study.json`; the result as it stands."""
        rows, budget = driver.ledger.rows(), driver.budget
        result = summarise(self.out, self.config, rows, driver.planner.stopped, warnings)
        tokens = math.fsum(row.tokens for row in rows)
        data = {
            "format": FORMAT, "version": isoscale.__version__, "finished": finished,
            "search": self._search(setup), "seeds": list(driver.ledger.seeds),
            "budget": {key.removeprefix("sweep.budget_"): limit for key, (limit, _) in budget.limits.items()}
            | {"seconds": self.config.sweep.budget_seconds},
            "spent": {"runs": sum(row.state in ("done", "pruned", "failed") for row in rows), "tokens": tokens,
                      "flops": tokens / budget.tokens * budget.flops, "wall_seconds": driver.seconds},
            "storage": setup.config.sweep.storage is not None, **result.to_dict(),
        }  # fmt: skip
        atomic_write(self.out / "study.json", dumps(data, indent=1))
        if result.best:
            atomic_write(self.out / "best.toml", best_toml(result))
        return result


@contextmanager
def _closing(executor: Executor, driver: Driver) -> Iterator[None]:
    """Workers end with the search: politely, and at once when somebody insists."""
    try:
        try:
            yield
        finally:
            try:
                executor.close(polite=True)
            except KeyboardInterrupt:
                executor.close(polite=False)
                raise
    finally:
        driver.release()


def _saved(out: Path) -> dict[str, Any]:
    """`study.json`, empty where there is none.

    Raises:
        CheckpointError: damaged, or of another format.
    """
    path = out / "study.json"
    if not path.exists():
        return {}
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("search"), dict):
        raise CheckpointError("study.json is damaged", place=str(path), hint="restore it, or use another folder")
    if data.get("format") != FORMAT:
        raise _other_format(out, data.get("format"))
    return data


def _other_format(out: Path, found: object) -> CheckpointError:
    return CheckpointError(f"a sweep of another format is here (this version writes format {FORMAT})", key="study.json",
                           value=found, place=str(out), hint="another --out, or the version that made it")  # fmt: skip


def _same(saved: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> tuple[str, ...]:
    """Warnings about continuing a saved search.

    Raises:
        CheckpointError: it is another search; names what differs.
    """
    old, new = (_flat(tree) for tree in (saved["search"], json.loads(json.dumps(now))))
    differ = {key: f"{old.get(key, 'not searched')} -> {new.get(key, 'not searched')}" for key in {**old, **new}
              if old.get(key) != new.get(key)}  # fmt: skip
    if differ:
        words = "; ".join(f"{key}: {change}" for key, change in list(differ.items())[:4])
        raise CheckpointError(
            f"the folder holds another search ({words})", key=", ".join(list(differ)[:4]),
            place=str(out / "study.json"), hint="another --out, or the settings it was started with",
        )  # fmt: skip
    version, here = saved.get("version"), isoscale.__version__
    return () if version == here else (f"begun with isoscale {version}, continued with {here}",)


def _flat(search: Mapping[str, Any]) -> dict[str, Any]:
    space = {f"space.{name}": values for name, values in search["space"].items()}
    return {**{key: value for key, value in search.items() if key != "space"}, **space}
