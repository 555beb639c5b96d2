"""Batches: elements in groups of one size, of neighbours or of like length, and the parts that shards take of them.

Laws:
    A batch of columns equals what the collate function makes of their rows. The parts of a batch make the batch.

Example:
    >>> from tnt_func.data.stages import Items
    >>> Batch(Items(range(5)), 3, False, sum).read(epoch=0, indices=range(2))
    [3, 7]
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import default_collate

from tnt_func import rng
from tnt_func.data.permutation import Indices, permute
from tnt_func.data.stages import Columns, Over, Stage, Stream, numbers, rows, tensor
from tnt_func.errors import UsageError

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True, eq=False)
class Batch(Over):
    size: int
    drop_last: bool
    collate: Collate | None
    part: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return len(self.upstream) // self.size if self.drop_last else -(-len(self.upstream) // self.size)

    def read(self, epoch: int, indices: Indices) -> list[Any]:
        return [self._one(epoch, index * self.size) for index in numbers(indices)]

    def _one(self, epoch: int, start: int) -> Any:
        places = range(start, min(start + self.size, len(self.upstream)))
        return collated(self.upstream.read(epoch, part_of(places, self.part)), self.collate)

    @property
    def batched(self) -> bool:
        return True

    def cut(self, index: int, count: int) -> Stage:
        last = 0 if self.drop_last else len(self.upstream) % self.size
        return replace(self, part=new_part(self.part, index, count, last or self.size))


@dataclass(frozen=True, eq=False)
class Bucket(Over):
    """Batches of elements of like length: bucket after bucket, or all in an order of every epoch's own."""

    order: torch.Tensor
    counts: tuple[int, ...]
    size: int
    drop_last: bool
    collate: Collate | None
    stream: Stream | None = None
    part: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return self._starts[-1]

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The first batch of each bucket, and the number of all."""
        groups = [count // self.size if self.drop_last else -(-count // self.size) for count in self.counts]
        return list(itertools.accumulate(groups, initial=0))

    def read(self, epoch: int, indices: Indices) -> list[Any]:
        if self.stream is None:
            return [self._one(epoch, index) for index in numbers(indices)]
        shuffled = permute(rng.fold_in(self.stream.at(epoch), "batches"), len(self), indices)
        return [self._one(epoch, index) for index in shuffled.tolist()]

    def _one(self, epoch: int, index: int) -> Any:
        bucket = next(number for number, after in enumerate(self._starts[1:]) if index < after)
        count, before = self.counts[bucket], sum(self.counts[:bucket])
        start = (index - self._starts[bucket]) * self.size
        places: Indices = part_of(range(start, min(start + self.size, count)), self.part)
        if self.stream is not None:
            places = permute(rng.fold_in(self.stream.at(epoch), bucket), count, places)
        return collated(self.upstream.read(epoch, self.order[before + tensor(places)]), self.collate)

    @property
    def batched(self) -> bool:
        return True

    def cut(self, index: int, count: int) -> Stage:
        rests = [self.size if self.drop_last else count % self.size or self.size for count in self.counts if count]
        return replace(self, part=new_part(self.part, index, count, min(rests)))


def collated(read: list[Any] | Columns, collate: Collate | None) -> Any:
    """A batch; of columns what `default_collate` makes of their rows, without cutting and stacking them."""
    if collate is not None:
        return collate(rows(read))
    return _batch(read.tree) if isinstance(read, Columns) else default_collate(read)


def part_of(places: range, part: tuple[int, int]) -> range:
    """A shard's part of a batch: parts differ by at most one, and in order make the whole.

    Example:
        >>> [part_of(range(5), (index, 2)) for index in range(2)]
        [range(0, 2), range(2, 5)]
    """
    index, count = part
    return places[len(places) * index // count : len(places) * (index + 1) // count]


def new_part(old: tuple[int, int], index: int, count: int, smallest: int) -> tuple[int, int]:
    """The part that a shard takes of batches, the smallest of which has so many elements."""
    if old != (0, 1):
        raise UsageError(
            f"shard({index}, {count}) was given batches that shard{old} has cut; a batch is cut once. Write "
            f".shard({index}, {count}) alone."
        )
    if count > smallest:
        raise UsageError(
            f"shard({index}, {count}) was given batches of which one has {smallest} elements; every shard gets a part "
            "of every batch. Write .batch(size, drop_last=True), with a size of at least the number of shards."
        )
    return index, count


def _batch(tree: Any) -> Any:
    if isinstance(tree, tuple):
        return [_batch(column) for column in tree]
    if isinstance(tree, dict):
        return {name: _batch(column) for name, column in tree.items()}
    return torch.as_tensor(tree)
