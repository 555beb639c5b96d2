"""Law 14: an element depends on key, epoch and index alone, whatever the pipeline; shards partition an epoch."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from tnt_func import rng
from tnt_func.data import Elements, mix, source
from tnt_func.data.permutation import permute
from tnt_func.errors import LawError
from tnt_func.testing.broken.pipelines import PIPELINES
from tnt_func.testing.pipelines import check_pipeline
from tnt_func.types import Generator

keys = st.integers(0, 2**64 - 1).map(rng.key)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Drawing(Dataset[Any]):
    """Draws from every generator for each item, as augmentations in datasets do."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.rand(2), "y": np.random.rand() + random.random() + index}


def noisy(element: Any) -> Any:
    return element, torch.rand(()), np.random.rand(), random.random()


def torch_noisy(element: Any) -> Any:
    return element, torch.rand(())


def still(element: Any) -> Any:
    return {"only": element}


DRAWS: dict[Any, tuple[Generator, ...]] = {noisy: rng.ALL, torch_noisy: ("torch",), still: ()}


@st.composite
def sources(draw: st.DrawFn, name: str = "source") -> Elements:
    length, key = draw(st.integers(1, 7)), draw(keys)
    kind = draw(st.sampled_from(("list", "range", "tensors", "dict", "array", "dataset", "buckets")))
    if kind == "tensors":
        return source(TensorDataset(torch.arange(length), torch.arange(2 * length).reshape(length, 2)), key)
    if kind == "dict":
        return source({"a": torch.arange(length), "b": (np.arange(float(length)), torch.ones(length))}, key)
    if kind == "array":
        return source(np.arange(float(length)), key)
    if kind == "dataset":
        return source(Drawing(length), key, name=name)
    if kind == "buckets":
        lengths = [draw(st.integers(1, 4)) for _ in range(length)]
        chosen = draw(st.sampled_from((None, key)))
        return source(range(length), key).bucket(lengths, [2, 3], draw(st.integers(1, 3)), chosen, name=name)
    return source(range(length) if kind == "range" else [*"abcdefg"[:length]], key)


@st.composite
def pipelines(draw: st.DrawFn, most: int = 4, made_of: int = 1) -> Elements:
    elements = draw(sources(f"source {made_of}"))
    for number in range(draw(st.integers(0, most))):
        length, named = len(elements), {"name": f"{made_of}.{number}", "key": draw(keys)}
        step = draw(st.sampled_from(("shuffle", "map", "batch", "repeat", "take", "shard", "zip", "mix")))
        if step == "shuffle":
            elements = elements.shuffle(**named)
        elif step == "map":
            fn = draw(st.sampled_from((noisy, torch_noisy, still)))
            elements = elements.map(fn, draws=DRAWS[fn], **named)
        elif step == "batch":
            size = draw(st.integers(1, 4))
            # Only what a source gives is alike enough to be stacked.
            alike = made_of == 1 and number == 0 and not elements.stage.batched
            collate = draw(st.sampled_from((list, None))) if alike else list
            elements = elements.batch(size, drop_last=draw(st.booleans()) and size <= length, collate=collate)
        elif step == "repeat":
            elements = elements.repeat(draw(st.integers(1, 3)))
        elif step == "take":
            elements = elements.take(draw(st.integers(1, length + 1)))
        elif step == "shard" and not elements.stage.batched:
            count = draw(st.integers(1, length))
            elements = elements.shard(draw(st.integers(0, count - 1)), count)
        elif step == "zip":
            elements = elements.zip(elements.map(torch_noisy, draws=("torch",), **named))
        elif step == "mix" and made_of == 1:
            members = {"first": elements, "second": draw(pipelines(2, 2 + number))}
            how = draw(st.sampled_from(("round_robin", "weighted", "in_order", "all")))
            stop = draw(st.sampled_from(("longest", "shortest", "restart", 5))) if how != "in_order" else "longest"
            more: Any = {"weights": {"first": 2, "second": 1}, **named} if how == "weighted" else {}
            elements = mix(members, how, stop=stop, **more)
    return elements


@settings(max_examples=80)
@given(pipelines(), st.integers(0, 2**40))
def test_every_pipeline_obeys(elements: Elements, epoch: int):
    check_pipeline(elements, epochs=(0, epoch), shards=(1, 2, 3, 5))


@settings(max_examples=4)
@given(pipelines(), st.integers(0, 3))
def test_so_it_does_with_workers(elements: Elements, epoch: int):
    check_pipeline(elements.take(6), epochs=(epoch,), workers=(1, 3), prefetch=(1,), shards=())


@settings(max_examples=80)
@given(sources(), keys, st.integers(1, 4), st.integers(0, 4))
def test_rows_gathered_at_once_are_the_rows_one_by_one(elements: Elements, key: rng.Key, size: int, epoch: int):
    """A map that does nothing takes the columns apart; so the batches are collated of single elements."""
    shuffled = elements.shuffle(key, name="mine").repeat(2)
    apart = shuffled.map(lambda element: element, draws=())
    for pipeline in (shuffled, apart):
        check_pipeline(pipeline, epochs=(epoch,), shards=())
    if not elements.stage.batched:
        pairs = zip(shuffled.batch(size).batches(epoch), apart.batch(size).batches(epoch), strict=True)
        assert all(_same(a, b) for a, b in pairs)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return type(b) is list and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_shards(count: int):
    whole = source(range(23)).shuffle(rng.key(0)).batch(7, drop_last=True)
    shards = [whole.shard(index, count) for index in range(count)]
    for batch, *parts in zip(whole.batches(1), *(shard.batches(1) for shard in shards), strict=True):
        assert torch.equal(torch.cat(parts), batch)


@settings(max_examples=50)
@given(keys, st.integers(1, 2**40), st.data())
def test_a_shuffle_is_a_permutation_of_any_size(key: rng.Key, size: int, data: Any):
    """A bijection, seen where it can be: distinct places go to distinct places inside."""
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    found = permute(key, size, torch.tensor(places)).tolist()
    assert len(set(found)) == len(places) and min(found) >= 0 and max(found) < size
    first = data.draw(st.integers(0, size - 1))
    near = range(first, min(first + 200, size), data.draw(st.integers(1, 70)))
    assert permute(key, size, near).tolist() == permute(key, size, torch.tensor(near)).tolist()


@pytest.mark.parametrize("name", PIPELINES)
def test_what_breaks_the_law_is_named_and_its_sound_twin_passes(name: str):
    make, words, workers = PIPELINES[name]
    check_pipeline(make(False), workers=workers)
    with pytest.raises(LawError) as caught:
        check_pipeline(make(True), workers=workers)
    assert all(word in str(caught.value) for word in ("law 14 (data) is broken", *words)), caught.value
