"""When to pause: a time limit, a signal, a predicate. Each is a `() -> bool` for the `pause_when` of train and fit.

It is asked after every step and every epoch, and after every step of an evaluation; where it says True the run ends
with its epoch left open, and the state it returns goes on as if it had never stopped. So it can depend on clocks and
signals, and still change no number.

Law:
    A paused run, continued, is the run (law 5, `tnt_func.testing.check_resume`).

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> with on_signal() as signalled:
    ...     pause_when = any_of(signalled, time_limit(seconds=0))
    ...     state = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1, 2], max_epochs=1, pause_when=pause_when)
    >>> state.params, state.progress.train
    (1, Progress(epochs=0, steps=1, steps_in_epoch=1))
"""

import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from types import FrameType, TracebackType
from typing import Any, TypeAlias

from tnt_func.errors import UsageError, UsageTypeError, kind_of
from tnt_func.factories import factory

Pause: TypeAlias = Callable[[], bool]


@factory
def time_limit(seconds: int | float | timedelta | None = None, *, until: datetime | None = None) -> Pause:
    """Pause when the time is up.

    Args:
        seconds: from now on, by a clock that nobody sets.
        until: a time on the wall; one without a time zone is local.

    Raises:
        UsageError: both or neither are given, or the time is negative.

    Example:
        >>> time_limit(timedelta(hours=2))(), time_limit(until=datetime(2020, 1, 1))()
        (False, True)
    """
    if (seconds is None) == (until is None):
        raise UsageError(
            f"time_limit(seconds={seconds!r}, until={until!r}) was given; it takes one of the two. Write "
            "time_limit(seconds=3600), or any_of(time_limit(3600), time_limit(until=...)) for the earlier one."
        )
    if until is not None:
        end = until.timestamp()
        return lambda: time.time() >= end
    assert seconds is not None
    length = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
    if not length >= 0:
        raise UsageError(
            f"time_limit(seconds={length}) was given; a time is not negative. Write time_limit(3600), say."
        )
    stop = time.monotonic() + length
    return lambda: time.monotonic() >= stop


@factory
def until(predicate: Callable[[], Any]) -> Pause:
    """Pause once a predicate has held; it is not asked again.

    Raises:
        UsageTypeError: when it answers neither True nor False.

    Example:
        >>> answers = iter([False, True])
        >>> pause = until(lambda: next(answers))
        >>> pause(), pause(), pause()
        (False, True, True)
    """
    held = False

    def pause() -> bool:
        nonlocal held
        if not held:
            answer = predicate()
            if not isinstance(answer, bool):
                raise UsageTypeError(
                    f"the predicate of until(...) returned {kind_of(answer)}; it says True or False. Write "
                    "until(lambda: bool(...))."
                )
            held = answer
        return held

    return pause


@factory
def any_of(*pauses: Pause) -> Pause:
    """Pause when any of these says so.

    Example:
        >>> any_of(time_limit(3600), until(lambda: True))(), any_of()()
        (True, False)
    """
    return lambda: any(pause() for pause in pauses)


class on_signal:
    """Pause when the process is asked to end: the step is finished, nothing is lost.

    A context manager, inside which the signals pause; afterwards their handlers are what they were. A second SIGINT
    (Ctrl-C) interrupts for good. Signals are delivered to the main thread, so it is entered there. A scheduler should
    signal this process alone: torch lets the workers of a DataLoader die of a SIGTERM, and the run with them.

    Args:
        signals: SIGTERM, SIGINT and SIGUSR1, if none is given.

    Raises:
        UsageError: on entering outside of the main thread; when asked and not entered.

    Example:
        >>> with on_signal(signal.SIGTERM) as pause:
        ...     before = pause()
        ...     signal.raise_signal(signal.SIGTERM)
        ...     before, pause(), pause.received
        (False, True, <Signals.SIGTERM: 15>)
    """

    def __init__(self, *signals: signal.Signals):
        defaults = [getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGUSR1")]
        self._signals = signals or tuple(found for found in defaults if found is not None)
        self._before: dict[signal.Signals, Any] | None = None
        self.received: signal.Signals | None = None

    def __enter__(self) -> "on_signal":
        if self._before is not None:
            raise UsageError("an on_signal was entered twice; each stands for one `with`. Write on_signal() anew.")
        self.received, self._before = None, {}
        try:
            for number in self._signals:
                self._before[number] = signal.signal(number, self._receive)
        except (ValueError, OSError) as error:
            self.__exit__(None, None, None)
            raise UsageError(
                f"on_signal{self._signals} cannot be entered here: {error}; the main thread alone takes signals, and "
                "none takes SIGKILL. Enter it in the main thread and hand pause_when=pause to the one that trains."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in (self._before or {}).items():
            # None is a handler that was not installed from Python, and cannot be from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = None

    def __call__(self) -> bool:
        """Whether a signal has come."""
        if self._before is None and self.received is None:
            raise UsageError(
                "an on_signal was asked outside of its `with`, where it hears nothing. Write "
                "with on_signal() as pause: tnt.train(..., pause_when=pause)."
            )
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = signal.Signals(number)
