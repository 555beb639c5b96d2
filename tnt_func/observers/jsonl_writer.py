"""Rows as JSON, one object a line, written while a run goes on and read back afterwards.

Example:
    >>> import tempfile
    >>> from tnt_func.observers.rows import Row
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = jsonl_writer(f"{directory}/run.jsonl")
    ...     writer.open((0, 0))
    ...     writer.write(Row(1, 0, "train", "step", {"loss": 0.5}))
    ...     writer.close()
    ...     Path(f"{directory}/run.jsonl").read_text()
    '{"step":1,"epoch":0,"phase":"train","kind":"step","metrics":{"loss":0.5}}\\n'
"""

import json
import math
import os
from pathlib import Path

from tnt_func.errors import UsageError
from tnt_func.lines import Lines
from tnt_func.observers.history import History
from tnt_func.observers.rows import Place, Row, tell_of_cut
from tnt_func.types import typed

HEAD = b"{"
ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


@typed
def jsonl_writer(path: str | os.PathLike[str]) -> "JsonlWriter":
    """A `Writer` of JSON lines. Lines are only ever appended; a resumed run first cuts those after its place.

    JSON has no number for what is not finite; it is written as "nan", "inf" or "-inf", which `float` reads.

    Args:
        path: of the file; it and its directory are made when a run starts. It belongs to one run at a time:
            among several ranks write rank_zero(...) around, or f"rank-{world.rank}..." here.

    Raises:
        UsageError: out of the run, when the file holds something else or another process writes it.
        CheckpointError: out of the run, when the file or a line cannot be written.

    Example:
        >>> jsonl_writer("runs/7.jsonl")
        jsonl_writer('runs/7.jsonl')
    """
    return JsonlWriter(Path(path))


@typed
def read_jsonl(path: str | os.PathLike[str]) -> History:
    """The rows that `jsonl_writer` wrote, to the bit; a torn last line, of a killed process, is left out.

    `read_jsonl(path).write_to(writer)` records a finished run anew, in any other format.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: it is not there.
        UsageError: a line of it is no row.

    Example:
        >>> import tempfile
        >>> from tnt_func.observers.csv_writer import csv_writer
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     History([Row(1, 0, "train", "step", {"loss": math.inf})]).write_to(jsonl_writer(f"{directory}/a.jsonl"))
        ...     read_jsonl(f"{directory}/a.jsonl").write_to(csv_writer(f"{directory}/a.csv"))
        ...     Path(f"{directory}/a.csv").read_text().splitlines()
        ['step,epoch,phase,kind,loss', '1,0,train,step,inf']
    """
    file = Lines(Path(path), HEAD)
    if not file.path.is_file():
        raise FileNotFoundError(f"{path} was given; no file is there. Give the path that jsonl_writer was given.")
    try:
        return History(_row(file, number, line) for number, line in enumerate(file.read(), 1))
    except UsageError as error:
        raise UsageError(
            f"read_jsonl({str(path)!r}) was given; {error.args[0].partition(';')[0]}. Give the path that jsonl_writer "
            "was given."
        ) from error


class JsonlWriter:
    """What `jsonl_writer` makes."""

    def __init__(self, path: Path):
        self._lines = Lines(path, HEAD)

    def __repr__(self) -> str:
        return f"jsonl_writer({str(self._lines.path)!r})"

    def open(self, place: Place | None) -> None:
        """Cut the lines after a place."""
        lines = self._lines.read()
        places = [_row(self._lines, number, line).place for number, line in enumerate(lines, 1)]
        left = [line for line, at in zip(lines, places, strict=True) if place is None or at <= place]
        self._lines.begin(left)
        tell_of_cut(len(lines) - len(left), self._lines.path, place)

    def write(self, row: Row) -> None:
        """Append a line."""
        metrics = {name: value if math.isfinite(value) else repr(value) for name, value in row.metrics.items()}
        self._lines.append(ENCODER.encode({**row._asdict(), "metrics": metrics}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _row(file: Lines, number: int, line: bytes) -> Row:
    try:
        found = json.loads(line)
        head = (int(found["step"]), int(found["epoch"]), found["phase"], found["kind"])
        return Row(*head, {name: float(value) for name, value in found["metrics"].items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise file.refused(number, line) from error
