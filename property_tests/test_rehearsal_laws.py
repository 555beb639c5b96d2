"""Law 2 of rehearsals: the run afterwards is the run without one, from the same state, on the same data, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.utils.data import DataLoader

from tnt_func.errors import LawError, UsageError
from tnt_func.rehearsal import Rehearsal, fast_dev_run, overfit_batches, sanity_check
from tnt_func.rng import key
from tnt_func.runs import train
from tnt_func.state import State
from tnt_func.testing.case import Case, law_error
from tnt_func.testing.generators import moved, standing, stands
from tnt_func.testing.runs import HERE
from tnt_func.testing.snapshot import changes, freeze
from tnt_func.testing.strategies import fit_cases, train_cases
from tnt_func.testing.tape import compare, record
from tnt_func.unit import FitUnit, TrainUnit


def check_undisturbed(look: Callable[[Case], Any], case: Case) -> None:
    """Whoever looks at a run before it begins leaves no trace of it."""
    with standing(HERE):
        tape = list(record(case))
        before, stood = freeze(case.state), stands()
        look(case)
        if went := moved(stood):
            raise law_error("determinism", "beforehand", f"the generators of {', '.join(went)} have moved", [], "")
        if lines := changes(before, freeze(case.state), "state"):
            raise law_error("determinism", "beforehand", "the state was written into", lines, "")
        compare(tape, record(case), "determinism", "a run that was looked at before", "")


def rehearsed(case: Case) -> list[Rehearsal]:
    """All three, of which each refuses data without a batch, and a run that takes no step."""
    unit: Any = case.unit
    both = (case.data, case.eval_data) if isinstance(unit, FitUnit) else (case.data,)
    looks: tuple[Callable[[], Rehearsal], ...] = (
        lambda: fast_dev_run(unit, case.state, *both, callbacks=case.callbacks, steps=2, max_epochs=9),
        lambda: sanity_check(unit, case.state, *both, callbacks=case.callbacks),
        lambda: overfit_batches(unit, case.state, case.data, callbacks=case.callbacks, steps=2),
    )
    found: list[Rehearsal] = []
    for look in looks:
        try:
            found.append(look())
        except UsageError as error:
            assert "gave no batch" in str(error) or "no step was taken" in str(error)
    return found


@settings(max_examples=settings.default.max_examples // 4 if settings.default else 50)
@given(train_cases() | fit_cases())
def test_a_rehearsal_leaves_no_trace_and_suspects_no_unit_that_keeps_the_laws(case: Case):
    found: list[Rehearsal] = []
    check_undisturbed(lambda case: found.extend(rehearsed(case)), case)
    said = [finding for rehearsal in found for finding in rehearsal.findings]
    suspicions = ("Two runs of", "wrote in place", "is another one", "A step keeps structure", "could not be resumed")
    assert [finding for finding in said if any(suspicion in finding for suspicion in suspicions)] == []


# Negative controls: whoever tries a unit that writes in place leaves a trace, but for a rehearsal.


def spoil(state: State, batch: Any) -> Any:
    """A step that is a function of what it is given, and spoils it."""
    loss = (state.params["w"] * batch).sum() + torch.rand(())
    state.params["w"].add_(1)
    batch.mul_(2)
    return state, {"loss": loss}


def keep(state: State, batch: Any) -> Any:
    return state.replace(params={"w": state.params["w"] + batch}), {"loss": batch.sum()}


SPOILING = TrainUnit(train_step=spoil)


def tried(case: Case, state: State) -> None:
    train(SPOILING, state, case.data, max_steps=1)


LOOKS: dict[str, tuple[Callable[[Case], Any], str | None]] = {
    "a batch drawn by hand": (lambda case: next(iter(case.data)), "the generators of torch have moved"),
    "a short run": (lambda case: tried(case, case.state), "the state was written into"),
    "a short run on a copy": (lambda case: tried(case, case.state.replace(params={"w": torch.ones(2)})), "batch"),
    "fast_dev_run": (lambda case: fast_dev_run(SPOILING, case.state, case.data), None),
    "sanity_check": (lambda case: sanity_check(SPOILING, case.state, case.data), None),
    "overfit_batches": (lambda case: overfit_batches(SPOILING, case.state, case.data), None),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_without_care_is_caught(name: str):
    look, expected = LOOKS[name]
    data: Any = DataLoader([torch.ones(2), torch.full((2,), 2.0)], batch_size=None, shuffle=True)  # pyright: ignore
    case = Case.of(TrainUnit(train_step=keep), State(params={"w": torch.ones(2)}, key=key(0)), data)
    if expected is None:
        check_undisturbed(look, case)
        return
    with pytest.raises(LawError, match=rf"law 2 \(determinism\) is broken(.|\n)*{expected}"):
        check_undisturbed(look, case)
