"""A torn record is none, and a full disk leaves none."""

import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.compat.proto import event_pb2

from tnt_func.errors import CheckpointError
from tnt_func.observers import Row, tensorboard_writer
from tnt_func.observers.tensorboard_records import record, records

PROTO: Any = event_pb2


def test_what_is_torn_is_left_out():
    events = [PROTO.Event(step=step, file_version="x" * 700 * step) for step in range(3)]
    content = b"".join(record(event.SerializeToString()) for event in events)
    for cut in range(len(content)):
        found = [*records(content[:cut])]
        assert b"".join(whole for whole, _ in found) == content[: sum(len(whole) for whole, _ in found)]
        assert [event for _, event in found] == events[: len(found)] and len(found) < 3
    assert [event for _, event in records(content)] == events


def test_a_full_disk_leaves_no_torn_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither of the first, with what stands at the head of the file, nor of a later one; then it goes on."""
    left: list[int] = []

    def write(file: int, content: bytes) -> int:
        return real(file, content[: left.pop(0)] if left else content)

    real, row = os.write, Row(1, 0, "train", "step", {"loss": 1.0})
    monkeypatch.setattr("tnt_func.lines.os.write", write)
    writer = tensorboard_writer(tmp_path)
    writer.open((0, 0))
    for short in ([5], [100], [], [7], [0], []):
        left[:] = short
        if short:
            with pytest.raises(CheckpointError, match="a row of .* could not be written: the disk is full. Make room"):
                writer.write(row)
        else:
            writer.write(row)
    writer.close()
    (path,) = tmp_path.iterdir()
    found = [*records(path.read_bytes())]
    assert b"".join(whole for whole, _ in found) == path.read_bytes()
    assert [bool(event.summary.value) for _, event in found] == [False, False, True, True]
    assert found[0][1].file_version == "brain.Event:2" and found[1][1].session_log.status == 1
