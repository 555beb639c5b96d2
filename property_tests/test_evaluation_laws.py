"""Law 7: evaluations and predictions read."""

from hypothesis import given

from tnt_func import testing
from tnt_func.testing.case import Case
from tnt_func.testing.strategies import fit_cases, pass_cases


@given(fit_cases() | pass_cases())
def test_evaluation_is_a_read(case: Case):
    case.check(testing.check_evaluation)
