"""Pipelines: what each method makes, what a key is folded with, what is refused."""

import random
from typing import Any

import numpy as np
import pytest
import torch

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.data import Elements, batches, loader, mix, source
from tnt_func.data.cursors import check_resume, describe
from tnt_func.errors import ContractError, DataError, UsageError, UsageTypeError
from tnt_func.progress import Progress
from tnt_func.testing import check_resume as check_resume_law
from tnt_func.testing.generators import moved, stands

KEY, OTHER = tnt.key(0), tnt.key(1)
NUMBERS = source(range(10))


def given(elements: Elements, epoch: int = 0, start: int = 0) -> list[Any]:
    return list(elements.batches(epoch, start))


def crop(x: Any) -> Any:
    return torch.rand(()), np.random.rand(), random.random()


def flip(x: Any) -> Any:
    return crop(x)


def augment(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand(2) + np.random.rand() - random.random()


class Dice:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> float:
        return random.random()


# What the methods make


def test_a_shuffle_orders_every_epoch_anew_by_key_and_name():
    orders = [
        given(p, e)
        for p in (NUMBERS.shuffle(KEY), NUMBERS.shuffle(OTHER), NUMBERS.shuffle(KEY, name="b"))
        for e in (0, 1)
    ]
    assert all(sorted(order) == [*range(10)] for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_repetition_is_the_next_epoch():
    shuffled = NUMBERS.shuffle(KEY)
    assert given(shuffled.repeat(3), 2) == [*given(shuffled, 6), *given(shuffled, 7), *given(shuffled, 8)]


def test_take_shard_zip_and_batch():
    assert given(NUMBERS.take(3)) == [0, 1, 2] and len(NUMBERS.take(99)) == 10
    assert [given(NUMBERS.shard(index, 3)) for index in range(3)] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert sorted(given(NUMBERS.shard(1, 3).shuffle(KEY))) == [1, 4, 7]
    assert given(NUMBERS.zip(NUMBERS.shuffle(KEY))) == [*zip(range(10), given(NUMBERS.shuffle(KEY)), strict=True)]
    assert given(NUMBERS.batch(4, collate=sum)) == [6, 22, 17] and len(NUMBERS.batch(4, drop_last=True)) == 2
    assert given(NUMBERS.batch(4, collate=list).batch(2, collate=list))[1] == [[8, 9]]


def test_a_batch_is_cut_where_it_is_made_whatever_orders_it_afterwards():
    whole = source(torch.arange(20)).shuffle(KEY).batch(6, drop_last=True)
    for elements in (whole, whole.shuffle(KEY, name="batches"), whole.repeat(2), whole.take(2), whole.zip(whole)):
        parts = [given(elements.shard(index, 3), 1) for index in range(3)]
        for batch, *cut in zip(given(elements, 1), *parts, strict=True):
            joined = (
                [torch.cat(piece) for piece in zip(*cut, strict=True)] if isinstance(batch, tuple) else [torch.cat(cut)]
            )
            assert trees.equal(joined, [*batch] if isinstance(batch, tuple) else [batch])
    mixed = mix({"a": whole, "b": whole.take(1)}, "in_order")
    assert [{n: len(b) for n, b in e.items()} for e in given(mixed.shard(0, 3))] == [{"a": 2}] * 3 + [{"b": 2}]


def test_a_map_after_the_cut_draws_the_same_on_every_shard():
    parts = [source(torch.zeros(4)).batch(4).shard(index, 2).map(augment, KEY) for index in range(2)]
    assert trees.equal(*map(given, parts))


# Buckets


def test_a_bucket_has_elements_of_like_length_and_all_of_them():
    words = ["x" * n for n in (1, 5, 2, 3, 9, 1, 4, 2, 8, 3)]
    elements = source(words).bucket([*map(len, words)], [2, 4], 2, KEY, collate=list)
    epochs = [given(elements, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(word for batch in epoch for word in batch) == sorted(words) and len(epoch) == len(elements) == 6
        kinds = [{(len(word) > 2) + (len(word) > 4) for word in batch} for batch in epoch]
        assert all(len(kind) == 1 for kind in kinds)
    assert len({str(epoch) for epoch in epochs}) == 4
    dropped = source(words).bucket(torch.tensor([*map(len, words)]), [2, 4], 2, KEY, drop_last=True, collate=list)
    assert [len(batch) for batch in given(dropped)] == [2] * 4
    parts = [given(dropped.shard(index, 2)) for index in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == given(dropped)


# Keys


def test_two_maps_under_one_key_do_not_draw_alike():
    both = source([0]).map(crop, KEY).map(lambda x: (x, flip(x)), KEY, name="flip")
    ((a, b),) = given(both)
    assert all(x != y for x, y in zip(a, b, strict=True))


def test_two_sources_under_one_key_are_told_apart_by_name():
    dice = [source(Dice(), KEY, name=name) for name in ("a", "b")]
    ((a, b), *_) = given(dice[0].zip(dice[1]))
    assert a != b
    with pytest.raises(UsageError, match="under the name 'source'.* name='source_2'"):
        source(Dice(), KEY).zip(source(Dice(), KEY))
    assert len(given(source([1], KEY).zip(source([2], KEY)))) == 1


def test_a_map_draws_the_same_wherever_it_stands():
    alone = given(NUMBERS.map(crop, KEY))
    assert alone == given(NUMBERS.map(lambda x: x, draws=()).shuffle(OTHER).map(flip).take(10).map(crop, KEY))
    assert alone != given(NUMBERS.map(crop, KEY, name="other")) and alone != given(NUMBERS.map(crop, KEY), 1)
    assert len({x for row in alone for x in row}) == 30


def test_the_key_is_that_of_the_stage_before():
    assert given(NUMBERS.shuffle(KEY).map(crop)) == given(NUMBERS.shuffle(KEY).map(crop, KEY))
    assert given(source(range(10), KEY).shuffle().take(4)) == given(NUMBERS.shuffle(KEY).take(4))
    assert given(NUMBERS.map(crop, KEY).map(flip, OTHER).shuffle()) == given(NUMBERS.map(flip, OTHER).shuffle())


def test_only_declared_generators_are_seeded():
    elements = NUMBERS.map(lambda x: random.random(), KEY, draws=("torch", "numpy"))
    random.seed(3)
    expected = [random.random() for _ in range(10)]
    random.seed(3)
    assert given(elements) == expected


def test_reading_leaves_the_generators_alone_also_where_it_is_left_and_where_it_fails():
    before = stands()
    for _ in NUMBERS.map(crop, KEY).batches():
        assert moved(before) == []
        break
    with pytest.raises(ZeroDivisionError):
        given(NUMBERS.map(lambda x: (crop(x), 1 // 0), KEY))
    assert moved(before) == []


def test_an_error_keeps_its_type_and_says_where():
    def fail(x: int) -> int:
        if x == 7:
            raise KeyError("seven")
        return x

    with pytest.raises(KeyError, match="seven") as caught:
        given(NUMBERS.map(fail, draws=()).batch(4), 2)
    assert caught.value.__notes__ == ["map 'fail', at (epoch, index) = (2, 7)"]
    with pytest.raises(ContractError, match="map 'end' raised StopIteration"):
        given(NUMBERS.map(lambda x: next(iter(())), draws=(), name="end"))


# In the loop


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumes_bitwise_at_every_step(num_workers: int):
    images = source(torch.arange(10.0).reshape(5, 2)).shuffle(KEY).map(augment).batch(2)
    data = loader(images, num_workers=num_workers)

    def train_step(state: tnt.State, batch: torch.Tensor) -> Any:
        params = state.params * 0.9 + batch.sum(0) * torch.rand(2)
        return state.replace(params=params), {"loss": params.sum()}

    unit = tnt.TrainUnit(train_step=train_step, metrics={"loss": tnt.metrics.mean("loss")})
    first = tnt.State(params=torch.zeros(2), key=tnt.key(3))
    run = [event.state for event in tnt.train_events(unit, first, data, max_epochs=2) if event.resumable]
    last = tnt.train(unit, first, images, max_epochs=2)
    assert len(run) == 8 and tnt.digest(last) == tnt.digest(tnt.train(unit, run[-1], data, max_epochs=2))
    for state in run[:-1]:
        assert tnt.digest(tnt.train(unit, state, data, max_epochs=2)) == tnt.digest(last)
    if not num_workers:
        check_resume_law(unit, first, images)


def test_a_run_may_go_on_with_other_workers_and_not_with_other_batches():
    plain = NUMBERS.batch(2)
    check_resume(loader(plain, num_workers=2), describe(plain), Progress(0, 1, 1), "train")
    with pytest.raises(DataError, match="began with length=5 and goes on with length=4"):
        check_resume(NUMBERS.batch(3), describe(plain), Progress(0, 1, 1), "train")


def test_the_loop_seeks():
    seen: list[int] = []
    elements = NUMBERS.map(lambda x: seen.append(x) or x, draws=())
    progress = tnt.State(params=0, key=KEY).progress.put("train", Progress(1, 18, 8))
    assert list(batches(elements, tnt.State(params=0, key=KEY, progress=progress))) == seen == [8, 9]


# Wrong use


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda: NUMBERS.shuffle(),
            UsageError,
            r"shuffle\(\) of 'shuffle' was given no key.* Write .shuffle\(tnt.key\(0\)\)",
        ),
        (lambda: NUMBERS.map(crop), UsageError, r"map\(\) of 'crop' was given no key.* or map\(crop, draws=\(\)\)"),
        (
            lambda: NUMBERS.map(crop, KEY).map(crop),
            UsageError,
            "under the name 'crop', and would draw alike.* name='crop_2'",
        ),
        (lambda: NUMBERS.shuffle(KEY).shuffle(), UsageError, "under the name 'shuffle'"),
        (lambda: NUMBERS.map(crop, KEY).zip(NUMBERS.map(crop, KEY)), UsageError, "under the name 'crop'"),
        (
            lambda: NUMBERS.batch(0),
            UsageError,
            r"batch\(..., size=0\) was given; it is a positive number. Write size=32",
        ),
        (lambda: NUMBERS.take(-1), UsageError, r"take\(..., count=-1\)"),
        (lambda: NUMBERS.repeat(0), UsageError, r"repeat\(..., times=0\)"),
        (lambda: NUMBERS.batch(11, drop_last=True), DataError, r"batch leaves no element of \[10\].* drop_last=False"),
        (lambda: NUMBERS.shard(3, 3), UsageError, r"shard\(3, 3\) was given; the index.* .shard\(rank, world_size\)"),
        (lambda: NUMBERS.shard(-1, 3), UsageError, r"shard\(-1, 3\)"),
        (lambda: NUMBERS.shard(11, 12), DataError, "shard leaves no element"),
        (
            lambda: NUMBERS.batch(4).shard(0, 3),
            UsageError,
            "one has 2 elements; every shard gets a part.* drop_last=True",
        ),
        (lambda: NUMBERS.batch(5).shard(0, 2).shard(0, 2), UsageError, r"shard\(0, 2\) has cut; a batch is cut once"),
        (
            lambda: NUMBERS.batch(5).map(crop, KEY).shard(0, 2),
            UsageError,
            r"what map made of batches; .* Write .batch\(size\).shard\(0, 2\), and what changes batches after it",
        ),
        (lambda: NUMBERS.zip(NUMBERS.take(3)), UsageError, r"lengths \[10, 3\]; .* Write .take\(3\)"),
        (lambda: NUMBERS.bucket([1], [2], 2), UsageError, r"lengths of shape \[1\].* for 10 elements"),
        (lambda: NUMBERS.bucket(range(10), [2, 2], 2), UsageError, "boundaries rise"),
        (
            lambda: NUMBERS.shuffle(KEY).bucket(range(10), [2], 2),
            UsageError,
            "a shuffled pipeline.* Leave that shuffle out",
        ),
        (lambda: NUMBERS.shuffle(0), UsageTypeError, r"shuffle\(\) parameter key=0"),  # pyright: ignore
        (lambda: NUMBERS.map(crop, KEY, draws=("cuda",)), UsageTypeError, "draws=.*cuda"),  # pyright: ignore
        (lambda: NUMBERS.batch(2.0), UsageTypeError, "size=2.0"),  # pyright: ignore
    ],
)
def test_wrong_use_is_told(make: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        make()


def test_pairs_may_be_shuffled_alike_and_share_what_is_before_them():
    pairs = NUMBERS.shuffle(KEY).zip(source([10 * x for x in range(10)]).shuffle(KEY))
    assert all(y == 10 * x for x, y in given(pairs, 3))
    cropped = NUMBERS.map(crop, KEY)
    assert all(x == y for x, y in given(cropped.zip(cropped)))
