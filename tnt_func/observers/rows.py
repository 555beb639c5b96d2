"""What is recorded of a run: a row of numbers for a step, an epoch or an evaluation, and what writes rows.

Laws:
    Rows come in the order of the run: their places never fall. The rows of a place are written before the event that
    a run resumes from there, so a resumed run that first cuts the rows after its place has each of them once.

Example:
    >>> row = Row(step=3, epoch=1, phase="eval", kind="epoch", metrics={"loss": 0.5})
    >>> row.place, row.metrics["loss"]
    ((3, 1), 0.5)
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from tnt_func.checkpoint.saving import numbers
from tnt_func.errors import UsageError, UsageTypeError, kind_of
from tnt_func.events import Event
from tnt_func.types import Phase

Kind: TypeAlias = Literal["step", "epoch"]
Place: TypeAlias = tuple[int, int]
"""Train steps and epochs completed, of the lifetime; places sort as a run goes."""

FIELDS = ("step", "epoch", "phase", "kind")


class Row(NamedTuple):
    """The numbers of one step, or of one epoch of training, evaluation or prediction.

    Args:
        step, epoch: train steps and epochs completed, of the lifetime; of an evaluation those of its state.
        phase: what the numbers are of.
        kind: "step" for the output of a train step, "epoch" for the metrics of a whole epoch.
        metrics: by name.
    """

    step: int
    epoch: int
    phase: Phase
    kind: Kind
    metrics: Mapping[str, float]

    @property
    def place(self) -> Place:
        """Where the run was."""
        return self.step, self.epoch

    def flat(self) -> dict[str, Any]:
        """As the row of a table: the fields, then the metrics; a metric named as a field gets "metrics." before it.

        Example:
            >>> Row(3, 1, "eval", "epoch", {"loss": 0.5, "step": 2.0}).flat()
            {'step': 3, 'epoch': 1, 'phase': 'eval', 'kind': 'epoch', 'loss': 0.5, 'metrics.step': 2.0}
        """
        named = {f"metrics.{name}" if name in FIELDS else name: value for name, value in self.metrics.items()}
        return {**dict(zip(FIELDS, self, strict=False)), **named}


@runtime_checkable
class Writer(Protocol):
    """Keeps rows, in memory, in a file or elsewhere. `recorder` gives it those of a run.

    Laws:
        `open(place)` leaves the rows up to the place and cuts those after it; `open(None)` leaves all. A row that
        `write` has returned from outlives the process. `close` may come twice, and before any `open`; the writer can be
        opened again.

    Example:
        >>> from tnt_func.observers import History
        >>> isinstance(History(), Writer)
        True
    """

    def open(self, place: Place | None) -> Any:
        """Make ready for rows after a place."""
        ...

    def write(self, row: Row) -> Any:
        """Keep one row."""
        ...

    def close(self) -> Any:
        """Release what is held."""
        ...


def check_writers(user: str, writers: Sequence[object]) -> None:
    """Refuse what is no writer, or there twice.

    Raises:
        UsageTypeError: one is something else: a class, say, and not what it makes.
        UsageError: one is there twice.

    Example:
        >>> check_writers("recorder", [print])
        Traceback (most recent call last):
        tnt_func.errors.UsageTypeError: recorder was given a builtin_function_or_method; it takes writers ...
    """
    for index, writer in enumerate(writers):
        if isinstance(writer, type) or not isinstance(writer, Writer):
            raise UsageTypeError(
                f"{user} was given {kind_of(writer)}; it takes writers of rows, one after the other. Write "
                f"{user}(tnt.observers.History(), tnt.observers.csv_writer('run.csv')), say."
            )
        if any(writer is other for other in writers[:index]):
            raise UsageError(f"{user} was given {writer!r} twice; it would have each row twice. Give it once.")


def tell_of_cut(count: int, where: object, place: Place | None) -> None:
    """Warn where a run that begins anew has cut rows, which are another run's.

    Args:
        count: of the rows.
        where: they stood.
        place: that the writer was opened at.
    """
    if count and place == (0, 0):
        warnings.warn(
            f"{count} rows of an earlier run were cut from {where}, which belongs to one run, and this one begins at "
            "step 0. Record it elsewhere, or resume the earlier one.",
            stacklevel=2,
        )


def metrics_of(event: Event, *, members: bool = True) -> dict[str, float]:
    """The metrics of an event's phase, so far in its epoch, that are one number; reading them waits for the device.

    Args:
        event: any.
        members: of an ensemble, whether each member's are wanted besides mean and standard deviation.

    Example:
        >>> from tnt_func.metrics import mean
        >>> from tnt_func.rng import key
        >>> from tnt_func.state import State
        >>> state = State(params={}, key=key(0), metrics={"eval": {"loss": mean("loss").of({"loss": 0.5})}})
        >>> metrics_of(Event("eval", "epoch_end", state))
        {'loss': 0.5}
    """
    phase, metrics = event.phase, event.state.metrics
    return numbers(event.state.replace(metrics={phase: metrics.get(phase, {})}), members=members)[phase]
