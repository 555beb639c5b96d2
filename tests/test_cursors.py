"""Plain iterables as functions of (key, epoch, position)."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.data.cursors import BLANK, Cursor, check_resume, describe
from tnt_func.errors import ContractError, DataError, ResumeError, UsageTypeError
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State


def at(steps_in_epoch: int = 0, epochs: int = 0, seed: int = 0) -> State:
    progress = RunProgress(train=Progress(epochs, 10 * epochs + steps_in_epoch, steps_in_epoch))
    return State(params={}, key=tnt.key(seed), progress=progress)


class Augmented(Dataset[torch.Tensor]):
    """Draws from every generator for each item."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(6):
            yield Augmented()[index]


class Drawing:
    """An iterable that draws as it is opened and as it is read."""

    def __iter__(self) -> Iterator[list[float]]:
        offset = random.random() + float(torch.rand(()))
        for _ in range(4):
            yield [offset, float(torch.rand(())), np.random.rand(), random.random()]


class Counting:
    """A pipeline that notes how it is called and what it gives."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.given: list[int] = []

    def batches(self, epoch: int, start: int) -> Iterator[int]:
        self.calls.append((epoch, start))
        for index in range(start, 5):
            self.given.append(index)
            yield 10 * epoch + index


def stand() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False)), random.getstate()]


# What data is

HELD: dict[str, Any] = {
    "list": [1, 2, 3],
    "tuple": (1, 2, 3),
    "range": range(1, 4),
    "tensor": torch.tensor([1, 2, 3]),
    "array": np.array([1, 2, 3]),
    "matrix": torch.arange(6).reshape(3, 2),
}
DRAWN: dict[str, Callable[[], Any]] = {
    "iterable": Drawing,
    "function": lambda: lambda epoch: Drawing(),
    "generator function": lambda: lambda epoch: iter(Drawing()),
    "set": lambda: {1, 2, 3},
    "loader": lambda: DataLoader(Augmented(), batch_size=2, shuffle=True),
    "loader of single items": lambda: DataLoader(Augmented(), batch_size=None, shuffle=True),
    "loader with a batch sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(Augmented()), 2, drop_last=True)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "workers": lambda: DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=2),
    "workers on a stream": lambda: DataLoader(Stream(), batch_size=3, num_workers=2),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_is_read_from_the_position_on(name: str):
    data = HELD[name]
    for start in range(4):
        assert trees.equal([*tnt.batches(data, at(start))], [*data][start:])
    assert not Cursor(data, "train").draws


def test_lists_are_held_where_numpy_is_not_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "numpy")
    assert not Cursor([1], "train").draws and Cursor(iter([1]), "train").draws


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")  # torchdata 0.11 calls it
def test_a_stateful_loader_is_read_as_a_plain_one():
    """Its own memory is neither used nor needed: the run's key and position say where it stands."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    for sampler in (None, RandomSampler(ITEMS)):
        loader = stateful.StatefulDataLoader(ITEMS, batch_size=2, sampler=sampler)
        whole = [*tnt.batches(DataLoader(ITEMS, batch_size=2, sampler=sampler), at(0, epochs=1))]
        check_resume(loader, describe(loader), Progress(1, 12, 2), "train")
        for start in (0, 2, 3):
            assert trees.equal([*tnt.batches(loader, at(start, epochs=1))], whole[start:])
    shuffled = stateful.StatefulDataLoader(ITEMS, batch_size=2, shuffle=True)
    with pytest.raises(ResumeError, match="generator=, .*: write sampler=torch.utils.data.RandomSampler"):
        check_resume(shuffled, BLANK, Progress(0, 1, 1), "train")


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_is_a_function_of_key_epoch_and_position(name: str):
    before = stand()
    whole = [*tnt.batches(DRAWN[name](), at(0, epochs=3))]
    assert stand() == before and len(whole) >= 3
    tnt.rng.seed(tnt.fold_in(tnt.key(0), name))
    for start in (0, 2, len(whole)) if "workers" not in name else (2,):
        assert trees.equal([*tnt.batches(DRAWN[name](), at(start, epochs=3))], whole[start:])
    if name not in ("set", "workers", "workers on a stream"):
        others = [at(0, epochs=4), at(0, epochs=3, seed=1)]
        phase = [*tnt.batches(DRAWN[name](), at(0, epochs=3), phase="eval")]
        drawn = [whole, phase, *([*tnt.batches(DRAWN[name](), other)] for other in others)]
        assert all(not trees.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_same_cursor_reads_epoch_after_epoch():
    cursor, fresh = (Cursor(DataLoader(Augmented(), shuffle=True), "train") for _ in range(2))
    first, second = ([*cursor.epoch(at(0, epochs=epoch))] for epoch in (0, 1))
    assert trees.equal([*fresh.epoch(at(0, epochs=1))], second) and not trees.equal(first, second)
    order = torch.stack([batch[0, 0] for batch in first])
    assert sorted(order.tolist()) == list(range(6)), "an epoch is every item once"


def test_the_items_are_those_of_the_scopes_that_the_documentation_names():
    key = tnt.fold_in(tnt.key(0), "train")
    opening, reading = (tnt.fold_in(tnt.fold_in(key, name), 2) for name in ("iter", "next"))
    with tnt.rng.scope(opening):
        iterator = iter(DataLoader(Augmented(), shuffle=True))
    expected = []
    for index in range(6):
        with tnt.rng.scope(tnt.fold_in(reading, index)):
            expected.append(next(iterator))
    assert trees.equal([*tnt.batches(DataLoader(Augmented(), shuffle=True), at(0, epochs=2))], expected)


def test_where_the_caller_preserves_the_generators_the_batches_are_the_same():
    data = Drawing()
    with tnt.rng.preserved():
        kept = [*Cursor(data, "train", kept=True).epoch(at())]
    assert kept == [*Cursor(data, "train").epoch(at())]


def test_a_function_is_asked_for_the_epoch():
    asked: list[int] = []

    def data(epoch: int) -> Iterable[int]:
        asked.append(epoch)
        return [epoch] * 2

    cursor = Cursor(data, "train")
    assert [[*cursor.epoch(at(0, epochs=epoch))] for epoch in (0, 5)] == [[0, 0], [5, 5]]
    assert asked == [0, 5] and [*cursor.epoch(at(1, epochs=7))] == [7]


def test_a_pipeline_is_sought_in_not_skipped_through():
    pipeline = Counting()
    assert [*tnt.batches(pipeline, at(3, epochs=2))] == [23, 24]
    assert (pipeline.calls, pipeline.given) == ([(2, 3)], [3, 4])
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    tnt.train(unit, at(4, epochs=2), pipeline, max_epochs=4, max_steps_per_epoch=5)
    assert pipeline.calls[1:] == [(2, 4), (3, 0)]


def test_a_pipeline_that_is_iterable_and_callable_too_is_a_pipeline():
    class Everything(Counting):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError

        __call__ = __iter__

    assert [*tnt.batches(Everything(), at(3))] == [3, 4]


def test_data_is_not_touched_before_the_first_batch_is_asked_for():
    touched: list[str] = []

    def data(epoch: int) -> Iterable[int]:
        touched.append("opened")
        return (touched.append("read") or item for item in (1, 2))

    batches = tnt.batches(data, at())
    assert touched == []
    assert next(batches) == 1 and touched == ["opened", "read"]


# Iterators


def test_an_iterator_stands_where_it_stands():
    iterator = iter(range(5))
    next(iterator)
    assert [*tnt.batches(iterator, at(1))] == [1, 2, 3, 4]


def test_an_iterator_gives_one_epoch():
    cursor = Cursor(iter([1, 2]), "train")
    assert [*cursor.epoch(at())] == [1, 2]
    with pytest.raises(
        DataError, match="train data is a one-shot list_iterator that earlier epochs used up, .* Pass a list"
    ):
        cursor.epoch(at(0, epochs=1))


def test_an_iterator_may_last_for_several_short_epochs_and_then_says_that_it_is_used_up():
    cursor = Cursor(iter([1, 2, 3, 4]), "eval")
    epochs = [cursor.epoch(at(0, epochs=epoch)) for epoch in range(3)]
    assert [[next(epoch), next(epoch)] for epoch in epochs[:2]] == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="the eval data is a one-shot list_iterator that earlier epochs used up"):
        next(epochs[2])


def test_an_iterator_may_end_in_the_middle_of_a_later_epoch():
    cursor = Cursor(iter([1, 2, 3]), "train")
    first = cursor.epoch(at())
    assert [next(first), next(first), [*cursor.epoch(at(0, epochs=1))]] == [1, 2, [3]]


def test_an_iterator_that_is_empty_from_the_start_is_an_empty_epoch():
    assert [*Cursor(iter([]), "train").epoch(at())] == []


# What is too short, or nothing


@pytest.mark.parametrize(
    "data", [[1, 2], lambda epoch: [1, 2], DataLoader(Augmented(), batch_size=3)], ids=["list", "function", "loader"]
)
def test_data_shorter_than_the_position_is_an_error_and_data_as_long_is_an_end(data: Any):
    assert [*tnt.batches(data, at(2))] == []
    with pytest.raises(
        DataError, match="train data ended after 2 batches, and the state has 3 steps of epoch 1 behind it"
    ):
        next(tnt.batches(data, at(3, epochs=1)))


@pytest.mark.parametrize(
    ("data", "kind", "instead"),
    [
        (None, "None", r"\[batch, ...\]"),
        (3, "an int", r"\[batch, ...\]"),
        ("train.csv", "a str", "DataLoader"),
        (b"", "a bytes", "DataLoader"),
        ({"x": [1]}, "a dict", "DataLoader"),
        (Augmented(), "an Augmented", r"DataLoader\(dataset, batch_size=...\)"),
    ],
    ids=["None", "int", "str", "bytes", "dict", "map-style dataset"],
)
def test_what_is_no_data_is_refused(data: Any, kind: str, instead: str):
    with pytest.raises(
        UsageTypeError, match=f"the train data is {kind}; data is an iterable of batches.* Write {instead}"
    ):
        tnt.batches(data, at())


def test_a_function_that_takes_no_epoch_is_refused_where_it_is_given():
    with pytest.raises(UsageTypeError, match=r"<lambda>\(\); .* Write lambda epoch: <lambda>\(\)"):
        tnt.batches(lambda: [7], at())
    assert next(tnt.batches(lambda *anything: [7], at())) == 7


def test_a_function_that_gives_no_iterable_is_refused():
    def data(epoch: int) -> Any:
        return Augmented()

    with pytest.raises(
        DataError, match="data function returned an Augmented for epoch 0; it maps an epoch to an iterable"
    ):
        next(tnt.batches(data, at()))
    with pytest.raises(ContractError, match="the train data function raised StopIteration"):
        next(tnt.batches(lambda epoch: next(iter(())), at()))


# What is noted of the data, and compared at resume


class Sampler(SequentialSampler):
    pass


NOTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "list": ([1, 2], {"type": "list", "length": 2}),
    "function": (lambda epoch: [], {"type": "function"}),
    "iterator": (iter([1]), {"type": "list_iterator"}),
    "loader": (
        DataLoader(Augmented(), batch_size=4, num_workers=2, shuffle=True),
        {"type": "DataLoader", "length": 2, "batch_size": 4, "num_workers": 2, "sampler": "RandomSampler"},
    ),
    "batch sampler": (
        DataLoader(Augmented(), batch_sampler=BatchSampler(SequentialSampler(Augmented()), 3, False)),
        {"type": "DataLoader", "length": 2, "num_workers": 0, "sampler": "BatchSampler"},
    ),
    "no batching": (
        DataLoader(Augmented(), batch_size=None),
        {"type": "DataLoader", "length": 6, "num_workers": 0, "sampler": "SequentialSampler"},
    ),
    "stream": (
        DataLoader(Stream(), batch_size=2),
        {"type": "DataLoader", "batch_size": 2, "num_workers": 0, "sampler": "_InfiniteConstantSampler"},
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_is_noted_of_data(name: str):
    data, note = NOTES[name]
    assert describe(data) == {**BLANK, **note}


class Remembering(SequentialSampler):
    def set_epoch(self, epoch: int) -> None:
        raise NotImplementedError


class Checkpointed(SequentialSampler):
    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError


ITEMS = Augmented()
GENERATOR = torch.Generator()
OWN: dict[str, tuple[Callable[[], Any], str]] = {
    "workers that live on": (
        lambda: DataLoader(ITEMS, num_workers=1, persistent_workers=True),
        "persistent_workers=True",
    ),
    "generator": (lambda: DataLoader(ITEMS, shuffle=True, generator=GENERATOR), "generator="),
    "sampler's generator": (lambda: DataLoader(ITEMS, sampler=RandomSampler(ITEMS, generator=GENERATOR)), "generator="),
    "sampler's in a batch sampler": (
        lambda: DataLoader(ITEMS, batch_sampler=BatchSampler(RandomSampler(ITEMS, generator=GENERATOR), 2, False)),
        "generator=",
    ),
    "sampler with an epoch": (
        lambda: DataLoader(ITEMS, sampler=Remembering(ITEMS)),
        "a Remembering with memory of its own",
    ),
    "sampler with a state": (
        lambda: DataLoader(ITEMS, batch_sampler=BatchSampler(Checkpointed(ITEMS), 2, False)),
        "a Checkpointed with memory of its own",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_loader_with_randomness_of_its_own_is_refused_at_resume_and_only_there(name: str):
    make, reason = OWN[name]
    check_resume(make(), BLANK, Progress(0, 0, 0), "train")
    for progress in (Progress(1, 6, 0), Progress(0, 2, 2), Progress(1, 0, 0)):
        with pytest.raises(
            ResumeError, match=f"the eval DataLoader has {reason}, whose state no checkpoint holds"
        ) as caught:
            check_resume(make(), BLANK, progress, "eval")
        assert "Leave that argument out, or pass allow_inexact_resume=True" in str(caught.value)


@pytest.mark.parametrize("name", [*DRAWN, "plain sampler"])
def test_other_data_resumes(name: str):
    data = DRAWN[name]() if name in DRAWN else DataLoader(ITEMS, sampler=Sampler(ITEMS))
    check_resume(data, describe(data), Progress(1, 8, 2), "train")


@pytest.mark.parametrize(
    ("changed", "was", "now"),
    [
        (DataLoader(ITEMS, batch_size=3), "length=3, batch_size=2", "length=2, batch_size=3"),
        (DataLoader(ITEMS, batch_size=2, shuffle=True), "sampler='SequentialSampler'", "sampler='RandomSampler'"),
        (DataLoader(ITEMS, batch_size=2, num_workers=1), "num_workers=0", "num_workers=1"),
        ([1, 2, 3], "type='DataLoader', batch_size=2, num_workers=0, sampler='Seq", "type='list', batch_size=-1, num"),
    ],
    ids=["batch size", "shuffle", "workers", "type"],
)
def test_a_changed_loader_is_refused_in_an_open_epoch_with_what_changed(changed: Any, was: str, now: str):
    noted = describe(DataLoader(ITEMS, batch_size=2))
    with pytest.raises(
        ResumeError, match=f"the open train epoch began with {was}.* and goes on with {now}.*; an epoch"
    ):
        check_resume(changed, noted, Progress(0, 1, 1), "train")
    check_resume(changed, noted, Progress(1, 3, 0), "train")
    check_resume(changed, BLANK, Progress(0, 1, 1), "train")
