"""Whatever is written to: places that cannot be, files of others, and other processes that write there too."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from torch.testing._internal.distributed import fake_pg

import tnt_func as tnt
from tnt_func.errors import CheckpointError, UsageError
from tnt_func.events import Observer
from tnt_func.observers import (
    History,
    Row,
    banner,
    checkpointer,
    console,
    csv_writer,
    jsonl_writer,
    predictions,
    profiler,
    progress_bar,
    recorder,
    tensorboard_writer,
)

UNIT = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch, "list": [batch]}))
FIRST = tnt.State(params=0, key=tnt.key(0))
PLACES: dict[str, Callable[[Path], Any]] = {
    "csv": lambda path: recorder(csv_writer(path), every_n_steps=1),
    "jsonl": lambda path: recorder(jsonl_writer(path), every_n_steps=1),
    "tensorboard": lambda path: recorder(tensorboard_writer(path), every_n_steps=1),
    "checkpointer": checkpointer,
    "predictions": lambda path: predictions(path.with_suffix(".csv"), phase="train"),
    "parquet": lambda path: predictions(path.with_suffix(".parquet"), phase="train"),
    "profiler": profiler,
}
DIRECTORIES = ("tensorboard", "checkpointer", "profiler")


def train(*observers: Observer) -> tnt.State:
    return tnt.train(UNIT, FIRST, [1.0, 2.0], max_epochs=1, observers=observers)


@pytest.mark.parametrize("name", PLACES)
def test_where_nothing_can_be_written_it_is_said_before_the_first_step(name: str, tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    places = [tmp_path / "file" / "inside"]
    if name in DIRECTORIES:
        places.append(tmp_path / "file")
    else:
        for suffix in ("", ".csv", ".parquet"):
            (tmp_path / f"taken{suffix}").mkdir()
        places.append(tmp_path / "taken")
    taken: list[Any] = []
    for place in places:
        with pytest.raises(CheckpointError, match=r"cannot be written to.*: (Is|Not|File) .*. Give a"):
            train(PLACES[name](place), lambda event: taken.append(event) if event.point == "fetched" else None)
    assert not taken and (tmp_path / "file").read_text() == "kept"


OTHERS: dict[str, tuple[Any, bytes]] = {
    "csv, no line": (csv_writer, b"\xff\xfe"),
    "csv, another head": (csv_writer, b"step,epoch,phase,kinds\n"),
    "csv, no number": (csv_writer, b"step,epoch,phase,kind,loss\nx,0,train,step,1\n"),
    "csv, a short line": (csv_writer, b"step,epoch,phase,kind,loss\n1,0,train\n"),
    "jsonl, no line": (jsonl_writer, b"notes"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_others_are_refused_and_left(name: str, tmp_path: Path):
    make, content = OTHERS[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(
        UsageError, match=r"line \d of .* is no row of a run .* is left as it is. Write to another path"
    ):
        train(recorder(make(tmp_path / "file")))
    assert (tmp_path / "file").read_bytes() == content


def test_a_torn_first_line_and_the_ends_of_lines_of_a_spreadsheet(tmp_path: Path):
    (tmp_path / "torn").write_bytes(b'{"step":1,"epo')
    train(recorder(jsonl_writer(tmp_path / "torn"), every_n_steps=1))
    assert [row.step for row in tnt.observers.read_jsonl(tmp_path / "torn")] == [1, 2]
    (tmp_path / "saved").write_bytes(b"step,epoch,phase,kind,loss\r\n1,0,train,step,0.5\r\n")
    History([Row(2, 0, "train", "step", {"loss": 1.0, "late": 2.0})]).write_to(writer := csv_writer(tmp_path / "saved"))
    writer.open(None)
    writer.close()
    assert (tmp_path / "saved").read_bytes() == b"step,epoch,phase,kind,loss,late\n2,0,train,step,1.0,2.0\n"


def told(work: Callable[[], Any]) -> str:
    """What becomes of a function in another process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            work()
            os.write(write, b"done")
        except Exception as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.parametrize("name", [name for name in PLACES if name != "profiler"])
def test_one_process_at_a_time_writes_to_a_place(name: str, tmp_path: Path):
    said: list[str] = []

    def other(event: tnt.Event) -> None:
        if event.point == "step_end":
            said.append(told(lambda: train(PLACES[name](tmp_path / "place"))))

    train(PLACES[name](tmp_path / "place"), other)
    for each in said:
        assert each.startswith("UsageError: ") and "place" in each.partition(" is being written by another")[0]
        assert "distributed.checkpointer" in each if name == "checkpointer" else "rank_zero(recorder(" in each
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert len(said) == 2 and files and not any("lock" in name for name in files)


def of_rank_one() -> None:
    """The fake backend is a group in which this process is rank 1, and waits for nobody."""
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=fake_pg.FakeStore())


def test_ranks_show_on_the_first_alone_or_in_files_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def work() -> None:
        of_rank_one()
        with open(tmp_path / "shown", "w") as file:
            train(console(), banner(), progress_bar(), console(file=file), banner(file=file))

    assert told(work) == "done" and capfd.readouterr() == ("", "")
    assert (
        "train from step 0" in (tmp_path / "shown").read_text() and "train epoch 1" in (tmp_path / "shown").read_text()
    )
