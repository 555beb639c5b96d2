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
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tnt_func.errors import optional
from tnt_func.lines import LOCK, Hold, append, overwrite, writable
from tnt_func.observers.rows import Place, Row, tell_of_cut
from tnt_func.observers.scalars import scalars
from tnt_func.observers.tensorboard_records import record, records
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
        directory: `log_dir` of `torch.utils.tensorboard.SummaryWriter`. It belongs to one run at a time: among several
            ranks write rank_zero(...) around, or f"{directory}/rank-{world.rank}" here.
        hparams: bools, numbers and strings, else as they print; TensorBoard's table of hyper-parameters has them, once.

    Raises:
        MissingExtraError: tensorboard is not installed.
        UsageError: out of the run, when another process writes there.
        CheckpointError: out of the run, when the directory or a row cannot be written.

    Example:
        >>> tensorboard_writer("runs/7", hparams={"lr": 1e-3})
        tensorboard_writer('runs/7')
    """
    module, user, package = "torch.utils.tensorboard", "tensorboard_writer", "tensorboard"
    tensorboard = optional(module, user=user, extra=package, package=package)
    if hparams is None:
        return TensorboardWriter(Path(directory), tensorboard.summary, None)
    plain = {name: x if isinstance(x, bool | int | float | str) else str(x) for name, x in hparams.items()}
    _, start, _ = tensorboard.summary.hparams(plain, {})
    return TensorboardWriter(Path(directory), tensorboard.summary, start)


class TensorboardWriter:
    """What `tensorboard_writer` makes.

    Attributes:
        summary: the module `torch.utils.tensorboard.summary`, whose summaries `add` takes.
    """

    def __init__(self, directory: Path, summary: Any, hparams: Any):
        self.summary = summary
        self._directory, self._hparams = directory, hparams
        self._path, self._file, self._head = directory, -1, b""
        self._hold = Hold(directory, directory / LOCK)
        self._purge_step: int | None = None
        self._has_hparams = False
        self._protobuf = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._made: dict[str, tuple[list[str], Any, list[Any]]] = {}

    def __repr__(self) -> str:
        return f"tensorboard_writer({str(self._directory)!r})"

    def open(self, place: Place | None) -> None:
        """Take out the rows after a place."""
        self.close()
        self._hold.take()
        self._purge_step = None if place is None else place[0] + 1
        self._has_hparams = False
        cut = 0
        for path in self._files():
            with writable(path):
                content = path.read_bytes()
                found = [*records(content)]
                left = [whole for whole, event in found if self._stays(event, place)]
                if place is not None and b"".join(left) != content:
                    overwrite(path, b"".join(left))
                    cut += len(found) - len(left)
        tell_of_cut(cut, self._directory, place)

    def write(self, row: Row) -> None:
        """Write an event."""
        self.add(row.step, scalars(row))

    def add(self, step: int, numbers: Mapping[str, float], others: Iterable[Any] = ()) -> None:
        """Write an event that is there or not as a whole, unlike those of SummaryWriter's methods.

        It is handed to the system at once, by this thread: SummaryWriter's own would have to be waited for.

        Args:
            step: of train steps.
            numbers: by tag; the first is an epoch, as in `scalars`.
            others: summaries of other kinds.

        Raises:
            CheckpointError: it could not be written; nothing of it is left.
        """
        event = self._scalars(numbers)
        if merged := [*others]:
            event = self._protobuf.Event.FromString(event.SerializeToString())
            for part in merged:
                event.summary.MergeFrom(part)
        event.wall_time, event.step = time.time(), step
        self._begin()
        append(self._file, self._head + record(event.SerializeToString()), self._path)
        self._head = b""

    def close(self) -> None:
        """Close the event file."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._purge_step = -1, None
        self._hold.leave()

    def _scalars(self, numbers: Mapping[str, float]) -> Any:
        """What `summary.scalar(tag, x, new_style=True, double_precision=True)` makes of each, in one event.

        Rows of a kind have the same names, and filling in the event of the one before takes a tenth of the time.
        """
        names = [*numbers]
        known, event, cells = self._made.get(names[0], ((), None, []))
        if known != names:
            made, plugin = self.summary, self.summary.SummaryMetadata.PluginData(plugin_name="scalars")
            tensor = made.TensorProto(double_val=[0.0], dtype="DT_DOUBLE")
            options = {"tensor": tensor, "metadata": made.SummaryMetadata(plugin_data=plugin)}
            whole = made.Summary(value=[made.Summary.Value(tag=tag, **options) for tag in names])
            event = self._protobuf.Event(summary=whole)
            cells = [value.tensor.double_val for value in event.summary.value]
            self._made[names[0]] = names, event, cells
        for cell, number in zip(cells, numbers.values(), strict=True):
            cell[0] = number
        return event

    def _begin(self) -> None:
        """Open a file of this second; its head is written with the first row."""
        if self._file >= 0:
            return
        seconds = [int(path.name.split(".")[3]) for path in self._files()]
        if int(time.time()) in seconds:
            time.sleep(1 - time.time() % 1)
        now, made = time.time(), self._protobuf
        head = [made.Event(wall_time=now, file_version="brain.Event:2")]
        if self._purge_step is not None:
            start = made.SessionLog(status=made.SessionLog.START)
            head.append(made.Event(wall_time=now, step=self._purge_step, session_log=start))
        if self._hparams is not None and not self._has_hparams:
            head.append(made.Event(wall_time=now, summary=self._hparams))
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.tnt_func"
        self._path = self._directory / name
        with writable(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._head = b"".join(record(event.SerializeToString()) for event in head)

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
