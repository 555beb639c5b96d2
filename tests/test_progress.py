"""The counters: one law, three phases."""

import pytest

from tnt_func.progress import Progress, RunProgress
from tnt_func.types import Phase

PHASES: tuple[Phase, ...] = ("train", "eval", "predict")


def test_a_step_adds_one_to_the_lifetime_and_to_the_epoch():
    assert Progress(2, 7, 0).after_step() == Progress(2, 8, 1)
    assert Progress(2, 8, 1).after_step() == Progress(2, 9, 2)


@pytest.mark.parametrize("steps_in_epoch", [0, 3])
def test_an_end_of_an_epoch_adds_an_epoch_and_leaves_none_open(steps_in_epoch: int):
    assert Progress(1, 5, steps_in_epoch).after_epoch() == Progress(2, 5, 0)


def test_an_epoch_is_open_from_its_first_step_to_its_end():
    fresh = Progress()
    assert [p.is_open for p in (fresh, fresh.after_step(), fresh.after_step().after_epoch())] == [False, True, False]


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_is_put_where_it_is_read_and_the_others_stay(phase: Phase):
    before = RunProgress(Progress(1), Progress(2), Progress(3))
    after = before.put(phase, Progress(9, 9, 9))
    assert after.of(phase) == getattr(after, phase) == Progress(9, 9, 9)
    assert all(after.of(other) is before.of(other) for other in PHASES if other != phase)
    assert [before.of(each).epochs for each in PHASES] == [1, 2, 3]


@pytest.mark.parametrize("counters", [Progress(), RunProgress()])
def test_counters_are_immutable(counters: Progress | RunProgress):
    with pytest.raises(AttributeError):
        counters.train = counters.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
