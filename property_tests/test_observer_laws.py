"""Law 6: observers watch, however many, in whatever order, and even where they fail."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnt_func import testing
from tnt_func.events import Event, Observer, fold
from tnt_func.metrics import compute
from tnt_func.testing.case import Case
from tnt_func.testing.snapshot import freeze
from tnt_func.testing.strategies import cases, fit_cases, train_cases
from tnt_func.testing.tape import compare, record


def reading(event: Event) -> None:
    compute(event.state, event.phase)


class Keeping:
    """Keeps all events, and counts how often it is closed."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


observer_lists = st.lists(st.sampled_from((reading, repr, Keeping())), max_size=3)


@given(cases(), observer_lists)
def test_observers_do_not_matter(case: Case, observers: list[Observer]):
    case.check(testing.check_observers, observers=observers)


class Fell(Exception):
    """What an observer raises."""


@given(train_cases() | fit_cases(), st.integers(0, 30), st.booleans())
def test_an_observer_that_raises_ends_the_run_where_it_resumes(case: Case, at: int, first: bool):
    """Everybody is told, and closed; the error comes out; from the last resumable state the run goes on."""
    tape = list(record(case))
    turns = iter(range(at))

    def falls(event: Event) -> Any:
        if next(turns, None) is None and event.error is None:
            raise Fell

    witness = Keeping()
    try:
        fold(case.run(), [falls, witness] if first else [witness, falls])
    except Fell as error:
        failed = witness.events.pop()
        assert failed.point == "failed" and failed.error is error
        assert len(witness.events) == at + (not first)  # the event at which it fell is told to those before it
        done = [index for index, moment in enumerate(tape[: at + 1]) if moment.event.resumable]
        if done:
            assert freeze(failed.state) == tape[done[-1]].state
            rest = record(case, state=failed.state)
            next(rest)
            compare(tape[done[-1] + 1 :], rest, "resume", "the run after its observer fell", "")
    else:
        assert len(witness.events) == len(tape) <= at
    assert witness.closed == 1


def test_an_observer_that_raises_on_closing_is_heard():
    class Stuck(Keeping):
        def close(self) -> None:
            raise Fell

    with pytest.raises(Fell):
        fold(iter([Event("train", "start", state=None)]), [Stuck()])  # pyright: ignore[reportArgumentType]
