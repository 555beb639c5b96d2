"""What an element must not depend on (law 14): each way to break it beside its sound twin.

Example:
    >>> from tnt_func.testing.pipelines import check_pipeline
    >>> make, words, workers = PIPELINES["counter"]
    >>> check_pipeline(make(False), workers=workers)
    >>> check_pipeline(make(True), workers=workers)
    Traceback (most recent call last):
    tnt_func.errors.LawError: law 14 (data) is broken at element 0 of epoch 0: it is another one when read again
      ...
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from tnt_func import rng
from tnt_func.data import Elements, source
from tnt_func.data.stages import Shard, Stage
from tnt_func.testing.pieces import draw
from tnt_func.types import Generator

Make = Callable[[bool], Any]


class Control(NamedTuple):
    """A pipeline, broken or sound, anew at every call; what the message says; workers that it takes to see it."""

    make: Make
    words: tuple[str, ...]
    workers: Sequence[int] = ()


PIPELINES: dict[str, Control] = {}
"""Every control by its name."""


def _control(*words: str, workers: Sequence[int] = ()) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        PIPELINES[getattr(make, "__name__", "")] = Control(make, words, workers)
        return make

    return enter


def _mapped(fn: Callable[[Any], Any], draws: tuple[Generator, ...] = ()) -> Elements:
    return source(range(5)).map(fn, rng.key(0), draws=draws, name="of mine")


@_control("element 0 of epoch 0", "when read again", "no counter")
def counter(broken: bool) -> Any:
    seen = list[int]()

    def count(x: int) -> int:
        seen.append(x)
        return x + (len(seen) if broken else 0)

    return _mapped(count)


@_control("it is another one when", "no generator of your own")
def own_generator(broken: bool) -> Any:
    own = torch.Generator().manual_seed(0)
    return _mapped(lambda x: x + float(torch.rand((), generator=own if broken else None)), ("torch",))


@_control("when 1 workers read it", "get_worker_info()", workers=(1,))
def worker(broken: bool) -> Any:
    return _mapped(lambda x: (x, broken and get_worker_info() is not None))


@_control("looked at after later ones were read", "Return a new tensor")
def one_buffer(broken: bool) -> Any:
    buffer = torch.zeros(2)
    return _mapped(lambda x: (buffer if broken else buffer.clone()).fill_(x))


@_control("when the global generators stand elsewhere", "rng.scope")
def reads_generator(broken: bool) -> Any:
    return _mapped(lambda x: x + (torch.initial_seed() if broken else 0))


def _undeclared(generator: Generator) -> Make:
    def make(broken: bool) -> Any:
        declared: tuple[Generator, ...] = tuple(name for name in rng.ALL if name != generator or not broken)
        return _mapped(lambda x: x + draw(generator), declared)

    make.__name__ = f"undeclared_{generator}"
    return make


for _generator in rng.ALL:
    _control(f"map 'of mine' drew from {_generator}'s global generator", "Write draws=")(_undeclared(_generator))


@_control("the collate function drew from random's global generator", "a map after .batch(size)")
def drawing_collate(broken: bool) -> Any:
    return source(range(5)).batch(2, collate=lambda rows: rows + ([draw("random")] if broken else []))


class Items:
    """A dataset that draws."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return index + float(torch.rand(()))


@_control("the dataset drew from torch's global generator", "Write draws=('torch',)")
def undeclared_dataset(broken: bool) -> Any:
    return source(Items(), rng.key(0), draws=() if broken else ("torch",))


@dataclass(frozen=True)
class Own:
    """A pipeline of a user's own, which may ignore the start, move global generators, or cut shards that overlap."""

    ignores_start: bool = False
    draws: bool = False
    overlaps: bool = False
    part: tuple[int, int] = (0, 1)

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        index, count = self.part
        for place in range(5)[index::count][0 if self.ignores_start else start :]:
            yield epoch, place, self.draws and draw("random")

    def shard(self, index: int, count: int) -> "Own":
        return replace(self, part=(index if count < 3 or not self.overlaps else 0, count))


@_control("when read from the middle on", "count from `start`")
def ignored_start(broken: bool) -> Any:
    return Own(ignores_start=broken)


@_control("moves the global generators of random", "rng.scope")
def moved_generators(broken: bool) -> Any:
    return Own(draws=broken)


@_control("5 elements are not those of 3 shards, which have [2, 2, 2]", "every element once")
def overlapping_shards(broken: bool) -> Any:
    return Own(overlaps=broken)


@dataclass(frozen=True, eq=False)
class Lossy(Shard):
    """A shard that forgets the rest of a division."""

    def __len__(self) -> int:
        return len(self.upstream) // self.count


class Shardable(Elements):
    """A pipeline whose shards are lossy."""

    def shard(self, index: int, count: int) -> Elements:
        stage: Stage = Lossy(self.stage, index, count)
        return Elements(stage)


@_control("5 elements are not those of 2 shards, which have [2, 2]", "every element once")
def lossy_shards(broken: bool) -> Any:
    elements = source(range(5))
    return Shardable(elements.stage) if broken else elements
