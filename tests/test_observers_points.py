"""The times of a run's points add up to the run's, and go to the point that they were spent before."""

from collections.abc import Callable
from typing import Any

import pytest

import tnt_func as tnt
from tnt_func.observers import History, Measure, recorder
from tnt_func.observers.points import points


class Clock:
    """Stands still but where it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[tnt.State], tnt.State]:
        def hook(state: tnt.State) -> tnt.State:
            self.now += seconds
            return state

        return hook


def run(clock: Clock, every: int, **options: Any) -> History:
    def train_step(state: tnt.State, batch: float) -> Any:
        return clock.takes(4.0)(state), {"loss": batch}

    def data(epoch: int) -> Any:
        for batch in (1.0, 2.0, 3.0):
            clock.now += 2.0
            yield batch

    train = tnt.TrainUnit(
        train_step=train_step, on_train_step_start=clock.takes(1.0), on_train_epoch_end=clock.takes(16.0)
    )
    evaluation = tnt.EvalUnit(eval_step=lambda state, batch: (clock.takes(8.0)(state), {}))
    history, state = History(), tnt.State(params=0, key=tnt.key(0))
    observer = recorder(history, every_n_steps=every, measures=[points(clock=clock)])
    unit = tnt.FitUnit(train_unit=train, eval_unit=evaluation)
    tnt.fit(unit, state, data, [0], observers=[observer], max_epochs=2, **options)
    return history


def test_every_moment_goes_to_its_point():
    rows = [row for row in run(Clock(), every=1) if row.kind == "step"]
    each = {"points.train.fetched": 2.0, "points.train.step_start": 1.0, "points.train.step_end": 4.0}
    found = [{name: value for name, value in row.metrics.items() if value and name != "loss"} for row in rows]
    between = {"points.train.epoch_end": 16.0, "points.eval.step_end": 8.0}
    assert found == [each, each, each, each | between, each, each]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_they_add_up_to_the_time_of_the_run_at_any_cadence(every: int):
    clock = Clock()
    clock.now = 100.0
    rows = [row for row in run(clock, every) if row.kind == "step"]
    total = sum(value for row in rows for name, value in row.metrics.items() if name.startswith("points.")) * every
    # After the last row there are the end of an epoch and an evaluation.
    assert total == pytest.approx(clock.now - 100.0 - 16.0 - 8.0)


def test_the_time_between_two_runs_is_of_neither():
    clock = Clock()
    measure, history = points(clock=clock), History()
    assert isinstance(measure, Measure)
    unit = tnt.TrainUnit(train_step=lambda state, batch: (clock.takes(1.0)(state), {"loss": 0.0}))
    state = tnt.State(params=0, key=tnt.key(0))
    for epochs in (1, 2):
        observers = [recorder(history, every_n_steps=1, measures=[measure])]
        state = tnt.train(unit, state, [0], max_epochs=epochs, observers=observers)
        clock.now += 1000.0
    assert [row.metrics["points.train.step_end"] for row in history if row.kind == "step"] == [1.0, 1.0]
    assert max(value for row in history for value in row.metrics.values()) == 1.0
