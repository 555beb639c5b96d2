"""What pandas reads of CSV and JSON lines is what History has, to the bit."""

import json
from pathlib import Path

import pandas
import pytest
from test_observers_recorder import FIRST, fit

from tnt_func.observers import History, csv_writer, jsonl_writer, recorder


@pytest.fixture
def history(tmp_path: Path) -> History:
    history = History()
    files = [csv_writer(tmp_path / "run.csv"), jsonl_writer(tmp_path / "run.jsonl")]
    fit(FIRST, [recorder(history, *files, every_n_steps=1)])
    return history


def exact(frame: pandas.DataFrame) -> list[list[str]]:
    """The cells, of floats their exact text."""
    return [
        [cell.hex() if isinstance(cell, float) else str(cell) for cell in row] for row in frame.itertuples(index=False)
    ]


def test_csv(tmp_path: Path, history: History):
    frame = pandas.read_csv(tmp_path / "run.csv")
    assert frame.columns.tolist() == history.to_pandas().columns.tolist()
    assert exact(frame) == exact(history.to_pandas()) and len(frame) == 18


def test_json_lines(tmp_path: Path, history: History):
    """By json, since pandas.read_json rounds, or refuses the smallest numbers."""
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    frame = pandas.json_normalize(rows).rename(columns={"metrics.loss": "loss", "metrics.late": "late"})
    numbers = ["loss", "late", "metrics.step"]
    frame[numbers] = frame[numbers].astype(float)
    assert exact(frame.reindex(columns=history.to_pandas().columns)) == exact(history.to_pandas()) and len(frame) == 18
