"""Law 8 of callbacks: however they are attached, the run is the same."""

from hypothesis import given

from tnt_func import testing
from tnt_func.testing.case import Case
from tnt_func.testing.strategies import cases
from tnt_func.unit import attach


@given(cases())
def test_attaching_has_an_identity_and_is_associative(case: Case):
    case.check(testing.check_composition)


@given(cases())
def test_units_out_of_attaching_are_equal(case: Case):
    """As values, before anything runs: the same hooks, in the same order, by the same names."""
    assert attach(case.unit) == case.unit
    one_by_one = case.unit
    for callback in case.callbacks:
        one_by_one = attach(one_by_one, callback)
    assert one_by_one == attach(case.unit, *case.callbacks)
