"""Rows as named scalars over the train steps of the lifetime, as TensorBoard, MLflow and Weights & Biases show them.

Metrics of epochs and evaluations are "train/loss", "eval/loss"; a step's output is "train_step/loss". Beside each row
stands the epoch, "epoch/train_step" and so on: with the step it tells which row a number is of.

Example:
    >>> scalars(Row(3, 1, "eval", "epoch", {"loss": 0.5}))
    {'epoch/eval': 1.0, 'eval/loss': 0.5}
"""

import logging
import sys
from collections.abc import Iterable

from tnt_func.observers.rows import Row


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row by the names they are shown under, the epoch first."""
    group = row.phase if row.kind == "epoch" else f"{row.phase}_{row.kind}"
    return {f"epoch/{group}": float(row.epoch)} | {f"{group}/{name}": float(x) for name, x in row.metrics.items()}


class Recorded:
    """What a store that takes nothing back has already, to leave those rows out that a resumed run takes again.

    By law a resumed run takes them again with the same numbers. Where one is different, a measured time, or where it is
    another run, what is recorded stays; the first such row is logged as a warning to "tnt_func.observers".

    Args:
        store: its name, for the warning.
        points: names, steps and values of all its scalars.

    Example:
        >>> row = Row(3, 1, "eval", "epoch", {"loss": 0.5})
        >>> recorded = Recorded("the store", [("epoch/eval", 3, 1.0), ("eval/loss", 3, 0.5)])
        >>> row in recorded, row._replace(step=4) in recorded
        (True, False)
    """

    def __init__(self, store: str, points: Iterable[tuple[str, int, float]] = ()):
        self._store, self._warned = store, False
        self._values = dict[tuple[str, int], set[str]]()
        for name, step, value in points:
            self._values.setdefault((name, step), set()).add(_stored(value))

    def __contains__(self, row: Row) -> bool:
        found = [(name, value, self._values.get((name, row.step), set())) for name, value in scalars(row).items()]
        if _stored(found[0][1]) not in found[0][2]:
            return False
        different = [(name, value, old) for name, value, old in found[1:] if _stored(value) not in old]
        if different and not self._warned:
            self._warned = True
            name, value, old = different[0]
            logging.getLogger("tnt_func.observers").warning(
                "%s has %s = %s at step %d, and this run has %r there. What is recorded stays. A different run needs a "
                "name of its own.",
                *(self._store, name, " or ".join(sorted(old)) or "nothing", row.step, value),
            )
        return True


def _stored(value: float) -> str:
    """A number as every store has it: SQL knows no infinity, and SQLite no negative zero."""
    return repr(min(max(value, -sys.float_info.max), sys.float_info.max) + 0.0)
