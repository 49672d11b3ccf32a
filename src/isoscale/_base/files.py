"""Files that are whole or absent: write beside, fsync, rename, fsync the folder.

Why: a process that dies inside `open(path, "w")` leaves half a file under the good name. Here the good name is only
ever given to a finished file, by one `rename`, which the file system does in one step.

What is lost: one fsync per file (milliseconds), and while a file is replaced both versions take room on the disk.
A SIGKILL inside a write may leave a hidden `.name.tmp-*` beside the target; `sweep_temps` removes those.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from isoscale._base.errors import CheckpointError, IsoscaleError, StorageError

CHUNK = 1 << 20  # bytes per write call; each is a point where a disk may refuse

_REFUSALS = {
    errno.ENOSPC: ("disk full", "free some space, or point the run folder at another disk"),
    errno.EDQUOT: ("disk full: the quota is used up", "free some space, or ask for more quota"),
    errno.EFBIG: ("file too large for this file system", "use another file system, or raise `ulimit -f`"),
    errno.EROFS: ("read-only file system", "choose a folder on a writable disk"),
    errno.EACCES: ("read-only: permission denied", "choose a folder that you may write, or change its permissions"),
    errno.EPERM: ("read-only: operation not permitted", "choose a folder that you may write"),
}

_hook: Callable[[str, Path], None] | None = None


def failpoint(name: str, path: Path) -> None:
    """A named point (`write`, `fsync`, `rename`, `fsync_dir`, `remove`) where a test may break things; else a no-op."""
    if _hook is not None:
        _hook(name, path)


@contextmanager
def failing(hook: Callable[[str, Path], None]) -> Iterator[None]:
    """For tests only: call `hook(name, path)` at every failpoint; it may raise an `OSError` or kill the process."""
    global _hook
    before, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = before


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the refusals of a disk into `StorageError`s that name `path`; lets any other `OSError` through."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        message, hint = _REFUSALS[error.errno]
        raise StorageError(message, key="path", place=str(path), hint=hint) from error


def _temp(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"


def sync_dir(path: Path) -> None:
    """Makes the names in a folder durable; a no-op where the system cannot sync folders."""
    failpoint("fsync_dir", path)
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes | str) -> None:
    """Writes a new file and makes its bytes durable; for files inside an `atomic_dir`. Not atomic by itself."""
    view = memoryview(data.encode() if isinstance(data, str) else data)
    with open(path, "xb", buffering=0) as file:
        start = 0
        while start < len(view):
            failpoint("write", path)
            start += file.write(view[start : start + CHUNK]) or 0
        failpoint("fsync", path)
        os.fsync(file.fileno())


def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Replaces a file as a whole: a reader sees the old bytes or the new ones, never a mixture.

    Args:
        path: the file; its folder is made when missing.
        data: the whole content; text is written as UTF-8.

    Raises:
        StorageError: the disk is full or read-only. The old file is untouched and no temporary file is left.
    """
    path = Path(path)
    temp = _temp(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(temp, data)
            failpoint("rename", path)
            os.replace(temp, path)
        except BaseException:
            with suppress(OSError):
                temp.unlink()
            raise
        sync_dir(path.parent)
    return path


@contextmanager
def atomic_dir(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Fills a folder under a temporary name and gives it the name `path` when the block ends without an exception.

    Args:
        path: the folder to make.
        replace: what to do with a folder of that name. False raises `FileExistsError` at the end (another process
            was faster). True moves it to a hidden `.name.old-*` first and removes it afterwards; a kill between
            the two renames leaves only the hidden one, which `candidates` finds.

    Yields:
        The temporary folder, beside `path`, so that the rename stays on one disk.

    Raises:
        StorageError: the disk is full or read-only; nothing is left behind.
    """
    path = Path(path)
    temp = _temp(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temp.mkdir()
            yield temp
            _sync_tree(temp)
            _publish(temp, path, replace)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        sync_dir(path.parent)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(root, name)
            failpoint("fsync", file)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        sync_dir(Path(root))


def _publish(temp: Path, path: Path, replace: bool) -> None:
    if not path.exists():
        failpoint("rename", path)
        try:
            os.rename(temp, path)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, "made by another process meanwhile", str(path)) from error
            raise
        return
    if not replace:
        raise FileExistsError(errno.EEXIST, "already there", str(path))
    old = path.parent / f".{path.name}.old-{secrets.token_hex(4)}"
    failpoint("rename", old)
    os.rename(path, old)
    try:
        failpoint("rename", path)
        os.rename(temp, path)
    except BaseException:
        with suppress(OSError):
            os.rename(old, path)
        raise
    sync_dir(path.parent)
    remove_tree(old)


def remove_tree(path: Path) -> None:
    """Removes a folder; hides it first, so that a kill midway never leaves a half-empty folder under a good name."""
    failpoint("remove", path)
    if path.name.startswith("."):
        doomed = path
    else:
        doomed = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def candidates(folder: Path) -> dict[Path, str]:
    """The sub-folders that hold whole data, with the name each was published under, hidden `.name.old-*` included."""
    found: dict[Path, str] = {}
    if not folder.is_dir():
        return found
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if not entry.is_dir() or ".tmp-" in name:
            continue
        if name.startswith(".") and ".old-" in name:
            name = name[1 : name.rindex(".old-")]
        found[entry] = name
    return found


def sweep_temps(folder: Path) -> None:
    """Removes what killed writers left in `folder` (`.*.tmp-*`). Only where this process is the one writer."""
    for entry in folder.glob(".*.tmp-*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: str | Path, error: type[IsoscaleError] = CheckpointError) -> object:
    """Reads a JSON file.

    Raises:
        error: the class given, when the file is missing, unreadable or damaged; it names the file and the spot.
    """
    try:
        return json.loads(Path(path).read_bytes().decode())
    except FileNotFoundError as cause:
        raise error("file missing", key="file", place=str(path)) from cause
    except OSError as cause:
        raise error(f"file cannot be read: {cause.strerror}", key="file", place=str(path)) from cause
    except (ValueError, RecursionError) as cause:
        hint = "restore the file from a backup or remove it"
        raise error(f"damaged JSON: {cause}", key="file", place=str(path), hint=hint) from cause
