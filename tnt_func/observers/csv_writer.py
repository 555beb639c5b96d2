"""Rows as CSV, one a line, with a column for every metric.

Example:
    >>> import tempfile
    >>> from tnt_func.observers.rows import Row
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = csv_writer(f"{directory}/run.csv")
    ...     writer.open((0, 0))
    ...     writer.write(Row(1, 0, "train", "step", {"loss": 0.5}))
    ...     writer.write(Row(1, 1, "eval", "epoch", {"accuracy": 1.0}))
    ...     writer.close()
    ...     print(Path(f"{directory}/run.csv").read_text().strip())
    step,epoch,phase,kind,loss,accuracy
    1,0,train,step,0.5,
    1,1,eval,epoch,,1.0
"""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tnt_func.errors import UsageError
from tnt_func.lines import Lines
from tnt_func.observers.rows import FIELDS, Place, Row, tell_of_cut
from tnt_func.types import typed


@typed
def csv_writer(path: str | os.PathLike[str]) -> "CsvWriter":
    """A `Writer` of CSV. A resumed run first cuts the lines after its place.

    Lines are appended; only when a row has a metric that no row before it had is the file written anew, and then it
    appears whole. A cell is empty where its row has no such metric; floats read back as they were, NaN as "nan".

    Args:
        path: of the file; it and its directory are made when a run starts. It belongs to one run at a time:
            among several ranks write rank_zero(...) around, or f"rank-{world.rank}..." here.

    Raises:
        UsageError: out of the run, when the file holds something else or another process writes it, or a metric's name
            has a line break.
        CheckpointError: out of the run, when the file or a line cannot be written.

    Example:
        >>> csv_writer("runs/7.csv")
        csv_writer('runs/7.csv')
    """
    return CsvWriter(Path(path))


class CsvWriter:
    """What `csv_writer` makes."""

    def __init__(self, path: Path):
        self._lines = Lines(path, ",".join(FIELDS).encode())
        self._columns = list(FIELDS)

    def __repr__(self) -> str:
        return f"csv_writer({str(self._lines.path)!r})"

    def open(self, place: Place | None) -> None:
        """Cut the lines after a place."""
        # A spreadsheet ends lines with \r\n.
        header, *lines = [line.rstrip(b"\r\n") + b"\n" for line in self._lines.read()] or [_line(FIELDS)]
        columns = _cells(header)
        if columns[: len(FIELDS)] != list(FIELDS):
            raise self._lines.refused(1, header)
        places = [self._place(number, line, len(columns)) for number, line in enumerate(lines, 2)]
        left = [line for line, at in zip(lines, places, strict=True) if place is None or at <= place]
        self._lines.begin([header, *left])
        self._columns = columns
        tell_of_cut(len(lines) - len(left), self._lines.path, place)

    def _place(self, number: int, line: bytes, width: int) -> Place:
        try:
            cells = _cells(line)
            if len(cells) != width:
                raise ValueError
            return int(cells[0]), int(cells[1])
        except (ValueError, csv.Error) as error:
            raise self._lines.refused(number, line) from error

    def write(self, row: Row) -> None:
        """Append a line."""
        flat = row.flat()
        if new := [name for name in flat if name not in self._columns]:
            if any("\n" in name or "\r" in name for name in new):
                raise UsageError(f"the metrics {new} were given; a column's name is one line. Name them otherwise.")
            columns = [*self._columns, *new]
            _, *lines = self._lines.read()
            self._lines.begin([_line(columns), *(line[:-1] + b"," * len(new) + b"\n" for line in lines)])
            self._columns = columns
        self._lines.append(_line(flat.get(name, "") for name in self._columns))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _line(cells: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cells(line: bytes) -> list[str]:
    return next(csv.reader([line.decode()]))
