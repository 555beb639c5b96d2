"""The records of which TensorBoard's event files consist.

A record is the length of an Event in 8 bytes, their checksum in 4, the Event, and its checksum in 4: the CRC-32C,
rotated by 15 bits and moved, as TFRecord has it. tensorboard computes it byte by byte in Python. But it is linear: it
is the exclusive or of what each byte alone, at its distance from the end, makes of it, so a table and one pass of NumPy
do, in a tenth of the time.

Example:
    >>> from tensorboard.compat.proto.event_pb2 import Event
    >>> content = record(Event(step=3, file_version="brain.Event:2").SerializeToString())
    >>> len(content), [(len(whole), event.step) for whole, event in records(content + content[:20])]
    (33, [(33, 3)])
"""

import importlib
import struct
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

BLOCK = 512
"""Bytes in one pass; a row of a few numbers is one."""
ONES = 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """What an event file has of a serialized Event."""
    return b"%b%b%b" % (_head(len(data)), data, _masked(data))


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


def crc32c(data: bytes) -> int:
    """The checksum as it is, before it is masked.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    import numpy as np

    table, offsets = _table()
    found = ONES
    for start in range(0, len(data), BLOCK):
        part = np.frombuffer(data, np.uint8, min(BLOCK, len(data) - start), start)
        at = part + offsets[-len(part) :]
        # What was found so far stands in the first four bytes; of a shorter part, some is left over.
        at[:4] ^= np.frombuffer(found.to_bytes(4, "little"), np.uint8)[: len(part)]
        found = int(np.bitwise_xor.reduce(table.take(at))) ^ found >> 8 * len(part)
    return found ^ ONES


@lru_cache(maxsize=256)
def _head(length: int) -> bytes:
    data = struct.pack("<Q", length)
    return data + _masked(data)


def _masked(data: bytes) -> bytes:
    found = crc32c(data)
    return ((found >> 15 | found << 17) + 0xA282EAD8 & ONES).to_bytes(4, "little")


@cache
def _table() -> tuple[Any, Any]:
    """What a byte of each value makes of the checksum, flat, by its place in a block; and where a place begins."""
    import numpy as np

    table = np.empty((BLOCK, 256), np.uint32)
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = last >> 1 ^ (last & 1) * np.uint32(0x82F63B78)
    table[-1] = last
    for place in range(BLOCK - 2, -1, -1):
        table[place] = last.take(table[place + 1] & 0xFF) ^ table[place + 1] >> 8
    return table.reshape(-1), np.arange(0, table.size, 256)
