"""Events, and the fold that hands them to observers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tnt_func as tnt
from tnt_func.errors import ContractError
from tnt_func.events import Closable, Event, fold
from tnt_func.state import State


def state(number: int) -> State:
    return State(params=number, key=tnt.key(0))


LAST = state(99)
STATES = [state(0), state(1), state(2)]


def run(closed: list[str] | None = None, raises: BaseException | None = None) -> Iterator[Event]:
    """Three events, or fewer and an error, told and raised as a run does."""
    try:
        for event_state in STATES:
            yield Event("train", "step_done", event_state)
        if raises is not None:
            raise raises
    except Exception as error:
        yield Event("train", "failed", LAST, error=error)
        raise
    except KeyboardInterrupt as error:
        yield Event("train", "failed", LAST, error=error)
        raise
    finally:
        if closed is not None:
            closed.append("run")


class Watcher:
    """Writes down what it sees; raises what it is told to, at the events it is told to, and at its close."""

    def __init__(self, log: list[Any], name: str, raises: dict[Any, BaseException] | None = None):
        self.log, self.name, self.raises = log, name, raises or {}

    def __call__(self, event: Event) -> str:
        seen = event.point if event.error is not None else event.state.params
        self.log.append((self.name, seen))
        if seen in self.raises:
            raise self.raises[seen]
        return "ignored"

    def close(self) -> None:
        self.log.append((self.name, "close"))
        if "close" in self.raises:
            raise self.raises["close"]

    def __repr__(self) -> str:
        return self.name


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def test_an_event_is_immutable_and_says_nothing_more_than_it_was_given():
    event = Event("eval", "start", LAST)
    assert (event.batch, event.resumable, event.reason, event.error) == (None, False, None, None)
    with pytest.raises(AttributeError):
        event.state = LAST  # pyright: ignore[reportAttributeAccessIssue]


def test_every_observer_sees_every_event_in_order_and_the_last_state_is_returned():
    log: list[Any] = []
    assert fold(run(), [Watcher(log, "a"), Watcher(log, "b")]) is STATES[2]
    assert log == [*((name, i) for i in range(3) for name in "ab"), ("a", "close"), ("b", "close")]


def test_without_observers_the_last_state_is_returned_all_the_same():
    assert fold(run(), []) is STATES[2]


def test_an_observer_without_close_is_left_as_it_is():
    seen: list[Event] = []
    assert not isinstance(seen.append, Closable)
    fold(run(), [seen.append])
    assert [event.state for event in seen] == STATES


ERRORS = [ValueError("first"), KeyboardInterrupt("first"), SystemExit(3)]


@pytest.mark.parametrize("error", ERRORS[:2], ids=repr)
def test_an_error_of_the_run_is_told_to_all_then_raised_unchanged(error: BaseException):
    log: list[Any] = []
    with pytest.raises(type(error)) as caught:
        fold(run(raises=error), [Watcher(log, "a"), Watcher(log, "b")])
    assert caught.value is error and notes(error) == []
    assert log[6:] == [("a", "failed"), ("b", "failed"), ("a", "close"), ("b", "close")]


def failing_train(error: BaseException, at: str = "step_end") -> tuple[list[Event], Callable[[Event], None]]:
    """What an observer sees of which another one raises at the second occurrence of a point."""
    seen: list[Event] = []

    def observe(event: Event) -> None:
        seen.append(event)
        if event.point == at and event.state.progress.train.steps == 2:
            raise error

    return seen, observe


UNIT = tnt.TrainUnit(train_step=lambda s, batch: (s.replace(params=s.params + batch), {}))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_observers_error_becomes_a_failed_event_with_the_last_resumable_state(error: BaseException):
    seen, observe = failing_train(error)
    log: list[Any] = []
    with pytest.raises(type(error)) as caught:
        tnt.train(UNIT, state(0), [1, 2, 3], max_epochs=1, observers=[Watcher(log, "a"), observe, Watcher(log, "b")])
    assert caught.value is error
    assert [event.point for event in seen[-3:]] == ["step_start", "step_end", "failed"]
    assert seen[-1].error is error and seen[-1].resumable
    assert seen[-1].state.params == 1 and seen[-1].state.progress.train.steps == 1
    # The observer behind the one that raised does not see that event, and nothing follows but the failure.
    assert [what for who, what in log if who == "b"][-2:] == ["failed", "close"]
    assert len([who for who, _ in log if who == "a"]) == len([who for who, _ in log if who == "b"]) + 1


@pytest.mark.parametrize("at", ["start", "fetched", "step_done", "epoch_end", "end"])
def test_an_observer_may_fail_at_any_point(at: str):
    error = OSError("disk full")
    told: list[Event] = []

    def observe(event: Event) -> None:
        told.append(event)
        if event.point == at:
            raise error

    with pytest.raises(OSError, match="disk full"):
        tnt.train(UNIT, state(0), [1, 2, 3], max_epochs=1, observers=[observe])
    assert [event.point for event in told][-2:] == [at, "failed"] and told[-1].error is error


def test_an_observer_that_fails_at_the_pause_turns_it_into_a_failure():
    error = OSError("disk full")
    told: list[Event] = []

    def observe(event: Event) -> None:
        told.append(event)
        if event.point == "paused":
            raise error

    with pytest.raises(OSError, match="disk full"):
        tnt.train(UNIT, state(0), [1, 2], max_epochs=1, observers=[observe], pause_when=lambda: True)
    assert [event.point for event in told][-2:] == ["paused", "failed"]
    assert told[-1].state is told[-2].state and told[-1].resumable


def test_the_first_error_wins_and_what_observers_raise_of_it_is_noted():
    first, log = ValueError("first"), []
    raising = Watcher(log, "a", {"failed": KeyError("second"), "close": OSError("third")})
    with pytest.raises(ValueError, match="first") as caught:
        fold(run(raises=first), [raising, Watcher(log, "b", {"failed": KeyboardInterrupt()})])
    assert caught.value is first
    assert notes(first) == [
        "Told of this, the observer a raised KeyError('second').",
        "Told of this, the observer b raised KeyboardInterrupt().",
        "Closing the observer a raised OSError('third').",
    ]
    assert log[-4:] == [("a", "failed"), ("b", "failed"), ("a", "close"), ("b", "close")]


def test_a_stop_iteration_of_an_observer_does_not_end_the_run_in_silence():
    log: list[Any] = []
    stop = StopIteration()
    with pytest.raises(ContractError, match="an observer raised StopIteration; .* Call next") as caught:
        fold(run(), [Watcher(log, "a", {1: stop})])
    assert caught.value.__cause__ is stop
    assert log == [("a", 0), ("a", 1), ("a", "failed"), ("a", "close")]


def test_the_run_is_closed_before_the_observers_and_hears_of_an_observers_error():
    log: list[Any] = []
    with pytest.raises(ValueError, match="mine"):
        fold(run(log), [Watcher(log, "a", {1: ValueError("mine")})])
    assert log == [("a", 0), ("a", 1), ("a", "failed"), "run", ("a", "close")]


def test_an_error_on_closing_is_raised_after_all_are_closed():
    log: list[Any] = []
    first, second = OSError("first"), OSError("second")
    watchers = [Watcher(log, "a", {"close": first}), Watcher(log, "b", {"close": second}), Watcher(log, "c")]
    with pytest.raises(OSError, match="first") as caught:
        fold(run(), watchers)
    assert caught.value is first and notes(first) == ["Closing the observer b raised OSError('second')."]
    assert log[-3:] == [("a", "close"), ("b", "close"), ("c", "close")]


def test_a_run_that_does_not_tell_of_an_error_thrown_into_it_ends_with_that_error():
    def silent() -> Iterator[Event]:
        yield Event("train", "start", LAST)

    log: list[Any] = []
    with pytest.raises(ValueError, match="mine"):
        fold(silent(), [Watcher(log, "a", {99: ValueError("mine")})])
    assert log == [("a", 99), ("a", "close")]
