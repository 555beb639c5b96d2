"""The loop: what happens in which order, told as events.

    train:
        START
        while an epoch is open, or (no stop, and steps < max_steps and epochs < max_epochs):
            if no epoch is open: metrics = empty; EPOCH_START
            for batch in the epoch's data, from steps_in_epoch on, until stop, max_steps or max_steps_per_epoch:
                yield fetched; STEP_START; state, output = train_step(state, batch)
                steps += 1; steps_in_epoch += 1; metrics = merge(metrics, output); STEP_END
                if due: EVALUATE
                yield step_done; if pause_when(): yield paused; return
                (with fuse=k: fetched for every step of a block, STEP_START and STEP_END for every one, then the rest;
                where nobody watches, the rest alone)
            epochs += 1; steps_in_epoch = 0; EPOCH_END
            if due: EVALUATE
            yield epoch_done; if pause_when(): yield paused; return
        END; stop = None

    evaluate, predict:
        START; if no epoch is open: metrics = empty; EPOCH_START
        for batch in data, until stop or max_steps_per_epoch:
            yield fetched; STEP_START; state, output = eval_step(state, batch)
            steps += 1; steps_in_epoch += 1; metrics = merge(metrics, output); STEP_END
        epochs += 1; steps_in_epoch = 0; EPOCH_END; END

A name in capitals is a point: its hooks run, the unit's first, then its event is yielded. Whatever is raised, a hook or
the consumer of the events included, becomes a `failed` event and is raised again.

Example:
    >>> from tnt_func import rng
    >>> from tnt_func.unit import TrainUnit
    >>> unit = Transitions(TrainUnit(train_step=lambda state, batch: (state, {})))
    >>> run, data = Run(State(params=0, key=rng.key(0))), Cursor([1], "train")
    >>> [event.point for event in run.events("train", training(run, unit, data, Limits.of(1, None, None)))]
    ['start', 'epoch_start', 'fetched', 'step_start', 'step_end', 'step_done', 'epoch_end', 'epoch_done', 'end']
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from tnt_func.data.cursors import Cursor, describe
from tnt_func.donation import between, consumed, take_consumed
from tnt_func.errors import DataError, UsageError, call
from tnt_func.events import Event
from tnt_func.state import State
from tnt_func.transitions import Transitions
from tnt_func.types import Batch, Limit, Phase
from tnt_func.unit import RESERVED

_NO_BATCH = object()


def limit(name: str, value: Limit) -> float:
    """A limit as a number; infinity where none is given.

    Raises:
        UsageError: it is negative, or no whole number.

    Example:
        >>> limit("max_steps", 3), limit("max_steps", None)
        (3, inf)
    """
    if value is None:
        return math.inf
    if isinstance(value, bool) or value < 0 or not (isinstance(value, int) or value == math.inf):
        raise UsageError(
            f"{name}={value!r} was given; a limit is a non-negative integer, math.inf, or None. Write {name}=10, say."
        )
    return value


@dataclass(frozen=True, slots=True)
class Limits:
    """Lifetime totals at which training ends, as numbers; infinity where there is none.

    Example:
        >>> Limits.of(4, None, None).epochs
        4
    """

    epochs: float
    steps: float
    steps_in_epoch: float

    @classmethod
    def of(cls, epochs: Limit, steps: Limit, steps_in_epoch: Limit, per_epoch: str = "max_steps_per_epoch") -> "Limits":
        """Limits out of an entry point's arguments.

        Raises:
            UsageError: a limit is no non-negative integer, or nothing ends the run.
        """
        limits = cls(limit("max_epochs", epochs), limit("max_steps", steps), limit(per_epoch, steps_in_epoch))
        if epochs is None and steps is None:
            raise UsageError(
                "neither max_epochs nor max_steps was given; a run needs one that ends it. Write max_epochs=10, or "
                "max_epochs=math.inf to train until a hook requests a stop."
            )
        if limits.steps_in_epoch == 0 and limits.epochs == math.inf:
            raise UsageError(
                f"{per_epoch}=0 was given without max_epochs; epochs without a step never reach max_steps. "
                "Write max_epochs=10, or leave the limit per epoch out."
            )
        return limits

    def reached(self, state: State) -> str | None:
        """Why no further epoch opens, or None."""
        progress = state.progress.train
        if state.stop is not None:
            return state.stop
        if progress.steps >= self.steps:
            return f"max_steps={self.steps} reached"
        return f"max_epochs={self.epochs} reached" if progress.epochs >= self.epochs else None

    def closes(self, state: State) -> bool:
        """Whether the open epoch takes no further step."""
        progress = state.progress.train
        return progress.steps >= self.steps or progress.steps_in_epoch >= self.steps_in_epoch or state.stop is not None


class _Pause(Exception):
    """Unwinds a run to its last resumable state."""


class Run:
    """What the events of one call share: the state it can resume from, and who may pause it.

    Args:
        state: the prepared state that the call begins with.
        pause_when: asked at resumable points and after evaluation steps.
        abandons: whether an evaluation inside may be given up, to be done again with the step that it followed.
        donates: whether the train step consumes the states that it is given; then no state is left to go back to while
            a step is under way, and no evaluation is given up.

    Example:
        >>> from tnt_func.rng import key
        >>> [event.point for event in Run(State(params=0, key=key(0))).events("train", iter(()))]
        []
    """

    def __init__(
        self,
        state: State,
        pause_when: Callable[[], bool] | None = None,
        *,
        abandons: bool = True,
        donates: bool = False,
    ):
        self.last, self.abandons, self._pause_when = state, abandons and not donates, pause_when
        self.tell: Callable[..., Event] = partial(Event, donated=True) if donates else Event
        self._donates, self._given = donates, state

    def step(self, unit: Transitions, state: State, batch: Batch) -> State:
        """The state after a train step; those it consumed can be read no more."""
        self._given = state
        after = unit.step(state, batch)
        if self._donates:
            take_consumed(state, self.last)
        return after

    def block(self, unit: Transitions, state: State, batches: Sequence[Batch]) -> Iterator[State]:
        """The states at the ends of steps that run as one."""
        self._given = state
        inner = unit.block(state, batches)
        if self._donates:
            take_consumed(state, self.last)
        return inner

    def done(self, point: Any, state: State, batch: Batch = None) -> Event:
        """The resumable event of a point."""
        self.last = self._given = state
        return self.tell("train", point, state, batch, resumable=True)

    def ask(self) -> None:
        """Unwind the run where `pause_when` says so."""
        if self._pause_when is not None and call("pause_when", self._pause_when):
            raise _Pause

    def events(self, phase: Phase, body: Iterator[Event]) -> Iterator[Event]:
        """The events of a run, with what ends it early: `paused`, or `failed` and then the error."""
        try:
            try:
                yield from body
            except _Pause:
                yield self.tell(phase, "paused", self.last, resumable=True, reason="pause_when returned True")
        except GeneratorExit:
            raise
        except BaseException as error:
            last: Any = None if consumed(self._given) else self.last
            yield self.tell(phase, "failed", last, resumable=phase == "train" and last is not None, error=error)
            raise


@dataclass(frozen=True, slots=True)
class Due:
    """The evaluations inside training, and when they are due.

    Args:
        evaluate: one evaluation of a state, as events that return the state after it.
        every_n_epochs: after every n-th epoch of the lifetime; 0 is never, None is 1 where no step cadence is given.
        every_n_steps: after every n-th step of the lifetime; 0 and None are never.
    """

    evaluate: Callable[[State], Generator[Event, None, State]]
    every_n_epochs: int | None = None
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "every_n_steps"):
            value: Any = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 0):
                raise UsageError(
                    f"evaluate_{name}={value!r} was given; a cadence is a positive integer, 0 for never, or None. "
                    f"Write evaluate_{name}=1, say."
                )

    def after_step(self, state: State) -> bool:
        """Whether an evaluation is due after the step that was just taken."""
        return bool(self.every_n_steps) and state.progress.train.steps % self.every_n_steps == 0

    def after_epoch(self, state: State) -> bool:
        """Whether an evaluation is due after the epoch that was just closed."""
        every = self.every_n_epochs
        if every is None:
            every = 0 if self.every_n_steps else 1
        return every > 0 and state.progress.train.epochs % every == 0


def training(run: Run, unit: Transitions, data: Cursor, limits: Limits, due: Due | None = None) -> Iterator[Event]:
    """The events of training from `run.last` on, `paused` and `failed` left to `run.events`."""
    state = unit.hooks("start", run.last)
    yield run.tell("train", "start", state)
    while state.progress.train.is_open or limits.reached(state) is None:
        with closing(data.epoch(state)) as batches:
            if not state.progress.train.is_open:
                state = unit.open_epoch(state.remember(RESERVED, describe(data.data)))
                yield run.tell("train", "epoch_start", state)
            while not limits.closes(state):
                if unit.fuse > 1:
                    size = _size(unit.fuse, state, limits, due)
                    after = yield from _block(run, unit, state, batches, size)
                    if after is None:
                        _check_fed(state, limits)
                        break
                    state, batch = after
                    if due is not None and due.after_step(state):
                        state = yield from due.evaluate(state)
                    yield run.done("step_done", state, batch)
                    run.ask()
                    continue
                batch = next(batches, _NO_BATCH)
                if batch is _NO_BATCH:
                    _check_fed(state, limits)
                    break
                yield run.tell("train", "fetched", state, batch)
                state = unit.hooks("step_start", state)
                yield run.tell("train", "step_start", state, batch)
                state = unit.hooks("step_end", run.step(unit, state, batch))
                yield run.tell("train", "step_end", state, batch)
                state = state.replace(output=None)
                if due is not None and due.after_step(state):
                    state = yield from due.evaluate(state)
                yield run.done("step_done", state, batch)
                run.ask()
        state = unit.close_epoch(state)
        yield run.tell("train", "epoch_end", state)
        if due is not None and due.after_epoch(state):
            state = yield from due.evaluate(state)
        yield run.done("epoch_done", state)
        run.ask()
    state = unit.hooks("end", state)
    yield run.tell("train", "end", state.replace(stop=None), reason=limits.reached(state))


def _size(fuse: int, state: State, limits: Limits, due: Due | None) -> int:
    """Steps of the block that comes next. It ends where the lifetime's steps are a multiple of `fuse`, or before."""
    progress = state.progress.train
    ends = [fuse, limits.steps - progress.steps, limits.steps_in_epoch - progress.steps_in_epoch]
    for every in (fuse, due.every_n_steps if due is not None else None):
        ends += [every - progress.steps % every] if every else []
    return int(min(ends))


def _block(
    run: Run, unit: Transitions, state: State, batches: Iterator[Batch], size: int
) -> Generator[Event, None, tuple[State, Batch] | None]:
    """The events of steps that run as one, up to the last `step_end`. Returns the state after it, and its batch.

    Nothing is told inside of a block that nobody watches.
    """
    fetched: list[Batch] = []
    for batch in itertools.islice(batches, size):
        if unit.watched:
            yield run.tell("train", "fetched", state, batch)
        fetched.append(batch)
    if not fetched:
        return None
    if not unit.watched:
        *_, inner = run.block(unit, state, fetched)
        return inner.replace(output=None), fetched[-1]
    inner = between(state)
    yield run.tell("train", "step_start", inner, fetched[0])
    # All of the block runs here; clocks find it in the first of its steps.
    after = run.block(unit, state, fetched)
    for place, batch in enumerate(fetched):
        if place:
            yield run.tell("train", "step_start", between(inner), batch)
        inner = next(after)
        yield run.tell("train", "step_end", inner, batch)
    return inner.replace(output=None), fetched[-1]


def evaluating(
    run: Run, unit: Transitions, data: Cursor, max_steps: float, state: State
) -> Generator[Event, None, State]:
    """The events of one evaluation or prediction: one epoch, always opened and closed. Returns the state after it.

    It begins with a clear stop; a stop that training had requested, or else one requested inside, is there afterwards.
    """
    phase: Phase = unit.phase
    wanted = state.stop
    state = unit.hooks("start", state.replace(stop=None))
    yield run.tell(phase, "start", state)
    with closing(data.epoch(state)) as batches:
        if not state.progress.of(phase).is_open:
            state = unit.open_epoch(state)
            yield run.tell(phase, "epoch_start", state)
        while state.stop is None and state.progress.of(phase).steps_in_epoch < max_steps:
            batch = next(batches, _NO_BATCH)
            if batch is _NO_BATCH:
                break
            yield run.tell(phase, "fetched", state, batch)
            state = unit.hooks("step_start", state)
            yield run.tell(phase, "step_start", state, batch)
            state = unit.hooks("step_end", unit.step(state, batch))
            yield run.tell(phase, "step_end", state, batch)
            state = state.replace(output=None)
            if run.abandons:
                run.ask()
    state = unit.close_epoch(state)
    yield run.tell(phase, "epoch_end", state)
    state = unit.hooks("end", state)
    yield run.tell(phase, "end", state.replace(stop=wanted), reason=state.stop or "the epoch is over")
    return state if wanted is None else state.replace(stop=wanted)


def _check_fed(state: State, limits: Limits) -> None:
    """An epoch without a batch must not repeat for ever."""
    if state.progress.train.is_open or limits.epochs < math.inf:
        return
    raise DataError(
        f"epoch {state.progress.train.epochs} gave no batch, and without max_epochs no limit can be reached; the run "
        "would not end. Pass data that has batches, or max_epochs."
    )
