"""What combinators pass on, open and close, under every entry point, and what becomes of errors inside."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from torch.testing._internal.distributed import fake_pg

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.events import Event, Observer, fold
from tnt_func.observers import History, Openable, combinators, every, isolate, on, rank_zero, recorder, tee, when


def step(state: tnt.State, batch: Any) -> Any:
    return state, {"loss": batch}


FIT = tnt.FitUnit(train_unit=tnt.TrainUnit(train_step=step), eval_unit=tnt.EvalUnit(eval_step=step))
PREDICT = tnt.PredictUnit(predict_step=step)
FIRST = tnt.State(params=0, key=tnt.key(0))
RUNS: dict[str, Any] = {
    "train": lambda *observers: tnt.train(FIT.train_unit, FIRST, [1, 2, 3], max_epochs=2, observers=observers),
    "evaluate": lambda *observers: tnt.evaluate(FIT.eval_unit, FIRST, [1, 2, 3], observers=observers),
    "predict": lambda *observers: tnt.predict(PREDICT, FIRST, [1, 2, 3], observers=observers),
    "fit": lambda *observers: tnt.fit(FIT, FIRST, [1, 2, 3], [1], max_epochs=2, observers=observers),
}


class Witness:
    def __init__(self) -> None:
        self.opened, self.closed = 0, 0
        self.seen: list[tuple[str, str, int]] = []

    def __call__(self, event: Event) -> None:
        if event.point == "start":
            self.open(event)
        steps = event.state.progress.of(event.phase).steps if event.state is not None else -1
        self.seen.append((event.phase, event.point, steps))

    def open(self, event: Event) -> None:
        self.opened += 1

    def close(self) -> None:
        self.closed += 1


AROUND: dict[str, Any] = {
    "on end": lambda inside: on("epoch_end", inside),
    "on start": lambda inside: on("start", inside),
    "every steps": lambda inside: every(inside, steps=2),
    "every epochs": lambda inside: every(inside, epochs=1),
    "every seconds": lambda inside: every(inside, seconds=1000),
    "when never": lambda inside: when(lambda event: False, inside),
    "when always": lambda inside: when(lambda event: True, inside),
    "rank_zero": rank_zero,
    "isolate": isolate,
    "tee": tee,
    "nested": lambda inside: isolate(every(tee(rank_zero(inside)), steps=1)),
}


@pytest.mark.parametrize("entry", RUNS)
@pytest.mark.parametrize("around", AROUND)
def test_what_is_inside_is_opened_at_every_start_and_closed_once(entry: str, around: str):
    inside = Witness()
    observer = AROUND[around](inside)
    assert isinstance(observer, Openable) and repr(inside) in repr(observer)
    RUNS[entry](observer)
    assert (inside.opened, inside.closed) == (3 if entry == "fit" else 1, 1)


def third(event: Event) -> bool:
    return event.point == "step_end" and event.batch == 3


@pytest.mark.parametrize(
    ("around", "seen"),
    [
        pytest.param(lambda inside: on("epoch_end", inside), "train 3, eval 1, train 6, eval 2", id="on"),
        pytest.param(lambda inside: on("epoch_end", inside, phase="eval"), "eval 1, eval 2", id="on phase"),
        pytest.param(lambda inside: every(inside, steps=2), "train 2, train 4, train 6, eval 2", id="steps"),
        pytest.param(lambda inside: every(inside, epochs=2), "train 6, eval 2", id="epochs"),
        pytest.param(lambda inside: every(inside, seconds=1000), "", id="seconds"),
        pytest.param(lambda inside: when(third, inside), "train 3, train 6", id="when"),
    ],
)
def test_what_is_passed_on(around: Any, seen: str):
    inside = Witness()
    RUNS["fit"](around(inside))
    assert ", ".join(f"{phase} {steps}" for phase, _, steps in inside.seen) == seen


def test_a_cadence_of_steps_goes_on_where_a_run_is_resumed():
    inside = Witness()
    state = tnt.train(FIT.train_unit, FIRST, [1, 2, 3], max_steps=3, observers=[every(inside, steps=2)])
    tnt.train(FIT.train_unit, state, [1, 2, 3], max_steps=6, observers=[every(inside, steps=2)])
    assert [steps for *_, steps in inside.seen] == [2, 4, 6]


def test_a_cadence_of_seconds_counts_from_the_one_before(monkeypatch: pytest.MonkeyPatch):
    inside, now = Witness(), iter(range(100))
    monkeypatch.setattr(combinators.time, "monotonic", lambda: next(now))
    RUNS["train"](every(inside, seconds=10))
    # Of a run's 33 events or so each takes a second: start, epoch_start, then four a step.
    assert [steps for *_, steps in inside.seen] == [3, 5]


@pytest.mark.parametrize("cadence", [{}, {"steps": 0}, {"seconds": -1.0}, {"steps": 1, "epochs": 1}])
def test_one_cadence_is_given(cadence: Any):
    with pytest.raises(UsageError, match=r"one cadence, above 0. Write every\(observer, steps=10\)"):
        every(print, **cadence)


class Fell(Exception):
    pass


class Falling(Witness):
    """Raises at a point, and on closing where it is told to."""

    def __init__(self, point: str, closing: bool = False):
        super().__init__()
        self._point, self._closing = point, closing

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if event.point == self._point:
            raise Fell

    def close(self) -> None:
        super().close()
        if self._closing:
            raise Fell


@pytest.mark.parametrize("around", ["tee", "rank_zero", "when always"])
def test_without_isolate_a_failure_surfaces(around: str):
    inside = Falling("step_end")
    with pytest.raises(Fell):
        RUNS["train"](AROUND[around](inside))
    assert inside.seen[-1][1] == "failed" and inside.closed == 1


def test_isolate_logs_once_and_lets_the_run_go_on(caplog: pytest.LogCaptureFixture):
    inside, beside = Falling("step_end", closing=True), Witness()
    observer = isolate(inside)
    RUNS["train"](observer, beside)
    assert beside.seen[-1][1] == "end" and inside.seen[-1][1] == "step_end" and inside.closed == 1
    (logged,) = caplog.records
    assert (logged.name, logged.levelno) == ("tnt_func.observers", logging.ERROR) and "Fell" in caplog.text
    RUNS["train"](observer)
    assert len(caplog.records) == 2 and inside.closed == 2  # Another run, another try.


def test_isolate_hears_of_closing_and_opening_too(caplog: pytest.LogCaptureFixture):
    class Shut(Witness):
        def open(self, event: Event) -> None:
            raise Fell

    RUNS["train"](isolate(Falling("never", closing=True)), isolate(on("end", Shut())))
    assert len(caplog.records) == 2


def test_isolate_lets_an_interrupt_pass():
    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RUNS["train"](isolate(interrupt))


def test_tee_tells_and_closes_everybody_even_where_one_falls():
    inside: list[Falling] = [Falling("failed", closing=True), Falling("failed"), Falling("epoch_end")]
    with pytest.raises(Fell):
        RUNS["train"](tee(*inside))
    assert [(one.seen[-1][1], one.closed) for one in inside] == [("failed", 1)] * 3


def test_tee_is_its_observers_in_order():
    told: list[str] = []
    observers: list[Observer] = [lambda event, name=name: told.append(name) for name in "abc"]
    fold(iter([Event("train", "end", state=FIRST)]), [tee(tee(*observers[:2]), observers[2])])
    assert told == ["a", "b", "c"]


def other_rank(write: int) -> None:
    inside = Witness()
    # The fake backend is a group in which this process is rank 1, and waits for nobody.
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=fake_pg.FakeStore())
    RUNS["train"](rank_zero(inside))
    os.write(write, repr((inside.seen, inside.opened, inside.closed)).encode())


def test_rank_zero_alone_is_opened_and_called():
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            other_rank(write)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "([], 0, 1)"
    os.waitpid(child, 0)


WHOLE: dict[str, Any] = {
    "progress bar": lambda path: tnt.observers.progress_bar(),
    "profiler": tnt.observers.profiler,
    "checkpointer": tnt.observers.checkpointer,
    "predictions": lambda path: tnt.observers.predictions(path / "all.csv"),
    "garbage collection": lambda path: tnt.observers.garbage_collection(every_n_steps=1),
    "empty data": lambda path: tnt.observers.warn_on_empty_data(),
    "slow data": lambda path: tnt.observers.warn_on_slow_data(),
    "slow rank": lambda path: tnt.observers.warn_on_slow_rank(),
    "summaries": lambda path: tnt.observers.tensorboard_summaries(
        tnt.observers.tensorboard_writer(path), every_n_steps=1, text=lambda event: {}
    ),
    "measure": lambda path: tnt.observers.timing(),
    "points": lambda path: tnt.observers.points(),
    "recorder with a measure": lambda path: recorder(History(), every_n_steps=1, measures=[tnt.observers.timing()]),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "around",
    [
        pytest.param(lambda inside: every(inside, steps=2), id="every"),
        pytest.param(lambda inside: on("epoch_end", inside), id="on"),
        pytest.param(lambda inside: on("end", isolate(tee(print, rank_zero(inside)))), id="deep inside"),
    ],
)
def test_what_needs_all_events_is_refused_before_anything_runs(name: str, around: Any, tmp_path: Path):
    with pytest.raises(UsageError, match=r"was given .* alone; it needs all the events of a phase. Write it by itself"):
        around(WHOLE[name](tmp_path))


@pytest.mark.parametrize("cadence", [{"steps": 2}, {"seconds": 60}])
def test_two_cadences_for_the_rows_of_steps_are_refused(cadence: Any):
    with pytest.raises(UsageError, match=r"every_n_steps=50; a row .* Write recorder\(..., every_n_steps=n\) without"):
        every(recorder(History()), **cadence)


@pytest.mark.parametrize(
    ("around", "rows"),
    [
        pytest.param(lambda inside: every(inside(every_n_steps=1), steps=2), [(2, 0), (4, 1), (6, 1)], id="steps"),
        pytest.param(lambda inside: every(inside(), epochs=2), [(6, 2)], id="epochs"),
        pytest.param(lambda inside: on("epoch_end", inside()), [(3, 1), (6, 2)], id="on"),
        pytest.param(lambda inside: on("step_end", inside(every_n_steps=3)), [(3, 0), (6, 1)], id="on steps"),
        pytest.param(lambda inside: when(lambda event: event.phase == "eval", inside()), [], id="when"),
    ],
)
def test_which_rows_a_recorder_inside_has(around: Any, rows: Any):
    history, metrics = History(), {"loss": tnt.metrics.mean("loss")}
    unit = tnt.TrainUnit(train_step=step, metrics=metrics)
    observers = [around(lambda **given: recorder(history, **given))]
    tnt.train(unit, FIRST, [1.0, 2.0, 3.0], max_epochs=2, observers=observers)
    assert [row.place for row in history] == rows


def test_a_console_says_that_it_prints_epochs():
    for around in (lambda inside: every(inside, steps=2), lambda inside: on("step_end", inside)):
        with pytest.raises(UsageError, match=r"step_end alone; it prints where an epoch is over. Write every\(console"):
            around(tnt.observers.console())
    with pytest.raises(UsageError, match="to tell it of end alone"):
        on("end", recorder(History()))
