"""Worker processes: the same elements, gone afterwards, and their errors."""

import gc
import multiprocessing
import os
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.data import loader, source
from tnt_func.errors import UsageError
from tnt_func.testing.generators import moved, stands

KEY = tnt.key(0)


class Unsendable(Exception):
    """Cannot be made again of what it says."""

    def __init__(self, number: int, word: str):
        super().__init__(f"{word} {number}")


def augment(x: Any) -> Any:
    return x + torch.rand(()) + np.random.rand() + random.random()


def fail(x: int) -> int:
    if x == 5:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    return x


def fail_unsendably(x: int) -> int:
    raise Unsendable(x, "number")


def where(x: int) -> Any:
    info = get_worker_info()
    return os.getpid(), torch.get_num_threads(), info is not None and info.id


IMAGES = source(torch.arange(12.0)).shuffle(KEY).map(augment).batch(3)


@pytest.fixture(autouse=True)
def no_process_or_thread_is_left():
    gc.collect()
    processes, threads = multiprocessing.active_children(), threading.enumerate()
    yield
    assert {*multiprocessing.active_children()} <= {*processes}
    for thread in threading.enumerate():
        if thread not in threads:
            thread.join(600)  # of a queue, which ends after it is closed
            assert not thread.is_alive()


def test_workers_give_the_elements_in_order_from_any_position():
    plain = [*IMAGES.batches(4)]
    before = stands()
    for start in (0, 3, 4):
        assert trees.equal([*loader(IMAGES, num_workers=2, prefetch=1).batches(4, start)], plain[start:])
    assert moved(before) == []


def test_workers_begin_as_copies_or_anew():
    assert trees.equal([*loader(IMAGES, num_workers=1, start_method="spawn").batches(1)], [*IMAGES.batches(1)])


def test_they_work_in_processes_of_one_thread():
    found = [*loader(source(range(4)).map(where, draws=()), num_workers=2).batches()]
    assert [worker for _, _, worker in found] == [0, 1, 0, 1]
    assert len({pid for pid, _, _ in found} | {os.getpid()}) == 3 and {threads for _, threads, _ in found} == {1}
    assert {pid for pid, _, _ in loader(source(range(4)).map(where, draws=())).batches()} == {os.getpid()}


def test_nothing_starts_before_the_first_element_and_nothing_stays_when_it_is_dropped():
    batches = loader(IMAGES, num_workers=2).batches()
    assert multiprocessing.active_children() == []
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert multiprocessing.active_children() == []


def test_nothing_stays_where_a_run_is_left_or_fails():
    def train_step(state: tnt.State, batch: Any) -> Any:
        raise ZeroDivisionError

    state, data = tnt.State(params=0, key=KEY), loader(IMAGES, num_workers=1)
    with pytest.raises(ZeroDivisionError) as kept:
        tnt.train(tnt.TrainUnit(train_step=train_step), state, data, max_epochs=1)
    assert multiprocessing.active_children() == [] and kept.traceback
    for event in tnt.train_events(tnt.TrainUnit(train_step=lambda state, _: (state, {})), state, data, max_epochs=1):
        if event.point == "step_done":
            break
    gc.collect()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_keeps_its_type_its_arguments_and_where_it_was(num_workers: int):
    elements = source(range(8)).map(fail, draws=()).batch(2)
    batches = loader(elements, num_workers=num_workers).batches(3)
    assert [len(next(batches)) for _ in range(2)] == [2, 2]
    with pytest.raises(UnicodeDecodeError, match="invalid start byte") as caught:
        next(batches)
    assert caught.value.object == b"\xff" and multiprocessing.active_children() == []
    assert "map 'fail', at (epoch, index) = (3, 5)" in caught.value.__notes__
    assert any("in fail" in note for note in caught.value.__notes__) == bool(num_workers)


def test_an_error_that_cannot_be_sent_comes_as_text():
    with pytest.raises(RuntimeError, match="(?s)Unsendable.*number 0.*at \\(epoch, index\\) = \\(0, 0\\)"):
        next(loader(source([0]).map(fail_unsendably, draws=()), num_workers=1).batches())


def test_a_loader_is_cut_as_its_pipeline_is():
    whole = loader(IMAGES)
    parts = [[*whole.shard(index, 3).batches()] for index in range(3)]
    assert torch.equal(torch.cat([part[0] for part in parts]), next(whole.batches()))
    assert len(whole) == 4


@pytest.mark.parametrize("more", [{"num_workers": -1}, {"num_workers": 1, "prefetch": 0}])
def test_numbers_out_of_range_are_told(more: Any):
    with pytest.raises(UsageError, match="workers are counted from 0.* Write num_workers=2, prefetch=2"):
        loader(IMAGES, **more)


@pytest.mark.parametrize(
    "elements",
    [source([1]).map(lambda x: x, draws=()), source([1]).batch(1, collate=lambda rows: rows)],
    ids=["map", "collate"],
)
def test_a_function_that_cannot_be_sent_is_told_before_anything_starts(elements: Any):
    for method in ("spawn", "forkserver"):
        with pytest.raises(
            UsageError, match="with <function <lambda>.*, which cannot be sent.* Write it as a function"
        ):
            loader(elements, num_workers=1, start_method=method)
    assert len([*loader(elements, num_workers=1, start_method="fork").batches()]) == 1
