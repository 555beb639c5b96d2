"""Rows as TensorBoard scalars.

Example:
    >>> import tempfile
    >>> from tnt_func.observers.rows import Row
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = tensorboard_writer(directory)
    ...     writer.open((0, 0))
    ...     writer.write(Row(1, 0, "train", "step", {"loss": 0.5}))
    ...     writer.close()
    ...     len(list(Path(directory).glob("events.out.tfevents.*")))
    1
"""

import importlib
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnt_func.errors import optional
from tnt_func.observers.lines import overwrite
from tnt_func.observers.rows import Place, Row
from tnt_func.types import typed


@typed
def tensorboard_writer(directory: str | os.PathLike[str]) -> "TensorboardWriter":
    """A `Writer` of scalars that TensorBoard shows, float64, over the train steps of the lifetime.

    Metrics of epochs and evaluations are "train/loss", "eval/loss"; a step's output is "train_step/loss". Beside each
    row stands the epoch, "epoch/train_step" and so on. A resumed run first takes the rows after its place out of the
    event files, and gives `purge_step` to a TensorBoard that has already read them. Event files that others have
    written stay as they are. Within the second of the newest event file the first row waits for the next second: event
    files are read in the order of the seconds in their names.

    Args:
        directory: `log_dir` of `torch.utils.tensorboard.SummaryWriter`. It belongs to one run at a time.

    Raises:
        MissingExtraError: tensorboard is not installed.

    Example:
        >>> tensorboard_writer("runs/7")
        tensorboard_writer('runs/7')
    """
    module, user, package = "torch.utils.tensorboard", "tensorboard_writer", "tensorboard"
    return TensorboardWriter(Path(directory), optional(module, user=user, extra=package, package=package))


class TensorboardWriter:
    """What `tensorboard_writer` makes."""

    def __init__(self, directory: Path, tensorboard: Any):
        self._directory, self._tensorboard = directory, tensorboard
        self._writer: Any = None
        self._purge_step: int | None = None

    def __repr__(self) -> str:
        return f"tensorboard_writer({str(self._directory)!r})"

    def open(self, place: Place | None) -> None:
        """Take out the rows after a place."""
        self.close()
        if place is None:
            return
        self._purge_step = place[0] + 1
        for path in self._files():
            content = path.read_bytes()
            left = b"".join(record for record, at in self._records(content) if at is None or at <= place)
            if left != content:
                overwrite(path, left)

    def write(self, row: Row) -> None:
        """Write an event, and see it onto the disk."""
        if self._writer is None:
            seconds = [int(path.name.split(".")[3]) for path in self._files()]
            if int(time.time()) in seconds:
                time.sleep(1 - time.time() % 1)
            self._writer = self._tensorboard.SummaryWriter(str(self._directory), purge_step=self._purge_step)
        group = row.phase if row.kind == "epoch" else f"{row.phase}_step"
        scalars = {f"epoch/{group}": float(row.epoch)} | {f"{group}/{name}": x for name, x in row.metrics.items()}
        summaries = importlib.import_module("torch.utils.tensorboard.summary")
        parts = [summaries.scalar(tag, x, new_style=True, double_precision=True) for tag, x in scalars.items()]
        for part in parts[1:]:
            parts[0].MergeFrom(part)
        # One event a row, so that it is there or not; add_scalar would write one for each number.
        self._writer.file_writer.add_summary(parts[0], row.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._purge_step = None

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob("events.out.tfevents.*"))

    def _records(self, content: bytes) -> Iterator[tuple[bytes, Place | None]]:
        """The whole records of an event file, with the place of those that are rows.

        A record is its length in 8 bytes, their checksum in 4, an Event, and its checksum in 4.
        """
        event_class = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        start = 0
        while start + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            end = start + 12 + length + 4
            if end > len(content):
                return
            event = event_class.FromString(content[start + 12 : end - 4])
            values = event.summary.value
            is_row = bool(values) and values[0].tag.startswith("epoch/") and bool(values[0].tensor.double_val)
            yield content[start:end], (event.step, int(values[0].tensor.double_val[0])) if is_row else None
            start = end
