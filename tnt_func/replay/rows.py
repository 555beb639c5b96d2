"""What a record holds: rows of JSON, one a line, and the checkpoints beside them.

    record.jsonl     a row when a call begins, after every step, after every epoch and for every checkpoint
    checkpoints/     `tnt.checkpoint` reads and resumes from it

Rows are only ever appended, in the order of the run; a resumed run first cuts those after the step it resumes from.

Laws:
    Steps and epochs of the rows never fall, and no step and no epoch has two rows. A torn last line is no row.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tnt_func.errors import CheckpointError, UsageError
from tnt_func.replay.marks import DIGITS
from tnt_func.types import typed

ROWS, CHECKPOINTS = "record.jsonl", "checkpoints"
Directory = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a record.

    Args:
        row: what it is about: the beginning of a call, a step, the end of an epoch, a checkpoint.
        step, epoch: steps and epochs completed by then, of the lifetime.
        numbers: of the step's output, with the evaluation's after it; of an epoch its metrics, "phase.name".
        batch: the mark of the step's batch.
        digest: `tnt.digest` of the state.
        marks: of the leaves, in the order of `leaves`.
        leaves: their kinds by path, where they are not those of the row with marks before.
        checkpoint: the name of its directory.
        lineage: of a call.
    """

    row: Literal["call", "step", "epoch", "checkpoint"]
    step: int
    epoch: int
    numbers: Mapping[str, Any] | None = None
    batch: str | None = None
    digest: str | None = None
    marks: str | None = None
    leaves: Mapping[str, str] | None = None
    checkpoint: str | None = None
    lineage: Mapping[str, Any] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Steps and epochs completed; places sort as the run goes."""
        return self.step, self.epoch

    @property
    def counts(self) -> bool:
        """Whether it is about a step or an epoch, of which there is one row each."""
        return self.row in ("step", "epoch")


_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"), check_circular=False)


def line(values: Mapping[str, Any]) -> bytes:
    """The line of a row's fields; those that are None are left out.

    Example:
        >>> line({"row": "step", "step": 1, "epoch": 0, "batch": None})
        b'{"row":"step","step":1,"epoch":0}\\n'
    """
    return f"{_ENCODER.encode({name: value for name, value in values.items() if value is not None})}\n".encode()


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What a call of a run came from.

    Args:
        run: a name of the first state, code, configuration and fingerprint, 12 hexadecimal digits.
        key: the seed of the run's key.
        tnt_func, torch: the versions.
        threads, cpu: what else the bits may depend on: torch's threads and the instructions it uses.
        code, config, fingerprint: as given to `record`.
        data: what the loop noted of the training data: type, length, batch size, workers, sampler.
    """

    run: str
    key: int
    tnt_func: str
    torch: str
    threads: int
    cpu: str
    code: str | None
    config: Mapping[str, Any]
    fingerprint: str | None
    data: Mapping[str, Any]

    def differences(self, other: "Lineage") -> list[str]:
        """What differs between two, a line each."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return [f"{name}: {a!r} here, {b!r} there" for name, a, b in pairs if a != b and name != "run"]


@dataclass(frozen=True)
class Record:
    """A record that was read.

    Args:
        directory: of the record.
        rows: in the order of the run.
        ends: where each ends in the file, in bytes.
    """

    directory: Path
    rows: tuple[Row, ...]
    ends: tuple[int, ...]

    @classmethod
    def read(cls, directory: Directory) -> "Record":
        """The record of a directory.

        Raises:
            CheckpointError: there is none, or a whole line is damaged.
        """
        directory = Path(directory)
        try:
            text = (directory / ROWS).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{directory} has no record: {error.strerror}. Give the directory of "
                "observers=[tnt.replay.record(directory)]."
            ) from error
        rows, ends, end = list[Row](), list[int](), 0
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            end += len(line)
            try:
                rows.append(_row(line))
            except (ValueError, TypeError) as error:
                if not line.endswith(b"\n"):
                    break  # The last one, torn.
                raise CheckpointError(
                    f"line {number} of {directory / ROWS} is damaged: {error}. A record is replayed from the rows that "
                    "were written; restore the file from a backup, or record to another directory."
                ) from error
            ends.append(end)
        _check_order(directory, rows)
        return cls(directory, tuple(rows), tuple(ends))

    def path(self, row: Row) -> Path:
        """Where the checkpoint of a row is."""
        assert row.checkpoint is not None
        return self.directory / CHECKPOINTS / row.checkpoint

    def checkpoints(self) -> list[int]:
        """The indices of the rows of checkpoints that are there, in order."""
        rows = enumerate(self.rows)
        return [index for index, row in rows if row.row == "checkpoint" and self.path(row).is_dir()]

    def index(self, step: int) -> int:
        """The index of a step's row, or of the checkpoint that the record begins with.

        Raises:
            UsageError: the record has no such step.
        """
        first = next((index for index, row in enumerate(self.rows) if row.row == "checkpoint"), None)
        for index, row in enumerate(self.rows):
            if row.step == step and (row.row == "step" or index == first):
                return index
        steps = [row.step for row in self.rows]
        has = f"has the steps from {steps[0]} to {steps[-1]}" if steps else "is empty"
        raise UsageError(f"step {step} was asked for, and the record in {self.directory} {has}. Ask for one of those.")

    def after(self, index: int, end: int | None = None) -> list[Row]:
        """The rows of steps and epochs after an index, up to and including another."""
        return [row for row in self.rows[index + 1 : None if end is None else end + 1] if row.counts]

    def lineage_at(self, index: int) -> Lineage:
        """The lineage of the call that a row belongs to."""
        for row in reversed(self.rows[: index + 1]):
            if row.lineage is not None:
                return _lineage(self.directory, row.lineage)
        raise CheckpointError(f"{self.directory / ROWS} does not begin with a call. Restore the file from a backup.")

    def marks_at(self, index: int) -> dict[str, tuple[str, str]]:
        """The kind and mark of every leaf of a row, by path; empty where it has none."""
        found = self.rows[index].marks
        if found is None:
            return {}
        leaves = next((row.leaves for row in reversed(self.rows[: index + 1]) if row.leaves is not None), {})
        cut = [found[start : start + DIGITS] for start in range(0, len(found), DIGITS)]
        return dict(zip(leaves, zip(leaves.values(), cut, strict=False), strict=False))


def _row(line: bytes) -> Row:
    if not line.endswith(b"\n"):
        raise ValueError("it was cut short")
    row = Row(**json.loads(line))
    if (
        type(row.step) is not int
        or type(row.epoch) is not int
        or row.row not in ("call", "step", "epoch", "checkpoint")
    ):
        raise ValueError("it has no step, no epoch or no kind")
    return row


def _check_order(directory: Path, rows: list[Row]) -> None:
    places = [row.place for row in rows if row.counts]
    if any(a >= b for a, b in pairwise(places)) or any(a.place > b.place for a, b in pairwise(rows)):
        raise CheckpointError(
            f"the rows of {directory / ROWS} are not in the order of a run, or one is there twice; one process at a "
            "time records to a directory. Restore the file from a backup."
        )


def _lineage(directory: Path, found: Mapping[str, Any]) -> Lineage:
    try:
        return Lineage(**found)
    except TypeError as error:
        raise CheckpointError(f"{directory / ROWS} has a call without its lineage: {error}.") from error


@typed
def lineage(path: Directory) -> Lineage:
    """What a record or a checkpoint in it came from: of a record its last call, of a checkpoint the call that made it.

    Raises:
        CheckpointError: there is no record, or it has no such checkpoint.

    Example:
        >>> import tempfile
        >>> import tnt_func as tnt
        >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     recording = tnt.replay.record(directory, code="v3", config={"lr": 0.1})
        ...     _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(7)), [1], max_epochs=1, observers=[recording])
        ...     found = lineage(tnt.checkpoint.latest(f"{directory}/checkpoints"))
        >>> found.key, found.code, found.config, found.data["length"]
        (7, 'v3', {'lr': 0.1}, 1)
    """
    path = Path(path)
    if (path / ROWS).exists():
        record = Record.read(path)
        return record.lineage_at(len(record.rows) - 1)
    record = Record.read(path.parent.parent)
    for index, row in enumerate(record.rows):
        if row.checkpoint == path.name:
            return record.lineage_at(index)
    raise CheckpointError(f"{path} is in no record; {record.directory} has {len(record.checkpoints())} checkpoints.")
