"""Storages that refuse, each in words and without a password; leases among drivers."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest
from servers import postgres

from isoscale._base.errors import CheckpointError, IsoscaleError, MissingDependencyError, StorageError
from isoscale.config import RunConfig
from isoscale.sweep import lease as lease_module
from isoscale.sweep import sweep
from isoscale.sweep.lease import Lease
from isoscale.sweep.store import Store, shown


def run(out, storage, **values):
    config = RunConfig().with_values(**{"sweep.executor": "inline", "sweep.storage": storage, **values})
    return sweep(config, out, objective="sweep_objectives:bowl")


@pytest.mark.parametrize(("address", "kind", "words"), [
    ("postgresql://me:hush@127.0.0.1:9/db", StorageError, "does it run"),
    ("postgresql://me:hush@no.such.host.invalid/db", StorageError, "no.such.host"),
    ("sqlite:////no/such/folder/study.db", StorageError, "unable to open database file"),
    ("nonsense", StorageError, "no database URL"), ("redis://me:hush@x/1", StorageError, "no database URL"),
    ("mysql+mysqldb://me:hush@127.0.0.1/db", MissingDependencyError, "no driver for this database"),
])  # fmt: skip
def test_addresses_that_lead_nowhere(address, kind, words, tmp_path):
    with pytest.raises(kind) as error:
        run(tmp_path / "x", address)
    assert words in str(error.value)
    assert "hush" not in str(error.value)
    assert "Background on this error" not in str(error.value)
    assert error.value.hint


def test_a_storage_that_may_not_be_written(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/study.db")
    store.close()
    code = (
        "import sys; from isoscale._base.errors import StorageError; from isoscale.sweep.store import Store\n"
        "try:\n    s = Store(sys.argv[1]); s.attr(s.create({}, {}, {}), 'a', 1)\n"
        "except StorageError as error:\n    print(error)"
    )
    user = []
    if os.getuid() == 0:  # root may write everywhere
        (tmp_path / "study.db").chmod(0o444)
        user = ["setpriv", "--reuid", "65534", "--clear-groups"]
        for parent in [tmp_path, *tmp_path.parents][:-2]:
            parent.chmod(parent.stat().st_mode | 0o055)
    else:
        tmp_path.chmod(0o555)
    words = [*user, sys.executable, "-c", code, f"sqlite:///{tmp_path}/study.db"]
    found = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HOME": "/tmp"})
    tmp_path.chmod(0o755)
    if "Permission denied" in found.stderr:
        pytest.skip("another user cannot run this Python")
    assert "storage refuses" in found.stdout, found.stderr[-500:]
    assert "where: " not in found.stdout or "Traceback" not in found.stderr


def test_a_storage_of_another_optuna(tmp_path):
    Store(f"sqlite:///{tmp_path}/study.db").close()
    with sqlite3.connect(tmp_path / "study.db") as base:
        base.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(StorageError, match="another version of Optuna") as error:
        Store(f"sqlite:///{tmp_path}/study.db")
    assert "optuna storage upgrade" in error.value.hint


def test_a_storage_that_is_no_database(tmp_path):
    (tmp_path / "study.db").write_text("not a database, but long enough to be looked at as one" * 50)
    with pytest.raises(StorageError, match="not a database"):
        Store(f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(CheckpointError, match="no sweep here"):
        Store(f"sqlite:///{tmp_path}/other.db", create=False)


def test_passwords_are_never_shown():
    assert shown("postgresql://me:hush@host/db") == "postgresql://me:***@host/db"
    assert "hush" not in shown("postgresql://me:hush@ho st:port/db")


def test_a_database_shared_by_url_is_one_study_for_one_search(tmp_path):
    address = f"sqlite:///{tmp_path}/shared.db"
    first = run(tmp_path / "a", address)
    again = run(tmp_path / "b", address)
    assert [t.loss for t in again.trials] == [t.loss for t in first.trials]
    assert not (tmp_path / "b" / "trials").exists() or not list((tmp_path / "b" / "trials").iterdir())
    run(tmp_path / "c", address, **{"sweep.space": {"lr": (1.0,)}})
    with sqlite3.connect(tmp_path / "shared.db") as base:
        assert base.execute("SELECT count(*) FROM studies").fetchone() == (2,)
        assert base.execute("SELECT count(*) FROM isoscale_lease").fetchone() == (0,)  # all have left


@pytest.fixture
def store(tmp_path):
    made = Store(f"sqlite:///{tmp_path}/study.db")
    yield made
    made.close()


def test_a_name_has_one_holder_until_it_is_dropped_or_dead(store, monkeypatch):
    monkeypatch.setattr(lease_module, "BEAT", 0.05)
    monkeypatch.setattr(lease_module, "GRACE", 0.4)
    with Lease(store) as one:
        with Lease(store) as two:
            assert one.take("leader")
            assert one.take("leader")
            assert not two.take("leader")
            assert two.drivers == 2
            one.drop("leader")
            assert two.take("leader")
            assert not one.take("leader")
        assert one.take("leader")  # the other has left
        one._end.set()  # no beat any more, but the row stays
        one._thread.join()
        with Lease(store) as three:
            three.look()
            assert not three.take("leader")  # not seen for long enough
            import time

            time.sleep(0.6)
            three.look()
            assert three.take("leader")
            assert not one.take("leader")  # what was lost stays lost
            assert three.drivers == 1


def test_the_password_reaches_no_file_of_a_sweep(tmp_path):
    with postgres(tmp_path / "server") as address:
        assert ":hush@" in address
        run(tmp_path / "out", address)
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(texts) >= 2
    assert not any(b"hush" in text for text in texts)
    with pytest.raises(IsoscaleError, match="does it run"):  # the server is gone
        run(tmp_path / "other", address)
