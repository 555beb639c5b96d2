"""Where the time goes, to the last second of a clock that is moved by hand, and what passes in it."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.events import Event
from tnt_func.observers import History, Measure, every, recorder, throughput, timing
from tnt_func.observers.measures import first_dimension


class Clock:
    """Moved by whoever takes time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed(clock: Clock, seconds: float, result: Any = None) -> Any:
    clock.now += seconds
    return result


def unit_of(clock: Clock) -> Any:
    """Steps of 3 s in training and 5 s elsewhere, with hooks of 0.5 s before and after."""
    return tnt.FitUnit(
        train_unit=tnt.TrainUnit(
            train_step=lambda state, batch: timed(clock, 3, (state, {})),
            on_train_step_start=lambda state: timed(clock, 0.5, state),
            on_train_step_end=lambda state: timed(clock, 0.5, state),
        ),
        eval_unit=tnt.EvalUnit(eval_step=lambda state, batch: timed(clock, 5, (state, {}))),
        predict_unit=tnt.PredictUnit(predict_step=lambda state, batch: timed(clock, 5, (state, {}))),
    )


def slow(clock: Clock, seconds: float, sizes: tuple[int, ...]) -> Any:
    """Batches that take so long to come, anew every epoch."""

    def batches(epoch: int) -> Iterator[torch.Tensor]:
        for size in sizes:
            clock.now += seconds
            yield torch.zeros(size, 2)

    return batches


FIRST = tnt.State(params=0, key=tnt.key(0))


def measured(history: History) -> dict[Any, Mapping[str, float]]:
    return {(row.phase, row.kind, row.step): row.metrics for row in history}


def test_every_second_is_waiting_a_step_or_overhead():
    clock, history = Clock(), History()
    observers = [
        recorder(history, every_n_steps=2, measures=[timing(clock=clock)]),
        every(lambda event: timed(clock, 0.25), steps=1),
    ]
    data = slow(clock, 2, (8, 8, 8)), slow(clock, 1, (4, 4))
    tnt.fit(unit_of(clock), FIRST, *data, max_epochs=2, evaluate_every_n_epochs=1, observers=observers)
    found = measured(history)
    # A step takes 3.5 with its hook at the end; the other hook and the observer are overhead, the first time 0.5.
    parts = {"time.step": 3.5, "time.data_wait": 2.0}
    assert found["train", "step", 2] == parts | {"time.overhead": 0.625, "time.data_wait_share": 4 / 12.25}
    # From step 2 to 4: the evaluation between them is not in it.
    assert found["train", "step", 4] == parts | {"time.overhead": 0.75, "time.data_wait_share": 4 / 12.5}
    # Evaluation has no step_done: of the observer after the measure the first turn goes to the next fetched.
    evaluated = {"time.step": 5.0, "time.data_wait": 1.125, "time.overhead": 0.125, "time.data_wait_share": 2.25 / 12.5}
    assert found["eval", "epoch", 3] == found["eval", "epoch", 6] == evaluated
    assert found["train", "epoch", 3] == parts | {"time.overhead": 0.75, "time.data_wait_share": 6 / 18.75}


def test_throughput_over_the_window_and_over_the_run():
    clock, history = Clock(), History()
    measure = throughput(tokens=lambda batch: 10, clock=clock)
    observers = [recorder(history, every_n_steps=2, measures=[measure])]
    tnt.train(unit_of(clock).train_unit, FIRST, slow(clock, 2, (8, 8, 8, 4)), max_epochs=1, observers=observers)
    found = measured(history)
    per_second = "throughput.{}_per_second".format
    assert found["train", "step", 4] == {
        per_second("batches"): 2 / 12,
        per_second("samples"): 12 / 12,
        per_second("tokens"): 20 / 12,
        per_second("run.batches"): 4 / 24,
        per_second("run.samples"): 28 / 24,
        per_second("run.tokens"): 40 / 24,
    }
    assert found["train", "epoch", 4][per_second("samples")] == 28 / 24


@pytest.mark.parametrize("entry", ["evaluate", "predict"])
def test_evaluation_and_prediction_on_their_own_are_measured(entry: str):
    clock, history = Clock(), History()
    unit = unit_of(clock)
    run: Any = {
        "evaluate": lambda **also: tnt.evaluate(unit.eval_unit, FIRST, **also),
        "predict": lambda **also: tnt.predict(unit.predict_unit, FIRST, **also),
    }[entry]
    observers = [recorder(history, measures=[throughput(clock=clock), timing(clock=clock)])]
    for _ in range(2):  # The second run counts from its own start.
        run(data=slow(clock, 1, (8, 4)), observers=observers)
        clock.now += 1000
    assert len(history) == 2 and history[0].metrics == history[1].metrics
    assert entry.startswith(history[0].phase)
    assert history[0].metrics["throughput.samples_per_second"] == 12 / 12
    assert history[0].metrics["throughput.run.samples_per_second"] == 12 / 12


def test_a_measure_is_of_use_alone_and_from_the_middle_on():
    clock, seen = Clock(), []
    measure = timing(clock=clock)
    events = tnt.train_events(unit_of(clock).train_unit, FIRST, slow(clock, 2, (1, 1, 1)), max_epochs=1)
    next(event for event in events if event.point == "step_end")
    for event in events:
        measure(event)
        if event.point == "step_end":
            seen.append(measure.read(event)["time.data_wait"])
    assert seen == [2.0, 2.0]


def test_no_step_no_numbers():
    clock, history = Clock(), History()
    observers = [recorder(history, measures=[timing(clock=clock), throughput(clock=clock)])]
    tnt.evaluate(unit_of(clock).eval_unit, FIRST, [], observers=observers)
    assert len(history) == 0


def test_a_resumed_run_measures_what_it_does_itself():
    clock, histories, asked = Clock(), (History(), History()), iter([False, True])
    state, unit, data = FIRST, unit_of(clock).train_unit, slow(clock, 2, (8, 8, 8))
    pauses = (lambda: next(asked), None)
    for history, pause in zip(histories, pauses, strict=True):
        observers = [recorder(history, every_n_steps=1, measures=[throughput(clock=clock)])]
        state = tnt.train(unit, state, data, max_epochs=1, observers=observers, pause_when=pause)
    (row, epoch) = histories[1]
    # The third batch alone; coming to it again took the time of all three.
    assert row.metrics["throughput.run.samples_per_second"] == 8 / (3 * 2 + 4)
    assert epoch.metrics["throughput.batches_per_second"] == 1 / (3 * 2 + 4)


class Own:
    """A measure with a close, and numbers of its own."""

    def __init__(self) -> None:
        self.points: list[str] = []
        self.closed = 0

    def __call__(self, event: Event) -> None:
        self.points.append(event.point)

    def read(self, event: Event) -> dict[str, float]:
        return {"own.events": float(len(self.points)), "loss": -1.0}

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("falls", [False, True])
def test_a_recorder_tells_its_measures_everything_and_closes_them(falls: bool):
    def step(state: tnt.State, batch: float) -> Any:
        return state, {"loss": 1 / batch}

    own, history, points = Own(), History(), []
    assert isinstance(own, Measure)
    observers = [recorder(history, every_n_steps=1, measures=[own]), lambda event: points.append(event.point)]
    try:
        tnt.train(
            tnt.TrainUnit(train_step=step), FIRST, [1.0, 0.0 if falls else 1.0], max_epochs=1, observers=observers
        )
    except ZeroDivisionError:
        assert falls
    assert own.points == points and own.closed == 1
    assert history[0].metrics == {"loss": -1.0, "own.events": 5.0}


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(4), torch.zeros(2)), 4),
        ({"a": "text", "b": [torch.zeros(5)]}, 5),
        ([[], torch.zeros(6)], 6),
    ],
)
def test_samples_are_counted_by_the_first_dimension(batch: Any, size: int):
    assert first_dimension(batch) == size


@pytest.mark.parametrize("batch", [1.0, torch.zeros(()), [], {"a": "text"}], ids=["float", "scalar", "empty", "text"])
def test_what_cannot_be_counted_is_an_error_that_says_what_to_write(batch: Any):
    observers = [throughput()]
    with pytest.raises(UsageError, match=r"Write throughput\(samples=lambda batch: len\(batch\)\)"):
        tnt.train(unit_of(Clock()).train_unit, FIRST, [batch], max_epochs=1, observers=observers)
