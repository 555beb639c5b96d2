"""Checkpoints while a run goes on: how often, which are kept, and that none is lost when the run ends early.

Example:
    >>> import tempfile
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> first = tnt.State(params=0, key=tnt.key(0))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     saving = checkpointer(directory, every_n_steps=2, keep=2)
    ...     state = tnt.train(unit, first, [1, 2, 3], max_epochs=2, observers=[saving])
    ...     [path.name for path in tnt.checkpoint.checkpoints(directory)]
    ['step-000000000004-epoch-000001', 'step-000000000006-epoch-000002']
"""

import math
import os
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tnt_func.checkpoint.listing import checkpoints, place, save_in, score
from tnt_func.checkpoint.restoring import inspect
from tnt_func.checkpoint.saving import make_ready, numbers, remove
from tnt_func.errors import CheckpointError, UsageError
from tnt_func.events import Event, refuse_a_part
from tnt_func.lines import LOCK, Hold
from tnt_func.observers.combinators import needs_all
from tnt_func.state import State, keep
from tnt_func.types import Mode, Phase, typed

OF_RANKS = (
    "Several ranks write one checkpoint by tnt.distributed.checkpointer(directory, mesh), or leave it to the first: "
    "rank_zero(checkpointer(directory))."
)


@typed
def checkpointer(
    directory: str | os.PathLike[str],
    *,
    every_n_steps: int | None = None,
    every_n_epochs: int | None = None,
    every_minutes: int | float | None = None,
    on_evaluation: bool = False,
    keep: int | None = None,
    keep_best: int = 0,
    metric: str | None = None,
    mode: Mode = "min",
    phase: Phase = "eval",
    asynchronous: bool = False,
) -> "Checkpointer":
    """An observer that saves the states a run can resume from.

    It saves at resumable events: when one of the cadences is due, and always at the end, on a pause, and on a failure
    the last resumable state. One state is one checkpoint, `checkpoint.name(state)` its name; of those with the same
    number of steps the last is kept. A directory belongs to one run at a time: several ranks write one checkpoint by
    `tnt.distributed.checkpointer`, or leave it to the first, `rank_zero(checkpointer(...))`.

    Args:
        directory: of the checkpoints; made when the run starts.
        every_n_steps, every_n_epochs: of the lifetime. Within a block of fused steps, at its end.
        every_minutes: since the start, or the last one that was saved.
        on_evaluation: after every evaluation.
        keep: so many of the latest; None is all.
        keep_best: so many more, the best by `metric`; NaN is never good. Needs `keep`.
        metric, mode, phase: as in `checkpoint.best`. The metrics of an evaluation count for the state it evaluated.
        asynchronous: training goes on while a thread writes. States are immutable, so nothing is copied for it but in
            a run that donates; one save is under way at most, and the next waits for it. Its error comes out at the
            next resumable event, or at the end.

    Raises:
        UsageError: the arguments contradict each other; out of the run, when another process writes there.
        CheckpointError: out of the run, when the directory or a checkpoint cannot be written.

    Example:
        >>> checkpointer("runs/7", every_n_epochs=1, keep=1, keep_best=3, metric="accuracy", mode="max")
        checkpointer('runs/7')
    """
    for given, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs), ("keep", keep)):
        if value is not None and value < 1:
            raise UsageError(
                f"checkpointer({given}={value}) was given; it is at least 1, or None. Write {given}=1, say."
            )
    if every_minutes is not None and not every_minutes > 0:
        raise UsageError(
            f"checkpointer(every_minutes={every_minutes}) was given; it is above 0. Write every_minutes=10."
        )
    if keep_best < 0 or (keep_best > 0) != (metric is not None) or (keep_best and keep is None):
        raise UsageError(
            f"checkpointer(keep={keep}, keep_best={keep_best}, metric={metric!r}) was given; the best are kept by a "
            "metric, beside the latest. Write keep=1, keep_best=3, metric='loss', say."
        )
    cadence = Cadence(every_n_steps, every_n_epochs, every_minutes, on_evaluation)
    return Checkpointer(Path(directory), cadence, Keeping(keep, keep_best, metric, mode, phase), asynchronous)


class Cadence(NamedTuple):
    """When to save, as `checkpointer` is told."""

    n_steps: int | None
    n_epochs: int | None
    minutes: float | None
    evaluation: bool


class Keeping(NamedTuple):
    """What to keep, as `checkpointer` is told."""

    latest: int | None
    best: int
    metric: str | None
    mode: Mode
    phase: Phase


class Checkpointer:
    """What `checkpointer` makes: called with every event, closed at the end.

    Attributes:
        directory: of the checkpoints.
        last: the path of the one saved last by this run, or None.
    """

    def __init__(self, directory: Path, cadence: Cadence, keeping: Keeping, asynchronous: bool):
        self.directory = directory
        self.last: Path | None = None
        self._cadence, self._keeping, self._asynchronous = cadence, keeping, asynchronous
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._state: State | None = None  # The last resumable one.
        self._saved: State | None = None
        self._evaluated = self._evaluation_due = self._judged = False
        self._scored, self._names = False, set[str]()  # Whether a save had the metric; the metrics that saves had.
        self._time = time.monotonic()
        self._hold = Hold(directory, directory / LOCK, OF_RANKS)
        self._steps = 0  # Of the last resumable state.
        self._others: set[str] | None = None  # Later ones that were there at the start; None where none has started.

    def __repr__(self) -> str:
        return f"checkpointer({str(self.directory)!r})"

    def __call__(self, event: Event) -> None:
        """Save where it is due."""
        if self._pending is not None and event.resumable and self._pending.done():
            self._finish()
        if event.phase == "eval" and event.point == "end":
            self._evaluated = self._evaluation_due = True
        if event.phase != "train":
            return
        if event.point == "start":
            self._start(event.state)
        elif event.point == "fetched":
            self._evaluated = False
        elif event.point in ("step_done", "epoch_done"):
            self._state, self._judged = event.state, self._evaluated
            if self._due(event):
                self._save(event.state, wait=not self._asynchronous, donated=event.donated)
            self._steps = event.state.progress.train.steps
        elif event.point == "end" and self._state is not None:
            self._save(self._state, wait=not self._asynchronous)
            self._tell_of_no_best()
        elif event.point in ("paused", "failed"):
            self._end_early(event)

    check_part, open = needs_all, refuse_a_part

    def _end_early(self, event: Event) -> None:
        if event.state is None and event.error is not None:
            # The step had already consumed it. What is being written was copied before.
            try:
                self._finish()
            finally:
                event.error.add_note(f"The last checkpoint is {self.last}.")
            return
        if self._others is None:
            return
        self._finish()
        self._judged = self._judged and event.state is self._state
        self._save(event.state, wait=True)

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: it could not be.
        """
        try:
            self._finish()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None
            self._state = self._saved = self._others = None
            self._hold.leave()

    def _start(self, state: State) -> None:
        self._hold.take()
        make_ready(self.directory)
        self._time, self._saved, self._state = time.monotonic(), None, None
        self._evaluated = self._evaluation_due = self._judged = False
        progress = state.progress.train
        here = (progress.steps, progress.epochs)
        self._steps = progress.steps
        later = [path.name for path in checkpoints(self.directory) if place(path)[:2] > here]
        self._others = set(later)
        if later:
            warnings.warn(
                f"{self.directory} has checkpoints of later steps than {progress.steps}, where this run starts: "
                f"{', '.join(later[:3])}. They stay until it gets there, and resume would take the latest of them. "
                "Train in another directory, or remove them.",
                stacklevel=2,
            )

    def _due(self, event: Event) -> bool:
        every, progress = self._cadence, event.state.progress.train
        return bool(
            (
                every.n_steps
                and event.point == "step_done"
                and progress.steps // every.n_steps > self._steps // every.n_steps
            )
            or (every.n_epochs and event.point == "epoch_done" and progress.epochs % every.n_epochs == 0)
            or (every.minutes and time.monotonic() - self._time >= 60 * every.minutes)
            or (every.evaluation and self._evaluation_due)
        )

    def _save(self, state: State, *, wait: bool, donated: bool = False) -> None:
        self._finish()
        if state is self._saved:
            return
        metrics = {phase: found for phase, found in numbers(state).items() if phase != "eval" or self._judged}
        self._time, self._evaluation_due = time.monotonic(), False
        self._scored |= self._keeping.metric in metrics.get(self._keeping.phase, {})
        self._names.update(f"{phase} {name}" for phase, found in metrics.items() for name in found)
        if wait:
            self._write(state, metrics)
        else:
            self._writer = self._writer or ThreadPoolExecutor(1, "checkpointer")
            # The next step may write over what the thread reads.
            self._pending = self._writer.submit(self._write, keep(state) if donated else state, metrics)
        self._saved = state

    def _tell_of_no_best(self) -> None:
        keep = self._keeping
        if keep.best and not self._scored:
            warnings.warn(
                f"checkpointer was given keep_best={keep.best} and metric={keep.metric!r}, phase={keep.phase!r}, which "
                f"no state had that was saved in this run; so none was kept for it. They had {sorted(self._names)}. "
                "Name one of these, or save at evaluations: on_evaluation=True.",
                stacklevel=2,
            )

    def _finish(self) -> None:
        """Wait for what is being written, and raise its error."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except BaseException:
            self._saved = None
            raise

    def _write(self, state: State, metrics: dict[str, dict[str, float]]) -> None:
        path = save_in(self.directory, state, metrics)
        self._others = {other for other in self._others or () if place(self.directory / other)[:2] > place(path)[:2]}
        self.last = path
        self._prune()

    def _prune(self) -> None:
        keep = self._keeping
        listed = [path for path in checkpoints(self.directory) if path.name not in (self._others or ())]
        last = {place(path)[0]: path for path in listed}  # Of each number of steps, the last.
        kept = set([*last.values()][-keep.latest :] if keep.latest else last.values())
        scores = {path: self._score(path) for path in last.values()} if keep.best else {}
        kept.update(sorted((path for path in scores if scores[path] < math.inf), key=lambda p: scores[p])[: keep.best])
        for path in listed:
            if path not in kept:
                remove(path)

    def _score(self, path: Path) -> float:
        keep = self._keeping
        try:
            return score(inspect(path), keep.metric or "", keep.mode, keep.phase)
        except CheckpointError:
            return math.inf
