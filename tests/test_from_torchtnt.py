"""What docs/torchtnt.md says serves for each of TorchTNT's callbacks and loggers, serves."""

import gc
import importlib
import inspect
import io
import itertools
import logging
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.observers import History, checkpointer, every, recorder

DOCS = Path(__file__).parent.parent / "docs" / "torchtnt.md"
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", DOCS.read_text(), re.MULTILINE))
"""TorchTNT's name: what serves."""


def step(state: tnt.State, batch: torch.Tensor) -> Any:
    return state.replace(params=state.params + 1), {"loss": batch.mean()}


METRICS = {"loss": tnt.metrics.mean("loss")}
TRAIN = tnt.TrainUnit(train_step=step, metrics=METRICS)
EVAL = tnt.EvalUnit(eval_step=lambda state, batch: (state, {"loss": batch.mean()}), metrics=METRICS)
PREDICT = tnt.PredictUnit(predict_step=lambda state, batch: (state, {"score": batch.flatten()}))
FIT = tnt.FitUnit(train_unit=TRAIN, eval_unit=EVAL)
FIRST = tnt.State(params=torch.zeros(()), key=tnt.key(0))
DATA = [torch.full((2, 1), float(n)) for n in range(5)]


def train(*observers: Any, **options: Any) -> tnt.State:
    return tnt.train(TRAIN, FIRST, DATA, **{"max_epochs": 2, **options}, observers=observers)


def torchtnt_names() -> Iterator[str]:
    yield from importlib.import_module("torchtnt.framework.callbacks").__all__
    loggers = importlib.import_module("torchtnt.utils.loggers")
    for info in pkgutil.iter_modules(loggers.__path__):
        module = importlib.import_module(f"{loggers.__name__}.{info.name}")
        for name, value in inspect.getmembers(module, inspect.isclass):
            if value.__module__ == module.__name__ and name.endswith("Logger"):
                yield name


def test_every_callback_and_logger_has_its_row_and_every_row_its_test():
    assert ROWS.keys() == set(torchtnt_names())
    tests = {name.removeprefix("test_").replace("_", "") for name in globals()}
    assert [name for name in ROWS if name.lower() not in tests] == []


@pytest.mark.parametrize("name", ROWS)
def test_what_serves_is_there(name: str):
    for path in re.findall(r"`tnt\.([\w.]+)`", ROWS[name]):
        value: Any = tnt
        for part in path.split("."):
            value = getattr(value, part)
        assert value.__doc__


def test_base_csv_writer(tmp_path: Path):
    tnt.predict(PREDICT, FIRST, DATA, observers=[tnt.observers.predictions(tmp_path / "all.csv")])
    assert (tmp_path / "all.csv").read_text().split() == ["score", *(str(float(n)) for n in range(5) for _ in "ab")]


def test_distributed_checkpoint_saver(tmp_path: Path):
    """D13: 0.0 is a number, and the last step of an epoch is saved once."""
    losses = iter([0.5, 0.0, 0.25])
    eval_unit = tnt.EvalUnit(eval_step=lambda state, batch: (state, {"loss": next(losses)}), metrics=METRICS)
    saving = checkpointer(tmp_path, every_n_steps=5, every_n_epochs=1, keep=1, keep_best=1, metric="loss")
    tnt.fit(tnt.FitUnit(train_unit=TRAIN, eval_unit=eval_unit), FIRST, DATA, [0], max_epochs=3, observers=[saving])
    names = [path.name for path in tnt.checkpoint.checkpoints(tmp_path)]
    assert names == ["step-000000000010-epoch-000002", "step-000000000015-epoch-000003"]
    assert tnt.checkpoint.best(tmp_path, "loss", "min") == tmp_path / names[0]


def test_torch_snapshot_saver(tmp_path: Path):
    state = train(checkpointer(tmp_path, every_n_steps=2, asynchronous=True))
    found = tnt.checkpoint.latest(tmp_path)
    assert found is not None
    assert tnt.digest(tnt.checkpoint.restore(found, like=tnt.prepare(TRAIN, FIRST))) == tnt.digest(state)


def test_early_stopping():
    stopping = tnt.callbacks.early_stopping("loss", phase="train", patience=2)
    state = tnt.train(TRAIN, FIRST, DATA, max_epochs=100, callbacks=[stopping])
    assert state.progress.train.epochs == 3 and state.memory["early_stopping"] == {"best": 2.0, "wait": 2}


def test_empty_cuda_cache(monkeypatch: pytest.MonkeyPatch):
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    train(every(tnt.observers.empty_cuda_cache, steps=5))
    assert len(calls) == 2


def test_garbage_collector():
    seen: list[bool] = []
    train(tnt.observers.garbage_collection(every_n_steps=2), lambda event: seen.append(gc.isenabled()))
    assert gc.isenabled() and set(seen) == {False}


def clock() -> Any:
    """A second passes between two looks at it."""
    return itertools.count(0.0).__next__


def test_iteration_time_logger():
    history = History()
    train(recorder(history, every_n_steps=1, measures=[tnt.observers.timing(clock=clock())]))
    assert all(row.metrics["time.step"] >= 1.0 for row in history if row.kind == "step")


def test_time_wait_for_batch_logger():
    history = History()
    train(recorder(history, every_n_steps=1, measures=[tnt.observers.timing(clock=clock())]))
    assert all(row.metrics["time.data_wait"] == 1.0 for row in history if row.kind == "step")
    assert all(0 < row.metrics["time.data_wait_share"] < 1 for row in history)


def test_lambda(capsys: pytest.CaptureFixture[str]):
    """D14: print is a hook."""
    printing = tnt.callbacks.lambda_callback(on_train_start=lambda state: print("here"), on_train_end=print)
    tnt.train(TRAIN, FIRST, DATA, max_epochs=1, callbacks=[printing])
    assert capsys.readouterr().out.startswith("here\nState(")


def test_learning_rate_monitor():
    optimizer, history = tnt.optim.sgd(tnt.schedules.linear(1.0, 0.0, steps=4)), History()
    unit, state = tnt.supervised(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, optimizer, key=tnt.key(0))
    observers = [recorder(history, every_n_steps=1, hyperparameters=["lr"])]
    tnt.train(unit.train_unit, state, [(torch.ones(1, 1), torch.ones(1, 1))] * 4, max_epochs=1, observers=observers)
    assert [row.metrics["optim.lr"] for row in history if row.kind == "step"] == [1.0, 0.75, 0.5, 0.25]


def test_memory_snapshot(tmp_path: Path):
    if torch.cuda.is_available():
        train(tnt.observers.cuda_memory_snapshots(tmp_path, every_n_steps=5))
        assert len(list(tmp_path.iterdir())) == 2
    else:
        with pytest.raises(tnt.errors.UsageError, match="torch has no CUDA device"):
            tnt.observers.cuda_memory_snapshots(tmp_path)


def test_module_summary():
    file = io.StringIO()
    summary = tnt.observers.module_summary(torch.nn.Linear(4, 8), torch.ones(3, 4))
    train(tnt.observers.banner(summary, file=file))
    assert summary.rows[0].parameters == 40 and str(summary) in file.getvalue()


def test_progress_reporter(caplog: pytest.LogCaptureFixture):
    log = logging.getLogger("run")
    with caplog.at_level(logging.INFO):
        train(lambda event: log.info("%s %s %s", event.phase, event.point, event.state.progress.train), max_epochs=1)
    assert len(caplog.records) == 4 + 1 + 4 * len(DATA)
    assert caplog.messages[-1] == "train end Progress(epochs=1, steps=5, steps_in_epoch=0)"


def test_pytorch_profiler(tmp_path: Path):
    train(tnt.observers.profiler(tmp_path, wait=1, warmup=1, active=2))
    (trace,) = tmp_path.iterdir()
    assert trace.name.endswith(".pt.trace.json") and "aten::add" in trace.read_text()


def test_slow_rank_detector():
    """On two processes in test_observers_slow_ranks; here it is alone, and nobody waits."""
    assert tnt.digest(train(tnt.observers.warn_on_slow_rank(every_n_steps=1))) == tnt.digest(train())


def test_system_resources_monitor():
    history = History()
    train(recorder(history, every_n_steps=5, measures=[tnt.observers.system()]))
    assert all(row.metrics["system.process_memory_bytes"] > 2**20 for row in history)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_tqdm_progress_bar(seconds: float):
    """D14: at the end it says 10/10."""
    terminal = Terminal()
    data = [torch.ones(1)] * 10
    bar = tnt.observers.progress_bar(file=terminal, metrics_every_seconds=seconds)
    tnt.train(TRAIN, FIRST, data, max_epochs=1, observers=[bar])
    assert " 10/10 " in terminal.getvalue().rpartition("\r")[2]


def test_tensor_board_parameter_monitor(tmp_path: Path):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    writer = tnt.observers.tensorboard_writer(tmp_path)
    params = tnt.observers.tensorboard_summaries(
        writer, every_n_epochs=1, histograms=lambda event: {"params": event.state.params}
    )
    train(params)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    (tag,) = events.Tags()["histograms"] or events.Tags()["tensors"]
    assert "params" in tag


def test_torch_compile():
    eager, state = tnt.supervised(
        torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, tnt.optim.sgd(0.1), key=tnt.key(0)
    )
    batches = [(torch.ones(2, 1), torch.zeros(2, 1))] * 3
    whole = tnt.compiled(eager.train_unit, backend="aot_eager")
    ends = [tnt.train(unit, state, batches, max_epochs=1).params for unit in (eager.train_unit, whole)]
    tnt.asserts.assert_trees_close(*ends, rtol=1e-5, atol=1e-6)


def test_throughput_logger():
    """D14: prediction has one too."""
    history = History()
    measures = [tnt.observers.throughput(clock=clock())]
    tnt.predict(PREDICT, FIRST, DATA, observers=[recorder(history, measures=measures)])
    (row,) = history
    assert row.phase == "predict" and row.metrics["throughput.samples_per_second"] > 0
    assert row.metrics["throughput.samples_per_second"] == 2 * row.metrics["throughput.batches_per_second"]


def test_time_limit_interrupter():
    now = iter(range(100))
    state = train(pause_when=tnt.pausing.until(lambda: next(now) == 2))
    assert state.progress.train.steps == 3 and state.progress.train.is_open
    assert tnt.digest(tnt.train(TRAIN, state, DATA, max_epochs=2)) == tnt.digest(train())
    assert tnt.pausing.time_limit(0)() and not tnt.pausing.time_limit(3600)()


def test_train_progress_monitor():
    history = History()
    train(recorder(history))
    assert [(row.step, row.epoch) for row in history if row.kind == "epoch"] == [(5, 1), (10, 2)]


def test_csv_logger(tmp_path: Path):
    train(recorder(tnt.observers.csv_writer(tmp_path / "run.csv")))
    lines = (tmp_path / "run.csv").read_text().split()
    assert lines == ["step,epoch,phase,kind,loss", "5,1,train,epoch,2.0", "10,2,train,epoch,2.0"]


def test_in_memory_logger():
    history = History()
    train(recorder(history, every_n_steps=5))
    assert [row.metrics["loss"] for row in history[-2:]] == [4.0, 2.0]


def test_json_logger(tmp_path: Path):
    history = History()
    train(recorder(history, tnt.observers.jsonl_writer(tmp_path / "run.jsonl")))
    assert list(tnt.observers.read_jsonl(tmp_path / "run.jsonl")) == list(history)


class Kept:
    """A writer that somebody wrote for a sink of their own."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def open(self, place: Any) -> None:
        self.said.append("open")

    def write(self, row: tnt.observers.Row) -> None:
        self.said.append(row.step)

    def close(self) -> None:
        self.said.append("close")


def test_file_logger():
    kept = Kept()
    train(recorder(kept))
    assert kept.said == ["open", 5, 10, "close"]


def test_metric_logger():
    assert isinstance(Kept(), tnt.observers.Writer) and isinstance(History(), tnt.observers.Writer)


def test_stdout_logger(capsys: pytest.CaptureFixture[str]):
    train(tnt.observers.console(), max_epochs=1)
    assert capsys.readouterr().out == "train epoch 1, step 5: loss 2\n"


def test_tensor_board_logger(tmp_path: Path):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    train(recorder(tnt.observers.tensorboard_writer(tmp_path)))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Tensors("train/loss")
    assert [(event.step, event.tensor_proto.double_val[0]) for event in events] == [(5, 2.0), (10, 2.0)]
