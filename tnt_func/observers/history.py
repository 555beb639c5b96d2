"""The rows of a run in memory.

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}))
    >>> history = History()
    >>> observers = [tnt.observers.recorder(history, every_n_steps=1)]
    >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [0.5, 0.25], max_epochs=2, observers=observers)
    >>> [row.metrics["loss"] for row in history[-3:]]
    [0.25, 0.5, 0.25]
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, overload

from tnt_func.errors import UsageTypeError, kind_of, optional
from tnt_func.observers.rows import FIELDS, Place, Row, Writer, check_writers, tell_of_cut

BEFORE_ALL: Place = (-1, -1)
SHOWN, LAST = 4, 10
"""Numbers that a repr has, and rows that a notebook shows."""


class History(Sequence[Row]):
    """A `Writer` that is a sequence of its rows. It is there after the run; a process that is killed loses it.

    Args:
        rows: to begin with.

    Raises:
        UsageTypeError: one is no `Row`.

    Example:
        >>> history = History([Row(1, 0, "train", "step", {"loss": 0.5}), Row(1, 1, "eval", "epoch", {"loss": 0.7})])
        >>> len(history), history[0].metrics, history[1:]
        (2, {'loss': 0.5}, History(1 row, step 1, eval loss 0.7))
    """

    def __init__(self, rows: Iterable[Row] = ()):
        self._rows = list(rows)
        for row in self._rows:
            if not isinstance(row, Row):
                raise UsageTypeError(
                    f"History was given {kind_of(row)} as a row; it has rows of a run. Write "
                    "History([Row(1, 0, 'train', 'step', {'loss': 0.5})]), or read_jsonl(path) for a file."
                )

    def __repr__(self) -> str:
        """How many rows, of which steps, and the first numbers of the last."""
        count = f"{len(self):,} row{'s' * (len(self) != 1)}"
        if not self._rows:
            return f"History({count})"
        first, last = self._rows[0].step, self._rows[-1]
        steps = f"step {first}" if first == last.step else f"steps {first:,} to {last.step:,}"
        numbers = [f"{last.phase} {name} {value:.4g}" for name, value in last.metrics.items()]
        return f"History({', '.join([count, steps, *numbers[:SHOWN], *['...'][: len(numbers) > SHOWN]])})"

    def _repr_html_(self) -> str:
        """A table of the last rows, for notebooks."""
        from html import escape

        flat = [row.flat() for row in self._rows[-LAST:]]
        names = list(dict.fromkeys((*FIELDS, *(name for row in flat for name in row))))
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        lines = [[row.get(name, "") for name in names] for row in flat]
        cells = [[f"{cell:.6g}" if isinstance(cell, float) else escape(str(cell)) for cell in line] for line in lines]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells)
        return f"<table><caption>{escape(repr(self))}</caption><tr>{head}</tr>{body}</table>"

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "History": ...
    def __getitem__(self, index: int | slice) -> "Row | History":
        """A row, or the history of a slice of them."""
        return History(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def open(self, place: Place | None) -> None:
        """Cut the rows after a place."""
        before, self._rows = len(self), [row for row in self._rows if place is None or row.place <= place]
        tell_of_cut(before - len(self), "a History", place)

    def write(self, row: Row) -> None:
        """Keep a row."""
        self._rows.append(row)

    def close(self) -> None:
        """Nothing is held."""

    def write_to(self, *writers: Writer) -> None:
        """Give the rows to writers, in place of any that these have.

        Args:
            writers: closed afterwards.

        Raises:
            UsageTypeError, UsageError: one is no writer, is there twice, or is this history.

        Example:
            >>> other = History([Row(7, 0, "train", "step", {"loss": 0.25})])
            >>> History([Row(1, 0, "train", "step", {"loss": 0.5})]).write_to(other)
            >>> [row.step for row in other]
            [1]
        """
        check_writers("write_to", [self, *writers])
        with ExitStack() as all_of_them:
            for writer in writers:
                all_of_them.callback(writer.close)
                writer.open(BEFORE_ALL)
            for row in self:
                for writer in writers:
                    writer.write(row)

    def to_pandas(self) -> Any:
        """A pandas DataFrame: step, epoch, phase, kind, and a column for every metric, NaN where a row has it not.

        Raises:
            MissingExtraError: pandas is not installed.

        Example:
            >>> frame = History([Row(1, 0, "train", "step", {"loss": 0.5})]).to_pandas()
            >>> frame.columns.tolist(), frame["loss"].tolist()
            (['step', 'epoch', 'phase', 'kind', 'loss'], [0.5])
        """
        pandas = optional("pandas", user="History.to_pandas", extra="pandas")
        flat = [row.flat() for row in self._rows]
        return pandas.DataFrame(flat, columns=list(dict.fromkeys((*FIELDS, *(name for row in flat for name in row)))))
