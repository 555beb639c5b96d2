"""`checked` finds the broken at the call that breaks, and changes nothing of the sound."""

from dataclasses import replace

import pytest

from tnt_func.errors import LawError
from tnt_func.testing import checked
from tnt_func.testing.broken import CONTROLS
from tnt_func.testing.case import Case
from tnt_func.testing.tape import compare, record

BETWEEN_CALLS = {"earlier_state_in_place", "reads_generator", "data_that_counts", "memory_that_counts"}
"""What is in no step and no hook, or the same at both calls."""
LAWS = ("purity", "structure", "determinism")
RUNS = {name: control for name, control in CONTROLS.items() if isinstance(control.make(False).case, Case)}


@pytest.mark.parametrize(
    "name", [name for name, control in RUNS.items() if control.law in LAWS and name not in BETWEEN_CALLS]
)
def test_what_breaks_a_law_of_calls_is_named(name: str):
    case = RUNS[name].make(True).case
    assert case is not None
    with pytest.raises(LawError, match=rf"law \d \({RUNS[name].law}\)"):
        for _ in case.run(unit=checked(case.whole)):
            pass


@pytest.mark.parametrize("name", RUNS)
def test_the_sound_run_as_without(name: str):
    case = RUNS[name].make(False).case
    assert case is not None
    compare(list(record(case)), record(replace(case, unit=checked(case.unit))), "determinism", "the checked run", "")
