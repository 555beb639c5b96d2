"""The records of which TensorBoard's event files consist, each to be there or not as a whole.

Example:
    >>> from tensorboard.compat.proto.event_pb2 import Event
    >>> content = record(Event(step=3, file_version="brain.Event:2").SerializeToString())
    >>> len(content), [(len(whole), event.step) for whole, event in records(content + content[:20])]
    (33, [(33, 3)])
"""

import importlib
import io
import struct
from collections.abc import Iterator
from typing import Any


def record(data: bytes) -> bytes:
    """What tensorboard's own writer puts into an event file for a serialized Event."""
    importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter(file := io.BytesIO()).write(data)
    return file.getvalue()


def records(content: bytes) -> Iterator[tuple[bytes, Any]]:
    """The whole records of an event file, with the Events in them; a torn last one is none."""
    event_class = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 12 + length + 4
        if end > len(content):
            return
        yield content[start:end], event_class.FromString(content[start + 12 : end - 4])
        start = end
