"""Laws 1 to 3 of units, on random ones and on every broken one; a run by hand is the run."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tnt_func import testing
from tnt_func.data.cursors import batches
from tnt_func.errors import LawError
from tnt_func.runs import train
from tnt_func.state import State
from tnt_func.testing.broken import CONTROLS, Control
from tnt_func.testing.case import LAWS, Call, Case
from tnt_func.testing.snapshot import changes, freeze, thaw
from tnt_func.testing.strategies import cases, train_cases
from tnt_func.transitions import end_epoch, prepare, start_epoch, step
from tnt_func.unit import TrainUnit, identity

every_control = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)


@given(cases())
def test_purity(case: Case):
    case.check(testing.check_purity)


@given(cases())
def test_determinism(case: Case):
    case.check(testing.check_determinism)


@given(cases())
def test_structure(case: Case):
    case.check(testing.check_structure)


@settings(max_examples=settings.default.max_examples // 20 if settings.default else 10)
@given(cases())
def test_all_laws_at_once(case: Case):
    if any(event.point == "step_end" for event in case.events()):
        case.check(testing.check_unit)


@given(cases())
def test_no_two_calls_draw_alike(case: Case):
    """Of all steps and hooks of a run, in whatever phase."""
    drawn = list[tuple[int, int]]()

    def watch(call: Call) -> Any:
        # torch's generator takes 32 bits of a key, which two of many calls may share; Python's takes all.
        drawn.append((int(torch.randint(2**62, ())), random.getrandbits(62)))
        return call.make()

    for _ in case.events(watch):
        pass
    assert len(set(drawn)) == len(drawn)


@every_control
def test_a_broken_one_breaks_the_laws_it_says_and_no_others(control: Control):
    violations = control.violations(broken=True)
    assert violations.keys() == {control.law, *control.also}
    message = violations[control.law]
    assert [word for word in control.words if word not in message] == [], message


@every_control
def test_its_sound_twin_breaks_none(control: Control):
    assert control.violations(broken=False) == {}


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.make(True).case])
def test_the_check_of_a_whole_unit_names_the_law(name: str):
    control, subject = CONTROLS[name], CONTROLS[name].make(True)
    assert subject.case is not None
    with pytest.raises(LawError, match=rf"^law {LAWS.index(control.law) + 1} \({control.law}\)"):
        subject.case.check(testing.check_unit, observers=subject.observers)


def test_every_law_has_a_control():
    assert {law for control in CONTROLS.values() for law in (control.law, *control.also)} == set(LAWS)
    assert {control.law for control in CONTROLS.values()} == set(LAWS)


def without_brackets(case: Case) -> Case:
    """The case without the hooks that bracket a call, which a loop by hand has not."""
    bare = {"on_train_start": identity, "on_train_end": identity}
    callbacks = tuple(replace(callback, **bare) for callback in case.callbacks)
    assert isinstance(case.unit, TrainUnit)
    return replace(case, unit=replace(case.unit, **bare), callbacks=callbacks)


def by_hand(case: Case) -> State:
    """Training, out of public pieces."""
    unit, limits = case.whole, case.options
    assert isinstance(unit, TrainUnit)
    max_epochs, max_steps = limits.get("max_epochs", torch.inf), limits.get("max_steps", torch.inf)
    state = prepare(case.unit, thaw(case.first), case.callbacks)

    def done(state: State) -> bool:
        train = state.progress.train
        return state.stop is not None or train.steps >= max_steps or train.epochs >= max_epochs

    while state.progress.train.is_open or not done(state):
        state = start_epoch(unit, state)
        for batch in batches(case.data, state):
            train = state.progress.train
            if state.stop is not None or train.steps >= max_steps:
                break
            if train.steps_in_epoch >= limits.get("max_steps_per_epoch", torch.inf):
                break
            state = step(unit, state, batch)
        state = end_epoch(unit, state)
    return state.replace(stop=None)


@given(train_cases().map(without_brackets))
def test_a_loop_by_hand_gives_the_bits_of_train(case: Case):
    assert isinstance(case.unit, TrainUnit)
    state = train(case.unit, thaw(case.first), case.data, callbacks=case.callbacks, **case.options)
    assert changes(freeze(by_hand(case)), freeze(state), "state") == []
