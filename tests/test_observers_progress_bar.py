"""What the bar says: the epoch, the total, the metrics, and the right count at the end."""

import io
import re
import sys
from math import nan
from typing import Any

import pytest
import torch
import tqdm
import tqdm.auto

import tnt_func as tnt
from tnt_func.errors import MissingExtraError, UsageError, UsageTypeError
from tnt_func.observers import console, progress_bar, when


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def bars(self) -> list[str]:
        """What each bar said last, an epoch's each."""
        said = re.findall(r"((?:train|eval|predict) epoch [^:]*:[^\r\n\x1b]*)", self.getvalue())
        return list({line.partition(":")[0]: line for line in said}.values())


def step(state: tnt.State, batch: Any) -> Any:
    return state, {"loss": batch}


MEAN = {"loss": tnt.metrics.mean("loss")}
TRAIN = tnt.TrainUnit(train_step=step, metrics=MEAN)
EVAL = tnt.EvalUnit(eval_step=step, metrics=MEAN)
PREDICT = tnt.PredictUnit(predict_step=step)
FIRST = tnt.State(params=0, key=tnt.key(0))


@pytest.mark.parametrize("every", [0.0, 1e9])
@pytest.mark.parametrize("data", [[1.0] * 10, lambda epoch: iter([1.0] * 10)], ids=["list", "generator"])
def test_it_is_right_at_the_end(data: Any, every: float):
    terminal = Terminal()
    bar = progress_bar(file=terminal, max_epochs=2, metrics_every_seconds=every)
    tnt.train(TRAIN, FIRST, data, max_epochs=2, observers=[bar])
    first, second = terminal.bars()
    assert "train epoch 1/2: 100%" in first and " 10/10 " in first and "loss=1" in first
    assert "train epoch 2/2: 100%" in second and " 10/10 " in second


def test_a_shorter_epoch_and_a_resumed_one_count_what_there_was():
    terminal, asked = Terminal(), iter(range(2))
    state = tnt.train(
        TRAIN, FIRST, [1.0] * 10, max_epochs=2, max_steps_per_epoch=5, pause_when=lambda: next(asked, None) is None
    )
    assert state.progress.train.steps_in_epoch == 3
    observers = [progress_bar(file=terminal)]
    tnt.train(TRAIN, state, [1.0] * 10, max_epochs=2, max_steps_per_epoch=5, observers=observers)
    first, second = terminal.bars()
    assert " 3/10 " in terminal.getvalue() and " 5/5 " in first and " 5/5 " in second
    assert "0/5" in terminal.getvalue()  # The second epoch knows the steps of the first.


def test_every_phase_has_its_bar():
    terminal = Terminal()
    bar, unit = progress_bar(file=terminal, totals={"eval": 3}), tnt.FitUnit(train_unit=TRAIN, eval_unit=EVAL)
    tnt.fit(unit, FIRST, [1.0] * 4, [1.0] * 3, max_epochs=1, observers=[bar])
    tnt.evaluate(EVAL, FIRST, [2.0] * 5, observers=[bar])
    tnt.predict(PREDICT, FIRST, [2.0] * 6, observers=[bar])
    assert "0/3" in terminal.getvalue()
    assert [re.findall(r"\d+/\d+ ", bar)[-1] for bar in terminal.bars()] == ["4/4 ", "5/5 ", "6/6 "]


def test_a_run_that_fails_leaves_its_bar_where_it_was():
    def fall(state: tnt.State, batch: Any) -> Any:
        return step(state, 1 / batch)

    terminal = Terminal()
    with pytest.raises(ZeroDivisionError):
        tnt.train(
            tnt.TrainUnit(train_step=fall), FIRST, [1, 1, 0], max_epochs=1, observers=[progress_bar(file=terminal)]
        )
    assert " 2/3 " in terminal.bars()[-1] and terminal.getvalue().endswith("\n")


class Read(torch.Tensor):
    reads = 0

    def item(self) -> Any:
        Read.reads += 1
        return super().item()


@pytest.mark.parametrize(("terminal", "reads"), [(Terminal(), 1), (io.StringIO(), 0)], ids=["terminal", "file"])
def test_it_reads_at_its_cadence_and_is_quiet_where_no_terminal_is(terminal: io.StringIO, reads: int):
    def reading(state: tnt.State, batch: Any) -> Any:
        return state, {"loss": torch.ones(()).as_subclass(Read)}

    Read.reads = 0
    bar = progress_bar(file=terminal, metrics_every_seconds=1e9)
    tnt.train(tnt.TrainUnit(train_step=reading), FIRST, range(10), max_epochs=1, observers=[bar])
    assert Read.reads == reads and bool(terminal.getvalue()) == bool(reads)


def test_a_notebook_has_a_bar_of_its_own_kind(monkeypatch: pytest.MonkeyPatch):
    """tqdm.auto chooses; a bar of a notebook, stood in for, shows where no terminal is."""
    terminal = Terminal()

    class Notebook(tqdm.tqdm):
        def __init__(self, **options: Any):
            super().__init__(**{**options, "disable": bool(options["disable"]), "file": terminal})

    monkeypatch.setattr(tqdm.auto, "tqdm", Notebook)
    tnt.train(TRAIN, FIRST, [1.0] * 10, max_epochs=1, observers=[progress_bar()])
    assert " 10/10 " in terminal.getvalue() and "loss=1" in terminal.getvalue()


def test_without_tqdm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(MissingExtraError, match=r"progress_bar needs tqdm, .* pip install 'tnt-func\[progress\]'"):
        progress_bar()


def test_console_has_a_line_an_epoch_and_an_evaluation(capsys: pytest.CaptureFixture[str]):
    unit = tnt.FitUnit(train_unit=TRAIN, eval_unit=EVAL)
    tnt.fit(unit, FIRST, [1.0, 2.0], [1 / 3], max_epochs=2, observers=[console()])
    tnt.predict(PREDICT, FIRST, [1], observers=[console()])
    assert capsys.readouterr().out.splitlines() == [
        "train epoch 1, step 2: loss 1.5",
        "eval epoch 1, step 2: loss 0.333333",
        "train epoch 2, step 4: loss 1.5",
        "eval epoch 2, step 4: loss 0.333333",
        "predict epoch 1, step 0",
    ]
    assert console(file=(file := io.StringIO())) and not file.getvalue()


def test_one_phase_alone_and_a_part_of_one():
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}))
    eval_unit = tnt.EvalUnit(eval_step=lambda state, batch: (state, {"loss": batch}))
    both, first = tnt.FitUnit(train_unit=unit, eval_unit=eval_unit), tnt.State(params=0, key=tnt.key(0))
    terminal = Terminal()
    bar = when(lambda event: event.phase == "eval", progress_bar(file=terminal))
    tnt.fit(both, first, [1, 2], [1], max_epochs=1, observers=[bar])
    assert "eval epoch 1: 100%" in terminal.getvalue() and "train" not in terminal.getvalue()
    for point in ("step_end", "step_start"):
        bar = when(lambda event, point=point: event.point in (point, "step_end"), progress_bar(file=terminal))
        with pytest.raises(UsageError, match=r"train step is over, and not that it was fetched; .* Write when\("):
            tnt.train(unit, first, [1, 2], max_epochs=1, observers=[bar])


@pytest.mark.parametrize(
    "given",
    [{"totals": {"train": -1}}, {"max_epochs": 0}, {"metrics_every_seconds": -1}, {"metrics_every_seconds": nan}],
)
def test_numbers_that_cannot_be(given: Any):
    with pytest.raises(UsageError, match=r"was given; none is negative, .* Write totals="):
        progress_bar(**given)


@pytest.mark.parametrize("make", [progress_bar, console, tnt.observers.banner, tnt.observers.compilations])
def test_a_file_is_open_and_no_path(make: Any):
    with pytest.raises(UsageTypeError, match="parameter file='run.log'"):
        make(file="run.log")
