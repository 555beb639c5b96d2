"""Which rows a run has, that every format reads back as History has them, and that no kill loses or repeats one."""

import csv
import json
import math
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import tnt_func as tnt
from tnt_func.errors import CheckpointError, MissingExtraError, UsageError
from tnt_func.events import Event
from tnt_func.observers import (
    History,
    Row,
    Writer,
    checkpointer,
    csv_writer,
    every,
    jsonl_writer,
    recorder,
    tensorboard_writer,
)

LOSSES = (0.1, -0.0, 1 / 3, float("nan"), 1e300, -math.inf, 5e-324)


def train_step(state: tnt.State, batch: Any) -> Any:
    steps = state.progress.train.steps
    output = {
        "loss": torch.tensor(LOSSES[steps % len(LOSSES)], dtype=torch.float64),
        "step": 7,
        "scores": torch.ones(2),
    }
    return state.replace(params=state.params + batch), output | ({"late": 1} if steps > 2 else {})


def eval_step(state: tnt.State, batch: Any) -> Any:
    return state, {"loss": state.params / 3}


MEAN = {"loss": tnt.metrics.mean("loss")}
UNIT = tnt.FitUnit(
    train_unit=tnt.TrainUnit(train_step=train_step, metrics=MEAN),
    eval_unit=tnt.EvalUnit(eval_step=eval_step, metrics=MEAN),
    predict_unit=tnt.PredictUnit(predict_step=eval_step),
)
FIRST = tnt.State(params=torch.zeros((), dtype=torch.float64), key=tnt.key(0))


def fit(state: tnt.State, observers: Sequence[Any], max_epochs: int = 3) -> tnt.State:
    data = [1.0, 2.0, 3.0]
    return tnt.fit(
        UNIT,
        state,
        data,
        [0],
        max_epochs=max_epochs,
        evaluate_every_n_steps=3,
        evaluate_every_n_epochs=1,
        observers=observers,
    )


def writers(directory: Path) -> list[Writer]:
    return [csv_writer(directory / "run.csv"), jsonl_writer(directory / "run.jsonl"), tensorboard_writer(directory)]


def flat(rows: Sequence[Row]) -> list[Any]:
    """Rows, comparable: of floats their exact text."""
    return [(*row[:4], {name: float(value).hex() for name, value in row.metrics.items()}) for row in rows]


def of_csv(directory: Path) -> list[Row]:
    with open(directory / "run.csv", newline="") as file:
        found = list(csv.DictReader(file))
    fields = ("step", "epoch", "phase", "kind")
    metrics = [
        {name.removeprefix("metrics."): float(cell) for name, cell in row.items() if name not in fields and cell}
        for row in found
    ]
    heads: list[Any] = [(int(row["step"]), int(row["epoch"]), row["phase"], row["kind"]) for row in found]
    return [Row._make((*head, values)) for head, values in zip(heads, metrics, strict=True)]


def of_jsonl(directory: Path) -> list[Row]:
    found = [json.loads(line) for line in (directory / "run.jsonl").read_text().splitlines()]
    return [Row(**{**row, "metrics": {name: float(x) for name, x in row["metrics"].items()}}) for row in found]


def of_tensorboard(directory: Path) -> dict[str, list[tuple[int, str]]]:
    """Of every tag the steps and exact values."""
    return scalars(EventAccumulator(str(directory), size_guidance={"tensors": 0}))


def scalars(events: EventAccumulator) -> dict[str, list[tuple[int, str]]]:
    events.Reload()
    return {
        tag: [(event.step, float(make_ndarray(event.tensor_proto)).hex()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def tags(rows: Sequence[Row]) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard should have of rows."""
    found: dict[str, list[tuple[int, str]]] = {}
    for row in rows:
        group = row.phase + ("_step" if row.kind == "step" else "")
        for tag, value in {f"epoch/{group}": row.epoch, **{f"{group}/{n}": x for n, x in row.metrics.items()}}.items():
            found.setdefault(tag, []).append((row.step, float(value).hex()))
    return found


def check_files(directory: Path, history: Sequence[Row]) -> None:
    assert flat(of_csv(directory)) == flat(of_jsonl(directory)) == flat(history)
    assert of_tensorboard(directory) == tags(history)


def whole() -> History:
    history = History()
    fit(FIRST, [recorder(history, every_n_steps=1)])
    return history


def test_the_rows_of_a_run():
    history = whole()
    kinds = [(row.step, row.epoch, row.phase, row.kind) for row in history[:6]]
    assert kinds == [
        (1, 0, "train", "step"),
        (2, 0, "train", "step"),
        (3, 0, "train", "step"),
        (3, 0, "eval", "epoch"),
        (3, 1, "train", "epoch"),
        (3, 1, "eval", "epoch"),
    ]
    assert len(history) == 18 and [row.place for row in history] == sorted(row.place for row in history)
    assert history[0].metrics == {"loss": 0.1, "step": 7.0} and history[3].metrics == {"loss": 2.0}


def test_rows_of_steps_come_at_their_cadence_and_nothing_else_is_read():
    class Read(torch.Tensor):
        reads = 0

        def item(self) -> Any:
            Read.reads += 1
            return super().item()

    def step(state: tnt.State, batch: Any) -> Any:
        return state, {"loss": torch.ones(()).as_subclass(Read)}

    history = History()
    unit = tnt.TrainUnit(train_step=step)
    tnt.train(unit, FIRST, range(10), max_epochs=1, observers=[recorder(history, every_n_steps=4)])
    assert [row.step for row in history] == [4, 8] and Read.reads == 2


def test_every_format_reads_back_what_history_has(tmp_path: Path):
    history = History()
    fit(FIRST, [recorder(history, *writers(tmp_path), every_n_steps=1)])
    check_files(tmp_path, history)
    frame = history.to_pandas()
    assert frame.columns.tolist() == ["step", "epoch", "phase", "kind", "loss", "metrics.step", "late"]
    assert [x.hex() for x in frame["loss"]] == [float(row.metrics["loss"]).hex() for row in history]


def test_a_history_is_a_sequence():
    history = whole()
    assert isinstance(history[2:4], History) and flat(history[2:4]) == flat([*history][2:4])
    assert history[-1].phase == "eval" and repr(history[1:2]).startswith("History(1 row, step ")


def test_evaluations_and_predictions_of_their_own_add_rows(tmp_path: Path):
    history = History()
    state = fit(FIRST, [recorder(history, *writers(tmp_path), every_n_steps=1)], max_epochs=1)
    before = len(history)
    recording = recorder(history, *writers(tmp_path))
    tnt.evaluate(UNIT.eval_unit, FIRST, [0], observers=[recording])  # Of an earlier state: nothing is cut.
    assert UNIT.predict_unit is not None
    tnt.predict(UNIT.predict_unit, state, [0], observers=[recording])  # It has no metrics.
    assert len(history) == before + 1 and history[-1].place == (0, 0)
    check_files(tmp_path, history)


@pytest.mark.filterwarnings("ignore:.* rows of an earlier run")
def test_under_a_combinator_it_is_opened_all_the_same(tmp_path: Path):
    history = History()
    observers = [every(recorder(history, *writers(tmp_path), every_n_steps=1), steps=3)]
    for _ in range(2):
        fit(FIRST, observers, max_epochs=2)
        assert [(row.step, row.phase) for row in history] == [(3, "train"), (6, "train")]
        check_files(tmp_path, history)


@pytest.mark.filterwarnings("ignore:.* rows of an earlier run")
def test_a_loop_that_is_dropped_and_begun_again_has_no_row_twice(tmp_path: Path):
    history = History()
    recording = recorder(history, *writers(tmp_path)[:2], every_n_steps=1)
    for _ in range(2):
        for event in tnt.train_events(UNIT.train_unit, FIRST, [1.0, 2.0, 3.0], max_epochs=1):
            recording(event)
    assert [row.place for row in history] == [(1, 0), (2, 0), (3, 0), (3, 1)]
    assert flat(of_csv(tmp_path)) == flat(of_jsonl(tmp_path)) == flat(history)
    recording.close()


def test_a_run_that_begins_anew_says_whose_rows_it_cuts(tmp_path: Path):
    def run(first: tnt.State, max_epochs: int, *given: Any) -> tnt.State:
        observers = [recorder(*given, every_n_steps=1)]
        return tnt.train(UNIT.train_unit, first, [1.0, 2.0, 3.0], max_epochs=max_epochs, observers=observers)

    each = [History(), *writers(tmp_path)]
    half = run(FIRST, 1, *each)
    for _ in range(2):
        run(half, 2, *each)
    for writer in each:
        with pytest.warns(UserWarning, match="^8 rows of an earlier run were cut from .*begins at step 0"):
            run(FIRST, 1, writer)


def hyperparameters(optimizer: Any, names: Sequence[str]) -> dict[str, float]:
    unit, state = tnt.supervised(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, optimizer, key=tnt.key(0))
    history, one = History(), torch.ones(1, 1)
    observers = [recorder(history, every_n_steps=1, hyperparameters=names)]
    tnt.train(unit.train_unit, state, [(one, one)], max_epochs=1, observers=observers)
    return {name: value for name, value in history[0].metrics.items() if name.startswith("optim.")}


def test_hyperparameters_stand_beside_the_step():
    assert hyperparameters(tnt.optim.adamw(0.5, betas=(0.25, 0.75)), ["lr", "betas"]) == {
        "optim.lr": 0.5,
        "optim.betas.0": 0.25,
        "optim.betas.1": 0.75,
    }
    groups = [(lambda path: "bias" in path, {"lr": 0.25})]
    assert hyperparameters(tnt.optim.from_torch(torch.optim.SGD, groups=groups, lr=0.5), ["lr"]) == {
        "optim.lr.0": 0.25,
        "optim.lr.1": 0.5,
    }
    with pytest.raises(UsageError, match=r"hyperparameters=\['learning_rate'\].*has \[.*'lr'.*Write one of those"):
        hyperparameters(tnt.optim.adamw(0.5), ["lr", "learning_rate"])


def resumed(directory: Path, turn: random.Random, events: int | None) -> tnt.State:
    """Train on from the directory's checkpoint, and die at an event."""
    state = tnt.checkpoint.resume(directory / "checkpoints", tnt.prepare(UNIT, FIRST))
    left = iter(range(events if events is not None else sys.maxsize))

    def killer(event: Event) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    saving = checkpointer(directory / "checkpoints", every_n_steps=1, every_n_epochs=1, keep=3)
    observers: list[Any] = [recorder(*writers(directory), every_n_steps=1), saving, killer]
    turn.shuffle(observers)
    return fit(state, observers)


@pytest.mark.filterwarnings("ignore:.* rows of an earlier run")
def test_a_run_killed_at_random_and_resumed_has_each_row_once(tmp_path: Path):
    seed = random.randrange(1 << 30)
    turn = random.Random(seed)
    for _ in range(6):
        order, events = turn.random(), turn.randrange(4, 45)
        if (child := os.fork()) == 0:
            try:
                resumed(tmp_path, random.Random(order), events)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"seed {seed}"
        if turn.random() < 0.5:
            for path in [*tmp_path.glob("run.*"), *tmp_path.glob("events.*")]:
                with open(path, "r+b") as file:
                    torn = file.read(turn.randrange(1, 20))
                    file.seek(0, os.SEEK_END)
                    file.write(torn.rstrip(b"\n"))
    resumed(tmp_path, turn, None)
    print(f"seed {seed}")
    check_files(tmp_path, whole())


def test_a_tensorboard_that_is_open_forgets_what_is_taken_again(tmp_path: Path):
    history = History()
    recording = recorder(history, tensorboard_writer(tmp_path), every_n_steps=1)
    after_one = fit(FIRST, [recording], max_epochs=1)
    fit(after_one, [recording], max_epochs=2)
    reader = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    assert scalars(reader) == tags(history) and len(history) == 12
    fit(after_one, [recording], max_epochs=3)
    assert scalars(reader) == of_tensorboard(tmp_path) == tags(history) and len(history) == 18


def test_an_event_is_on_the_disk_when_write_returns(tmp_path: Path):
    writer, sizes = tensorboard_writer(tmp_path), [0]
    writer.open((0, 0))
    for step in range(50):
        writer.write(Row(step + 1, 0, "train", "step", {"loss": 1.0}))
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
    writer.close()
    assert sizes == sorted(set(sizes))


def test_event_files_have_seconds_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr("time.time", lambda: 1e9 + 0.25)
    monkeypatch.setattr("time.sleep", slept.append)
    for step in range(2):
        writer = tensorboard_writer(tmp_path)
        writer.open((step, 0))
        writer.write(Row(step + 1, 0, "train", "step", {"loss": 1.0}))
        writer.close()
    assert slept == [0.75]


def test_files_of_others_are_refused_and_left(tmp_path: Path):
    for name, content, make in (("a.csv", "x,y\n1,2\n", csv_writer), ("a.jsonl", '{"x": 1}\n', jsonl_writer)):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="Write to another path"):
            fit(FIRST, [recorder(make(tmp_path / name))])
        assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("make", [csv_writer, jsonl_writer])
def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch):
    real, calls = os.write, iter(range(3))

    def write(file: int, line: bytes) -> int:
        return real(file, line) if next(calls, None) is not None else real(file, line[:5])

    monkeypatch.setattr("tnt_func.lines.os.write", write)
    with pytest.raises(CheckpointError, match="the disk is full. Make room"):
        fit(FIRST, [recorder(make(tmp_path / "run"), every_n_steps=1)])
    lines = (tmp_path / "run").read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 + (make is csv_writer) and lines[-1].endswith(b"\n")


def test_a_missing_extra_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch):
    for name in ("torch.utils.tensorboard", "pandas", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"tnt-func\[tensorboard\]"):
        tensorboard_writer("runs")
    with pytest.raises(MissingExtraError, match=r"tnt-func\[progress\]"):
        tnt.observers.progress_bar()
    with pytest.raises(MissingExtraError, match=r"tnt-func\[pandas\]"):
        History().to_pandas()


@pytest.mark.parametrize("given", [{"every_n_steps": 0}, {"hyperparameters": "lr"}])
def test_arguments_that_cannot_work(given: Any):
    with pytest.raises(UsageError, match="Write"):
        recorder(History(), **given)


def test_a_recorder_that_a_run_inside_of_its_own_has_too_goes_on(tmp_path: Path):
    history = History()
    recording = recorder(history, *writers(tmp_path), every_n_steps=1)

    def evaluating(event: Event) -> None:
        if event.point == "epoch_done":
            tnt.evaluate(UNIT.eval_unit, event.state, [0], observers=[recording])

    tnt.train(UNIT.train_unit, FIRST, [1.0, 2.0], max_epochs=2, observers=[recording, evaluating])
    assert [(row.step, row.kind, row.phase) for row in history[2:4]] == [(2, "epoch", "train"), (2, "epoch", "eval")]
    assert len(history) == 8
    check_files(tmp_path, history)


def test_a_recorder_that_is_told_of_steps_alone_cuts_nothing(tmp_path: Path):
    recording = recorder(history := History(), *writers(tmp_path), every_n_steps=1)
    for _ in range(2):
        events = tnt.train_events(UNIT.train_unit, FIRST, [1.0, 2.0], max_epochs=1)
        for event in (event for event in events if event.point == "step_end"):
            recording(event)
        recording.close()
    assert [row.step for row in history] == [1, 2, 1, 2]
    check_files(tmp_path, history)
