"""What becomes of a run whose sink breaks: with `isolate` it ends as ever, without it stops where it resumes."""

import io
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import CheckpointError
from tnt_func.events import Event, Observer
from tnt_func.observers import (
    checkpointer,
    console,
    csv_writer,
    isolate,
    jsonl_writer,
    progress_bar,
    recorder,
    tensorboard_writer,
)

FULL = 3000
"""Bytes that a file may grow to while the disk is full."""


def step(state: tnt.State, batch: float) -> Any:
    params = state.params * 0.5 + batch
    return state.replace(params=params), {"loss": params.sum(), "a number of a long name": params[0]}


UNIT = tnt.TrainUnit(train_step=step, metrics={"loss": tnt.metrics.mean("loss")})
FIRST = tnt.State(params=torch.zeros(3), key=tnt.key(0))
DATA = [float(n) for n in range(50)]


def train(state: tnt.State, *observers: Observer) -> tnt.State:
    return tnt.train(UNIT, state, DATA, max_epochs=2, observers=observers)


WHOLE = tnt.digest(train(FIRST))


class ClosedTerminal(io.StringIO):
    """A terminal that goes away after the first word."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.tell() > 0:
            self.close()
        return super().write(text)


def recording(writer: Any) -> Observer:
    return recorder(writer, every_n_steps=1)


def closed_descriptor(directory: Path) -> Observer:
    """A writer whose file somebody closes at the fifth step."""
    writer = jsonl_writer(directory / "run.jsonl")
    inside = recording(writer)

    def observer(event: Event) -> None:
        inside(event)
        if event.point == "step_end" and event.state.progress.train.steps == 5:
            writer.close()

    return observer


SINKS = {
    "csv on a full disk": lambda directory: recording(csv_writer(directory / "run.csv")),
    "jsonl on a full disk": lambda directory: recording(jsonl_writer(directory / "run.jsonl")),
    "tensorboard on a full disk": lambda directory: recording(tensorboard_writer(directory / "events")),
    "console that is closed": lambda directory: console(file=ClosedTerminal()),
    "descriptor that is closed": closed_descriptor,
}
broken = pytest.mark.parametrize("name", SINKS)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows over `FULL` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@broken
def test_isolated_the_run_ends_as_ever_with_one_warning(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with full_disk(), caplog.at_level(logging.WARNING):
        state = train(FIRST, isolate(SINKS[name](tmp_path)))
    assert tnt.digest(state) == WHOLE
    assert [record.name for record in caplog.records] == ["tnt_func.observers"]


@broken
def test_otherwise_it_stops_and_goes_on_from_its_checkpoint(name: str, tmp_path: Path):
    failures: list[Event] = []

    def witness(event: Event) -> None:
        if event.error is not None:
            failures.append(event)

    saving = checkpointer(tmp_path / "checkpoints", every_n_epochs=10)
    with full_disk(), pytest.raises((OSError, ValueError, CheckpointError, AssertionError)) as raised:
        train(FIRST, SINKS[name](tmp_path), saving, witness)
    (failed,) = failures
    assert failed.error is raised.value and failed.resumable and 0 < failed.state.progress.train.steps < 100
    saved = tnt.checkpoint.resume(tmp_path / "checkpoints", tnt.prepare(UNIT, FIRST))
    assert tnt.digest(saved) == tnt.digest(failed.state)
    assert tnt.digest(train(saved)) == WHOLE


def test_a_progress_bar_without_its_terminal_is_quiet():
    assert tnt.digest(train(FIRST, progress_bar(file=ClosedTerminal(), metrics_every_seconds=0))) == WHOLE
