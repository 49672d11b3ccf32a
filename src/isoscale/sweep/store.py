"""The storage of a study: an Optuna database, SQLite in the sweep's folder or any other by its URL.

Only drivers open it, workers never do. Every call either works or ends in a `StorageError` in words; a database that is
away for a moment is waited for. SQLite writes ahead (WAL), so that a trial costs milliseconds: a killed process loses
nothing, a power cut may lose the last seconds, whose trials then run again from their checkpoints.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from isoscale._base.errors import CheckpointError, IsoscaleError, MissingDependencyError, StorageError

NAME = "isoscale"
RETRIES = 3
PATIENCE = (0.2, 1.0, 3.0, 6.0)  # seconds between the attempts at a database that is away
T = TypeVar("T")
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def url(out: Path) -> str:
    """The address of a folder's own storage."""
    return f"sqlite:///{(out / 'study.db').resolve()}"


def shown(address: str) -> str:
    """An address without its password."""
    try:
        return sqlalchemy.engine.make_url(address).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return address.split("://")[0] + "://..."


def with_driver(address: str) -> str:
    """A PostgreSQL address that names no driver, with one that is installed: SQLAlchemy's own choice has changed."""
    scheme, colon, rest = address.partition("://")
    if scheme not in ("postgresql", "postgres"):
        return address
    driver = next((name for name in ("psycopg2", "psycopg") if find_spec(name) is not None), "psycopg2")
    return f"postgresql+{driver}{colon}{rest}"


def _words(error: BaseException, address: str) -> str:
    """The first line of the innermost reason, without the password."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(getattr(error, "orig", None) or error).strip() or type(error).__name__).splitlines()[0][:300]
    try:
        password = sqlalchemy.engine.make_url(address).password
    except (SQLAlchemyError, ValueError):
        password = None
    return text.replace(str(password), "***") if password else text.replace(address, shown(address))


def _refusal(error: BaseException, address: str) -> IsoscaleError:
    place = shown(address)
    if isinstance(error, ImportError):
        return MissingDependencyError("no driver for this database is installed", key="sweep.storage", value=place,
                                      hint='pip install "isoscale[postgres]"')  # fmt: skip
    text = _words(error, address)
    if isinstance(error, RuntimeError) and "optuna" in text:
        return StorageError("another version of Optuna made this storage", key="sweep.storage", value=place, place=text,
                            hint=f"install that version, or: optuna storage upgrade --storage '{place}'")  # fmt: skip
    if isinstance(error, sqlalchemy.exc.ArgumentError | ValueError):
        return StorageError(f"this is no database URL: {text}", key="sweep.storage", value=place,
                            hint="postgresql://user@host/database, or sqlite:////folder/study.db")  # fmt: skip
    low = text.lower()
    hint = ("choose a place that you may write" if "readonly" in low or "read-only" in low or "permission" in low
            else "is the disk full?" if "disk" in low or "full" in low
            else "does it run, and do the host, the port, the user and the password fit?" if "://" in place
            and not place.startswith("sqlite") else "does the folder exist, and is there room?")  # fmt: skip
    return StorageError(f"the sweep's storage refuses: {text}", key="sweep.storage", value=place, hint=hint)


def _wal(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


class Store:
    """One study in one database.

    Args:
        address: database URL.
        name: of the study.
        create: make the study where it is missing.

    Raises:
        CheckpointError: there is no such study and `create` is off.
        StorageError: the database cannot be reached, read or written; another version of Optuna made it.
        MissingDependencyError: its driver is not installed.
    """

    def __init__(self, address: str, name: str = NAME, *, create: bool = True) -> None:
        self.address, self.name = address, name
        address = with_driver(address)
        sqlite = address.startswith("sqlite")
        options: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
        if address.startswith("postgres"):
            options["connect_args"] = {"connect_timeout": 10}

        def connect() -> tuple[RDBStorage, int]:
            rdb = RDBStorage(address, engine_kwargs=dict(options))
            if sqlite:
                sqlalchemy.event.listen(rdb.engine, "connect", _wal)
                rdb.engine.dispose()
            try:
                return rdb, int(rdb.get_study_id_from_name(name))
            except KeyError:
                if not create:
                    raise
            try:
                return rdb, int(rdb.create_new_study([StudyDirection.MINIMIZE], name))
            except optuna.exceptions.DuplicatedStudyError:  # another driver was faster
                return rdb, int(rdb.get_study_id_from_name(name))

        try:
            self.rdb, self.study = connect()
        except KeyError:
            raise CheckpointError("no sweep here", key="study", value=name, place=shown(address),
                                  hint="give the folder that isoscale sweep --out made") from None  # fmt: skip
        except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError, ValueError, OSError) as error:
            if isinstance(error, SQLAlchemyError) and "already exists" in str(error):  # two made the tables at once
                time.sleep(1.0)
                self.rdb, self.study = connect()
            else:
                raise _refusal(error, address) from None
        self.cached = get_storage(self.rdb)
        self.engine = self.rdb.engine

    def do(self, call: Callable[[], T]) -> T:
        """Run a call on the database, again while it is away for a moment.

        Raises:
            StorageError: it stays away, or refuses for good.
        """
        for pause in (*PATIENCE, None):
            try:
                return call()
            except (StorageInternalError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError) as error:
                text = _words(error, self.address).lower()
                if pause is None or "readonly" in text or "read-only" in text or "full" in text:
                    raise _refusal(error, self.address) from None
                time.sleep(pause)
            except SQLAlchemyError as error:
                raise _refusal(error, self.address) from None
        raise AssertionError("unreachable")

    def trials(self) -> list[FrozenTrial]:
        """All trials; what has finished is read once."""
        return self.do(lambda: self.cached.get_all_trials(self.study, deepcopy=False))

    def create(
        self, point: Mapping[str, float], ranges: Mapping[str, tuple[float, float]], attrs: dict[str, Any]
    ) -> int:
        """Add a waiting trial in one transaction; its number in the storage.

        Args:
            point: its parameters.
            ranges: parameter -> lowest and highest value, for the dashboard's axes.
            attrs: user attributes.
        """
        spans = {name: ranges.get(name, (value, value)) for name, value in point.items()}
        scales = {name: FloatDistribution(min(low, point[name]), max(high, point[name]), log=min(low, point[name]) > 0)
                  for name, (low, high) in spans.items()}  # fmt: skip
        trial = create_trial(state=TrialState.WAITING, params=dict(point), distributions=dict(scales), user_attrs=attrs)
        return self.do(lambda: self.rdb.create_new_trial(self.study, trial))

    def run(self, number: int) -> bool:
        """Waiting -> running; False where it is no longer waiting."""
        return self._state(number, TrialState.RUNNING)

    def release(self, number: int) -> bool:
        """Running -> waiting, so that anyone may take it."""
        return self._state(number, TrialState.WAITING)

    def end(self, number: int, state: TrialState, value: float | None, attrs: Mapping[str, Any]) -> bool:
        """Write how a trial ended; False where it had ended before."""
        try:
            for key, attr in attrs.items():
                self.attr(number, key, attr)
        except UpdateFinishedTrialError:
            return False
        return self._state(number, state, value)

    def attr(self, number: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        self.do(lambda: self.rdb.set_trial_user_attr(number, key, value))

    def report(self, number: int, tokens: int, loss: float) -> None:
        """An intermediate value."""
        try:
            self.do(lambda: self.rdb.set_trial_intermediate_value(number, tokens, loss if loss == loss else math.inf))
        except UpdateFinishedTrialError:
            return

    def _state(self, number: int, state: TrialState, value: float | None = None) -> bool:
        values = None if value is None else [value]
        try:
            return self.do(lambda: bool(self.rdb.set_trial_state_values(number, state, values)))
        except UpdateFinishedTrialError:
            return False

    def close(self) -> None:
        """Let the connections go."""
        self.rdb.remove_session()
        self.engine.dispose()
