"""When the checkpointer saves, what it keeps, and how it says that it could not."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func import testing
from tnt_func.checkpoint import best, checkpoints, inspect, restore, resume, save
from tnt_func.errors import CheckpointError, UsageError
from tnt_func.events import Event
from tnt_func.observers import checkpointer, every, isolate, on, rank_zero, tee, when
from tnt_func.state import State


def step(state: State, batch: Any) -> Any:
    return state.replace(params=state.params + batch), {"loss": state.params.sum()}


def evaluate(state: State, batch: Any) -> Any:
    return state, {"loss": LOSSES[state.progress.train.steps % len(LOSSES)]}


LOSSES = (3.0, float("nan"), 0.0, 5.0, 2.0)
TRAIN = tnt.TrainUnit(train_step=step)
FIT = tnt.FitUnit(
    train_unit=TRAIN, eval_unit=tnt.EvalUnit(eval_step=evaluate, metrics={"loss": tnt.metrics.mean("loss")})
)
FIRST = tnt.State(params=torch.zeros(2), key=tnt.key(0))
DATA = [1.0, 2.0, 3.0]


def train(directory: Path, state: State = FIRST, epochs: int = 2, **options: Any) -> State:
    pause_when = options.pop("pause_when", None)
    saving = checkpointer(directory, **options)
    return tnt.train(TRAIN, state, DATA, max_epochs=epochs, observers=[saving], pause_when=pause_when)


def fit(directory: Path, every: int | None = 1, **options: Any) -> State:
    saving = checkpointer(directory, **options)
    return tnt.fit(FIT, FIRST, DATA, [0], max_epochs=2, evaluate_every_n_steps=every, observers=[saving])


def names(directory: Path) -> list[str]:
    """`step/epoch` of every checkpoint."""
    return [
        "/".join(str(int(part)) for part in path.name.replace("step-", "").split("-epoch-"))
        for path in checkpoints(directory)
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["6/2"]),
        ({"every_n_steps": 2}, ["2/0", "4/1", "6/2"]),
        ({"every_n_steps": 1}, ["1/0", "2/0", "3/0", "4/1", "5/1", "6/2"]),
        ({"every_n_epochs": 1}, ["3/1", "6/2"]),
        ({"every_n_steps": 1, "every_n_epochs": 1}, ["1/0", "2/0", "3/1", "4/1", "5/1", "6/2"]),
        ({"every_n_steps": 1, "keep": 2}, ["5/1", "6/2"]),
        ({"every_minutes": 1e-9, "keep": 3}, ["4/1", "5/1", "6/2"]),
        ({"every_minutes": 1000.0}, ["6/2"]),
    ],
)
def test_it_saves_when_due_and_at_the_end(tmp_path: Path, options: Any, expected: list[str], asynchronous: bool):
    state = train(tmp_path, **options, asynchronous=asynchronous)
    assert names(tmp_path) == expected
    assert trees.equal(tnt.train(TRAIN, resume(tmp_path, tnt.prepare(TRAIN, FIRST)), DATA, max_epochs=2), state)
    assert not list(tmp_path.glob(".*"))


def test_every_checkpoint_leads_to_the_same_end(tmp_path: Path):
    state = train(tmp_path, every_n_steps=1, every_n_epochs=1)
    for path in checkpoints(tmp_path):
        start = restore(path, tnt.prepare(TRAIN, FIRST))
        assert trees.equal(tnt.train(TRAIN, start, DATA, max_epochs=2), state)


def test_evaluations(tmp_path: Path):
    fit(tmp_path / "a", on_evaluation=True)
    assert names(tmp_path / "a") == ["1/0", "2/0", "3/0", "4/1", "5/1", "6/2"]
    fit(tmp_path / "b", None, on_evaluation=True, every_n_steps=1)
    found = {path.name: inspect(path).metrics for path in checkpoints(tmp_path / "b")}
    assert [bool(metrics.get("eval")) for metrics in found.values()] == [False, False, True, False, False, True]


@pytest.mark.parametrize(("mode", "expected"), [("min", ["2/0", "4/1", "6/2"]), ("max", ["3/0", "5/1", "6/2"])])
def test_the_best_are_kept_by_a_metric(tmp_path: Path, mode: Any, expected: list[str]):
    """After steps 1 to 6 the losses are NaN, 0, 5, 2, 3, NaN; the last checkpoint is kept as the latest."""
    fit(tmp_path, every_n_steps=1, keep=1, keep_best=2, metric="loss", mode=mode)
    assert names(tmp_path) == expected
    assert best(tmp_path, "loss", mode) == checkpoints(tmp_path)[expected.index("2/0" if mode == "min" else "3/0")]


def test_a_metric_that_no_checkpoint_has_is_told_at_the_end(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"metric='los', phase='eval', which no state had.*They had \['eval loss'"):
        fit(tmp_path / "a", every_n_steps=1, keep=1, keep_best=2, metric="los")
    with pytest.warns(UserWarning, match=r"phase='eval', which no state had.*They had \[\]"):
        train(tmp_path / "b", every_n_steps=1, keep=1, keep_best=1, metric="loss")


def test_pauses_and_failures_save_the_last_resumable_state(tmp_path: Path):
    answers = iter([False, True])
    paused = train(tmp_path / "a", pause_when=lambda: next(answers))
    assert names(tmp_path / "a") == ["2/0"]
    assert trees.equal(resume(tmp_path / "a", tnt.prepare(TRAIN, FIRST)), paused)

    def failing(state: State, batch: Any) -> Any:
        if state.progress.train.steps == 4:
            raise KeyboardInterrupt
        return step(state, batch)

    unit, saving = tnt.TrainUnit(train_step=failing), checkpointer(tmp_path / "b", asynchronous=True)
    with pytest.raises(KeyboardInterrupt):
        tnt.train(unit, FIRST, DATA, max_epochs=2, observers=[saving])
    assert names(tmp_path / "b") == ["4/1"] and saving.last == checkpoints(tmp_path / "b")[-1]
    assert trees.equal(train(tmp_path / "b", resume(tmp_path / "b", tnt.prepare(TRAIN, FIRST))), train(tmp_path / "c"))


def test_a_resumed_run_does_not_save_again_what_is_there(tmp_path: Path):
    train(tmp_path, every_n_steps=1)
    written = {path: (path / "checkpoint.json").stat().st_mtime_ns for path in checkpoints(tmp_path)}
    with pytest.warns(UserWarning, match="later steps than 0"):
        train(tmp_path, every_n_steps=1)
    assert {path: (path / "checkpoint.json").stat().st_mtime_ns for path in checkpoints(tmp_path)} == written


def test_checkpoints_of_later_steps_stay_until_the_run_gets_there(tmp_path: Path):
    train(tmp_path, every_n_steps=1)
    for path in checkpoints(tmp_path)[:4]:
        shutil.rmtree(path)
    with pytest.warns(UserWarning, match="later steps than 0"):
        train(tmp_path, every_n_steps=1, keep=1, epochs=1)
    assert names(tmp_path) == ["3/1", "5/1", "6/2"]


def test_a_damaged_later_one_is_replaced_when_the_run_gets_there(tmp_path: Path):
    state = train(tmp_path, every_n_steps=1, keep=2)
    (checkpoints(tmp_path)[-1] / "tensors.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"):
        start = resume(tmp_path, tnt.prepare(TRAIN, FIRST))
    assert start.progress.train.steps == 5
    with pytest.warns(UserWarning, match="later steps than 5"):
        train(tmp_path, start, every_n_steps=1, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-000000000005-epoch-000001",
        "step-000000000006-epoch-000002.1",
    ]
    assert resume(tmp_path, tnt.prepare(TRAIN, FIRST)).progress == state.progress


def test_what_a_killed_process_left_is_cleared_and_others_files_are_not(tmp_path: Path):
    for name in (".tnt-0123", ".git", "step-mine"):
        (tmp_path / name).mkdir()
    train(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {".git", "step-mine", "step-000000000006-epoch-000002"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_directory_deleted_under_it(tmp_path: Path, asynchronous: bool):
    saving = checkpointer(tmp_path / "a", every_n_steps=1, asynchronous=asynchronous)

    def delete(event: Event) -> None:
        if event.point == "step_start" and event.state.progress.train.steps == 3:
            while (tmp_path / "a").exists():
                shutil.rmtree(tmp_path / "a", ignore_errors=True)

    with pytest.raises(CheckpointError, match="could not be written.*No such file or directory"):
        tnt.train(TRAIN, FIRST, DATA, max_epochs=2, observers=[delete, saving])
    assert not (tmp_path / "a").exists()


def test_a_directory_that_cannot_be_made_fails_before_the_first_step(tmp_path: Path):
    (tmp_path / "file").touch()
    seen = list[str]()
    with pytest.raises(CheckpointError, match="cannot be written to"):
        observers = [lambda event: seen.append(event.point), checkpointer(tmp_path / "file" / "a")]
        tnt.train(TRAIN, FIRST, DATA, max_epochs=2, observers=observers)
    assert seen == ["start", "failed"]


class Slow:
    """A save that waits until it is let go, and says how many are under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None):
        self.gate, self.under_way, self.most, self.count, self.error = threading.Event(), 0, 0, 0, error
        self.entered = threading.Event()
        monkeypatch.setattr("tnt_func.checkpoint.listing.save", self)

    def __call__(self, path: Path, state: State, metrics: Any) -> None:
        self.under_way += 1
        self.entered.set()
        self.most, self.count = max(self.most, self.under_way), self.count + 1
        self.gate.wait(600)
        self.under_way -= 1
        if self.error is not None:
            raise self.error
        save(path, state, metrics=metrics)


def test_training_goes_on_while_it_writes_and_the_next_save_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    slow, steps = Slow(monkeypatch), list[int]()

    def watch(event: Event) -> None:
        if event.point == "step_done":
            steps.append(slow.under_way)
        if event.point == "step_start" and event.state.progress.train.steps == 2:
            slow.entered.wait(600)
        if event.point == "step_start" and event.state.progress.train.steps == 3:
            threading.Timer(0.01, slow.gate.set).start()

    saving = checkpointer(tmp_path, every_n_steps=2, asynchronous=True)
    tnt.train(TRAIN, FIRST, DATA, max_epochs=2, observers=[watch, saving])
    assert steps[2] == 1, "the step after the save was done while it was under way"
    assert slow.most == 1 and names(tmp_path) == ["2/0", "4/1", "6/2"]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_an_asynchronous_error_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_the_end: bool):
    slow, steps = Slow(monkeypatch, CheckpointError("no room")), 0
    if not at_the_end:
        slow.gate.set()

    def count(state: State, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.01 * (not at_the_end))
        return step(state, batch)

    threading.Timer(0.3, slow.gate.set).start()
    with pytest.raises(CheckpointError, match="no room"):
        saving = checkpointer(tmp_path, every_n_steps=1 if not at_the_end else None, asynchronous=True)
        tnt.train(tnt.TrainUnit(train_step=count), FIRST, DATA, max_epochs=2, observers=[saving])
    assert steps == 6 if at_the_end else steps < 6
    assert checkpoints(tmp_path) == []


def test_one_checkpointer_watches_one_run_after_another(tmp_path: Path):
    saving = checkpointer(tmp_path, asynchronous=True, keep=3)
    state = FIRST
    for epoch in (1, 2):
        state = tnt.train(TRAIN, state, DATA, max_epochs=epoch, observers=[saving])
    assert names(tmp_path) == ["3/1", "6/2"]


@pytest.mark.parametrize("make", [checkpointer, tnt.replay.record])
def test_what_needs_every_event_is_not_put_where_it_would_save_nothing(tmp_path: Path, make: Any):
    saving = make(tmp_path / "run")
    arounds: list[Any] = [
        lambda: every(saving, steps=1),
        lambda: on("epoch_done", saving),
        lambda: tee(every(isolate(print), steps=9), on("end", saving)),
        lambda: when(lambda event: event.point == "step_done", saving),
    ]
    for around in arounds:
        with pytest.raises(UsageError, match="(a part of|needs all) the events.* its own"):
            tnt.train(TRAIN, FIRST, DATA, max_epochs=1, observers=[around()])
    assert not (tmp_path / "run").exists()
    for around in (tee(saving), isolate(saving), rank_zero(saving), when(lambda event: event.phase == "train", saving)):
        tnt.fit(FIT, FIRST, DATA, DATA, max_epochs=1, observers=[around])
        assert any(tmp_path.rglob("checkpoint.json"))
        shutil.rmtree(tmp_path / "run")


def test_a_failure_without_a_state_is_told_where_the_last_checkpoint_is(tmp_path: Path):
    train(tmp_path, keep=1)
    saving: Any = checkpointer(tmp_path)
    error = RuntimeError("boom")
    saving(Event("train", "failed", state=None, resumable=True, error=error))  # pyright: ignore[reportArgumentType]
    assert error.__notes__ == ["The last checkpoint is None."]


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_steps": 0},
        {"every_n_epochs": -1},
        {"keep": 0},
        {"every_minutes": 0},
        {"keep_best": 1, "keep": 1},
        {"keep_best": 1, "metric": "loss"},
        {"metric": "loss"},
    ],
)
def test_arguments_that_contradict_each_other(options: Any):
    with pytest.raises(UsageError, match="Write "):
        checkpointer("x", **options)


@pytest.mark.filterwarnings("ignore:.* has checkpoints of later steps:UserWarning")
def test_it_watches_and_changes_nothing(tmp_path: Path):
    saving = checkpointer(tmp_path / "a", every_n_steps=1, keep=1)
    testing.check_observers(TRAIN, FIRST, DATA, observers=[saving])


def test_a_run_that_fails_before_it_starts_saves_nothing(tmp_path: Path):
    def fail(event: Event) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        tnt.train(TRAIN, FIRST, DATA, max_epochs=2, observers=[fail, checkpointer(tmp_path / "a")])
    assert list(tmp_path.iterdir()) == []
