"""How a run pauses, fails, is dropped, and goes on from where it was."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.errors import ContractError
from tnt_func.events import Event
from tnt_func.metrics import last, mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State, digest
from tnt_func.types import Phase
from tnt_func.unit import POINTS, Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit


def noisy_step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    noise = torch.rand(2) + np.random.rand()
    return state.replace(params=state.params * 0.9 + batch * noise), {"x": noise.sum()}


def read(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    return state, {"x": state.params.sum() * batch + torch.rand(())}


def count(state: State) -> State:
    return state.remember("count", state.memory["count"] + 1)


METRICS = {"x": mean("x"), "last": last("x")}
TRAIN = TrainUnit(train_step=noisy_step, metrics=METRICS)
FIT = FitUnit(train_unit=TRAIN, eval_unit=EvalUnit(eval_step=read, metrics=METRICS))
COUNTING = Callback(name="count", memory=lambda state: 0, on_train_step_end=count, on_train_epoch_end=count)
EVAL_COUNTING = replace(COUNTING, on_eval_step_end=count)
START = State(params=torch.ones(2), key=tnt.key(3))
DATA, EVAL_DATA = [1.0, 2.0, 3.0], [1.0, 2.0]


def train(state: State, **more: Any) -> Iterator[Event]:
    return tnt.train_events(TRAIN, state, DATA, max_epochs=2, callbacks=[COUNTING], **more)


def fit(state: State, epochs: int = 2, **more: Any) -> Iterator[Event]:
    every: dict[str, Any] = {"evaluate_every_n_steps": 2, "evaluate_every_n_epochs": 1}
    return tnt.fit_events(FIT, state, DATA, EVAL_DATA, max_epochs=epochs, callbacks=[EVAL_COUNTING], **every, **more)


RUNS: dict[str, Callable[..., Iterator[Event]]] = {"train": train, "fit": fit}


def told(events: Iterator[Event]) -> list[Any]:
    return [(event.phase, event.point, event.batch, event.reason, digest(event.state)) for event in events]


def asking(at: int) -> Callable[[], bool]:
    """A pause_when that says True when it is asked for the time given."""
    asked = iter(range(10**6))
    return lambda: next(asked) == at


# Going on


@pytest.mark.parametrize("name", RUNS)
def test_from_every_resumable_event_the_rest_of_the_run_follows(name: str):
    run = RUNS[name]
    whole, events = told(run(START)), list(run(START))
    resumable = [index for index, event in enumerate(events) if event.resumable]
    assert len(resumable) == 8
    for index in resumable:
        assert told(run(events[index].state))[1:] == whole[index + 1 :]


# Pausing


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("at", range(8))
def test_a_pause_ends_the_run_at_a_resume_point_and_changes_no_number(name: str, at: int):
    run = RUNS[name]
    events = list(run(START, pause_when=asking(at)))
    done, paused = events[-2:] if name == "train" else (None, events[-1])
    assert paused.point == "paused" and paused.resumable and paused.reason == "pause_when returned True"
    assert done is None or (done.resumable and done.state is paused.state)
    *_, end = run(START)
    *_, resumed = run(paused.state)
    assert digest(resumed.state) == digest(end.state)


def test_pause_when_is_asked_at_resumable_points_and_at_evaluation_steps():
    places: list[str] = []
    asked_at: list[str] = []
    for event in fit(START, pause_when=lambda: bool(asked_at.append(places[-1]))):
        places.append(f"{event.phase}.{event.point}")
    steps, ends = ["train.step_done", "eval.step_end", "eval.step_end"], ["eval.step_end"] * 2 + ["train.epoch_done"]
    first = ["train.step_done", *steps[1:], "train.step_done", "train.step_done", *ends]
    second = [*steps[1:], "train.step_done", "train.step_done", *steps[1:], "train.step_done", *ends]
    assert asked_at == first + second


def test_a_pause_inside_an_evaluation_abandons_it_and_the_step_it_followed():
    # Asked at the first step, then at the first evaluation step after the second.
    *_, asked, paused = fit(START, pause_when=asking(1))
    assert (asked.phase, asked.point) == ("eval", "step_end")
    assert paused.phase == "train" and paused.state.progress == RunProgress(Progress(0, 1, 1))
    assert paused.state.memory["count"] == 1


@pytest.mark.parametrize("one_shot", ["train", "eval"])
def test_a_pause_finishes_an_evaluation_where_an_iterator_could_not_give_its_batches_again(one_shot: str):
    batches, judged = (iter(DATA), EVAL_DATA) if one_shot == "train" else (DATA, iter(EVAL_DATA))
    every: dict[str, Any] = {"max_epochs": 1, "evaluate_every_n_steps": 2}
    state = tnt.fit(FIT, START, batches, judged, **every, pause_when=asking(1))
    assert state.progress == RunProgress(Progress(0, 2, 2), Progress(1, 2, 0))
    state = tnt.fit(FIT, state, batches, judged, **every)
    assert digest(state) == digest(tnt.fit(FIT, START, DATA, EVAL_DATA, **every))


def test_a_pause_before_anything_is_done_gives_the_prepared_state():
    every: dict[str, Any] = {"max_epochs": 1, "evaluate_every_n_steps": 1, "pause_when": lambda: True}
    state = tnt.fit(FIT, START, DATA, EVAL_DATA, **every)
    assert digest(state) == digest(tnt.prepare(FIT, START))


def test_a_paused_state_carries_what_data_the_open_epoch_reads_and_a_stop():
    state = tnt.train(TRAIN, START, DATA, max_epochs=1, pause_when=lambda: True)
    assert state.memory["data"]["length"] == 3 and state.progress.train == Progress(0, 1, 1)
    stopping = Callback(name="stop", on_train_step_end=lambda state: state.request_stop("enough"))
    state = tnt.train(TRAIN, START, DATA, max_epochs=1, callbacks=[stopping], pause_when=lambda: True)
    assert state.stop == "enough"
    assert tnt.train(TRAIN, state, DATA, max_epochs=1).progress.train == Progress(1, 1, 0)


# Failing


class Boom(Exception):
    pass


def raising(error: BaseException, at: int) -> Callable[..., Any]:
    """A hook or step that raises when it is called for the time given."""
    called = iter(range(10**6))

    def hook(state: State, *batch: Any) -> Any:
        if next(called) == at:
            raise error
        return noisy_step(state, *batch) if batch else state

    return hook


def failure(events: Iterator[Event], error: BaseException) -> tuple[list[Event], Event]:
    """The events before and at a failure, which is raised unchanged after it was told."""
    seen: list[Event] = []
    with pytest.raises(type(error)) as caught:
        seen.extend(events)
    assert caught.value is error
    *before, failed = seen
    assert failed.point == "failed" and failed.error is error
    assert [event.point for event in before].count("failed") == 0
    return before, failed


def last_resumable(events: list[Event], prepared: State) -> State:
    return next((event.state for event in reversed(events) if event.resumable), prepared)


@pytest.mark.parametrize("error", [Boom(), KeyboardInterrupt(), SystemExit(2)], ids=repr)
@pytest.mark.parametrize("at", range(6))
def test_an_error_in_a_step_fails_with_the_last_resumable_state(at: int, error: BaseException):
    unit = TrainUnit(train_step=raising(error, at))
    before, failed = failure(tnt.train_events(unit, START, DATA, max_epochs=2), error)
    assert before[-1].point == "step_start"
    assert digest(failed.state) == digest(last_resumable(before, tnt.prepare(unit, START)))
    assert failed.resumable and failed.phase == "train" and failed.state.progress.train.steps == at


@pytest.mark.parametrize("phase", ["train", "eval"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("at", [0, 1])
def test_an_error_in_a_hook_fails_with_the_last_resumable_state(phase: Phase, point: str, at: int):
    error, hooks = Boom(), {}
    hooks[f"on_{phase}_{point}"] = raising(error, at)
    events = tnt.fit_events(FIT, START, DATA, EVAL_DATA, max_epochs=2, callbacks=[Callback(name="c", **hooks)])
    if phase == "train" and point in ("start", "end") and at == 1:
        assert [event.point for event in events][-1] == "end", "called once a run"
        return
    before, failed = failure(events, error)
    prepared = tnt.prepare(FIT, START)
    assert digest(failed.state) == digest(last_resumable(before, prepared))
    assert failed.resumable and failed.phase == "train"
    *_, end = tnt.fit_events(FIT, failed.state, DATA, EVAL_DATA, max_epochs=2)
    assert digest(end.state) == digest(tnt.fit(FIT, START, DATA, EVAL_DATA, max_epochs=2))


def test_an_error_thrown_in_by_who_iterates_fails_at_any_event():
    prepared = tnt.prepare(FIT, START, [EVAL_COUNTING])
    for index in range(len(list(fit(START, epochs=1)))):
        error, events, seen = Boom(), fit(START, epochs=1), []
        for _ in range(index + 1):
            seen.append(next(events))
        failed = events.throw(error)  # pyright: ignore[reportAttributeAccessIssue]
        assert failed.point == "failed" and digest(failed.state) == digest(last_resumable(seen, prepared))
        with pytest.raises(Boom) as caught:
            next(events)
        assert caught.value is error


def test_a_failed_evaluation_or_prediction_has_nothing_to_resume():
    def fail(state: State) -> State:
        raise error

    error = Boom()
    for phase, events in (
        ("eval", tnt.evaluate_events(EvalUnit(eval_step=read, on_eval_step_end=fail), START, EVAL_DATA)),
        ("predict", tnt.predict_events(PredictUnit(predict_step=read, on_predict_end=fail), START, EVAL_DATA)),
    ):
        _, failed = failure(events, error)
        assert failed.phase == phase and not failed.resumable and failed.state.params is START.params


def broken_data(error: BaseException) -> Iterator[float]:
    yield 1.0
    raise error


def test_an_error_of_the_data_fails_the_run():
    error = Boom()
    before, failed = failure(tnt.train_events(TRAIN, START, broken_data(error), max_epochs=1), error)
    assert before[-1].point == "step_done" and failed.state is before[-1].state
    before, failed = failure(tnt.evaluate_events(FIT.eval_unit, START, broken_data(error)), error)
    assert before[-1].point == "step_end" and not failed.resumable and failed.phase == "eval"


def exhausted(*_: Any) -> Any:
    return next(iter(()))


STOP_ITERATIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "step": (lambda: tnt.train(TrainUnit(train_step=exhausted), START, DATA, max_epochs=1), "train_step"),
    "eval step": (lambda: tnt.evaluate(EvalUnit(eval_step=exhausted), START, DATA), "eval_step"),
    "hook": (
        lambda: tnt.evaluate(EvalUnit(eval_step=read, on_eval_end=exhausted), START, DATA),
        "EvalUnit.on_eval_end",
    ),
    "callback": (
        lambda: tnt.fit(
            FIT, START, DATA, DATA, max_epochs=1, callbacks=[Callback(name="c", on_eval_step_end=exhausted)]
        ),
        "callback 'c' on_eval_step_end",
    ),
    "pause_when": (lambda: tnt.train(TRAIN, START, DATA, max_epochs=1, pause_when=exhausted), "pause_when"),
    "data": (lambda: tnt.train(TRAIN, START, exhausted, max_epochs=1), "the train data function"),
    "metric": (
        lambda: tnt.evaluate(
            EvalUnit(eval_step=read, metrics={"m": tnt.Metric(METRICS["x"].empty, exhausted)}), START, DATA
        ),
        "the metric 'm'",
    ),
}


@pytest.mark.parametrize("name", STOP_ITERATIONS)
def test_stop_iteration_from_user_code_does_not_end_an_epoch_in_silence(name: str):
    call, owner = STOP_ITERATIONS[name]
    with pytest.raises(
        ContractError, match=f"^{owner} raised StopIteration; that would end the epoch in silence"
    ) as caught:
        call()
    assert isinstance(caught.value.__cause__, StopIteration)


# Dropping


def stand() -> tuple[Any, ...]:
    """Where the global generators and the gradient mode stand."""
    numpy: Any = np.random.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        numpy[1].tobytes(),
        numpy[2:],
        random.getstate(),
        torch.is_grad_enabled(),
    )


class Augmented(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(()) + np.random.rand() + random.random()


@pytest.mark.parametrize("gradients", [True, False])
def test_a_run_may_be_dropped_at_any_event_and_leaves_nothing_behind(gradients: bool):
    loader = DataLoader(Augmented(), batch_size=None, shuffle=True)

    def run() -> Iterator[Event]:
        return tnt.fit_events(FIT, START, loader, loader, max_epochs=1, evaluate_every_n_steps=1)

    length = len(list(run()))
    with torch.set_grad_enabled(gradients):
        before = stand()
        for index in range(length):
            events = run()
            for _ in range(index):
                next(events)
            assert stand() == before
            events.close()  # pyright: ignore[reportAttributeAccessIssue]
            assert stand() == before
            with pytest.raises(StopIteration):
                next(events)


def test_what_is_drawn_between_two_events_changes_nothing():
    loader = DataLoader(Augmented(), batch_size=None, shuffle=True)
    quiet = told(tnt.train_events(TRAIN, START, loader, max_epochs=1))
    loud: list[Any] = []
    for event in tnt.train_events(TRAIN, START, loader, max_epochs=1):
        assert stand() != (torch.rand(5), np.random.rand(5), random.random())
        loud.extend(told(iter([event])))
    assert [line[:2] + line[3:] for line in quiet] == [line[:2] + line[3:] for line in loud]
    assert trees.equal([line[2] for line in quiet], [line[2] for line in loud])
