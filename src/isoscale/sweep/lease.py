"""Several drivers on one study: who leads, who runs which trial, and who is dead.

One small table beside Optuna's, `isoscale_lease(study, name, holder, beat)`. Each driver has a row whose `beat` it
raises every few seconds. Others take it for dead when the row is gone, or when they have seen the same beat for `GRACE`
seconds on their own clock, so that no two clocks are compared. `leader` and the trials in work are rows too: made by an
INSERT that only one can make, taken over by an UPDATE that names the dead holder. Why not Optuna's heartbeat: it is one
row and one thread a trial, compares the database's clock, and makes a second trial of one that is retried.

What is lost: a driver that stalls for longer than `GRACE` loses its trials to others, and one trial may train twice at
a time; the first to finish counts.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from types import TracebackType
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from isoscale._base.errors import StorageError
from isoscale.sweep.store import Store

BEAT, GRACE = 3.0, 12.0  # seconds

_TABLE = sql.Table(
    "isoscale_lease", sql.MetaData(),
    sql.Column("study", sql.Integer, primary_key=True), sql.Column("name", sql.String(64), primary_key=True),
    sql.Column("holder", sql.String(128), nullable=False), sql.Column("beat", sql.Integer, nullable=False),
)  # fmt: skip


class Lease:
    """A driver's standing among the drivers of a study.

    Args:
        store: the study.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.me = f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(3)}"
        self.seen: dict[str, tuple[int, float]] = {}  # driver -> its beat, and since when by our clock
        self.beat = 0
        self._end = threading.Event()
        try:
            store.do(lambda: _TABLE.create(store.engine, checkfirst=True))
        except StorageError as error:
            if "exist" not in error.message and "pg_type" not in error.message:  # another driver was faster
                raise
        self._put(self._driver(self.me), self.me)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=BEAT)
        where = (_TABLE.c.study == self.store.study) & (_TABLE.c.holder == self.me)
        try:
            with self.store.engine.begin() as connection:
                connection.execute(_TABLE.delete().where(where))
        except SQLAlchemyError:
            return  # others will see that the beat has stopped

    @staticmethod
    def _driver(holder: str) -> str:
        return "driver:" + holder[-50:]

    def _row(self, name: str) -> Any:
        return (_TABLE.c.study == self.store.study) & (_TABLE.c.name == name)

    def _put(self, name: str, holder: str) -> bool:
        def insert() -> bool:
            try:
                with self.store.engine.begin() as connection:
                    connection.execute(_TABLE.insert().values(study=self.store.study, name=name, holder=holder, beat=0))
            except IntegrityError:
                return False
            return True

        return self.store.do(insert)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            self.beat += 1
            statement = _TABLE.update().where(self._row(self._driver(self.me))).values(beat=self.beat)
            try:
                with self.store.engine.begin() as connection:
                    known = connection.execute(statement).rowcount
                if not known:
                    self._put(self._driver(self.me), self.me)
            except (SQLAlchemyError, StorageError):
                continue  # the driver's own calls will say so

    def look(self) -> None:
        """Read the beats of all drivers; call it every few seconds."""

        def read() -> list[Any]:
            with self.store.engine.connect() as connection:
                where = (_TABLE.c.study == self.store.study) & _TABLE.c.name.startswith("driver:")
                return list(connection.execute(sql.select(_TABLE.c.holder, _TABLE.c.beat).where(where)))

        now, rows = time.monotonic(), dict(map(tuple, self.store.do(read)))
        for holder in self.seen.keys() - rows.keys():
            del self.seen[holder]
        for holder, beat in rows.items():
            if holder not in self.seen or self.seen[holder][0] != beat:
                self.seen[holder] = (beat, now)

    def alive(self, holder: str) -> bool:
        """Whether a driver was heard of lately."""
        return holder == self.me or (holder in self.seen and time.monotonic() - self.seen[holder][1] < GRACE)

    @property
    def drivers(self) -> int:
        """How many drivers are alive, this one with them."""
        return sum(self.alive(holder) for holder in {self.me, *self.seen})

    def take(self, name: str) -> bool:
        """Hold a name (`leader`, a trial's identity), from nobody or from the dead; True when it is held."""
        if self._put(name, self.me):
            return True

        def holder_of() -> str | None:
            with self.store.engine.connect() as connection:
                return connection.execute(sql.select(_TABLE.c.holder).where(self._row(name))).scalar()

        holder = self.store.do(holder_of)
        if holder == self.me:
            return True
        if holder is not None and holder not in self.seen:
            self.look()  # it may have come since the last look
        if holder is None or self.alive(holder):
            return False

        def seize() -> bool:
            with self.store.engine.begin() as connection:
                where = self._row(name) & (_TABLE.c.holder == holder)
                return connection.execute(_TABLE.update().where(where).values(holder=self.me)).rowcount == 1

        return self.store.do(seize)

    def drop(self, name: str) -> None:
        """Let a name go that is held."""

        def delete() -> None:
            with self.store.engine.begin() as connection:
                connection.execute(_TABLE.delete().where(self._row(name) & (_TABLE.c.holder == self.me)))

        self.store.do(delete)
