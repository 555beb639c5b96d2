"""What a pipeline is made of: each stage says how many elements it has, and computes those it is asked for.

A stage is frozen and remembers nothing. It reads whole runs of indices at a time, so that a batch of tensors is one
gather and not many rows; `Columns` are elements that no stage has yet had to look at one by one.

Laws:
    `read(epoch, indices)` is a function of its arguments, index by index.

Example:
    >>> Shard(Items(range(10)), 1, 3).read(epoch=0, indices=range(3))
    [1, 4, 7]
"""

import functools
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from mmap import mmap
from typing import Any, NamedTuple

import torch

from tnt_func import rng
from tnt_func.data.permutation import Indices, permute, splitmix
from tnt_func.errors import UsageError, call
from tnt_func.rng import Key
from tnt_func.types import Generator


class Stream(NamedTuple):
    """What a stage draws from: a key folded with the stage's name, and the global generators that are seeded.

    Example:
        >>> Stream(rng.key(0), "crop", ()).at(epoch=1) == Stream(rng.key(0), "flip", ()).at(epoch=1)
        False
    """

    key: Key
    name: str
    draws: tuple[Generator, ...]

    def at(self, epoch: int) -> Key:
        """The key of an epoch."""
        return _epoch_key(self.key, self.name, epoch)


@functools.lru_cache(maxsize=64)
def _epoch_key(key: Key, name: str, epoch: int) -> Key:
    return rng.fold_in(rng.fold_in(key, name), epoch)


class Columns(NamedTuple):
    """Elements side by side: a tensor or array, or a tuple or dict of them, whose first dimension counts elements.

    Example:
        >>> rows(Columns((torch.arange(2), torch.ones(2))))
        [(tensor(0), tensor(1.)), (tensor(1), tensor(1.))]
    """

    tree: Any


class Stage(ABC):
    """A finite sequence of elements for each epoch."""

    stream: Stream | None = None
    """What its own draws come from."""

    @abstractmethod
    def __len__(self) -> int:
        """How many elements an epoch has, whichever epoch."""

    @abstractmethod
    def read(self, epoch: int, indices: Indices) -> list[Any] | Columns:
        """The elements at indices of an epoch. Seeds the global generators and does not preserve them."""

    @property
    def parents(self) -> tuple["Stage", ...]:
        """The stages that this one reads."""
        return ()

    @property
    def batched(self) -> bool:
        """Whether its elements are batches, which `shard` cuts."""
        return any(parent.batched for parent in self.parents)

    def cut(self, index: int, count: int) -> "Stage":
        """The same with every batch cut to one of `count` parts."""
        raise UsageError(
            f"shard({index}, {count}) was given what {type(self).__name__.lower()} made of batches; these are cut "
            f"where they are made. Write .batch(size).shard({index}, {count}), and what changes batches after it."
        )


def lineage(stage: Stage) -> list[Stage]:
    """All that a stage reads, each once, and the stage itself at the end.

    Example:
        >>> numbers = Items(range(3))
        >>> [type(each).__name__ for each in lineage(Zip((numbers, Take(numbers, 2))))]
        ['Items', 'Take', 'Zip']
    """
    found = {id(each): each for parent in stage.parents for each in lineage(parent)}
    return [*found.values(), stage]


@dataclass(frozen=True, eq=False)
class Table(Stage):
    """Elements that are rows of tensors or arrays, copied out."""

    columns: Any
    length: int
    stream: Stream | None = None

    def __len__(self) -> int:
        return self.length

    def read(self, epoch: int, indices: Indices) -> Columns:
        return Columns(_gather(self.columns, tensor(indices)))

    def __reduce__(self) -> Any:
        return _table, (_over_leaves(_closed, self.columns), self.length, self.stream)


class _File(NamedTuple):
    """A mapped file, as it is sent to a process: NumPy would send what is in it."""

    name: str
    dtype: Any
    offset: int
    shape: tuple[int, ...]


def _table(columns: Any, length: int, stream: Stream | None) -> Table:
    return Table(_over_leaves(_opened, columns), length, stream)


def _closed(column: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None or type(column) is not numpy.memmap or not isinstance(column.base, mmap) or column.mode != "r":
        return column
    return _File(column.filename, column.dtype, column.offset, column.shape) if column.flags.c_contiguous else column


def _opened(column: Any) -> Any:
    if not isinstance(column, _File):
        return column
    import numpy

    return numpy.memmap(column.name, column.dtype, "r", column.offset, column.shape)


@dataclass(frozen=True, eq=False)
class Items(Stage):
    """Elements of whatever has a length and an item for every index."""

    data: Any
    bulk: Callable[[list[int]], list[Any]] | None = None
    stream: Stream | None = None

    def __len__(self) -> int:
        return len(self.data)

    def read(self, epoch: int, indices: Indices) -> list[Any]:
        places = numbers(indices)
        if self.bulk is not None:
            return list(call("the dataset", self.bulk, list(places)))
        return each("the dataset", self.data.__getitem__, places, self.stream, epoch, places)


@dataclass(frozen=True, eq=False)
class Over(Stage):
    """A stage over one other, as long as that."""

    upstream: Stage

    def __len__(self) -> int:
        return len(self.upstream)

    @property
    def parents(self) -> tuple[Stage, ...]:
        return (self.upstream,)


class Ordering(Over):
    """A stage that says which elements come, and leaves them as they are: it may stand between batches and shards."""

    def cut(self, index: int, count: int) -> Stage:
        return replace(self, upstream=self.upstream.cut(index, count))


@dataclass(frozen=True, eq=False)
class Shuffle(Ordering):
    stream: Stream  # pyright: ignore[reportIncompatibleVariableOverride]

    def read(self, epoch: int, indices: Indices) -> list[Any] | Columns:
        return self.upstream.read(epoch, permute(self.stream.at(epoch), len(self), indices))


@dataclass(frozen=True, eq=False)
class Repeat(Ordering):
    times: int

    def __len__(self) -> int:
        return self.times * len(self.upstream)

    def read(self, epoch: int, indices: Indices) -> list[Any] | Columns:
        return in_turns(self.upstream, epoch * self.times, indices)


@dataclass(frozen=True, eq=False)
class Take(Ordering):
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.upstream))

    def read(self, epoch: int, indices: Indices) -> list[Any] | Columns:
        return self.upstream.read(epoch, indices)


@dataclass(frozen=True, eq=False)
class Shard(Over):
    index: int
    count: int

    def __len__(self) -> int:
        return len(range(self.index, len(self.upstream), self.count))

    def read(self, epoch: int, indices: Indices) -> list[Any] | Columns:
        if isinstance(indices, torch.Tensor):
            return self.upstream.read(epoch, indices * self.count + self.index)
        own = range(self.index, len(self.upstream), self.count)
        return self.upstream.read(epoch, own[indices.start : indices.stop : indices.step])


@dataclass(frozen=True, eq=False)
class Map(Over):
    fn: Callable[..., Any]
    name: str
    stream: Stream | None = None

    def read(self, epoch: int, indices: Indices) -> list[Any]:
        elements = rows(self.upstream.read(epoch, indices))
        return each(f"map {self.name!r}", self.fn, elements, self.stream, epoch, numbers(indices))


@dataclass(frozen=True, eq=False)
class Zip(Stage):
    stages: tuple[Stage, ...]

    def __len__(self) -> int:
        return len(self.stages[0])

    @property
    def parents(self) -> tuple[Stage, ...]:
        return self.stages

    def read(self, epoch: int, indices: Indices) -> list[Any] | Columns:
        found = [stage.read(epoch, indices) for stage in self.stages]
        columns = tuple(read.tree for read in found if isinstance(read, Columns))
        if len(columns) == len(found):
            return Columns(columns)
        return list(zip(*map(rows, found), strict=True))

    def cut(self, index: int, count: int) -> Stage:
        return replace(self, stages=tuple(stage.cut(index, count) for stage in self.stages))


def each(
    owner: str, function: Callable[..., Any], arguments: Iterable[Any], stream: Stream | None, epoch: int, places: Any
) -> list[Any]:
    """Call a user's function on every element, its draws seeded for each; an error says which element it met.

    Example:
        >>> each("map 'half'", lambda x: x / 2, [1, 2], None, 0, [7, 8])
        [0.5, 1.0]
    """
    results = list[Any]()

    def loop() -> None:
        results.extend(map(function, arguments))
        if len(results) < len(places):
            raise StopIteration  # which `map` takes for the end of the arguments

    def seeded_loop(seed: int, draws: tuple[Generator, ...]) -> None:
        for place, argument in zip(places, arguments, strict=True):
            rng.seed(Key(splitmix(seed, place)), draws)
            results.append(function(argument))

    try:
        if stream is None or not stream.draws:
            call(owner, loop)
        else:
            call(owner, seeded_loop, stream.at(epoch).seed, stream.draws)
    except Exception as error:
        error.add_note(f"{owner}, at (epoch, index) = ({epoch}, {places[len(results)]})")
        raise
    return results


def in_turns(stage: Stage, first: int, indices: Indices) -> list[Any] | Columns:
    """The elements of consecutive epochs, as if they were one that begins with epoch `first`.

    Example:
        >>> in_turns(Items("ab"), 0, range(1, 4))
        ['b', 'a', 'b']
    """
    length = len(stage)
    if isinstance(indices, range) and len(indices) and indices[0] // length == indices[-1] // length:
        shift = indices[0] // length * length
        within = range(indices.start - shift, indices.stop - shift, indices.step)
        return stage.read(first + shift // length, within)
    found = list[Any]()
    for turn, places in itertools.groupby(numbers(indices), lambda index: index // length):
        found += rows(stage.read(first + turn, torch.tensor([place % length for place in places])))
    return found


def rows(read: list[Any] | Columns) -> list[Any]:
    """Elements one by one."""
    return _rows(read.tree) if isinstance(read, Columns) else read


def numbers(indices: Indices) -> Any:
    """Indices as Python's numbers."""
    return indices.tolist() if isinstance(indices, torch.Tensor) else indices


def tensor(indices: Indices) -> torch.Tensor:
    """Indices as a tensor: int64 [count]."""
    if isinstance(indices, torch.Tensor):
        return indices
    return torch.arange(indices.start, indices.stop, indices.step)


def _over_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    if type(tree) is tuple:
        return tuple(_over_leaves(function, column) for column in tree)
    if type(tree) is dict:
        return {name: _over_leaves(function, column) for name, column in tree.items()}
    return function(tree)


def _gather(tree: Any, indices: torch.Tensor) -> Any:
    def taken(column: Any) -> Any:
        if isinstance(column, torch.Tensor):
            return column.index_select(0, indices.to(column.device))
        return column[indices.numpy()]

    return _over_leaves(taken, tree)


def _rows(tree: Any) -> list[Any]:
    if isinstance(tree, tuple):
        return list(zip(*map(_rows, tree), strict=True))
    if isinstance(tree, dict):
        return [dict(zip(tree, row, strict=True)) for row in zip(*map(_rows, tree.values()), strict=True)]
    return list(tree)
