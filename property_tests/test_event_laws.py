"""Law 4: what the loop says is a word of the language, whatever happens in it; and what is not one is refused."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnt_func import testing
from tnt_func.errors import LawError
from tnt_func.events import Event
from tnt_func.progress import Progress
from tnt_func.state import State
from tnt_func.testing.case import Call, Case
from tnt_func.testing.grammar import check_events
from tnt_func.testing.strategies import cases, fit_cases, train_cases
from tnt_func.unit import FitUnit, TrainUnit

EVALUATION = "eval_start (eval_epoch_start )?(eval_fetched eval_step_start eval_step_end )*eval_epoch_end eval_end "
STEP = f"train_fetched train_step_start train_step_end ({EVALUATION})?train_step_done "
CLOSING = f"train_epoch_end ({EVALUATION})?train_epoch_done "
TRAINING = f"train_start (({STEP})*{CLOSING})?(train_epoch_start ({STEP})*{CLOSING})*train_end "


@given(cases())
def test_events_are_a_word_and_counters_follow(case: Case):
    case.check(testing.check_grammar)


@given(cases())
def test_the_language_is_the_one_that_is_told(case: Case):
    """Read off the docstring of `events`, as a regular expression."""
    language = TRAINING if isinstance(case.unit, TrainUnit | FitUnit) else EVALUATION.replace("eval", case.unit.phase)
    word = "".join(f"{event.phase}_{event.point} " for event in case.events())
    assert re.fullmatch(language, word), word


@given(train_cases() | fit_cases(), st.integers(1, 20))
def test_a_paused_run_says_a_beginning_of_a_word(case: Case, asks: int):
    asked = iter(range(asks))
    check_events(case.run(pause_when=lambda: next(asked, None) is None), case)


class Interrupted(Exception):
    """What a user's code raises."""


@given(cases(), st.integers(0, 30))
def test_a_failed_run_says_a_beginning_of_a_word(case: Case, at: int):
    calls = iter(range(at))

    def fail(call: Call) -> Any:
        if next(calls, None) is None:
            raise Interrupted
        return call.make()

    try:
        check_events(case.run(fail), case)
    except Interrupted:
        return


def moved(state: State) -> State:
    train = state.progress.train
    return state.replace(progress=state.progress._replace(train=Progress(train.epochs, train.steps + 1, 0)))


@st.composite
def marred(draw: st.DrawFn) -> tuple[Case, list[Event], str]:
    """The events of a run with one fault."""
    case = draw(cases())
    events = list(case.events())
    index = draw(st.integers(0, len(events) - 1))
    event = events[index]
    faults: dict[str, list[Event]] = {
        "dropped": [],
        "doubled": [event, event],
        "counter": [event._replace(state=moved(event.state))],
        "resumable": [event._replace(resumable=not event.resumable)],
        "output": [event._replace(state=event.state.replace(output={}))],
        "batch": [event._replace(batch=object())],
        "reason": [event._replace(reason=None if event.reason else "why")],
    }
    if event.point == "step_end":
        del faults["output"]
    if event.point == "fetched":
        del faults["batch"]
    fault = draw(st.sampled_from(sorted(faults)))
    return case, [*events[:index], *faults[fault], *events[index + 1 :]], fault


@given(marred())
def test_what_is_no_word_is_refused(found: tuple[Case, list[Event], str]):
    case, events, _ = found
    with pytest.raises(LawError, match="^law 4"):
        check_events(events, case)
