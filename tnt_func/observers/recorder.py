"""The numbers of a run, read once and given to every writer.

Example:
    >>> import tnt_func as tnt
    >>> import torch
    >>> from torch import nn
    >>> optimizer = tnt.optim.sgd(tnt.schedules.linear(1.0, 0.0, steps=4))
    >>> unit, state = tnt.supervised(nn.Linear(1, 1), nn.functional.mse_loss, optimizer, key=tnt.key(0))
    >>> history = tnt.observers.History()
    >>> observers = [recorder(history, every_n_steps=2, hyperparameters=["lr"])]
    >>> data = [(torch.ones(1, 1), torch.ones(1, 1))] * 4
    >>> _ = tnt.train(unit.train_unit, state, data, max_epochs=1, observers=observers)
    >>> [(row.step, row.kind, row.metrics.get("optim.lr")) for row in history]
    [(2, 'step', 0.75), (4, 'step', 0.25), (4, 'epoch', None)]
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tnt_func import optim
from tnt_func.ensembles.stacking import told_apart
from tnt_func.errors import UsageError
from tnt_func.events import Closable, Event
from tnt_func.observers.combinators import needs_all
from tnt_func.observers.measures import Measure
from tnt_func.observers.rows import Row, Writer, check_writers, metrics_of
from tnt_func.replay.marks import numbers
from tnt_func.types import Point, PyTree, typed


@typed
def recorder(
    *writers: Writer, every_n_steps: int = 50, hyperparameters: Sequence[str] = (), measures: Sequence[Measure] = ()
) -> "Recorder":
    """An observer that records a run: rows of steps, epochs and evaluations, the same for every writer.

    A row has what is one number: of a step, the entries of its output; of an epoch and an evaluation, the unit's
    metrics; and what the measures read there. Of an ensemble, "loss" is the mean of its members, and "loss.std",
    "loss.0", "loss.1", ... are there too. Where there is no number, there is no row; a warning says so where training
    leaves none at all. A call of `train` or `fit` that begins where the rows already have been cuts those after that
    place; `evaluate` and `predict` on their own add to them.

    Numbers are read from the device when a row is due and at no other time: that is the only wait for it.

    It has a cadence of its own for steps. Inside `every`, for rows every so many seconds say, that of `every` holds,
    and every_n_steps is 1; `on` and `when` choose among the rows.

    Args:
        writers: `History()`, `csv_writer(path)`, `jsonl_writer(path)`, `tensorboard_writer(directory)`, or any other
            `Writer`, each of one recorder alone.
        every_n_steps: train steps of the lifetime from row to row; 1 waits for the device at every step.
        hyperparameters: names of those to add to the rows of steps, "lr" say, as "optim.lr" after the step; where there
            are several of a name, of groups or in a tuple, they are numbered: "optim.betas.0". Not with `fuse=`,
            between whose steps no optimizer's state is there.
        measures: `timing()`, `throughput()`, `system()`, or any other `Measure`, each of one recorder alone. They need
            all events, so the recorder is then in no `every` or `on`.

    Raises:
        UsageError: there is no writer, or one twice; every_n_steps is below 1; an `every` around it with another
            cadence; when the run starts, the optimizer has no such hyper-parameter.
        UsageTypeError: a writer is a class or a function, not what it makes.

    Example:
        >>> from tnt_func.observers import History
        >>> recorder(History(), every_n_steps=10, hyperparameters=["lr"])
        recorder(History(0 rows))
    """
    if not writers:
        raise UsageError(
            "recorder() was given no writer; it gives the rows of a run to writers. Write "
            "recorder(tnt.observers.History()), say."
        )
    check_writers("recorder", writers)
    if every_n_steps < 1:
        raise UsageError(
            f"recorder(every_n_steps={every_n_steps}) was given; it is at least 1. Write every_n_steps=50."
        )
    if isinstance(hyperparameters, str):
        raise UsageError(
            f"recorder(hyperparameters={hyperparameters!r}) was given; it takes names. Write [{hyperparameters!r}]."
        )
    return Recorder(writers, every_n_steps, tuple(hyperparameters), tuple(measures))


class Recorder:
    """What `recorder` makes: called with every event, closed at the end."""

    def __init__(
        self,
        writers: tuple[Writer, ...],
        every_n_steps: int,
        hyperparameters: tuple[str, ...],
        measures: tuple[Measure, ...],
    ):
        self._writers, self._every, self._hyperparameters = writers, every_n_steps, hyperparameters
        self._measures = measures
        self._opened = self._wrote = self._was_due = False

    def __repr__(self) -> str:
        return f"recorder({', '.join(map(repr, self._writers))})"

    def __call__(self, event: Event) -> None:
        """Write what is due."""
        if event.point == "start":
            self.open(event)
            return
        for measure in self._measures:
            measure(event)
        if event.point == "step_end" and event.phase == "train":
            if event.state.progress.train.steps % self._every == 0:
                found = {name: float(value) for name, value in numbers(told_apart(event.state)).items()}
                if self._hyperparameters:
                    found.update(_hyperparameters(event.state.opt_state, self._hyperparameters))
                self._write(event, "step", found)
        elif event.point == "epoch_end":
            self._write(event, "epoch", metrics_of(event))

    def check_part(self, combinator: str, point: Point) -> None:
        """Refuse what would leave measures wrong, no row, or a row of a step where two cadences meet."""
        if self._measures or point not in ("step_end", "epoch_end"):
            needs_all(self, combinator, point)
        if combinator == "every" and point == "step_end" and self._every > 1:
            raise UsageError(
                f"every was given {self!r}, which has a cadence of its own, every_n_steps={self._every}; a row of a "
                "step would need both. Write recorder(..., every_n_steps=n) without every, or every_n_steps=1 inside."
            )

    def open(self, event: Event) -> None:
        """Bring the writers to where a run starts; an evaluation inside training changes nothing."""
        for measure in self._measures:
            measure(event)
        training = event.phase == "train"
        if self._opened and not training:
            return
        if training:
            _check(event.state.opt_state, self._hyperparameters)
        self._opened = True
        progress = event.state.progress.train
        for writer in self._writers:
            writer.open((progress.steps, progress.epochs) if training else None)

    def close(self) -> None:
        """Close the writers, and the measures that can be closed. Warn where there was nothing to write."""
        empty, self._opened, self._wrote, self._was_due = self._was_due and not self._wrote, False, False, False
        with ExitStack() as all_of_them:
            for measure in reversed(self._measures):
                if isinstance(measure, Closable):
                    all_of_them.callback(measure.close)
            for writer in reversed(self._writers):
                all_of_them.callback(writer.close)
        if empty:
            warnings.warn(
                f"{self!r} had nothing to write: no output of a step that was due, by every_n_steps={self._every}, and "
                "no metric of the unit was one number. Return {'loss': loss} from train_step with every_n_steps=1, "
                "or TrainUnit(..., metrics={'loss': tnt.metrics.mean('loss')}).",
                stacklevel=2,
            )

    def _write(self, event: Event, kind: Any, metrics: Mapping[str, float]) -> None:
        for measure in self._measures:
            metrics = {**metrics, **measure.read(event)}
        self._was_due |= event.phase == "train"
        if not metrics:
            return
        self._wrote = True
        progress = event.state.progress.train
        row = Row(progress.steps, progress.epochs, event.phase, kind, metrics)
        if not self._opened:
            # It was not told of the start, or a run inside of this one that has the same recorder closed it.
            self._opened = True
            for writer in self._writers:
                writer.open(None)
        for writer in self._writers:
            writer.write(row)


def _check(opt_state: PyTree, names: Sequence[str]) -> None:
    known = sorted({name for values in optim.hyperparameters(opt_state) for name in values})
    if missing := [name for name in names if name not in known]:
        raise UsageError(
            f"recorder(hyperparameters={missing}) was given; the optimizer has {known}. Write one of those."
        )


def _hyperparameters(opt_state: PyTree, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        held = [values[name] for values in optim.hyperparameters(opt_state) if name in values]
        yield from _flat(f"optim.{name}", held[0] if len(held) == 1 else held)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, tuple | list) or getattr(value, "ndim", 0) == 1:
        for index, part in enumerate(value):
            yield from _flat(f"{name}.{index}", part)
    elif value is not None:
        yield name, float(value)
