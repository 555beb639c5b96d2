"""JSON lines of a finished run, read back and given to other writers, are the rows to the bit."""

import math
from pathlib import Path

import pytest
from test_observers_recorder import FIRST, check_files, fit, flat, writers

from tnt_func.errors import UsageError
from tnt_func.observers import History, Row, csv_writer, jsonl_writer, read_jsonl, recorder


def test_a_finished_run_is_written_anew_in_every_format(tmp_path: Path):
    history, jsonl = History(), tmp_path / "run.jsonl"
    fit(FIRST, [recorder(history, jsonl_writer(jsonl), every_n_steps=1)])
    found = read_jsonl(jsonl)
    assert isinstance(found, History) and flat(found) == flat(history) and len(found) == 18
    assert {math.isnan(x) for row in found for x in row.metrics.values()} == {True, False}
    for _ in range(2):  # What was there before, rows at (0, 0) too, is replaced.
        other = History([Row(0, 0, "eval", "epoch", {"loss": 1.0})])
        found.write_to(other, *writers(tmp_path / "new"))
        assert flat(other) == flat(history)
        check_files(tmp_path / "new", history)


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    row = Row(1, 0, "train", "step", {"loss": -math.inf})
    History([row, row]).write_to(jsonl_writer(tmp_path / "a"))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-3])
    assert flat(read_jsonl(tmp_path / "a")) == flat([row])


@pytest.mark.parametrize(
    "line", ['{"step": 1}', "[]", "3", '{"step":1,"epoch":0,"phase":"train","kind":"step","metrics":[]}']
)
def test_what_is_no_row_is_named(tmp_path: Path, line: str):
    (tmp_path / "a").write_text(f"{line}\n")
    with pytest.raises(UsageError, match="line 1 of .*a is .* no row of a run"):
        read_jsonl(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no file is there"):
        read_jsonl(tmp_path / "b")


def test_writers_are_closed_where_one_fails(tmp_path: Path):
    class Failing(History):
        closed = False

        def write(self, row: Row) -> None:
            raise ZeroDivisionError

        def close(self) -> None:
            self.closed = True

    failing = Failing()
    with pytest.raises(ZeroDivisionError):
        History([Row(1, 0, "train", "step", {})]).write_to(csv_writer(tmp_path / "a"), failing)
    assert failing.closed
