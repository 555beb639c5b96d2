"""Rows as JSON, one object a line.

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
from tnt_func.observers.lines import Lines
from tnt_func.observers.rows import FIELDS, Place, Row
from tnt_func.types import typed


@typed
def jsonl_writer(path: str | os.PathLike[str]) -> "JsonlWriter":
    """A `Writer` of JSON lines. Lines are only ever appended; a resumed run first cuts those after its place.

    JSON has no number for what is not finite; it is written as "nan", "inf" or "-inf", which `float` reads.

    Args:
        path: of the file; it and its directory are made when a run starts. It belongs to one run at a time.

    Raises:
        UsageError: out of the run, when the file holds something else.
        CheckpointError: out of the run, when a line cannot be written.

    Example:
        >>> jsonl_writer("runs/7.jsonl")
        jsonl_writer('runs/7.jsonl')
    """
    return JsonlWriter(Path(path))


class JsonlWriter:
    """What `jsonl_writer` makes."""

    def __init__(self, path: Path):
        self._lines = Lines(path)

    def __repr__(self) -> str:
        return f"jsonl_writer({str(self._lines.path)!r})"

    def open(self, place: Place | None) -> None:
        """Cut the lines after a place."""
        lines = self._lines.read()
        places = [self._place(number, line) for number, line in enumerate(lines, 1)]
        self._lines.begin(line for line, at in zip(lines, places, strict=True) if place is None or at <= place)

    def write(self, row: Row) -> None:
        """Append a line."""
        metrics = {name: value if math.isfinite(value) else repr(value) for name, value in row.metrics.items()}
        values = {**dict(zip(FIELDS, row, strict=False)), "metrics": metrics}
        self._lines.append(json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _place(self, number: int, line: bytes) -> Place:
        try:
            found = json.loads(line)
            return int(found["step"]), int(found["epoch"])
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"line {number} of {self._lines.path} is {line[:80]!r}, which is no row of a run; the file is left as "
                "it is. Write to another path."
            ) from error
