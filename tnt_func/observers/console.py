"""A line of text for every epoch and every evaluation.

Example:
    >>> import tnt_func as tnt
    >>> metrics = {"loss": tnt.metrics.mean("loss")}
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}), metrics=metrics)
    >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1.0, 2.0], max_epochs=2, observers=[console()])
    train epoch 1, step 2: loss 1.5
    train epoch 2, step 4: loss 1.5
"""

import sys
from typing import Any, Protocol, runtime_checkable

from tnt_func.errors import UsageError
from tnt_func.events import Event, Observer
from tnt_func.observers.combinators import is_rank_zero
from tnt_func.observers.rows import metrics_of
from tnt_func.types import Point, typed


@runtime_checkable
class Text(Protocol):
    """A file of text that is open for writing.

    Example:
        >>> isinstance(sys.stderr, Text), isinstance("run.log", Text)
        (True, False)
    """

    def write(self, text: str, /) -> Any:
        """Add to it."""
        ...


@typed
def console(*, file: Text | None = None) -> Observer:
    """An observer that prints a line when an epoch of training, an evaluation or a prediction is over.

    The line has the epoch of the phase and the train steps, of the lifetime, and the unit's metrics in six digits.

    Args:
        file: open, written to by every rank that has it; None is the standard output of the moment, of rank 0 alone.

    Example:
        >>> console(file=sys.stderr)
        console()
    """
    return _Console(file)


class _Console:
    def __init__(self, file: Text | None):
        self._file: Any = file

    def __repr__(self) -> str:
        return "console()"

    def __call__(self, event: Event) -> None:
        if event.point != "epoch_end" or (self._file is None and not is_rank_zero()):
            return
        found, progress = metrics_of(event, members=False), event.state.progress
        metrics = ": " + ", ".join(f"{name} {value:.6g}" for name, value in found.items()) if found else ""
        where = f"{event.phase} epoch {progress.of(event.phase).epochs}, step {progress.train.steps}"
        print(where + metrics, file=sys.stdout if self._file is None else self._file)

    def check_part(self, combinator: str, point: Point) -> None:
        """Refuse what is told of steps alone."""
        if point != "epoch_end":
            raise UsageError(
                f"{combinator} was given console(), to tell it of {point} alone; it prints where an epoch is over. "
                "Write every(console(), epochs=2), say, and for lines of steps a function: "
                "every(lambda event: print(event.state.output), steps=100)."
            )
