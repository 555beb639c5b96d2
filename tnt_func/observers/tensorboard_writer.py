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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tnt_func.errors import optional
from tnt_func.observers.lines import overwrite
from tnt_func.observers.rows import Place, Row
from tnt_func.observers.scalars import scalars
from tnt_func.types import typed

HPARAMS = "_hparams_/session_start_info"


@typed
def tensorboard_writer(
    directory: str | os.PathLike[str], *, hparams: Mapping[str, Any] | None = None
) -> "TensorboardWriter":
    """A `Writer` of scalars that TensorBoard shows, float64, over the train steps of the lifetime.

    Metrics of epochs and evaluations are "train/loss", "eval/loss"; a step's output is "train_step/loss". Beside each
    row stands the epoch, "epoch/train_step" and so on. A resumed run first takes the rows after its place out of the
    event files, and gives `purge_step` to a TensorBoard that has already read them. Event files that others have
    written stay as they are. Within the second of the newest event file the first row waits for the next second: event
    files are read in the order of the seconds in their names.

    Args:
        directory: `log_dir` of `torch.utils.tensorboard.SummaryWriter`. It belongs to one run at a time.
        hparams: bools, numbers and strings, else as they print; TensorBoard's table of hyper-parameters has them, once.

    Raises:
        MissingExtraError: tensorboard is not installed.

    Example:
        >>> tensorboard_writer("runs/7", hparams={"lr": 1e-3})
        tensorboard_writer('runs/7')
    """
    module, user, package = "torch.utils.tensorboard", "tensorboard_writer", "tensorboard"
    tensorboard = optional(module, user=user, extra=package, package=package)
    if hparams is None:
        return TensorboardWriter(Path(directory), tensorboard, None)
    plain = {name: x if isinstance(x, bool | int | float | str) else str(x) for name, x in hparams.items()}
    _, start, _ = tensorboard.summary.hparams(plain, {})
    return TensorboardWriter(Path(directory), tensorboard, start)


class TensorboardWriter:
    """What `tensorboard_writer` makes.

    Attributes:
        summary: the module `torch.utils.tensorboard.summary`, whose summaries `add` takes.
    """

    def __init__(self, directory: Path, tensorboard: Any, hparams: Any):
        self.summary = tensorboard.summary
        self._directory, self._tensorboard, self._hparams = directory, tensorboard, hparams
        self._writer: Any = None
        self._purge_step: int | None = None
        self._has_hparams = False

    def __repr__(self) -> str:
        return f"tensorboard_writer({str(self._directory)!r})"

    def open(self, place: Place | None) -> None:
        """Take out the rows after a place."""
        self.close()
        self._purge_step = None if place is None else place[0] + 1
        self._has_hparams = False
        for path in self._files():
            content = path.read_bytes()
            left = b"".join([record for record, event in _records(content) if self._stays(event, place)])
            if place is not None and left != content:
                overwrite(path, left)

    def write(self, row: Row) -> None:
        """Write an event, and see it onto the disk."""
        self.add(row.step, scalars(row))

    def add(self, step: int, numbers: Mapping[str, float], others: Iterable[Any] = ()) -> None:
        """Write an event that is there or not as a whole, unlike those of SummaryWriter's methods.

        Args:
            step: of train steps.
            numbers: by tag; the first is an epoch, as in `scalars`.
            others: summaries of other kinds.
        """
        self._begin()
        # What `summary.scalar(tag, x, new_style=True, double_precision=True)` makes of each, in half of its time.
        made, plugin = self.summary, self.summary.SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = made.SummaryMetadata(plugin_data=plugin)
        tensors = {tag: made.TensorProto(double_val=[x], dtype="DT_DOUBLE") for tag, x in numbers.items()}
        whole = made.Summary(
            value=[made.Summary.Value(tag=tag, tensor=its, metadata=metadata) for tag, its in tensors.items()]
        )
        for part in others:
            whole.MergeFrom(part)
        self._writer.file_writer.add_summary(whole, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._purge_step = None

    def _begin(self) -> None:
        if self._writer is not None:
            return
        seconds = [int(path.name.split(".")[3]) for path in self._files()]
        if int(time.time()) in seconds:
            time.sleep(1 - time.time() % 1)
        self._writer = self._tensorboard.SummaryWriter(str(self._directory), purge_step=self._purge_step)
        if self._hparams is not None and not self._has_hparams:
            self._writer.file_writer.add_summary(self._hparams, 0)

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob("events.out.tfevents.*"))

    def _stays(self, event: Any, place: Place | None) -> bool:
        """Whether an event is of others, or of a row up to the place, or tells these hyper-parameters."""
        values = event.summary.value
        if values and values[0].tag == HPARAMS and self._hparams is not None:
            same = values[0].metadata == self._hparams.value[0].metadata
            self._has_hparams |= same
            return same
        is_row = bool(values) and values[0].tag.startswith("epoch/") and bool(values[0].tensor.double_val)
        return place is None or not is_row or (event.step, int(values[0].tensor.double_val[0])) <= place


def _records(content: bytes) -> Iterator[tuple[bytes, Any]]:
    """The whole records of an event file, with what they hold.

    A record is its length in 8 bytes, their checksum in 4, an Event, and its checksum in 4.
    """
    event_class = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 12 + length + 4
        if end > len(content):
            return
        yield content[start:end], event_class.FromString(content[start + 12 : end - 4])
        start = end
