"""Pipelines: the data of an epoch as a function of its number, computed where it is asked for and stored nowhere.

Every method gives a new pipeline. One that draws takes a key, or the key of the stage before, and folds it with a name,
the epoch and the index. A map's name is its function's, so two maps under one key draw independently, and a stage more
or less elsewhere shifts nobody's draws; two stages with one key and one name would draw alike, and are refused.

Laws:
    Element i of epoch e depends on (key, e, i) alone: not on what was read before, the start, workers or prefetching.
    The shards of a pipeline partition its epochs. See `tnt_func.testing.check_pipeline`.

Example:
    >>> from tnt_func.data.sources import source
    >>> numbers = source(range(10)).shuffle(rng.key(0)).map(lambda x: 10 * x, draws=()).batch(4)
    >>> whole = [batch.tolist() for batch in numbers.batches(epoch=0)]
    >>> sorted(sum(whole, [])) == list(range(0, 100, 10)), whole[2:] == [b.tolist() for b in numbers.batches(0, 2)]
    (True, True)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tnt_func import rng
from tnt_func.data.batching import Batch, Bucket, Collate
from tnt_func.data.mixing import How, Interleaved, Stop, Together, stretches
from tnt_func.data.stages import Map, Repeat, Shard, Shuffle, Stage, Stream, Take, Zip, lineage, rows
from tnt_func.errors import DataError, UsageError
from tnt_func.rng import Key
from tnt_func.types import Generator, typed


@dataclass(frozen=True, eq=False, repr=False)
class Elements:
    """A finite sequence of elements for each epoch: made by `source`, changed by its methods, taken by `train`.

    Args:
        stage: the last stage, which reads the others.

    Example:
        >>> from tnt_func.data.sources import source
        >>> letters = source(list("abc")).repeat(2)
        >>> letters, list(letters.batches(epoch=0, start=2))
        (Elements(6 by Items, Repeat), ['c', 'a', 'b', 'c'])
    """

    stage: Stage

    def __repr__(self) -> str:
        return f"Elements({len(self)} by {', '.join(type(stage).__name__ for stage in lineage(self.stage))})"

    def __len__(self) -> int:
        return len(self.stage)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        """The elements of an epoch from a position on. The global generators are left as they are.

        Example:
            >>> from tnt_func.data.sources import source
            >>> list(source(list("abc")).batches(epoch=7, start=1))
            ['b', 'c']
        """
        streams = [stage.stream for stage in lineage(self.stage) if stage.stream]
        draws = tuple(frozenset[Generator]().union(*(stream.draws for stream in streams)))
        for index in range(start, len(self)):
            with rng.preserved(draws):
                element = self.element(epoch, index)
            yield element

    def element(self, epoch: int, index: int) -> Any:
        """One element of an epoch. The global generators that it draws from are seeded, and not preserved.

        Example:
            >>> from tnt_func.data.sources import source
            >>> source(["a", "b"]).element(epoch=0, index=1)
            'b'
        """
        return rows(self.stage.read(epoch, range(index, index + 1)))[0]

    @typed
    def shuffle(self, key: Key | None = None, *, name: str = "shuffle") -> "Elements":
        """Every epoch in an order of its own. Computed index by index, in constant memory.

        Args:
            key: which orders; None takes the key of the stage before.
            name: what the key is folded with.

        Raises:
            UsageError: there is no key, or its name is taken.

        Example:
            >>> from tnt_func.data.sources import source
            >>> deck = source(range(10**9)).shuffle(rng.key(0))
            >>> next(deck.batches(0)) != next(deck.batches(1))
            True
        """
        return _made(Shuffle(self.stage, self._stream(key, name, (), "shuffle(tnt.key(0))")))

    @typed
    def map(
        self,
        fn: Callable[..., Any],
        key: Key | None = None,
        *,
        draws: tuple[Generator, ...] = rng.ALL,
        name: str | None = None,
    ) -> "Elements":
        """A function of every element, which finds the global generators seeded for that element alone.

        Args:
            fn: element -> element.
            key: of what it draws; None takes the key of the stage before.
            draws: the global generators it draws from; each is seeded for every element, so `()` costs nothing.
            name: what the key is folded with; None takes the function's own name.

        Raises:
            UsageError: it may draw and there is no key, or its name is taken.

        Example:
            >>> from tnt_func.data.sources import source
            >>> def jitter(x): return x + torch.rand(())
            >>> noisy = source([1.0, 2.0]).map(jitter, rng.key(0), draws=("torch",))
            >>> list(noisy.batches(3)) == list(noisy.batches(3))
            True
        """
        name = name or str(getattr(fn, "__name__", type(fn).__name__))
        if not draws:
            return _made(Map(self.stage, fn, name))
        advice = f"map({name}, tnt.key(0)), or map({name}, draws=()) if it draws nothing"
        return _made(Map(self.stage, fn, name, self._stream(key, name, draws, advice)))

    @typed
    def batch(self, size: int, *, drop_last: bool = False, collate: Collate | None = None) -> "Elements":
        """Groups of elements, each made into a batch.

        Args:
            size: elements in a batch.
            drop_last: leave out a last batch that has fewer.
            collate: list of elements -> batch, drawing nothing; None is torch's `default_collate`, and where no stage
                has to see single elements, tensors are indexed by a whole vector of indices at once.

        Raises:
            UsageError: the size is not positive.
            DataError: no batch is left.

        Example:
            >>> from tnt_func.data.sources import source
            >>> list(source(torch.arange(5)).batch(3).batches())
            [tensor([0, 1, 2]), tensor([3, 4])]
        """
        _positive("batch", "size", size)
        return _made(Batch(self.stage, size, drop_last, collate))

    @typed
    def bucket(
        self,
        lengths: Any,
        boundaries: Sequence[int],
        size: int,
        key: Key | None = None,
        *,
        drop_last: bool = False,
        collate: Collate | None = None,
        name: str = "bucket",
    ) -> "Elements":
        """Batches of elements of like length, in place of `shuffle` and `batch`.

        With a key, batches come in an order of every epoch's own, as do the elements of a bucket; without, in order.

        Args:
            lengths: one number for every element, int [elements].
            boundaries: the greatest length of each bucket but the last, rising.
            size, drop_last, collate: as in `batch`; they apply to every bucket.
            key, name: as in `shuffle`; None does not shuffle.

        Raises:
            UsageError: the lengths are not those of the elements, or the order of these changes with the epoch.
            DataError: no batch is left.

        Example:
            >>> from tnt_func.data.sources import source
            >>> words = ["a", "long", "b", "word", "c"]
            >>> list(source(words).bucket([len(word) for word in words], [2], 2).batches())
            [['a', 'b'], ['c'], ['long', 'word']]
        """
        _positive("bucket", "size", size)
        if any(isinstance(stage, Shuffle | Interleaved) and stage.stream for stage in lineage(self.stage)):
            raise UsageError(
                "bucket(...) was given a shuffled pipeline; the lengths are those of the elements, in their order. "
                "Leave that shuffle out and write .bucket(lengths, boundaries, size, key)."
            )
        bounds, sizes = torch.tensor(boundaries, dtype=torch.int64), torch.as_tensor(lengths)
        if sizes.shape != (len(self),) or (bounds.diff() <= 0).any():
            raise UsageError(
                f"bucket(...) was given lengths of shape {list(sizes.shape)} and boundaries {list(boundaries)} for "
                f"{len(self)} elements; there is one length for each, and boundaries rise. Write .bucket([len(x) for x "
                "in data], [32, 64], size)."
            )
        numbers = torch.bucketize(sizes, bounds)
        counts = tuple(torch.bincount(numbers, minlength=len(bounds) + 1).tolist())
        stream = None if key is None else self._stream(key, name, (), "")
        return _made(Bucket(self.stage, numbers.argsort(stable=True), counts, size, drop_last, collate, stream))

    @typed
    def repeat(self, times: int) -> "Elements":
        """Several epochs as one: epoch 0 is then epochs 0 to times - 1, each in its own order, with its own draws.

        Example:
            >>> from tnt_func.data.sources import source
            >>> list(source([1, 2]).repeat(2).batches())
            [1, 2, 1, 2]
        """
        _positive("repeat", "times", times)
        return _made(Repeat(self.stage, times))

    @typed
    def take(self, count: int) -> "Elements":
        """The first elements of every epoch, at most `count`.

        Example:
            >>> from tnt_func.data.sources import source
            >>> list(source([1, 2, 3]).take(2).batches())
            [1, 2]
        """
        _positive("take", "count", count)
        return _made(Take(self.stage, count))

    @typed
    def shard(self, index: int, count: int) -> "Elements":
        """One of `count` parts of every epoch.

        Of elements, every count-th. Of batches, a part of each: those of all shards together are the whole batch, so
        that which samples a step sees does not depend on the number of shards.

        Args:
            index: which part, from 0: the rank.
            count: how many parts there are: the world size.

        Raises:
            UsageError: there is no such part, or batches cannot be cut here, or are too small.
            DataError: the part is empty.

        Example:
            >>> from tnt_func.data.sources import source
            >>> list(source(range(8)).batch(4).shard(1, 2).batches())
            [tensor([2, 3]), tensor([6, 7])]
        """
        if not 0 <= index < count:
            raise UsageError(
                f"shard({index}, {count}) was given; the index of a shard is from 0 to count - 1. Write .shard(rank, "
                "world_size)."
            )
        return _made(self.stage.cut(index, count) if self.stage.batched else Shard(self.stage, index, count))

    @typed
    def zip(self, *others: "Elements") -> "Elements":
        """The elements of several pipelines that have the same index, as tuples.

        Raises:
            UsageError: the lengths differ.

        Example:
            >>> from tnt_func.data.sources import source
            >>> list(source([1, 2]).zip(source(["a", "b"])).batches())
            [(1, 'a'), (2, 'b')]
        """
        lengths = [len(elements) for elements in (self, *others)]
        if len(set(lengths)) > 1:
            raise UsageError(
                f"zip(...) was given lengths {lengths}; every element has a partner. Write .take({min(lengths)}) on "
                "the longer ones."
            )
        return _made(Zip((self.stage, *(elements.stage for elements in others))))

    def _stream(self, key: Key | None, name: str, draws: tuple[Generator, ...], advice: str) -> Stream:
        stage: Stage | None = self.stage
        while key is None and stage is not None:
            key = stage.stream.key if stage.stream else None
            stage = stage.parents[0] if len(stage.parents) == 1 else None
        if key is None:
            raise UsageError(
                f"{advice.partition('(')[0]}() of {name!r} was given no key, and no stage before has one; what is "
                f"drawn comes from a key. Write .{advice}."
            )
        return Stream(key, name, draws)


@typed
def mix(
    pipelines: Mapping[str, Elements],
    how: How,
    *,
    stop: Stop = "longest",
    weights: Mapping[str, int | float] | None = None,
    key: Key | None = None,
    name: str = "mix",
) -> Elements:
    """Several pipelines as one; an element is {name: element}, so that a step can tell whose it is.

    Args:
        pipelines: the members by name, in order.
        how: "round_robin" gives one element of each in turn; "weighted" gives them in a random order, in each stretch
            in proportion to the weights of the members that have not ended; "in_order" one member after another;
            "all" one of each at once, {name: element, ...}.
        stop: an epoch ends when all members have ended ("longest"), or the first has ("shortest"); "restart" begins
            members anew, with draws of their next epoch, until all have ended once; a number is how many elements an
            epoch has, members beginning anew. "in_order" knows "longest" only.
        weights: of "weighted", positive, by name.
        key, name: of "weighted": what its order is drawn from.

    Raises:
        UsageError: the arguments do not go together.

    Example:
        >>> from tnt_func.data.sources import source
        >>> list(mix({"a": source([1, 2]), "b": source([10])}, "round_robin").batches())
        [{'a': 1}, {'b': 10}, {'a': 2}]
    """
    weighted = how == "weighted"
    if not pipelines:
        raise UsageError("mix({}) was given; there is something to mix. Write tnt.data.mix({'a': a, 'b': b}, how).")
    if weighted != (weights is not None) or weighted != (key is not None):
        raise UsageError(
            f"mix(..., {how!r}) was given weights={weights} and key={key}; these two belong to 'weighted', and it to "
            "them. Write mix(pipelines, 'weighted', weights={'a': 2, 'b': 1}, key=tnt.key(0))."
        )
    if weights is not None and (weights.keys() != pipelines.keys() or min(weights.values()) <= 0):
        raise UsageError(
            f"mix(...) was given weights={dict(weights)} for {list(pipelines)}; every member has a positive weight. "
            f"Write weights={dict.fromkeys(pipelines, 1.0)}, say."
        )
    if how == "in_order" and stop != "longest":
        raise UsageError(
            f"mix(..., 'in_order', stop={stop!r}) was given; members come one after another, each to its end. Write "
            "stop='longest', and .take(count) or .repeat(times) on members or the mix."
        )
    if isinstance(stop, int):
        _positive("mix", "stop", stop)
    names, stages = tuple(pipelines), tuple(elements.stage for elements in pipelines.values())
    if how == "all":
        return _made(Together(names, stages, stop))
    shares = [1.0] * len(names) if weights is None else [weights[name] for name in names]
    stream = None if key is None else Stream(key, name, ())
    return _made(Interleaved(names, stages, how, stretches(how, [*map(len, stages)], shares, stop), stream))


def _made(stage: Stage) -> Elements:
    """A pipeline of a stage that has elements, and draws like no other. Shuffles side by side may: they make pairs."""
    if len(stage) == 0:
        raise DataError(
            f"{type(stage).__name__.lower()} leaves no element of {[len(parent) for parent in stage.parents]}; an "
            "epoch has at least one. Write a smaller size or count, or drop_last=False."
        )
    taken = dict[tuple[Key, str], Stage]()
    for found in lineage(stage):
        if found.stream is None or not (found.stream.draws or isinstance(found, Shuffle | Bucket | Interleaved)):
            continue
        key, name, _ = found.stream
        other = taken.setdefault((key, name), found)
        beside = isinstance(found, Shuffle) and isinstance(other, Shuffle) and found is not stage
        if other is not found and not beside:
            raise UsageError(
                f"two stages draw from {key} under the name {name!r}, and would draw alike; a stage's draws come from "
                f"its key and name. Write name={name + '_2'!r} in one of them, or give it another key."
            )
    return Elements(stage)


def _positive(method: str, name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{method}(..., {name}={value}) was given; it is a positive number. Write {name}=32, say.")
