"""A PostgreSQL server of a test's own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _tool(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A running server; its URL. Skips where there is none to run."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    tools = {name: _tool(name) for name in ("initdb", "postgres")}
    if None in tools.values():
        pytest.skip("no PostgreSQL server here (initdb, postgres)")
    data = folder / "data"
    user = []
    if os.getuid() == 0:  # the server refuses to run as root
        if shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("root without a user `postgres` to run the server as")
        user = ["runuser", "-u", "postgres", "--"]
        data.mkdir(parents=True)
        shutil.chown(data, "postgres")
        for parent in data.parents:
            if parent.stat().st_uid == 0 and parent not in (Path("/"), Path("/tmp")):
                parent.chmod(parent.stat().st_mode | 0o011)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*user, tools["initdb"], "-D", str(data), "-A", "trust", "-U", "tester", "--no-sync", "--locale=C"]
    subprocess.run(words, check=True, capture_output=True, cwd="/tmp", timeout=60)
    flags = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*user, tools["postgres"], "-D", str(data), *flags], stdout=log, stderr=log, cwd="/tmp")
    url = f"postgresql://tester:hush@127.0.0.1:{port}/postgres"
    try:
        import time

        import psycopg2

        for _ in range(100):
            try:
                psycopg2.connect(url).close()
                break
            except psycopg2.OperationalError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)
