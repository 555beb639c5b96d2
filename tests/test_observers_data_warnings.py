"""Who is warned of empty and of slow data, when, and of what to change; nobody else is: warnings are errors here."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import warn_on_empty_data, warn_on_slow_data


def step(state: tnt.State, batch: Any) -> Any:
    return state, {}


TRAIN, EVAL = tnt.TrainUnit(train_step=step), tnt.EvalUnit(eval_step=step)
FIT = tnt.FitUnit(train_unit=TRAIN, eval_unit=EVAL)
FIRST = tnt.State(params=0, key=tnt.key(0))


def test_an_epoch_without_a_batch_is_told_of():
    data = [[1], [], [1]]
    with pytest.warns(UserWarning) as told:
        tnt.train(TRAIN, FIRST, lambda epoch: data[epoch], max_epochs=3, observers=[warn_on_empty_data()])
    (one,) = told
    assert "the train epoch 2 had no batch" in str(one.message) and "pass a list, a loader" in str(one.message)


def test_an_evaluation_without_a_batch_is_told_of():
    with pytest.warns(UserWarning, match="the eval epoch 2 had no batch"):
        tnt.fit(FIT, FIRST, [1], lambda epoch: [1] * (1 - epoch), max_epochs=2, observers=[warn_on_empty_data()])
    predict = tnt.PredictUnit(predict_step=step)
    with pytest.warns(UserWarning, match="the predict epoch 1 had no batch"):
        tnt.predict(predict, FIRST, [], observers=[warn_on_empty_data()])


def test_an_epoch_that_is_resumed_at_its_end_is_not_empty():
    asked = itertools.chain([False, True], itertools.repeat(False))
    state = tnt.train(TRAIN, FIRST, [1, 2], max_epochs=1, pause_when=lambda: next(asked))
    assert state.progress.train.steps_in_epoch == 2
    tnt.train(TRAIN, state, [1, 2], max_epochs=2, observers=[warn_on_empty_data()])


class Timed:
    """A unit and data that move a clock: so long to wait for a batch, so long for a step."""

    def __init__(self, *waits: float, takes: float = 1.0):
        self.now, self.waits, self.takes = 0.0, waits, takes

    def clock(self) -> float:
        return self.now

    def step(self, state: tnt.State, batch: Any) -> Any:
        self.now += self.takes
        return state, {}

    def __iter__(self) -> Iterator[int]:
        for wait in self.waits:
            self.now += wait
            yield 0

    def train(self, epochs: int = 1, **options: Any) -> list[str]:
        unit, observers = tnt.TrainUnit(train_step=self.step), [warn_on_slow_data(clock=self.clock, **options)]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            tnt.train(unit, FIRST, self, max_epochs=epochs, observers=observers)
        return [str(warning.message) for warning in told]


def test_slow_data_is_told_of_once_with_the_share_and_what_to_write():
    (said,) = Timed(*[3.0] * 12).train(share=0.5, n_steps=4)
    assert said.startswith(
        "of the last 4 train steps 75 % of the time was waiting for data: 3 s a step, of 4 s. Let worker processes make"
    )
    assert "tnt.data.loader(pipeline, num_workers=4)" in said


@pytest.mark.parametrize(
    "waits",
    [
        pytest.param([9.0] * 4 + [0.0] * 8, id="at first alone"),
        pytest.param([0.9] * 12, id="less"),
        pytest.param([9.0] * 7, id="not for long"),
        pytest.param([0.0] * 4 + [1.0, 0.0, 2.0, 0.0] * 2, id="now and then"),
    ],
)
def test_data_that_is_fast_enough_is_not_told_of(waits: list[float]):
    assert Timed(*waits).train(share=0.5, n_steps=4) == []


def test_every_run_and_phase_is_told_of_its_own():
    timed = Timed(*[3.0] * 8)
    observer = warn_on_slow_data(share=0.5, n_steps=4, clock=timed.clock)
    assert repr(observer) == "warn_on_slow_data(share=0.5)"
    unit = tnt.FitUnit(train_unit=tnt.TrainUnit(train_step=timed.step), eval_unit=tnt.EvalUnit(eval_step=timed.step))
    for _ in range(2):
        with pytest.warns(UserWarning) as told:
            tnt.fit(unit, FIRST, timed, timed, max_epochs=2, observers=[observer])
        assert [str(one.message).split()[4] for one in told] == ["train", "eval"]


@pytest.mark.parametrize(
    ("workers", "more"), [(0, "write DataLoader(..., num_workers=4)"), (1, "give it more of them")]
)
def test_the_loader_that_the_run_has_is_told_of(workers: int, more: str):
    ticks = itertools.count()
    observer = warn_on_slow_data(share=0.1, n_steps=2, clock=ticks.__next__)
    loader = DataLoader(range(4), num_workers=workers)  # pyright: ignore[reportArgumentType]
    with pytest.warns(UserWarning) as told:
        tnt.train(TRAIN, FIRST, loader, max_epochs=1, observers=[observer])
    assert f"The loader has num_workers={workers}" in str(told[0].message) and more in str(told[0].message)


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.0}, {"n_steps": 0}])
def test_share_and_steps_are_checked(options: Any):
    with pytest.raises(UsageError, match=r"Write share=0.25, n_steps=100"):
        warn_on_slow_data(**options)
