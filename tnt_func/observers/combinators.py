"""Observers around observers: at which events one is called, on which rank, and what becomes of its errors.

What is inside is opened when a run starts, even where the `start` event itself is not passed on, and closed with what
is around it. All of them watch `train`, `evaluate`, `predict` and `fit` alike. `every` and `on` pass on one point: what
needs all the events of a phase, a progress bar say, is refused inside of them.

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    >>> told = lambda event: print(event.point, event.state.progress.train.steps)
    >>> watching = tee(every(told, steps=2), on("epoch_end", told))
    >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1, 2, 3], max_epochs=1, observers=[watching])
    step_end 2
    epoch_end 3
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch.distributed

from tnt_func.errors import UsageError
from tnt_func.events import Closable, Event, Observer
from tnt_func.types import Phase, Point, typed


@runtime_checkable
class Openable(Protocol):
    """Has an `open`, which is called with the `start` events of runs that are not passed on to it.

    Example:
        >>> isinstance(on("end", print), Openable), isinstance(print, Openable)
        (True, False)
    """

    def open(self, event: Event) -> Any:
        """Make ready for the run that starts with this event; an evaluation inside training starts too."""
        ...


@runtime_checkable
class Choosy(Protocol):
    """Has a say in what is passed on to it: `check_part` is called by an `every` or `on` that is made around it.

    Example:
        >>> isinstance(on("end", print), Choosy), isinstance(print, Choosy)
        (True, False)
    """

    def check_part(self, combinator: str, point: Point) -> Any:
        """Refuse to be told of one point alone, where that is no use.

        Raises:
            UsageError: it is none.
        """
        ...


def needs_all(observer: Any, combinator: str, point: Point) -> NoReturn:
    """The `check_part` of an observer that needs all the events of a phase.

    Example:
        >>> needs_all(print, "on", "end")
        Traceback (most recent call last):
        tnt_func.errors.UsageError: on was given <built-in function print>, to tell it of end alone; ...
    """
    raise UsageError(
        f"{combinator} was given {observer!r}, to tell it of {point} alone; it needs all the events of a phase. Write "
        "it by itself in observers=[...], with its own cadence if it has one, or, for one phase, "
        "when(lambda event: event.phase == 'eval', ...)."
    )


@typed
def on(point: Point, observer: Observer, *, phase: Phase | None = None) -> Observer:
    """An observer that is called at one point.

    Args:
        point: "step_end", "epoch_end" and so on, as in `Event`.
        observer: called there.
        phase: in which phase alone; None is all.

    Raises:
        UsageError: the observer needs more than that point.

    Example:
        >>> on("epoch_end", print, phase="eval")
        on('epoch_end', <built-in function print>, phase='eval')
    """
    _check(observer, "on", point)
    said = f"on({point!r}, {observer!r}, phase={phase!r})"
    return _Passing(said, observer, lambda event: event.point == point and phase in (None, event.phase))


@typed
def every(
    observer: Observer,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    seconds: int | float | None = None,
) -> Observer:
    """An observer that is called now and then; one cadence is given.

    Args:
        observer: called with `step_end` or `epoch_end` events, of every phase.
        steps: at the `step_end` of every n-th step of the phase's lifetime, so a resumed run keeps the rhythm.
        epochs: at the `epoch_end` of every n-th epoch, likewise.
        seconds: at the first `step_end` so many seconds after the one before, or after the first event.

    Raises:
        UsageError: none or several are given, or one that is not above 0; the observer needs all events, or has a
            cadence of its own.

    Example:
        >>> every(print, steps=100)
        every(<built-in function print>, steps=100)
    """
    cadences = {"steps": steps, "epochs": epochs, "seconds": seconds}
    given = [(name, value) for name, value in cadences.items() if value is not None]
    if len(given) != 1 or not given[0][1] > 0:
        raise UsageError(
            f"every was given {dict(given)}; it takes one cadence, above 0. Write every(observer, steps=10)."
        )
    name, n = given[0]
    point = "epoch_end" if name == "epochs" else "step_end"
    _check(observer, "every", point)
    if name == "seconds":
        passes = _Clock(n)
    else:

        def passes(event: Event) -> bool:
            return event.point == point and getattr(event.state.progress.of(event.phase), name) % n == 0

    return _Passing(f"every({observer!r}, {name}={n})", observer, passes)


@typed
def when(predicate: Callable[[Event], bool], observer: Observer) -> Observer:
    """An observer that is called with the events of which the predicate is true.

    A `failed` event may have no state.

    Example:
        >>> import tnt_func as tnt
        >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}))
        >>> high = lambda event: event.point == "step_end" and event.state.output["loss"] > 2
        >>> observers = [when(high, lambda event: print(event.state.output))]
        >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1, 3], max_epochs=1, observers=observers)
        {'loss': 3}
    """
    return _Passing(f"when({predicate!r}, {observer!r})", observer, predicate)


@typed
def rank_zero(observer: Observer) -> Observer:
    """An observer that is opened and called on rank 0 alone; where no process group is initialised, everywhere.

    Example:
        >>> rank_zero(print)
        rank_zero(<built-in function print>)
    """
    return _Passing(f"rank_zero({observer!r})", observer, lambda event: is_rank_zero(), is_rank_zero)


@typed
def isolate(observer: Observer) -> Observer:
    """An observer whose errors do not stop the run.

    The first is logged, to the logger "tnt_func.observers", with its traceback; for the rest of the run the observer is
    not called, only closed. KeyboardInterrupt and the like pass.

    Example:
        >>> isolate(print)
        isolate(<built-in function print>)
    """
    return _Isolated(observer)


@typed
def tee(*observers: Observer) -> Observer:
    """Several observers as one, in order: `observers=[tee(a, b), c]` is `observers=[a, b, c]`.

    All are told of a failure, and all are closed, even where one of them raises.

    Example:
        >>> tee(print, repr)
        tee(<built-in function print>, <built-in function repr>)
    """
    return named(f"tee({', '.join(map(repr, observers))})", *observers)


def named(said: str, *observers: Observer, check_part: Callable[[Any, str, Point], Any] | None = None) -> Observer:
    """Several observers as one, with a repr of its own, and a say in what is passed on to it, or else that of each.

    Example:
        >>> named("loud", print, print)
        loud
    """
    return _Tee(said, observers, check_part)


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or alone.

    Example:
        >>> is_rank_zero()
        True
    """
    groups = torch.distributed
    return not (groups.is_available() and groups.is_initialized()) or groups.get_rank() == 0


class _Passing:
    """An observer of which only some events are passed on to the one inside."""

    def __init__(
        self,
        said: str,
        observer: Observer,
        passes: Callable[[Event], bool],
        here: Callable[[], bool] = lambda: True,
    ):
        self._said, self._observer, self._passes, self._here = said, observer, passes, here

    def __repr__(self) -> str:
        return self._said

    def __call__(self, event: Event) -> None:
        if self._passes(event):
            self._observer(event)
        elif event.point == "start":
            self.open(event)

    def open(self, event: Event) -> None:
        if self._here():
            _open(self._observer, event)

    def check_part(self, combinator: str, point: Point) -> None:
        _check(self._observer, combinator, point)

    def close(self) -> None:
        _close(self._observer)


class _Clock:
    """True of the first `step_end` after so many seconds."""

    def __init__(self, seconds: float):
        self._seconds, self._last = seconds, None

    def __call__(self, event: Event) -> bool:
        now = time.monotonic()
        if self._last is None:
            self._last = now
        if event.point != "step_end" or now - self._last < self._seconds:
            return False
        self._last = now
        return True


class _Isolated:
    def __init__(self, observer: Observer):
        self._observer, self._fell = observer, False

    def __repr__(self) -> str:
        return f"isolate({self._observer!r})"

    def __call__(self, event: Event) -> None:
        if not self._fell:
            self._try(self._observer, event)

    def open(self, event: Event) -> None:
        if not self._fell:
            self._try(_open, self._observer, event)

    def check_part(self, combinator: str, point: Point) -> None:
        _check(self._observer, combinator, point)

    def close(self) -> None:
        self._try(_close, self._observer)
        self._fell = False

    def _try(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except Exception:
            if not self._fell:
                logging.getLogger("tnt_func.observers").exception(
                    "The observer %r failed, and is not called for the rest of this run.", self._observer
                )
            self._fell = True


class _Tee:
    def __init__(self, said: str, observers: tuple[Observer, ...], own: Callable[[Any, str, Point], Any] | None):
        self._said, self._observers, self._own = said, observers, own

    def __repr__(self) -> str:
        return self._said

    def __call__(self, event: Event) -> None:
        if event.error is None:
            for observer in self._observers:
                observer(event)
            return
        with ExitStack() as all_of_them:
            for observer in reversed(self._observers):
                all_of_them.callback(observer, event)

    def open(self, event: Event) -> None:
        for observer in self._observers:
            _open(observer, event)

    def check_part(self, combinator: str, point: Point) -> None:
        if self._own is not None:
            self._own(self, combinator, point)
        for observer in self._observers:
            _check(observer, combinator, point)

    def close(self) -> None:
        with ExitStack() as all_of_them:
            for observer in reversed(self._observers):
                all_of_them.callback(_close, observer)


def _open(observer: Observer, event: Event) -> None:
    if isinstance(observer, Openable):
        observer.open(event)


def _check(observer: Observer, combinator: str, point: Point) -> None:
    if isinstance(observer, Choosy):
        observer.check_part(combinator, point)


def _close(observer: Observer) -> None:
    if isinstance(observer, Closable):
        observer.close()
