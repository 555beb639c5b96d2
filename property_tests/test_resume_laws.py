"""Law 5: a run split anywhere, paused, cut by limits or failed, and continued, is the run."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tnt_func import testing
from tnt_func.state import State
from tnt_func.testing.case import Call, Case
from tnt_func.testing.snapshot import freeze
from tnt_func.testing.strategies import fit_cases, train_cases
from tnt_func.testing.tape import compare, record
from tnt_func.unit import FitUnit, identity

PLACES = 8


@given(train_cases())
def test_training_resumes(case: Case):
    case.check(testing.check_resume, places=PLACES)


@given(fit_cases())
def test_fitting_resumes(case: Case):
    case.check(testing.check_resume, places=PLACES)


class Interrupted(Exception):
    """What a user's code raises, or a user by pressing a key."""


@given(train_cases() | fit_cases(), st.integers(0, 1000))
def test_a_failed_run_resumes_from_what_it_says(case: Case, at: int):
    """The error comes out unchanged, after `failed` with the last resumable state, from which the run goes on."""
    tape = list(record(case))
    calls = sum(len(moment.calls) for moment in tape)
    if not calls:
        return
    until = iter(range(at % calls))

    def fail(call: Call) -> Any:
        if next(until, None) is None:
            raise Interrupted
        return call.make()

    seen = list[Any]()
    with pytest.raises(Interrupted):
        for event in case.run(fail):
            seen.append(event)
    *before, failed = seen
    assert failed.point == "failed" and isinstance(failed.error, Interrupted) and failed.resumable
    done = [event for event in before if event.resumable]
    assert len(before) < len(tape)
    if done:
        assert freeze(failed.state) == freeze(done[-1].state)
        rest = record(case, state=failed.state)
        next(rest)
        compare(tape[before.index(done[-1]) + 1 :], rest, "resume", "the run after its failure", "")


def bare(case: Case) -> Case:
    """The case without end hooks, which every call runs once, and without stops, which every call clears."""
    end = {"on_train_end": identity}
    unit: Any = case.unit
    part = {"train_unit": replace(unit.train_unit, **end)} if isinstance(unit, FitUnit) else end
    callbacks = tuple(replace(callback, **end) for callback in case.callbacks)
    return replace(case, unit=replace(unit, **part), callbacks=callbacks)


@given((train_cases() | fit_cases()).map(bare))
def test_a_limit_of_epochs_cuts_without_a_trace(case: Case):
    """Epoch by epoch, each a call of its own, is all epochs in one call."""
    tape = list(record(case))
    assume(not any(moment.event.state.stop for moment in tape))
    last = tape[-1].event.state
    state: State | None = None
    for epoch in range(case.state.progress.train.epochs + 1, last.progress.train.epochs + 1):
        *_, end = case.events(state=state, max_epochs=epoch)
        state = end.state
    assert state is None or freeze(state) == tape[-1].state
