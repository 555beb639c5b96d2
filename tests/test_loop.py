"""The loop: order, limits, cadences, and how a run stops, pauses and fails."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import tnt_func as tnt
from tnt_func.errors import DataError, UsageError
from tnt_func.events import Event
from tnt_func.loop import Limits, limit
from tnt_func.metrics import total
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State
from tnt_func.types import Phase
from tnt_func.unit import POINTS, Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit


def add(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    return state.replace(params=state.params + batch), {"x": batch}


def read(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    return state, {"x": batch}


TRAIN = TrainUnit(train_step=add, metrics={"x": total("x")})
EVAL = EvalUnit(eval_step=read, metrics={"x": total("x")})
PREDICT = PredictUnit(predict_step=read)
FIT = FitUnit(train_unit=TRAIN, eval_unit=EVAL)


def new(*train: int, **fields: Any) -> State:
    return State(params=0, key=tnt.key(0), progress=RunProgress(Progress(*train)), **fields)


def words(events: Iterable[Event]) -> str:
    return " ".join(event.point if event.phase == "train" else f"{event.phase}.{event.point}" for event in events)


def hooks(phase: Phase, point: str, hook: Callable[[State], State]) -> dict[str, Any]:
    return {f"on_{phase}_{point}": hook}


def at(phase: Phase, point: str, hook: Callable[[State], State]) -> Callback:
    return Callback(name="at", **hooks(phase, point, hook))


# Order

STEP = "fetched step_start step_end"
EVALUATION = "eval.start eval.epoch_start eval.fetched eval.step_start eval.step_end eval.epoch_end eval.end"


def test_the_events_of_training():
    events = list(tnt.train_events(TRAIN, new(), [1, 2], max_epochs=2))
    epoch = f"epoch_start {STEP} step_done {STEP} step_done epoch_end epoch_done"
    assert words(events) == f"start {epoch} {epoch} end"
    assert [event.point for event in events if event.resumable] == ["step_done", "step_done", "epoch_done"] * 2
    assert [event.batch for event in events[2:10]] == [1] * 4 + [2] * 4
    assert all(event.batch is None for event in events[:2] + events[10:12])
    assert [event.reason for event in events if event.reason] == ["max_epochs=2 reached"]


def test_the_states_in_the_events_of_training():
    events = list(tnt.train_events(TRAIN, new(), [5, 7], max_epochs=1))
    counters = [tuple(event.state.progress.train) for event in events]
    assert counters == [(0, 0, 0)] * 4 + [(0, 1, 1)] * 4 + [(0, 2, 2)] * 2 + [(1, 2, 0)] * 3
    assert [event.state.params for event in events] == [0] * 4 + [5] * 4 + [12] * 5
    outputs = [event.state.output for event in events]
    assert outputs == [{"x": event.batch} if event.point == "step_end" else None for event in events]
    assert {event.state.memory["data"]["type"] for event in events[1:10]} == {"list"}
    assert {event.state.memory["data"]["type"] for event in (events[0], *events[10:])} == {""}


@pytest.mark.parametrize(("phase", "unit"), [("eval", EVAL), ("predict", PREDICT)])
def test_the_events_of_evaluation_and_prediction(phase: Phase, unit: Any):
    run = {"eval": tnt.evaluate_events, "predict": tnt.predict_events}[phase]
    events = list(run(unit, new(2, 6, 1), [5, 7]))
    assert {event.phase for event in events} == {phase}
    points = ["start", "epoch_start", *STEP.split() * 2, "epoch_end", "end"]
    assert [event.point for event in events] == points
    counters = [tuple(event.state.progress.of(phase)) for event in events]
    assert counters == [(0, 0, 0)] * 4 + [(0, 1, 1)] * 3 + [(0, 2, 2)] + [(1, 2, 0)] * 2
    assert {event.state.progress.train for event in events} == {Progress(2, 6, 1)}
    assert not any(event.resumable for event in events)
    assert events[-1].reason == "the epoch is over"


def test_an_evaluation_that_is_open_goes_on_where_it_stood():
    half = next(event.state for event in tnt.evaluate_events(EVAL, new(), [1, 10]) if event.point == "step_end")
    events = list(tnt.evaluate_events(EVAL, half, [1, 10]))
    assert [event.point for event in events] == ["start", *STEP.split(), "epoch_end", "end"]
    assert events[-1].state.progress.eval == Progress(1, 2, 0)
    assert float(tnt.metrics.compute(events[-1].state, "eval")["x"]) == 11.0


def test_evaluation_inside_training_comes_before_the_step_or_epoch_is_done():
    events = tnt.fit_events(FIT, new(), [1], [2], max_epochs=1, evaluate_every_n_epochs=1, evaluate_every_n_steps=1)
    step = f"{STEP} {EVALUATION} step_done"
    assert words(events) == f"start epoch_start {step} epoch_end {EVALUATION} epoch_done end"


def test_an_evaluation_in_an_open_epoch_leaves_the_train_metrics_alone():
    seen = [
        (event.point, *(float(tnt.metrics.compute(event.state, phase)["x"]) for phase in ("train", "eval")))
        for event in tnt.fit_events(FIT, new(), [1, 2], [10, 20], max_epochs=1, evaluate_every_n_steps=1)
        if event.resumable
    ]
    assert seen == [("step_done", 1.0, 30.0), ("step_done", 3.0, 30.0), ("epoch_done", 3.0, 30.0)]


CADENCES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "nothing said": ({}, [], [1, 2, 3]),
    "every second epoch": ({"evaluate_every_n_epochs": 2}, [], [2]),
    "never": ({"evaluate_every_n_epochs": 0}, [], []),
    "steps alone": ({"evaluate_every_n_steps": 2}, [2, 4, 6, 8], []),
    "steps never": ({"evaluate_every_n_steps": 0}, [], [1, 2, 3]),
    "steps, and None": ({"evaluate_every_n_steps": 3, "evaluate_every_n_epochs": None}, [3, 6, 9], []),
    "steps, and never": ({"evaluate_every_n_steps": 4, "evaluate_every_n_epochs": 0}, [4, 8], []),
    "both": ({"evaluate_every_n_steps": 2, "evaluate_every_n_epochs": 3}, [2, 4, 6, 8], [3]),
}


@pytest.mark.parametrize("begun", range(3))
@pytest.mark.parametrize("name", CADENCES)
def test_when_fit_evaluates(name: str, begun: int):
    """Cadences count the lifetime's steps and epochs, so a call may begin anywhere."""
    every, steps, epochs = CADENCES[name]
    state = tnt.fit(FIT, new(), [1, 1, 1], [1], max_epochs=begun, **every)
    events = tnt.fit_events(FIT, state, [1, 1, 1], [1], max_epochs=3, **every)
    seen = [event.state.progress.train for event in events if (event.phase, event.point) == ("eval", "start")]
    assert [train.steps for train in seen if train.is_open] == [n for n in steps if n > 3 * begun]
    assert [train.epochs for train in seen if not train.is_open] == [n for n in epochs if n > begun]


# Limits

LIMITS: dict[str, tuple[dict[str, Any], tuple[int, int, int], str]] = {
    "epochs": ({"max_epochs": 2}, (2, 6, 0), "max_epochs=2 reached"),
    "steps": ({"max_steps": 7}, (3, 7, 0), "max_steps=7 reached"),
    "steps at the end of an epoch": ({"max_steps": 6}, (2, 6, 0), "max_steps=6 reached"),
    "steps per epoch": ({"max_epochs": 3, "max_steps_per_epoch": 2}, (3, 6, 0), "max_epochs=3 reached"),
    "steps per epoch beyond the data": ({"max_epochs": 1, "max_steps_per_epoch": 9}, (1, 3, 0), "max_epochs=1 reached"),
    "whichever comes first, steps": ({"max_epochs": 2, "max_steps": 4}, (2, 4, 0), "max_steps=4 reached"),
    "whichever comes first, epochs": ({"max_epochs": 1, "max_steps": 4}, (1, 3, 0), "max_epochs=1 reached"),
    "no epoch": ({"max_epochs": 0}, (0, 0, 0), "max_epochs=0 reached"),
    "no step": ({"max_steps": 0}, (0, 0, 0), "max_steps=0 reached"),
    "no step in any epoch": ({"max_epochs": 2, "max_steps_per_epoch": 0}, (2, 0, 0), "max_epochs=2 reached"),
    "infinity": ({"max_epochs": math.inf, "max_steps": 2}, (1, 2, 0), "max_steps=2 reached"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_where_training_ends(name: str):
    limits, counters, reason = LIMITS[name]
    *_, end = tnt.train_events(TRAIN, new(), [1, 1, 1], **limits)
    assert (end.point, tuple(end.state.progress.train), end.reason) == ("end", counters, reason)
    assert end.state.params == counters[1]
    again = list(tnt.train_events(TRAIN, end.state, [1, 1, 1], **limits))
    assert words(again) == "start end" and again[-1].state.progress == end.state.progress


def test_fit_has_the_limits_of_train_under_names_of_its_own():
    state = tnt.fit(FIT, new(), [1, 1, 1], [1], max_epochs=2, max_steps=3, max_train_steps_per_epoch=2)
    assert (state.progress.train, state.progress.eval) == (Progress(2, 3, 0), Progress(2, 2, 0))


def test_limits_are_lifetime_totals_over_several_calls():
    state = new()
    for epochs, steps, counters in [(1, None, (1, 3, 0)), (None, 5, (2, 5, 0)), (4, 9, (4, 9, 0)), (9, 10, (5, 10, 0))]:
        state = tnt.train(TRAIN, state, [1, 1, 1], max_epochs=epochs, max_steps=steps)
        assert tuple(state.progress.train) == counters
    assert state.params == 10


@pytest.mark.parametrize(
    "limits", [{"max_steps": 2}, {"max_epochs": 0}, {"max_epochs": 9, "max_steps_per_epoch": 1}], ids=str
)
def test_an_open_epoch_is_entered_and_closed_whatever_the_limit(limits: dict[str, Any]):
    events = list(tnt.train_events(TRAIN, new(0, 2, 2), [1, 1], **{"max_epochs": 1, **limits}))
    assert words(events).startswith("start epoch_end epoch_done")
    assert events[1].state.progress.train == Progress(1, 2, 0)


def test_an_open_epoch_goes_on_where_it_stood_without_another_epoch_start():
    events = list(tnt.train_events(TRAIN, new(3, 7, 1), [1, 10, 100], max_epochs=4))
    assert words(events) == f"start {STEP} step_done {STEP} step_done epoch_end epoch_done end"
    assert events[-1].state.params == 110 and events[-1].state.progress.train == Progress(4, 9, 0)


@pytest.mark.parametrize("maximum", [0, 1, 2, 5, None])
def test_evaluation_and_prediction_take_a_limit_per_epoch(maximum: int | None):
    steps = min(3, 3 if maximum is None else maximum)
    state = tnt.evaluate(EVAL, new(), [1, 1, 1], max_steps_per_epoch=maximum)
    assert state.progress.eval == Progress(1, steps, 0)
    state, outputs = tnt.predict(PREDICT, state, [1, 1, 1], max_steps_per_epoch=maximum)
    assert state.progress.predict == Progress(1, steps, 0) and len(outputs) == steps
    state = tnt.fit(FIT, new(), [1], [1, 1, 1], max_epochs=2, max_eval_steps_per_epoch=maximum)
    assert state.progress.eval == Progress(2, 2 * steps, 0)


@pytest.mark.parametrize("value", [-1, 1.5, True, math.nan, -math.inf], ids=repr)
def test_a_limit_is_a_non_negative_integer_or_infinity(value: Any):
    with pytest.raises(
        UsageError, match=r"max_steps=.* was given; a limit is a non-negative integer, math.inf, or None"
    ):
        limit("max_steps", value)
    assert [limit("n", good) for good in (0, 3, math.inf, None)] == [0, 3, math.inf, math.inf]


def test_something_must_end_a_run():
    with pytest.raises(UsageError, match="neither max_epochs nor max_steps was given; .* max_epochs=math.inf"):
        Limits.of(None, None, 3)
    assert Limits.of(math.inf, None, None) == Limits(math.inf, math.inf, math.inf)
    for epochs in (None, math.inf):
        with pytest.raises(UsageError, match="limit_name=0 was given without max_epochs; .* never reach max_steps"):
            Limits.of(epochs, 3, 0, "limit_name")


@pytest.mark.parametrize("name", ["evaluate_every_n_epochs", "evaluate_every_n_steps"])
@pytest.mark.parametrize("value", [-1, True])
def test_a_cadence_is_a_non_negative_integer(name: str, value: Any):
    with pytest.raises(UsageError, match=rf"{name}={value!r} was given; a cadence is a positive integer, 0 for never"):
        tnt.fit(FIT, new(), [1], [1], max_epochs=1, **{name: value})


# Epochs without a batch


def test_an_epoch_without_a_batch_counts_where_a_limit_on_epochs_ends_it():
    assert tnt.train(TRAIN, new(), [], max_epochs=3, max_steps=1).progress.train == Progress(3, 0, 0)
    assert tnt.evaluate(EVAL, new(), []).progress.eval == Progress(1, 0, 0)


def test_an_epoch_without_a_batch_is_an_error_where_nothing_would_end_the_run():
    with pytest.raises(
        DataError, match="epoch 2 gave no batch, and without max_epochs no limit can be reached; .* Pass"
    ):
        tnt.train(TRAIN, new(), lambda epoch: [1] * (2 - epoch), max_steps=9)


def test_nothing_left_of_an_open_epoch_is_no_error():
    assert tnt.train(TRAIN, new(0, 2, 2), [1, 1], max_steps=3).progress.train == Progress(2, 3, 0)


# Stopping

STOPS: dict[str, tuple[int, int, int]] = {
    "start": (0, 0, 0),
    "epoch_start": (1, 0, 0),
    "step_start": (1, 1, 0),
    "step_end": (1, 1, 0),
    "epoch_end": (1, 3, 0),
    "end": (2, 6, 0),
}


def stop(state: State) -> State:
    return state.request_stop("enough")


@pytest.mark.parametrize("point", POINTS)
def test_a_stop_requested_in_any_hook_of_training_closes_the_open_epoch(point: str):
    events = list(tnt.train_events(TRAIN, new(), [1, 1, 1], max_epochs=2, callbacks=[at("train", point, stop)]))
    assert tuple(events[-1].state.progress.train) == STOPS[point]
    assert (events[-1].point, events[-1].reason, events[-1].state.stop) == ("end", "enough", None)
    first = next(index for index, event in enumerate(events) if event.point == point)
    assert {event.state.stop for event in events[first:-1]} <= {"enough"}


@pytest.mark.parametrize("phase", ["eval", "predict"])
@pytest.mark.parametrize("point", POINTS)
def test_a_stop_requested_in_any_hook_of_evaluation_and_prediction_cuts_its_one_epoch(phase: Phase, point: str):
    run = {"eval": tnt.evaluate_events, "predict": tnt.predict_events}[phase]
    unit = {"eval": EVAL, "predict": PREDICT}[phase]
    *_, end = run(unit, new(), [1, 1, 1], callbacks=[at(phase, point, stop)])
    steps = {"start": 0, "epoch_start": 0, "step_start": 1, "step_end": 1, "epoch_end": 3, "end": 3}[point]
    assert end.state.progress.of(phase) == Progress(1, steps, 0)
    assert (end.reason, end.state.stop) == ("enough", None)


def test_a_stop_of_training_lets_the_due_evaluation_run_in_full():
    callback = at("train", "step_end", stop)
    every: dict[str, Any] = {"evaluate_every_n_steps": 1, "evaluate_every_n_epochs": 1}
    events = list(tnt.fit_events(FIT, new(), [1, 1], [1, 1], max_epochs=2, callbacks=[callback], **every))
    assert events[-1].state.progress == RunProgress(Progress(1, 1, 0), Progress(2, 4, 0))
    assert {event.state.stop for event in events if event.phase == "eval" and event.point != "end"} == {None}
    assert {event.state.stop for event in events if event.resumable} == {"enough"}
    assert (events[-1].reason, events[-1].state.stop) == ("enough", None)


@pytest.mark.parametrize("point", POINTS)
def test_a_stop_requested_inside_an_evaluation_cuts_it_and_then_training(point: str):
    steps = {"start": 0, "epoch_start": 0, "step_start": 1, "step_end": 1, "epoch_end": 2, "end": 2}[point]
    for cadence, train in (("steps", (1, 1, 0)), ("epochs", (1, 3, 0))):
        every: dict[str, Any] = {f"evaluate_every_n_{cadence}": 1}
        callback = at("eval", point, stop)
        *_, done, end = tnt.fit_events(FIT, new(), [1] * 3, [1] * 2, max_epochs=2, callbacks=[callback], **every)
        assert end.state.progress == RunProgress(Progress(*train), Progress(1, steps, 0))
        assert (done.point, done.state.stop, end.reason, end.state.stop) == ("epoch_done", "enough", "enough", None)


def test_the_reason_of_training_wins_over_one_of_its_last_evaluation():
    callbacks = [Callback(name="a", on_train_step_end=stop, on_eval_step_end=lambda s: s.request_stop("other"))]
    *_, end = tnt.fit_events(FIT, new(), [1, 1], [1, 1], max_epochs=2, callbacks=callbacks)
    assert end.reason == "enough" and end.state.progress.eval == Progress(1, 1, 0)


def test_evaluate_and_predict_leave_a_stop_that_was_requested_before():
    state = new(stop="earlier")
    state = tnt.evaluate(EVAL, state, [1, 1], callbacks=[at("eval", "step_end", stop)])
    assert (state.stop, state.progress.eval) == ("earlier", Progress(1, 1, 0))
    state, outputs = tnt.predict(PREDICT, state, [1, 1])
    assert (state.stop, len(outputs)) == ("earlier", 2)


def test_a_stopping_state_goes_on_to_stop_and_the_returned_one_trains_on():
    events = list(tnt.train_events(TRAIN, new(), [1] * 3, max_epochs=2, callbacks=[at("train", "step_end", stop)]))
    stopping = next(event.state for event in events if event.point == "step_done")
    assert words(tnt.train_events(TRAIN, stopping, [1] * 3, max_epochs=2)) == "start epoch_end epoch_done end"
    assert tnt.train(TRAIN, events[-1].state, [1] * 3, max_epochs=2).progress.train == Progress(2, 4, 0)
