"""What W&B reads back from offline run files, together, is what History has; online the server is asked first."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from test_observers_recorder import FIRST, UNIT, fit, flat, tags
from wandb.util import get_core_path

import tnt_func as tnt
from tnt_func.errors import MissingExtraError
from tnt_func.observers import History, Row, Writer, read_jsonl, recorder, wandb_writer

QUIET = {"mode": "offline", "settings": {"silent": True, "x_disable_stats": True, "console": "off"}}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def records(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of all run files, by what `wandb leet inspect --json` runs."""
    for path in sorted(directory.glob("wandb/*run-*/*.wandb")):
        reader = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", path, path.parent]
        said = subprocess.run(reader, capture_output=True, text=True, check=True).stdout
        yield from map(json.loads, said.splitlines())


def history_of(directory: Path) -> dict[str, list[tuple[int, str]]]:
    """Of every name the steps and exact values, as `tags`."""
    found: dict[str, list[tuple[int, str]]] = {}
    for record in records(directory):
        items = record["history"]["item"] if record["type"] == "history" else {}
        for name, value in items.items():
            if "/" in name:
                found.setdefault(name, []).append((items["step"], float(value).hex()))
    return {name: sorted(points) for name, points in found.items()}


def stored(history: History) -> dict[str, list[tuple[int, str]]]:
    """The reader prints -0 as 0."""
    zero = {"-0x0.0p+0": "0x0.0p+0"}
    return {name: sorted((step, zero.get(x, x)) for step, x in points) for name, points in tags(history).items()}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """W&B logs much of its own."""
    return [record.getMessage() for record in caplog.records if record.name == "tnt_func.observers"]


def test_a_run_and_its_resumed_ones_read_back_as_history(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    history, writer = History(), wandb_writer("p", "a", directory=tmp_path / "new", config={"lr": 1e-3}, **QUIET)
    assert isinstance(writer, Writer)
    recording = recorder(history, writer, every_n_steps=1)
    after_one = fit(FIRST, [recording], max_epochs=1)
    fit(after_one, [recording], max_epochs=2)
    fit(after_one, [recording], max_epochs=3)  # Its second epoch is there already.
    assert len(history) == 18 and history_of(tmp_path / "new") == stored(history) and not told(caplog)
    tnt.evaluate(UNIT.eval_unit, after_one, [0], observers=[recording])
    assert len(history) == 19 and history_of(tmp_path / "new") == stored(history)
    runs = [record["run"] for record in records(tmp_path / "new") if record["type"] == "run"]
    assert {run["run_id"] for run in runs} == {"a"} and len(runs) == 4 and all(run["resume"] for run in runs)
    assert runs[0]["config"]["update"]["lr"] == 1e-3
    assert flat(read_jsonl(tmp_path / "new" / "wandb" / "a.jsonl")) == flat(history)


def test_numbers_that_differ_stay_and_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [Row(step, 0, "train", "step", {"loss": 1 / step, "time": 0.5}) for step in (1, 2, 3)]
    writer = wandb_writer("p", "a", directory=tmp_path, **QUIET)
    History(rows).write_to(writer)
    writer.open((1, 0))
    with caplog.at_level(logging.WARNING, "tnt_func.observers"):
        for step in (2, 3, 4):
            writer.write(Row(step, 0, "train", "step", {"loss": 1 / step, "time": float(step)}))
    writer.close()
    points = ((1, 0.5), (2, 0.5), (3, 0.5), (4, 4.0))
    assert history_of(tmp_path)["train_step/time"] == [(step, value.hex()) for step, value in points]
    (said,) = told(caplog)
    assert said.startswith("The W&B run 'a' has train_step/time = 0.5 at step 2, and this run has 2.0 there.")


class Online:
    """A run of W&B with a server, as far as the writer calls it."""

    offline, path, id = False, "entity/p/a", "a"

    def __init__(self, history: list[dict[str, Any]]):
        self.history, self.resumed, self.codes = history, bool(history), list[int]()

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.history.append({"_step": len(self.history), **values})

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def test_online_what_the_server_has_is_left_out_and_what_it_lost_is_handed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server, given, runs = list[dict[str, Any]](), list[Any](), list[Online]()

    def init(**options: Any) -> Online:
        given.append(options)
        runs.append(Online(server))
        return runs[-1]

    def run(path: str) -> Any:
        assert path == "entity/p/a"
        return SimpleNamespace(
            scan_history=lambda: [{**row, "other/table": {}, "other/x": None, "other/y": "z"} for row in server]
        )

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(run=run))
    history = History()
    recording = recorder(history, wandb_writer("p", "a", directory=tmp_path, entity="e"), every_n_steps=1)
    after_one = fit(FIRST, [recording], max_epochs=1)
    expected = [{name: repr(x) for name, x in row.items() if name != "_step"} for row in server]
    del server[2:]  # Lost with the process.
    fit(after_one, [recording], max_epochs=1)
    assert [{name: repr(x) for name, x in row.items() if name != "_step"} for row in server] == expected
    assert given[1] == {
        **{"resume": "allow", "reinit": "create_new", "entity": "e", "project": "p", "id": "a", "config": {}},
        "dir": str(tmp_path),
    }

    def failing(event: tnt.Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(after_one, [recording, failing], max_epochs=2)
    assert [run.codes for run in runs] == [[0], [0], [1]]


def test_records_over_the_ends_of_blocks_are_found(tmp_path: Path):
    row = Row(1, 0, "train", "step", {f"x{i}": 1 / (i + 1) for i in range(2500)})
    writer = wandb_writer("p", "a[1]", directory=tmp_path, **QUIET)
    for step in range(1, 4):
        writer.open((step - 1, 0))
        writer.write(row._replace(step=step))
        writer.close()
    assert {name: [x[0] for x in points] for name, points in history_of(tmp_path).items()} == {
        name: [1, 2, 3] for name in tags([row])
    }
    (size, *_) = [path.stat().st_size for path in tmp_path.glob("wandb/*run-*/*.wandb")]
    assert size > 3 * 2**15


def test_a_missing_extra_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"wandb_writer needs wandb.*tnt-func\[wandb\]"):
        wandb_writer("a", "b")
