"""What the loop tells: one event for every point of every phase, in order.

Laws:
    The points of a run are a word of this language, and the counters in the states are a function of it:

        train: start (epoch_start (fetched step_start STEP step_end [eval] step_done)* epoch_end [eval] epoch_done)* end
        eval:  start epoch_start (fetched step_start STEP step_end)* epoch_end end                  (predict likewise)

    From the state of a resumable event the loop continues with exactly the events that would have followed.
    `paused` and `failed` end a run early and carry its last resumable state.

Example:
    >>> event = Event("train", "step_done", state=None, resumable=True)
    >>> event.phase, event.point, event.resumable
    ('train', 'step_done', True)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from tnt_func.errors import ContractError, UsageError
from tnt_func.state import State
from tnt_func.types import Batch, Phase, Point


class Event(NamedTuple):
    """One point of one phase of a run.

    Args:
        phase: "train", "eval" or "predict".
        point: where in the phase.
        state: the state after the hooks of this point ran; of `paused` and `failed` the last resumable one. None in a
            `failed` event of a run whose step had already consumed that one.
        batch: the batch of a step, at the points from `fetched` to `step_done`.
        resumable: whether a run continues from `state` as if it had never stopped.
        reason: of `end` and `paused`, why.
        error: of `failed`, the error that is about to be raised.
        donated: whether a later step may write over the state: hold on to a copy of it, `tnt.keep(event.state)`.

    Example:
        >>> Event("eval", "end", state=None, reason="one epoch").reason
        'one epoch'
    """

    phase: Phase
    point: Point
    state: State
    batch: Batch = None
    resumable: bool = False
    reason: str | None = None
    error: BaseException | None = None
    donated: bool = False


Observer: TypeAlias = Callable[[Event], Any]
"""Watches a run: called with every event, in order; what it returns is ignored. It has effects and can change nothing.

An observer that also has a `close` method (`Closable`) is closed when its run is over, however it ends.
"""


@runtime_checkable
class Closable(Protocol):
    """Has a `close`, which the loop calls once after the last event.

    Example:
        >>> import io
        >>> isinstance(io.StringIO(), Closable)
        True
    """

    def close(self) -> Any:
        """Release what is held."""
        ...


def refuse_a_part(observer: Any, event: Event, phase: Phase = "train") -> None:
    """The `open` of an observer of a phase that a part of the events is no use to.

    Raises:
        UsageError: the phase starts, and the event of it was not passed on.

    Example:
        >>> refuse_a_part(print, Event("train", "start", state=None))
        Traceback (most recent call last):
        tnt_func.errors.UsageError: <built-in function print> is given a part of the events, ...
    """
    if event.phase == phase:
        raise UsageError(
            f"{observer!r} is given a part of the events, by every, on or when around it; it needs all of them, and "
            "would write nothing. Write it by itself in observers=[...]; it has cadences of its own."
        )


def fold(events: Iterator[Event], observers: Sequence[Observer]) -> State:
    """Hand every event to every observer and return the last state.

    An observer's error is thrown into the run, which tells everybody that it failed; then it is raised. What observers
    raise about a failure, or on closing, is added to the first error as notes. They are closed however it ends.

    Example:
        >>> fold(iter([Event("eval", "start", state=1), Event("eval", "end", state=2)]), [])
        2
    """
    event: Any = None
    try:
        for event in events:
            if not observers:
                continue
            try:
                _tell(event, observers)
            except BaseException as error:
                _tell(_thrown(events, error), observers)
    except BaseException as error:
        _close(observers, error)
        # A failed event holds its error, whose traceback holds this frame: a cycle, which would keep all of it alive.
        event = None
        raise
    _close(observers, None)
    return event.state


def _tell(event: Event, observers: Sequence[Observer]) -> None:
    if event.error is None:
        for observe in observers:
            observe(event)
        return
    for observe in observers:
        try:
            observe(event)
        except BaseException as error:
            event.error.add_note(f"Told of this, the observer {observe!r} raised {error!r}.")


def _thrown(events: Any, error: BaseException) -> Event:
    """The `failed` event that a run makes of an error thrown into it."""
    if isinstance(error, StopIteration):
        wrapped = ContractError(
            "an observer raised StopIteration; that would end the run in silence. Call next(iterator, default) there, "
            "or raise another error."
        )
        wrapped.__cause__ = error
        error = wrapped
    return events.throw(error)


def _close(observers: Sequence[Observer], first: BaseException | None) -> None:
    opened = first
    for observer in observers:
        if not isinstance(observer, Closable):
            continue
        try:
            observer.close()
        except BaseException as error:
            if first is None:
                first = error
            else:
                first.add_note(f"Closing the observer {observer!r} raised {error!r}.")
    if opened is None and first is not None:
        raise first
