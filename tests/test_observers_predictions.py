"""Predictions read back with pandas, the csv module and pyarrow are the outputs; no file is there in part."""

import csv
import importlib
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as parquet
import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import MissingExtraError, UsageError
from tnt_func.observers import predictions

FIRST = tnt.State(params=torch.tensor(2.0), key=tnt.key(0))
DATA = [torch.tensor([0.1, -0.0, math.nan]), torch.tensor([math.inf]), torch.tensor([1 / 3, 5e-45])]


def step(state: tnt.State, batch: torch.Tensor) -> Any:
    output = {
        "score": batch.double() / 3,
        "label": batch > 0,
        "count": torch.arange(len(batch)),
        "half": batch.bfloat16(),
        "pair": torch.stack([batch, -batch], 1),
        "grid": torch.arange(4 * len(batch)).reshape(-1, 2, 2),
        "none": torch.zeros(len(batch), 0),
        "name": [f'{x:g}, "{i}"' for i, x in enumerate(batch.tolist())],
        "loss": batch.mean(),
    }
    return state, output


UNIT = tnt.PredictUnit(predict_step=step)


def expected() -> list[dict[str, Any]]:
    """The rows of all the steps, as Python values, floats by their exact text."""
    rows = []
    for batch in DATA:
        output = {name: x for name, x in step(FIRST, batch)[1].items() if name != "loss"}
        columns = [x.tolist() if isinstance(x, torch.Tensor) else x for x in output.values()]
        rows += [dict(zip(output, map(exact, row), strict=True)) for row in zip(*columns, strict=True)]
    return rows


def exact(value: Any) -> Any:
    if isinstance(value, list):
        return [exact(x) for x in value]
    return value.hex() if isinstance(value, float) else value


def predicted(path: Path, **options: Any) -> None:
    tnt.predict(UNIT, FIRST, DATA, observers=[predictions(path, **options)])


def test_csv_has_every_row(tmp_path: Path):
    predicted(tmp_path / "new" / "all.csv")
    with open(tmp_path / "new" / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    read = {"score": float, "label": "True".__eq__, "count": int, "half": float, "name": str}
    values = [{name: exact(read.get(name, json.loads)(cell)) for name, cell in row.items()} for row in rows]
    assert values == expected() and len(values) == 6
    assert pandas.read_csv(tmp_path / "new" / "all.csv")["count"].tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("group", [1, 2**20])
def test_parquet_has_every_row(tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.import_module("tnt_func.observers.predictions"), "ROW_GROUP", group)
    predicted(tmp_path / "all.parquet")
    file = parquet.ParquetFile(tmp_path / "all.parquet")
    assert [{name: exact(x) for name, x in row.items()} for row in file.read().to_pylist()] == expected()
    assert file.num_row_groups == (3 if group == 1 else 1)
    frame = pandas.read_parquet(tmp_path / "all.parquet")
    assert frame.dtypes["score"] == "float64" and frame.dtypes["half"] == "float32" and frame.dtypes["label"] == "bool"


def test_columns_are_chosen_and_the_batch_is_there(tmp_path: Path):
    def columns(event: tnt.Event) -> Any:
        return {"x": event.batch, "twice": (event.batch * event.state.params).tolist()}

    for name in ("a.csv", "a.parquet"):
        predicted(tmp_path / name, columns=columns)
    frame = pandas.read_parquet(tmp_path / "a.parquet")
    assert frame.columns.tolist() == ["x", "twice"] and frame["twice"].tolist()[3] == math.inf
    assert pandas.read_csv(tmp_path / "a.csv")["twice"].tolist()[4] == frame["twice"].tolist()[4]


def test_tensors_in_a_list_have_shapes_of_their_own(tmp_path: Path):
    def columns(event: tnt.Event) -> Any:
        return {"x": [event.batch[:n] for n in range(len(event.batch))], "one": list(event.batch.unbind())}

    for name in ("a.csv", "a.parquet"):
        predicted(tmp_path / name, columns=columns)
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    with open(tmp_path / "a.csv", newline="") as file:
        cells = [{"x": json.loads(row["x"]), "one": float(row["one"])} for row in csv.DictReader(file)]
    batches = [batch.tolist() for batch in DATA]
    expected = [{"x": batch[:n], "one": batch[n]} for batch in batches for n in range(len(batch))]
    assert repr(rows) == repr(cells) == repr(expected)


def test_an_output_that_is_one_tensor_is_one_column(tmp_path: Path):
    unit = tnt.PredictUnit(predict_step=lambda state, batch: (state, batch))
    tnt.predict(unit, FIRST, DATA[1:2], observers=[predictions(tmp_path / "a.csv")])
    assert (tmp_path / "a.csv").read_text() == "output\ninf\n"


def test_a_run_that_fails_leaves_the_file_that_was_there(tmp_path: Path):
    for name in ("a.csv", "a.parquet"):
        predicted(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        observer = predictions(tmp_path / name)
        for data in ([*DATA, None], [None]):
            with pytest.raises(AttributeError):
                tnt.predict(UNIT, FIRST, data, observers=[observer])
        assert (tmp_path / name).read_bytes() == before
        tnt.predict(UNIT, FIRST, DATA[:1], observers=[observer])
        assert (tmp_path / name).read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.parquet"]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
@pytest.mark.parametrize("limit", [0, 100, 600])
def test_a_disk_that_is_full_leaves_the_file_that_was_there(tmp_path: Path, name: str, limit: int):
    (tmp_path / name).write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            predicted(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "old"
    predicted(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 600


def test_a_loop_that_is_dropped_and_begun_again_has_no_row_twice(tmp_path: Path):
    observer = predictions(tmp_path / "a.csv", columns=lambda event: {"x": event.batch})
    for limit in (5, None):
        for count, event in enumerate(tnt.predict_events(UNIT, FIRST, DATA)):
            observer(event)
            if count == limit:
                break
        assert (tmp_path / "a.csv").exists() == (limit is None)
    assert len(pandas.read_csv(tmp_path / "a.csv")) == 6


def test_inside_fit_the_last_evaluation_is_there(tmp_path: Path):
    def eval_step(state: tnt.State, batch: Any) -> Any:
        return state, {"at": state.params + batch}

    unit = tnt.FitUnit(
        train_unit=tnt.TrainUnit(
            train_step=lambda state, batch: (state.replace(params=state.params + 1), {"at": batch})
        ),
        eval_unit=tnt.EvalUnit(eval_step=eval_step),
    )
    observers = [predictions(tmp_path / "a.csv", phase="eval")]
    tnt.fit(unit, FIRST, [torch.zeros(1)] * 3, DATA[1:], max_epochs=2, observers=observers)
    assert pandas.read_csv(tmp_path / "a.csv")["at"].tolist() == [math.inf, *(8 + DATA[2]).tolist()]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (lambda event: {}, "given the columns {}"),
        (lambda event: {"x": event.batch, "y": [1, 2]}, "'x': 3, 'y': 2"),
        (lambda event: {"x": event.batch.sum()}, "x: a Tensor"),
        (lambda event: {f"x{event.state.progress.predict.steps}": event.batch}, r"\['x2'\] after \['x1'\]"),
    ],
)
def test_columns_that_are_no_table(tmp_path: Path, columns: Any, said: str):
    with pytest.raises(UsageError, match=said):
        predicted(tmp_path / "a.csv", columns=columns)


def test_inside_of_another_it_would_write_nothing_and_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="all the events of a phase"):
        tnt.observers.on("step_end", predictions(tmp_path / "all.csv"))
    steps = tnt.observers.when(lambda event: event.point == "step_end", predictions(tmp_path / "all.csv"))
    with pytest.raises(UsageError, match="a part of the events"):
        tnt.predict(UNIT, FIRST, DATA, observers=[steps])


def test_columns_of_another_type(tmp_path: Path):
    def columns(event: tnt.Event) -> Any:
        return {"x": event.batch if event.state.progress.predict.steps == 1 else event.batch > 0}

    with pytest.raises(UsageError, match="'x': 'bool'} after {'x': 'float'}"):
        predicted(tmp_path / "a.parquet", columns=columns)
    assert not list(tmp_path.iterdir())


def test_paths_and_extras(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="'a.txt' was given.*Write a.csv"):
        predictions("a.txt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"tnt-func\[parquet\]"):
        predictions("a.parquet")
    predictions("a.csv")


@pytest.mark.parametrize("name", ["all.csv", "all.parquet"])
def test_of_no_batch_the_file_is_empty_and_not_that_of_another_run(tmp_path: Path, name: str):
    (tmp_path / name).write_text("of another run")
    tnt.predict(UNIT, FIRST, [], observers=[predictions(tmp_path / name)])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "all.csv":
        assert (tmp_path / name).read_text() == ""
    else:
        assert parquet.read_table(tmp_path / name).shape == (0, 0)


def test_a_phase_that_never_comes_is_told_of(tmp_path: Path):
    with pytest.warns(
        UserWarning, match=r"wrote nothing: .* of eval, and the run had those of predict. Write .*'predict'"
    ):
        tnt.predict(UNIT, FIRST, DATA, observers=[predictions(tmp_path / "all.csv", phase="eval")])
    assert not list(tmp_path.iterdir())


def test_columns_have_names(tmp_path: Path):
    with pytest.raises(UsageError, match="columns= gave a list; it gives columns by name. Write columns=lambda event"):
        predicted(tmp_path / "a.csv", columns=lambda event: [1])
