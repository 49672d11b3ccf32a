"""Rows survive; only a torn tail is cut."""

import errno
import math
import os

import numpy as np
import pytest
import torch

from isoscale._base import files, log
from isoscale._base.errors import CheckpointError, ConfigError, StorageError

ROWS = [{"step": step, "loss": 1 / (step + 1), "name": "é\u2028\r\n"} for step in range(5)]


def write(path, rows=ROWS):
    with log.JsonLog(path) as writer:
        for row in rows:
            writer.append(row)
    return path


def test_round_trip(tmp_path):
    assert log.read(write(tmp_path / "a" / "m.jsonl")) == ROWS
    assert log.read(tmp_path / "none") == []


def test_non_finite_numbers_are_text_on_disk_and_floats_in_memory(tmp_path):
    path = write(tmp_path / "m", [{"a": math.nan, "b": [math.inf, {"c": -math.inf}]}])
    assert path.read_text() == '{"a":"nan","b":["inf",{"c":"-inf"}]}\n'
    [row] = log.read(path)
    assert math.isnan(row["a"])
    assert row["b"] == [math.inf, {"c": -math.inf}]


def test_scalars_of_numpy_and_torch(tmp_path):
    path = write(tmp_path / "m", [{"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(math.inf), "d": (1, 2)}])
    assert log.read(path) == [{"a": 0.5, "b": 3, "c": math.inf, "d": [1, 2]}]


def test_a_value_without_a_json_form_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError) as caught:
        write(tmp_path / "m", [{"a": {"b": object()}}])
    assert caught.value.key == "row.a.b"
    assert log.read(tmp_path / "m") == []


def test_torn_at_every_byte_of_the_last_row(tmp_path):
    path = write(tmp_path / "m")
    data = path.read_bytes()
    start = data[:-1].rindex(b"\n") + 1
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        assert log.read(path) == ROWS[:-1]
        assert log.repair(path) == end - start
        assert path.read_bytes() == data[:start]
    assert log.repair(path) == 0


def test_opening_repairs_so_that_rows_never_glue(tmp_path):
    path = write(tmp_path / "m")
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "lo')
    write(path, [{"step": 6}])
    assert log.read(path) == [*ROWS, {"step": 6}]


def test_control_plain_append_after_a_torn_row_damages_the_next(tmp_path):
    path = write(tmp_path / "m")
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "lo')
        file.write(b'{"step": 6}\n{"step": 7}\n')
    with pytest.raises(CheckpointError, match="damaged row") as caught:
        log.read(path)
    assert caught.value.place.endswith(":6")


def test_damage_in_the_middle_is_not_skipped(tmp_path):
    path = write(tmp_path / "m")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"garbage\n", *lines[2:]]))
    with pytest.raises(CheckpointError):
        log.read(path)


def test_truncate_after_keeps_bytes_and_drops_the_rest(tmp_path):
    path = write(tmp_path / "m")
    data = path.read_bytes()
    path.write_bytes(data + b'{"step": 9')
    assert log.truncate_after(path, lambda row: row["step"] <= 2) == 2
    assert data.startswith(path.read_bytes())
    assert log.read(path) == ROWS[:3]
    assert log.truncate_after(path, lambda row: True) == 0
    assert log.truncate_after(tmp_path / "none", bool) == 0


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    path = tmp_path / "m"
    real = os.write

    def half(handle, data):
        real(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "full")

    with log.JsonLog(path) as writer:
        writer.append(ROWS[0])
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(StorageError, match="disk full"):
            writer.append(ROWS[1])
        monkeypatch.setattr(os, "write", real)
        writer.append(ROWS[2], fsync=True)
    assert log.read(path) == [ROWS[0], ROWS[2]]


def test_fsync_is_asked_for(tmp_path):
    seen = []
    with log.JsonLog(tmp_path / "m") as writer, files.failing(lambda name, _: seen.append(name)):
        writer.append({})
        writer.append({}, fsync=True)
    assert seen == ["write", "write", "fsync"]
    writer.close()
