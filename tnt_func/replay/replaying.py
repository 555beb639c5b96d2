"""Going through recorded steps again, from a checkpoint of the record.

How long an epoch was, the record knows: limits need not be given again, so a run that was stopped, resumed and given
other limits on the way is replayed as it was.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tnt_func.checkpoint.restoring import restore
from tnt_func.data.cursors import describe
from tnt_func.errors import UsageError
from tnt_func.events import Event
from tnt_func.replay.marks import numbers, row_numbers
from tnt_func.replay.rows import Directory, Record, Row
from tnt_func.runs import fit_events, train_events
from tnt_func.state import State, digest
from tnt_func.transitions import prepare, start_epoch
from tnt_func.types import Batch, typed
from tnt_func.unit import RESERVED, FitUnit, TrainUnit, attach

LIMITS = ("max_epochs", "max_steps", "max_steps_per_epoch", "max_train_steps_per_epoch")


class Passed(NamedTuple):
    """A recorded step or epoch, gone through again: its row, and what it was this time."""

    row: Row
    state: State
    batch: Batch
    numbers: Mapping[str, Any]


class Strayed(UsageError):
    """A replayed run took another way than the record: an epoch was longer or shorter."""

    def __init__(self, said: str):
        self.said = said
        super().__init__(f"{said}; {_OTHERS}")


_OTHERS = (
    "a replay gives the bits of the run where unit, data and options are those of the run. Pass those; "
    "tnt.replay.verify says where the two part."
)


@dataclass(frozen=True)
class Rerun:
    """A record and what its run was made of.

    Args:
        record: of the run.
        unit, data: as given to the run.
        like: a prepared state, to restore checkpoints into.
        options: of the call, without its limits.
    """

    record: Record
    unit: TrainUnit | FitUnit
    data: Any
    like: State
    options: Mapping[str, Any]

    @classmethod
    def of(cls, directory: Directory, unit: Any, state: State, data: Any, options: Mapping[str, Any]) -> "Rerun":
        """A rerun out of the arguments of a public function."""
        if isinstance(data, Iterator) or isinstance(options.get("eval_data"), Iterator):
            raise UsageError(
                f"a replay was given {type(data).__name__} as its data; an iterator gives its batches once. Pass what "
                "the run was given: a list, a DataLoader, a function of the epoch."
            )
        if isinstance(unit, FitUnit) != ("eval_data" in options):
            raise UsageError(
                f"a replay was given a {type(unit).__name__} {'and' if 'eval_data' in options else 'without'} "
                "eval_data; a recorded fit is replayed with a FitUnit and its eval_data=..., a recorded train with "
                "unit.train_unit and neither."
            )
        kept = {name: value for name, value in options.items() if name not in LIMITS}
        return cls(Record.read(directory), unit, data, prepare(unit, state, kept.get("callbacks", ())), kept)

    def restored(self, index: int) -> State:
        """The state of a row that is a checkpoint's."""
        return restore(self.record.path(self.record.rows[index]), self.like)

    def begun(self) -> State:
        """The state that a run begins with, once its start hooks ran."""
        return next(self._events(self.like, ())).state

    def nearest(self, index: int) -> int:
        """The index of the checkpoint to replay a row from."""
        rows = self.record.rows
        following = index + 1 < len(rows) and rows[index + 1].row == "checkpoint"
        near = index + 1 if following and rows[index].place == rows[index + 1].place else index
        found = [at for at in self.record.checkpoints() if at <= near]
        if not found:
            raise UsageError(
                f"step {rows[index].step} cannot be replayed: {self.record.directory} has no checkpoint before it any "
                "more. Ask for a later step."
            )
        return found[-1]

    def walk(self, state: State, rows: Sequence[Row], *, without: frozenset[int] = frozenset()) -> Iterator[Passed]:
        """The steps and epochs of these rows again, from the state before them.

        Args:
            state: where the first row began.
            rows: of steps and epochs, as they follow each other.
            without: steps that are not taken: counters move, and nothing else.

        Raises:
            Strayed: an epoch does not end where it did.
        """
        at = 0
        while at < len(rows):
            if rows[at].row == "step" and rows[at].step in without:
                state = self._passed_over(state)
                yield Passed(rows[at], state, None, {})
                at += 1
                continue
            output, evaluated = {}, False
            for event in self._events(state, rows[at:]):
                if event.phase == "train" and event.point == "step_end":
                    output = numbers(event.state.output)
                evaluated = evaluated or (event.phase == "eval" and event.point == "end")
                if event.point not in ("step_done", "epoch_done"):
                    continue
                state, progress = event.state, event.state.progress.train
                if (progress.steps, progress.epochs) != rows[at].place:
                    raise Strayed(
                        f"the record goes on to step {rows[at].step} with {rows[at].epoch} epochs, and the replayed "
                        f"run to step {progress.steps} with {progress.epochs}"
                    )
                stepped = event.point == "step_done"
                found = row_numbers(state, output, stepped=stepped, evaluated=evaluated)
                yield Passed(rows[at], state, event.batch, found or {})
                at, output, evaluated = at + 1, {}, False
                if at == len(rows) or event.point == "epoch_done" or rows[at].step in without:
                    break
            else:
                raise Strayed(f"the replayed run ended before step {rows[at].step} of the record")

    def _events(self, state: State, rows: Sequence[Row]) -> Iterator[Event]:
        progress, unit, options = state.progress.train, self.unit, dict(self.options)
        closing = next((row for row in rows if row.row == "epoch"), None)
        epochs = math.inf if closing is None else closing.epoch
        length = None if closing is None else progress.steps_in_epoch + closing.step - progress.steps
        if isinstance(unit, FitUnit):
            eval_data = options.pop("eval_data")
            options |= {"max_epochs": epochs, "max_train_steps_per_epoch": length}
            return fit_events(unit, state, self.data, eval_data, **options)
        return train_events(unit, state, self.data, max_epochs=epochs, max_steps_per_epoch=length, **options)

    def _passed_over(self, state: State) -> State:
        unit = self.unit.train_unit if isinstance(self.unit, FitUnit) else self.unit
        if not state.progress.train.is_open:
            state = state.remember(RESERVED, describe(self.data))
        state = start_epoch(attach(unit, *self.options.get("callbacks", ())), state)
        return state.replace(progress=state.progress.put("train", state.progress.train.after_step()))


@typed
def replay(
    directory: Directory, unit: TrainUnit | FitUnit, state: State, data: Any, step: int, **options: Any
) -> State:
    """The state of a recorded run after a step, to the bit: the nearest checkpoint, and the steps from there again.

    Args:
        directory: of the record.
        unit, state, data: as given to `train` or `fit`.
        step: of the lifetime, before its epoch is closed; the step that the record begins at gives the first state.
        options: the call's other arguments: callbacks; of a fit eval_data and when it evaluates. Limits are not needed.

    Raises:
        UsageError: the record has no such step, or the state is not the recorded one: unit or data are others.
        CheckpointError: there is no record, or the checkpoint is damaged.
        StructureError: unit and state have another structure than the checkpoint.

    Example:
        >>> import tempfile
        >>> import tnt_func as tnt
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
        >>> first, data = State(params=0, key=tnt.key(0)), [1, 2, 3]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = tnt.train(unit, first, data, max_epochs=2, observers=[tnt.replay.record(directory)])
        ...     replay(directory, unit, first, data, step=5).params
        9
    """
    rerun = Rerun.of(directory, unit, state, data, options)
    return replayed(rerun, rerun.record.index(step))


def replayed(rerun: Rerun, index: int) -> State:
    """The state of a row, compared with its digest where it has one."""
    start, row = rerun.nearest(index), rerun.record.rows[index]
    state = rerun.restored(start)
    for passed in rerun.walk(state, rerun.record.after(start, index)):
        state = passed.state
    if row.digest is not None and row.digest != digest(state):
        raise UsageError(f"the state after step {row.step} is not the one that was recorded; {_OTHERS}")
    return state
