"""What MLflow itself reads back is what History has; a resumed run leaves out what is there, and tells what differs."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from test_observers_recorder import FIRST, UNIT, fit, tags

import tnt_func as tnt
from tnt_func.errors import MissingExtraError, UsageError
from tnt_func.observers import History, Row, Writer, isolate, mlflow_writer, recorder

LARGEST = sys.float_info.max.hex()
IN_SQLITE = {"inf": LARGEST, "-inf": f"-{LARGEST}", "-0x0.0p+0": "0x0.0p+0"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db"


def metrics(writer: Any) -> dict[str, list[tuple[int, str]]]:
    """Of every metric the steps and exact values, as `tags`."""
    client = MlflowClient(writer.client.tracking_uri)
    names = client.get_run(writer.run_id).data.metrics
    return {
        name: sorted((m.step, m.value.hex()) for m in client.get_metric_history(writer.run_id, name)) for name in names
    }


def stored(history: History) -> dict[str, list[tuple[int, str]]]:
    return {name: sorted((step, IN_SQLITE.get(x, x)) for step, x in points) for name, points in tags(history).items()}


def runs(uri: str, experiment: str) -> list[Any]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def test_it_reads_back_what_history_has(uri: str):
    history, writer = History(), mlflow_writer("a", "first", tracking_uri=uri, params={"lr": 1e-3, "layers": [1, 2]})
    assert isinstance(writer, Writer)
    fit(FIRST, [recorder(history, writer, every_n_steps=1)])
    assert metrics(writer) == stored(history)
    (run,) = runs(uri, "a")
    assert run.data.params == {"lr": "0.001", "layers": "[1, 2]"}
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")


def test_a_resumed_run_goes_on_where_it_is_and_a_new_one_begins_anew(uri: str, caplog: pytest.LogCaptureFixture):
    history, writer = History(), mlflow_writer("b", "run", tracking_uri=uri, params={"lr": 1})
    after_one = fit(FIRST, [recorder(history, writer, every_n_steps=1)], max_epochs=1)
    first = writer.run_id
    fit(after_one, [recorder(history, writer, every_n_steps=1)], max_epochs=2)
    fit(after_one, [recorder(history, writer, every_n_steps=1)], max_epochs=3)  # Its second epoch is there already.
    assert writer.run_id == first and len(history) == 18 and metrics(writer) == stored(history)
    assert not caplog.records
    fit(FIRST, [recorder(writer, every_n_steps=1)], max_epochs=1)
    assert writer.run_id != first and len(runs(uri, "b")) == 2
    again = mlflow_writer("b", "run", tracking_uri=uri, run_id=first)
    fit(FIRST, [recorder(again, every_n_steps=1)])
    assert again.run_id == first and metrics(again) == stored(history)


def test_numbers_that_differ_stay_and_are_told_of_once(uri: str, caplog: pytest.LogCaptureFixture):
    rows = [Row(step, 0, "train", "step", {"loss": 1 / step, "time": 0.5}) for step in (1, 2, 3)]
    writer = mlflow_writer("c", "run", tracking_uri=uri)
    History(rows).write_to(writer)
    writer.open((1, 0))
    with caplog.at_level(logging.WARNING, "tnt_func.observers"):
        for step in (2, 3, 4):
            writer.write(Row(step, 0, "train", "step", {"loss": 1 / step, "time": float(step)}))
    writer.close()
    assert metrics(writer)["train_step/time"] == [(x, y.hex()) for x, y in ((1, 0.5), (2, 0.5), (3, 0.5), (4, 4.0))]
    (said,) = caplog.messages
    assert f"'run', {writer.run_id}, has train_step/time = 0.5 at step 2, and this run has 2.0" in said


def test_evaluations_of_their_own_add_rows(uri: str):
    history, writer = History(), mlflow_writer("d", "run", tracking_uri=uri)
    state = fit(FIRST, [recorder(history, writer)], max_epochs=1)
    recording = recorder(history, writer)
    for _ in range(2):
        tnt.evaluate(UNIT.eval_unit, state, [0], observers=[recording])
    assert len(runs(uri, "d")) == 1 and metrics(writer) == stored(history)


def test_other_params_are_refused_and_a_failed_run_is_one(uri: str):
    state = fit(FIRST, [recorder(mlflow_writer("e", "run", tracking_uri=uri, params={"lr": 1}))], max_epochs=1)
    with pytest.raises(MlflowException, match="[Cc]hanging param"):
        fit(state, [recorder(mlflow_writer("e", "run", tracking_uri=uri, params={"lr": 2}))], max_epochs=2)

    def failing(event: tnt.Event) -> None:
        if event.point == "step_end":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(state, [recorder(mlflow_writer("e", "run", tracking_uri=uri)), failing], max_epochs=2)
    assert [run.info.status for run in runs(uri, "e")] == ["FAILED"]


def test_a_server_that_refuses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    writer = mlflow_writer("g", "run", tracking_uri="http://127.0.0.1:1")
    with pytest.raises(MlflowException, match="[Cc]onnection"):
        fit(FIRST, [recorder(writer)], max_epochs=1)
    state = fit(FIRST, [isolate(recorder(writer))], max_epochs=1)
    assert tnt.digest(state) == tnt.digest(fit(FIRST, [], max_epochs=1))
    assert [record.name for record in caplog.records].count("tnt_func.observers") == 1


def test_many_params(uri: str):
    writer = mlflow_writer("f", "run", tracking_uri=uri, params={f"x{i}": i for i in range(250)})
    writer.close()
    writer.open((0, 0))
    writer.close()
    assert len(runs(uri, "f")[0].data.params) == 250


def test_a_missing_extra_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(UsageError, match="Write one without"):
        mlflow_writer("a", 'a "run"')
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    with pytest.raises(MissingExtraError, match=r"mlflow_writer needs mlflow.*tnt-func\[mlflow\]"):
        mlflow_writer("a", "b")


def test_another_rank_makes_no_run_of_the_same_name(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["tnt_func.observers.mlflow_writer"], "is_rank_zero", lambda: False)
    with pytest.raises(UsageError, match=r"a rank other than 0; each would make .* Write rank_zero\(recorder\("):
        fit(FIRST, [recorder(mlflow_writer("ranks", "run", tracking_uri=uri))])
    client = MlflowClient(uri)
    own = client.create_run(client.create_experiment("ranks")).info.run_id
    fit(FIRST, [recorder(mlflow_writer("ranks", "run", run_id=own, tracking_uri=uri))], max_epochs=1)
    assert [run.info.run_id for run in runs(uri, "ranks")] == [own]
