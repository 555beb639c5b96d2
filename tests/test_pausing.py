"""Pausing: times, signals, predicates; a pause loses nothing, and handlers are given back."""

import itertools
import math
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.errors import UsageError, UsageTypeError
from tnt_func.events import Event
from tnt_func.pausing import any_of, on_signal, time_limit, until
from tnt_func.state import State

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def step(state: State, batch: Any) -> Any:
    return state.replace(params=state.params + batch * torch.rand(())), {}


UNIT = tnt.FitUnit(
    train_unit=tnt.TrainUnit(train_step=step), eval_unit=tnt.EvalUnit(eval_step=lambda state, batch: (state, {}))
)
FIRST = tnt.State(params=torch.zeros(()), key=tnt.key(0))


def fit(state: State = FIRST, **options: Any) -> State:
    return tnt.fit(UNIT, state, [1.0, 2.0, 3.0], range(100), max_epochs=2, evaluate_every_n_steps=2, **options)


def test_times(monkeypatch: pytest.MonkeyPatch):
    assert not time_limit(60)() and not time_limit(timedelta(minutes=1))() and time_limit(0)()
    assert time_limit(until=datetime.now(UTC) - timedelta(hours=1))()
    assert not time_limit(until=datetime.now() + timedelta(hours=1))()
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limit = time_limit(0.02)
    assert not limit()
    now += 0.03
    assert limit()


@pytest.mark.parametrize(
    "arguments", [{}, {"seconds": 1, "until": datetime.now()}, {"seconds": -1}, {"seconds": math.nan}]
)
def test_times_that_are_none(arguments: Any):
    with pytest.raises(UsageError, match="time_limit"):
        time_limit(**arguments)


def test_a_predicate_that_has_held_is_not_asked_again():
    asked = itertools.count()
    pause = until(lambda: next(asked) == 1)
    assert [pause() for _ in range(4)] == [False, True, True, True] and next(asked) == 2
    wrong: Any = lambda: "yes"  # noqa: E731
    with pytest.raises(UsageTypeError, match="returned a str"):
        until(wrong)()


def test_any_of():
    assert any_of(time_limit(60), until(lambda: True))()
    assert not any_of(time_limit(60), until(lambda: False))()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_pauses_and_handlers_are_given_back(number: signal.Signals):
    before = [signal.getsignal(each) for each in SIGNALS]
    with on_signal() as pause:
        assert not pause() and pause.received is None
        os.kill(os.getpid(), number)
        assert pause() and pause() and pause.received is number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert pause()


def test_handlers_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(RuntimeError, match="boom"), on_signal(signal.SIGUSR1):
        assert signal.getsignal(signal.SIGUSR1) != before
        raise RuntimeError("boom")
    with pytest.raises(UsageError, match="SIGKILL"), on_signal(signal.SIGUSR1, signal.SIGKILL):
        pass
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_interrupt_is_for_good():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), on_signal() as pause:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert pause()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_that_hears_nothing_says_so():
    pause = on_signal(signal.SIGUSR1)
    with pytest.raises(UsageError, match="outside of its `with`"):
        pause()
    with pause, pytest.raises(UsageError, match="entered twice"), pause:
        pass
    caught = list[Exception]()

    def enter() -> None:
        try:
            with on_signal():
                pass
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_a_signal_in_a_long_evaluation_pauses_within_one_step_and_loses_nothing(tmp_path: Path):
    seen, sent = list[tuple[str, str]](), 0

    def watch(event: Event) -> None:
        nonlocal sent
        seen.append((event.phase, event.point))
        if event.phase == "eval" and event.point == "step_start" and event.state.progress.eval.steps_in_epoch == 40:
            os.kill(os.getpid(), signal.SIGTERM)
            sent = len(seen)

    whole = fit()
    saving = tnt.observers.checkpointer(tmp_path)
    with on_signal() as pause:
        paused = fit(observers=[watch, saving], pause_when=pause)
    assert seen[sent:] == [("eval", "step_end"), ("train", "paused")]
    assert paused.progress.train.steps == 1, "the step that was being evaluated is done again"
    resumed = fit(tnt.checkpoint.resume(tmp_path, tnt.prepare(UNIT, FIRST)))
    assert trees.equal(resumed, whole)


def test_a_signal_in_a_step_finishes_the_step(tmp_path: Path):
    def signalled(state: State, batch: Any) -> Any:
        if state.progress.train.steps == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(state, batch)

    unit = tnt.TrainUnit(train_step=signalled)
    with on_signal() as pause:
        paused = tnt.train(unit, FIRST, [1.0, 2.0, 3.0], max_epochs=2, pause_when=any_of(pause, time_limit(600)))
    assert paused.progress.train.steps == 4
    train = tnt.TrainUnit(train_step=step)
    whole = tnt.train(train, FIRST, [1.0, 2.0, 3.0], max_epochs=2)
    assert trees.equal(tnt.train(train, paused, [1.0, 2.0, 3.0], max_epochs=2), whole)
