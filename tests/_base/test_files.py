"""Files are whole or absent."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from isoscale._base import files
from isoscale._base.errors import CheckpointError, DataError, StorageError


def breaking(at, code=errno.ENOSPC):
    """A hook that raises at the `at`-th failpoint."""
    seen = []

    def hook(name, path):
        seen.append(name)
        if len(seen) == at:
            raise OSError(code, os.strerror(code))

    return hook, seen


def test_atomic_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    assert files.atomic_write(path, "one") == path
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_leaves_the_old_file_and_no_temp(tmp_path, at):
    path = files.atomic_write(tmp_path / "x", "old")
    hook, seen = breaking(at)
    with files.failing(hook), pytest.raises(StorageError, match="disk full") as caught:
        files.atomic_write(path, "new")
    assert seen[-1] == ("write", "fsync", "rename")[at - 1]
    assert caught.value.place == str(path)
    assert caught.value.hint
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_control_a_plain_write_loses_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with suppress(OSError), open(path, "w") as file:
        file.write("ne")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "ne"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_is_named(tmp_path, code):
    hook, _ = breaking(1, code)
    with files.failing(hook), pytest.raises(StorageError, match="read-only"):
        files.atomic_write(tmp_path / "x", "new")


def test_other_os_errors_pass_through(tmp_path):
    hook, _ = breaking(1, errno.EIO)
    with files.failing(hook), pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.atomic_write(tmp_path / "x", "new")
    assert not os.listdir(tmp_path)


def test_a_real_size_limit_is_a_storage_error(tmp_path):
    resource = pytest.importorskip("resource")
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(StorageError, match="too large"):
            files.atomic_write(tmp_path / "x", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not os.listdir(tmp_path)


def test_atomic_dir_appears_only_at_the_end(tmp_path):
    target = tmp_path / "d"
    with files.atomic_dir(target) as temp:
        (temp / "f").write_text("x")
        assert temp.parent == tmp_path
        assert not target.exists()
    assert os.listdir(tmp_path) == ["d"]
    assert (target / "f").read_text() == "x"


def test_atomic_dir_removes_the_temp_on_failure(tmp_path):
    with suppress(ValueError), files.atomic_dir(tmp_path / "d") as temp:
        (temp / "f").write_text("x")
        raise ValueError("stop")
    assert not os.listdir(tmp_path)


def test_atomic_dir_refuses_or_replaces(tmp_path):
    target = tmp_path / "d"
    for content, replace in (("1", False), ("2", True)):
        with files.atomic_dir(target, replace=replace) as temp:
            (temp / "f").write_text(content)
    with pytest.raises(FileExistsError), files.atomic_dir(target) as temp:
        (temp / "f").write_text("3")
    assert (target / "f").read_text() == "2"
    assert os.listdir(tmp_path) == ["d"]


def test_every_failure_of_a_replacement_leaves_one_whole_folder(tmp_path):
    target = tmp_path / "d"
    with files.atomic_dir(target) as temp:
        (temp / "f").write_text("old")
    for at in range(1, 30):
        hook, seen = breaking(at)
        with files.failing(hook):
            try:
                with files.atomic_dir(target, replace=True) as temp:
                    files.write_synced(temp / "f", "new")
            except StorageError:
                pass
        found = files.candidates(tmp_path)
        assert "d" in found.values()
        assert {(path / "f").read_text() for path in found} <= {"old", "new"}
        assert not list(tmp_path.glob(".*tmp*"))
        if len(seen) < at:
            return
    pytest.fail("more failpoints than expected")


def test_sweep_temps_removes_only_temps(tmp_path):
    (tmp_path / ".d.tmp-1-ab").mkdir()
    (tmp_path / ".f.tmp-1-ab").write_text("x")
    (tmp_path / "keep").write_text("x")
    files.sweep_temps(tmp_path)
    assert os.listdir(tmp_path) == ["keep"]


def test_candidates_knows_the_name_behind_a_set_aside_folder(tmp_path):
    for name in ("a", ".b.old-12", ".c.tmp-1-2"):
        (tmp_path / name).mkdir()
    assert sorted(files.candidates(tmp_path).values()) == ["a", "b"]
    assert files.candidates(tmp_path / "none") == {}


def test_sha256(tmp_path):
    path = files.atomic_write(tmp_path / "x", b"abc")
    assert files.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("text", ["{", b"\xff", "[" * 100_000], ids=["cut", "bytes", "deep"])
def test_read_json_names_damage(tmp_path, text):
    path = files.atomic_write(tmp_path / "x.json", text)
    with pytest.raises(CheckpointError, match="damaged JSON") as caught:
        files.read_json(path)
    assert caught.value.place == str(path)


def test_read_json_reads_and_misses(tmp_path):
    assert files.read_json(files.atomic_write(tmp_path / "x.json", '{"a": 1}')) == {"a": 1}
    with pytest.raises(DataError, match="missing"):
        files.read_json(Path(tmp_path / "none.json"), DataError)
