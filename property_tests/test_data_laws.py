"""Data is a function of the key, the epoch and the position: what is left of an epoch is the end of the whole."""

import random
from typing import Any

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnt_func import rng
from tnt_func.data.cursors import batches
from tnt_func.progress import Progress, RunProgress
from tnt_func.rng import Key
from tnt_func.state import State
from tnt_func.testing.generators import moved, standing, stands
from tnt_func.testing.snapshot import freeze
from tnt_func.testing.strategies import data
from tnt_func.types import Phase

keys = st.integers(0, 2**64 - 1).map(rng.key)
lengths = st.integers(0, 3)
fed = lengths.flatmap(lambda length: st.tuples(st.just(length), data(length)))


def at(key: Key, epoch: int, position: int, phase: Phase = "train") -> State:
    return State(params={}, key=key, progress=RunProgress().put(phase, Progress(epoch, 7, position)))


@given(fed, keys, st.integers(0, 3), st.data())
def test_what_is_left_is_the_end_of_the_whole(found: tuple[int, Any], key: Key, epoch: int, chosen: Any):
    length, feed = found
    position = chosen.draw(st.integers(0, length))
    whole = [freeze(batch) for batch in batches(feed, at(key, epoch, 0))]
    assert len(whole) == length
    assert [freeze(batch) for batch in batches(feed, at(key, epoch, position))] == whole[position:]


@given(fed, keys, st.integers(0, 3))
def test_an_epoch_depends_on_no_generator_and_moves_none(found: tuple[int, Any], key: Key, epoch: int):
    _, feed = found
    with standing({"torch": 1, "numpy": 2, "random": 3}):
        first = [freeze(batch) for batch in batches(feed, at(key, epoch, 0))]
    with standing({"torch": 4, "numpy": 5, "random": 6}):
        before = stands()
        second = []
        for batch in batches(feed, at(key, epoch, 0)):
            second.append(freeze(batch))
            assert moved(before) == []
    assert first == second


@given(keys, st.integers(0, 2**64 - 1).map(rng.key))
def test_no_two_batches_draw_alike(key: Key, other: Key):
    """Whatever the key, phase, epoch or position; and opening the data draws by itself.

    torch's and NumPy's generators take 32 bits of a key, which two of these keys share once in a million times.
    """

    def numbers(epoch: int) -> Any:
        first = wide()
        return (number for position in range(3) for number in ((first, wide()) if position == 0 else (wide(),)))

    def wide() -> tuple[int, ...]:
        return int(torch.randint(2**62, ())), int(numpy.random.randint(2**62)), random.getrandbits(62)

    phases: tuple[Phase, ...] = ("train", "eval", "predict")
    every = [
        batch
        for k in {key, other}
        for phase in phases
        for epoch in range(3)
        for batch in batches(numbers, at(k, epoch, 0, phase), phase=phase)
    ]
    for drawn, alike in zip(zip(*every, strict=True), (1, 1, 0), strict=True):
        assert len(set(drawn)) >= len(drawn) - alike and len(drawn) == 36 * len({key, other})


@given(fed, keys, st.integers(0, 3), st.integers(0, 3))
def test_reading_another_epoch_in_between_changes_nothing(found: tuple[int, Any], key: Key, epoch: int, other: int):
    _, feed = found
    whole = [freeze(batch) for batch in batches(feed, at(key, epoch, 0))]
    reading = batches(feed, at(key, epoch, 0))
    again = []
    for batch in reading:
        again.append(freeze(batch))
        list(batches(feed, at(key, other, 0)))
    assert again == whole
