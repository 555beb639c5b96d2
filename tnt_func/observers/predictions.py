"""The outputs of steps as a table with a row for every example, in CSV or Parquet.

Example:
    >>> import tempfile
    >>> import torch
    >>> import tnt_func as tnt
    >>> unit = tnt.PredictUnit(predict_step=lambda state, batch: (state, {"x": batch, "double": 2 * batch}))
    >>> state, data = tnt.State(params={}, key=tnt.key(0)), [torch.tensor([1, 2]), torch.tensor([3])]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = tnt.predict(unit, state, data, observers=[predictions(f"{directory}/all.csv")])
    ...     print(Path(f"{directory}/all.csv").read_text().strip())
    x,double
    1,2
    2,4
    3,6
"""

import csv
import errno
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tnt_func import pytree as trees
from tnt_func.errors import UsageError, kind_of, optional
from tnt_func.events import Event, refuse_a_part
from tnt_func.lines import Hold, writable
from tnt_func.observers.combinators import needs_all
from tnt_func.types import Phase, typed

ROW_GROUP = 16 * 2**20
"""So many bytes of rows are kept in memory until Parquet writes them as a group."""


def outputs(event: Event) -> Mapping[str, Any]:
    """The entries of a step's output that have a dimension; an output that is one tensor is the column "output".

    Example:
        >>> from tnt_func.state import State
        >>> state = State(params={}, key=None, output={"label": torch.tensor([1, 0]), "loss": torch.tensor(0.5)})
        >>> outputs(Event("predict", "step_end", state))
        {'label': tensor([1, 0])}
    """
    output = event.state.output
    entries = output if isinstance(output, Mapping) else {"output": output}
    return {name: x for name, x in entries.items() if (x.ndim if isinstance(x, torch.Tensor) else _is_column(x))}


@typed
def predictions(
    path: str | os.PathLike[str],
    *,
    columns: Callable[[Event], Mapping[str, Any]] = outputs,
    phase: Phase = "predict",
) -> "Predictions":
    """An observer that writes the outputs of a phase to a file, a row for every example of every batch.

    The file appears, in place of one that is there, when the phase is over, and then it is whole: whoever is killed, or
    fails, before leaves what was there. So the observer needs all the events of the phase; inside `every` or `on` it
    would not see the end, and is refused. No more than a batch, or a group of rows, is held in memory; `predict` itself
    keeps every output, `predict_events` does not. Reading an output waits for the device.

    In CSV floats read back as they were, and what has further dimensions is a list in JSON; in Parquet it is a list,
    and bfloat16 is float32.

    Args:
        path: ends in ".csv" or ".parquet"; its directory is made. Of several ranks one writes it, `rank_zero` around,
            for the outputs of `data_parallel` are whole on each; or write f"rank-{world.rank}.csv".
        columns: called at every step; values by name, tensors [batch, ...], lists or tuples, all of one length. The
            batch is there too: `lambda event: {"id": event.batch["id"], "score": event.state.output}`.
        phase: whose steps; "eval" inside `fit` leaves the outputs of the last evaluation.

    Raises:
        UsageError: another ending; inside of `every` or `on`; out of the run, where another process writes it, or
            columns are missing, or unlike each other or those before.
        CheckpointError: out of the run, where the path is a directory, or cannot be written.
        MissingExtraError: Parquet without pyarrow.

    Example:
        >>> predictions("all.csv")
        predictions('all.csv')

    References:
        torchtnt.framework.callbacks.BaseCSVWriter.
    """
    where = Path(path)
    if where.suffix == ".csv":
        return Predictions(where, columns, phase, Csv)
    if where.suffix == ".parquet":
        arrow = optional("pyarrow", user="predictions", extra="parquet")
        parquet = optional("pyarrow.parquet", user="predictions", extra="parquet", package="pyarrow")
        return Predictions(where, columns, phase, lambda at: Parquet(at, arrow, parquet))
    raise UsageError(f"{str(path)!r} was given; predictions end in .csv or .parquet. Write {where.stem}.csv, say.")


class Table(Protocol):
    """A file of rows under way."""

    def write(self, columns: Mapping[str, Any]) -> None:
        """Add rows, given as columns."""
        ...

    def close(self) -> None:
        """Bring the file to its end."""
        ...


class Predictions:
    """What `predictions` makes: called with every event, closed at the end."""

    def __init__(
        self, path: Path, columns: Callable[[Event], Mapping[str, Any]], phase: Phase, table: Callable[[Path], Table]
    ):
        self._path, self._columns, self._make = path, columns, table
        self._phase: Phase = phase
        self._new, self._hold = path.with_name(f".{path.name}.new"), Hold(path, path.with_name(f".{path.name}.lock"))
        self._table: Table | None = None
        self._names: list[str] | None = None
        self._begun = set[Phase]()

    def __repr__(self) -> str:
        return f"predictions({str(self._path)!r})"

    def __call__(self, event: Event) -> None:
        """Write the rows of a step, and at the end let the file appear."""
        if event.phase != self._phase:
            if event.point == "fetched":
                self._begun.add(event.phase)
            return
        self._begun.add(event.phase)
        if event.point == "start":
            self._start()
        elif event.point == "step_end":
            self._write(event)
        elif event.point == "end":
            self._finish()

    check_part = needs_all

    def open(self, event: Event) -> None:
        """Called where the start of a run is not passed on: its end would not be either."""
        refuse_a_part(self, event, self._phase)

    def close(self) -> None:
        """Remove what was not finished; warn where the phase never came."""
        self._clear()
        begun, self._begun = self._begun, set()
        if begun and self._phase not in begun:
            warnings.warn(
                f"{self!r} wrote nothing: it is given the steps of {self._phase}, and the run had those of "
                f"{' and '.join(sorted(begun))}. Write predictions(..., phase={min(begun)!r}), say.",
                stacklevel=2,
            )

    def _clear(self) -> None:
        table, self._table, self._names = self._table, None, None
        try:
            if table is not None:
                table.close()
        finally:
            if table is not None:
                self._new.unlink(missing_ok=True)
            self._hold.leave()

    def _start(self) -> None:
        self._clear()
        self._hold.take()
        with writable(self._path):
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    def _write(self, event: Event) -> None:
        columns = self._columns(event)
        if not isinstance(columns, Mapping):
            raise UsageError(
                f"columns= gave {kind_of(columns)}; it gives columns by name. Write "
                "columns=lambda event: {'score': event.state.output}, say."
            )
        self._check(columns)
        if self._table is None:
            with writable(self._path):
                self._table = self._make(self._new)
        with writable(self._path):
            self._table.write({name: _read(column) for name, column in columns.items()})

    def _finish(self) -> None:
        with writable(self._path):
            self._table = self._table or self._make(self._new)  # Of no batch an empty one.
            self._table.close()
            with open(self._new, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._new, self._path)
        self._table = self._names = None
        self._hold.leave()

    def _check(self, columns: Mapping[str, Any]) -> None:
        wrong = [f"{name}: {kind_of(x)}" for name, x in columns.items() if not _is_column(x)]
        lengths = {} if wrong else {name: len(x) for name, x in columns.items()}
        if wrong or not columns or len(set(lengths.values())) > 1:
            raise UsageError(
                f"predictions were given the columns {wrong or lengths}; each is a tensor [batch, ...], a list or a "
                "tuple, of one length. Give columns=lambda event: {'score': event.state.output}, say."
            )
        self._names = self._names or list(columns)
        if self._names != list(columns):
            raise UsageError(
                f"predictions were given the columns {list(columns)} after {self._names}; all steps have the same. "
                "Choose them by columns=lambda event: {...}."
            )


def _read(column: torch.Tensor | Sequence[Any]) -> torch.Tensor | Sequence[Any]:
    """On the CPU; tensors in a list, which may have shapes of their own, as lists of numbers."""
    if isinstance(column, torch.Tensor):
        return column.detach().cpu()
    return trees.map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, column)


def _is_column(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, torch.Tensor) else isinstance(value, list | tuple)


class Csv:
    """A CSV file; what is not one value is a list in JSON.

    Args:
        path: of the file; it is begun anew.
    """

    def __init__(self, path: Path):
        self._file = open(path, "w", newline="")
        self._begun = False

    def write(self, columns: Mapping[str, Any]) -> None:
        """Add lines."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        if not self._begun:
            rows.writerow(columns)
        self._begun = True
        rows.writerows(zip(*map(_cells, columns.values()), strict=True))
        self._file.write(text.getvalue())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cells(column: torch.Tensor | Sequence[Any]) -> list[Any]:
    values = column.tolist() if isinstance(column, torch.Tensor) else column
    return [json.dumps(value) if isinstance(value, list | tuple) else value for value in values]


class Parquet:
    """A Parquet file, in groups of rows.

    Args:
        path: of the file; it is begun anew.
        arrow, parquet: the modules.
    """

    def __init__(self, path: Path, arrow: Any, parquet: Any):
        self._path, self._arrow, self._parquet = path, arrow, parquet
        self._waiting, self._bytes = list[Any](), 0
        self._writer: Any = None

    def write(self, columns: Mapping[str, Any]) -> None:
        """Add rows, and write those that are a group."""
        table = self._arrow.table({name: self._array(name, column) for name, column in columns.items()})
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._path, table.schema)
        if table.schema != self._writer.schema:
            raise UsageError(
                f"predictions were given columns of the types {_types(table.schema)} after "
                f"{_types(self._writer.schema)}; all steps have the same. Convert them in columns=lambda event: ..."
            )
        self._waiting.append(table)
        self._bytes += table.nbytes
        if self._bytes >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what waits and the footer; of nothing a file without columns."""
        self._writer = self._writer or self._parquet.ParquetWriter(self._path, self._arrow.schema([]))
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(self._arrow.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._bytes = [], 0

    def _array(self, name: str, column: torch.Tensor | Sequence[Any]) -> Any:
        if not isinstance(column, torch.Tensor):
            # The type of a list in which all are empty, or None, is known from the first batch alone.
            return self._arrow.array(column, self._writer.schema.field(name).type if self._writer else None)
        values = column.float() if column.dtype == torch.bfloat16 else column
        array, shape = self._arrow.array(values.reshape(-1).numpy()), column.shape
        for dimension in range(len(shape) - 1, 0, -1):
            offsets = torch.arange(shape[:dimension].numel() + 1, dtype=torch.int32) * shape[dimension]
            array = self._arrow.ListArray.from_arrays(self._arrow.array(offsets.numpy()), array)
        return array


def _types(schema: Any) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}
