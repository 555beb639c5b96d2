"""Observers of every kind watch (law 6); and the rows of a run that is cut off anywhere and resumed are the run's."""

import csv
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnt_func import testing
from tnt_func.errors import LawError
from tnt_func.events import Event, Observer
from tnt_func.observers import (
    History,
    Row,
    anomalies,
    banner,
    checkpointer,
    console,
    csv_writer,
    every,
    garbage_collection,
    isolate,
    jsonl_writer,
    on,
    predictions,
    profiler,
    progress_bar,
    rank_zero,
    recorder,
    system,
    tee,
    tensorboard_summaries,
    tensorboard_writer,
    tf32,
    throughput,
    timing,
    warn_on_empty_data,
    warn_on_slow_data,
    warn_on_slow_rank,
    when,
)
from tnt_func.testing.case import Case
from tnt_func.testing.strategies import cases, fit_cases, train_cases


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def falling(event: Event) -> None:
    raise OSError("the network is gone")


def counted(event: Event) -> dict[str, list[int]]:
    return {"step": [event.state.progress.eval.steps]}


def plain(directory: Path) -> dict[str, Observer]:
    return {
        "bar": progress_bar(file=Terminal(), metrics_every_seconds=0),
        "console": console(file=io.StringIO()),
        "recorder": recorder(
            History(), csv_writer(directory / "a.csv"), jsonl_writer(directory / "a.jsonl"), every_n_steps=1
        ),
        "falling": isolate(falling),
        "measures": recorder(
            History(), every_n_steps=1, measures=[timing(), throughput(samples=lambda batch: 1), system()]
        ),
        "anomalies": recorder(anomalies("loss", spike=1, above=0, then=repr), every_n_steps=1),
        "banner": banner(file=io.StringIO()),
        "garbage": garbage_collection(every_n_steps=100),
        "tf32": tf32(),
        "warnings": tee(
            warn_on_empty_data(), warn_on_slow_data(share=0.01, n_steps=1), warn_on_slow_rank(every_n_steps=1)
        ),
        "predictions": predictions(directory / "b.csv", columns=counted, phase="eval"),
        "checkpoints": checkpointer(directory / "checkpoints", every_n_epochs=1, keep=1, asynchronous=True),
    }


ALL: tuple[Any, ...] = (lambda inside: inside, rank_zero, isolate, lambda inside: tee(inside, repr))
"""Around what needs every event."""
PHASES: tuple[Any, ...] = (*ALL, lambda inside: when(lambda event: event.phase == "eval", inside))
"""Around what needs all the events of a phase."""
AROUND: tuple[Any, ...] = (
    *PHASES,
    lambda inside: on("epoch_end", inside),
    lambda inside: every(inside, steps=2),
    lambda inside: every(inside, seconds=1e-9),
)
CHOICES = st.lists(
    st.tuples(st.sampled_from(("recorder", "falling", "anomalies", "banner", "tf32")), st.sampled_from(AROUND))
    | st.tuples(st.sampled_from(("bar", "console", "measures", "garbage", "warnings")), st.sampled_from(PHASES))
    | st.tuples(st.sampled_from(("predictions", "checkpoints")), st.sampled_from(ALL)),
    max_size=4,
    unique_by=lambda pair: pair[0],
)
AGAIN = pytest.mark.filterwarnings("ignore:.* rows of an earlier run")
"""A run that is begun again and again from its first state."""


@contextmanager
def untold() -> Iterator[None]:
    """Without what is logged, and what is warned of."""
    log = logging.getLogger("tnt_func.observers")
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = False


@settings(max_examples=60)
@given(cases(), CHOICES)
def test_observers_of_every_kind_do_not_matter(case: Case, choices: Sequence[tuple[str, Any]]):
    with tempfile.TemporaryDirectory() as directory, untold():
        inside = plain(Path(directory))
        case.check(testing.check_observers, observers=[around(inside[name]) for name, around in choices])


@AGAIN
@settings(max_examples=3)
@given(fit_cases())
def test_tensorboard_and_the_profiler_do_not_matter(case: Case):
    with tempfile.TemporaryDirectory() as directory:
        writer = tensorboard_writer(directory)
        shown = tensorboard_summaries(writer, every_n_steps=1, histograms=lambda event: event.state.params)
        profiled = profiler(directory, wait=0, warmup=1, active=1)
        case.check(testing.check_observers, observers=[recorder(writer, every_n_steps=1), shown, profiled])


def test_an_observer_that_writes_is_caught_inside_a_combinator():
    import torch

    import tnt_func as tnt

    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    zero = isolate(every(tee(lambda event: event.state.params.zero_()), steps=1))
    with pytest.raises(LawError, match="law 6"):
        testing.check_observers(unit, tnt.State(params=torch.ones(2), key=tnt.key(0)), [1.0], observers=[zero])


def watched(directory: Path, events: Iterable[Event], keep: History, limit: int | None = None) -> Event | None:
    """Record events, up to a limit, where the process dies; the last resumable of them."""
    observer = recorder(keep, csv_writer(directory / "a.csv"), jsonl_writer(directory / "a.jsonl"), every_n_steps=1)
    last = None
    for _, event in zip(range(limit if limit is not None else 10**9), events, strict=False):
        observer(event)
        last = event if event.resumable else last
    return last


def exact(rows: Iterable[Row]) -> list[Any]:
    return [(*row[:4], {name: float(value).hex() for name, value in row.metrics.items()}) for row in rows]


def read(directory: Path) -> tuple[list[Any], list[Any]]:
    lines = [json.loads(line) for line in (directory / "a.jsonl").read_text().splitlines()]
    with open(directory / "a.csv", newline="") as file:
        cells = [list(row.values()) for row in csv.DictReader(file)]
    return exact(Row(**line) for line in lines), [
        (int(row[0]), int(row[1]), *row[2:4], sorted(float(cell).hex() for cell in row[4:] if cell)) for row in cells
    ]


@AGAIN
@settings(max_examples=60)
@given(train_cases() | fit_cases(), st.lists(st.integers(0, 40), max_size=3))
def test_a_run_cut_off_anywhere_and_resumed_has_the_rows_of_the_whole(case: Case, cuts: list[int]):
    whole, kept = History(), History()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        watched(Path(one), case.events(), whole)
        state = case.state
        for cut in cuts:
            last = watched(Path(two), case.events(state=state), kept, cut)
            state = state if last is None else last.state
        watched(Path(two), case.events(state=state), kept)
        rows, cells = read(Path(two))
        assert exact(kept) == exact(whole) == rows
        assert cells == [(*row[:4], sorted(row[4].values())) for row in exact(whole)] == read(Path(one))[1]
