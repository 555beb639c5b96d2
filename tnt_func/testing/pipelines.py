"""Law 14, data: element i of epoch e depends on (key, e, i) alone, and the shards of a pipeline partition its epochs.

Example:
    >>> from tnt_func import rng
    >>> from tnt_func.data import source
    >>> def jitter(x): return x + torch.rand(())
    >>> check_pipeline(source([1.0, 2.0, 3.0]).map(jitter, rng.key(0), draws=("torch",)).batch(2))
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from tnt_func.data import Elements, loader
from tnt_func.data.batching import Batch, Bucket
from tnt_func.data.loading import StartMethod
from tnt_func.data.stages import Items, Map, Stage
from tnt_func.errors import DataError, LawError, UsageError
from tnt_func.testing.generators import moved, standing, stands
from tnt_func.testing.runs import HERE, THERE
from tnt_func.testing.snapshot import changes, freeze
from tnt_func.types import Generator, Pipeline, typed

Read = Callable[[int], Iterable[Any]]
"""The frozen elements of an epoch, read in some way or other."""


@typed
def check_pipeline(
    pipeline: Pipeline,
    *,
    epochs: Sequence[int] = (0, 1),
    workers: Sequence[int] = (),
    prefetch: Sequence[int] = (2,),
    shards: Sequence[int] = (1, 2, 3),
    start_method: StartMethod | None = None,
) -> None:
    """Law 14. The elements are the same whatever was read before, from wherever, by whom; shards partition an epoch.

    Args:
        pipeline: one that `source` begins, or an object of your own with `batches(epoch, start)`. A few elements will
            do; every epoch is read six times and more.
        epochs: which to read.
        workers: numbers of worker processes to try, with a pipeline that `source` begins; to start them takes a while.
        prefetch: what each of them reads ahead, to be tried with each number.
        shards: world sizes to try, where it has a method `shard(index, count)`; what that refuses is left out.
        start_method: of the workers.

    Raises:
        LawError: the law is broken; the message says on what an element depends, and which, or which function draws
            from a global generator that it does not declare.

    Example:
        >>> from tnt_func.data import source
        >>> seen = []
        >>> def count(x): seen.append(x); return len(seen)
        >>> check_pipeline(source([5, 6]).map(count, draws=()), epochs=[0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 14 (data) is broken at element 0 of epoch 0: it is another one when read again
          element: int 3 became int 5
        ...
    """
    if isinstance(pipeline, Elements):
        _check_draws(pipeline, epochs)
    with standing(HERE):
        before = stands()
        whole = {epoch: list(map(freeze, pipeline.batches(epoch, 0))) for epoch in epochs}
        if went := moved(before):
            said = f"reading it moves the global generators of {', '.join(went)}"
            raise LawError(f"law 14 (data) is broken in epoch {epochs[-1]}: {said}\n{_SCOPE}")
        for how, advice, read in _readings(pipeline, whole):
            _compare(whole, how, advice, read)
        if isinstance(pipeline, Elements):
            for count, ahead in itertools.product(workers, prefetch):
                loaded = loader(pipeline, num_workers=count, prefetch=ahead, start_method=start_method)
                how = f"when {count} workers read it, {ahead} ahead"
                _compare(whole, how, _WORKERS, lambda epoch, of=loaded: _all(of, epoch))
                middle = "from the middle on, " + how
                _compare(whole, middle, _WORKERS, lambda epoch, of=loaded: _from_middle(of, epoch, whole[epoch]))
    with standing(THERE):
        _compare(whole, "when the global generators stand elsewhere", _SCOPE, lambda epoch: _all(pipeline, epoch))
    with standing(HERE):
        for count in shards if hasattr(type(pipeline), "shard") else ():
            _check_shards(pipeline, epochs, count)


def _readings(pipeline: Pipeline, whole: Mapping[int, list[Any]]) -> Iterator[tuple[str, str, Read]]:
    yield "when read again", _MEMORY, lambda epoch: _all(pipeline, epoch)
    yield (
        "when it is looked at after later ones were read",
        _BUFFER,
        lambda epoch: map(freeze, [*pipeline.batches(epoch, 0)]),
    )
    yield "when read from the middle on", _START, lambda epoch: _from_middle(pipeline, epoch, whole[epoch])
    yield "when read first, from its position on", _START, lambda epoch: _backwards(pipeline, epoch, len(whole[epoch]))
    yield "when epochs are read side by side", _MEMORY, lambda epoch: _beside(pipeline, epoch, whole)


def _all(pipeline: Pipeline, epoch: int) -> Iterator[Any]:
    return map(freeze, pipeline.batches(epoch, 0))


def _from_middle(pipeline: Pipeline, epoch: int, whole: list[Any]) -> list[Any]:
    middle = (len(whole) + 1) // 2
    return [*whole[:middle], *map(freeze, pipeline.batches(epoch, middle))]


def _backwards(pipeline: Pipeline, epoch: int, count: int) -> list[Any]:
    return [freeze(next(pipeline.batches(epoch, index), None)) for index in reversed(range(count))][::-1]


def _beside(pipeline: Pipeline, epoch: int, whole: Mapping[int, list[Any]]) -> Iterator[Any]:
    others = [pipeline.batches(other, 0) for other in (*whole, epoch + 1)]
    for element in pipeline.batches(epoch, 0):
        yield freeze(element)
        for other in others:
            next(other, None)


def _compare(whole: Mapping[int, list[Any]], how: str, advice: str, read: Read) -> None:
    for epoch, elements in whole.items():
        found = list(read(epoch))
        for index, (was, now) in enumerate(zip(elements, found, strict=False)):
            if was != now:
                lines = "".join(f"\n  {line}" for line in changes(was, now, "element"))
                said = f"at element {index} of epoch {epoch}: it is another one {how}"
                raise LawError(f"law 14 (data) is broken {said}{lines}\n{advice}")
        if len(found) != len(elements):
            raise LawError(
                f"law 14 (data) is broken in epoch {epoch}: {len(elements)} elements are {len(found)} {how}\n{advice}"
            )


_MEMORY = (
    "An element depends on the key, the epoch and its index alone. Keep no counter or cache that changes what is "
    "returned, and no generator of your own: draw from the global ones in a map, which finds them seeded."
)
_SCOPE = "Draw in a map that declares it, .map(fn, key, draws=...), or inside tnt.rng.scope(key_of_the_element)."
_BUFFER = "Elements are read ahead. Return a new tensor for each, and write into none that was returned before."
_START = "batches(epoch, start) gives the epoch's elements without the first `start`, not others: count from `start`."
_WORKERS = "Depend on no process: neither on get_worker_info() nor on what another element left behind in this one."
_SHARDS = "shard(index, count) for index 0 to count - 1 gives every element once, or of every batch each row once."


def _check_draws(pipeline: Elements, epochs: Sequence[int]) -> None:
    def watch(owner: str, function: Callable[..., Any], declared: Sequence[Generator]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            before = stands([name for name in HERE if name not in declared])
            result = function(*args)
            if went := moved(before):
                draws = tuple(dict.fromkeys((*declared, *went)))
                raise LawError(
                    f"law 14 (data) is broken: {owner} drew from {went[0]}'s global generator, which it does not "
                    f"declare\nWrite draws={draws!r} there, with a key; a collate function that draws is a map after "
                    ".batch(size)."
                )
            return result

        return watched

    watched = Elements(_watched(pipeline.stage, watch))
    with standing(HERE):
        for epoch in epochs:
            for _ in watched.batches(epoch, 0):
                pass


class _Watched:
    """A dataset whose items are watched."""

    def __init__(self, data: Any, item: Callable[..., Any]):
        self.data, self.item = data, item

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def _watched(stage: Stage, watch: Callable[..., Any]) -> Stage:
    """The same stages with every function of the user's watched."""
    stage = _over(stage, lambda parent: _watched(parent, watch))
    declared = stage.stream.draws if stage.stream else ()
    if isinstance(stage, Map):
        return replace(stage, fn=watch(f"map {stage.name!r}", stage.fn, declared))
    if isinstance(stage, Items):
        item = watch("the dataset", stage.data.__getitem__, declared)
        bulk = stage.bulk and watch("the dataset", stage.bulk, declared)
        return replace(stage, data=_Watched(stage.data, item), bulk=bulk)
    if isinstance(stage, Batch | Bucket) and stage.collate is not None:
        return replace(stage, collate=watch("the collate function", stage.collate, ()))
    return stage


def _over(stage: Stage, change: Callable[[Stage], Stage]) -> Stage:
    """A stage over changed parents."""
    found: Any = stage
    held = {field.name: getattr(stage, field.name) for field in fields(found)}
    if "upstream" in held:
        return replace(found, upstream=change(held["upstream"]))
    if "stages" in held:
        return replace(found, stages=tuple(change(parent) for parent in held["stages"]))
    return stage


def _check_shards(pipeline: Any, epochs: Sequence[int], count: int) -> None:
    if isinstance(pipeline, Elements):
        pipeline = replace(pipeline, stage=_listed(pipeline.stage))
    try:
        parts = [pipeline.shard(index, count) for index in range(count)]
    except (UsageError, DataError):
        return
    for epoch in epochs:
        whole = list(pipeline.batches(epoch, 0))
        found = [list(part.batches(epoch, 0)) for part in parts]
        lengths = [len(part) for part in found]
        if sum(lengths) == len(whole) and _bag(element for part in found for element in part) == _bag(whole):
            continue
        same = set(lengths) == {len(whole)} and all(
            freeze(_joined(pieces)) == freeze(batch) for batch, *pieces in zip(whole, *found, strict=True)
        )
        if not same:
            raise LawError(
                f"law 14 (data) is broken in epoch {epoch}: {len(whole)} elements are not those of {count} shards, "
                f"which have {lengths}\n{_SHARDS}"
            )


def _bag(elements: Iterable[Any]) -> list[str]:
    return sorted(repr(freeze(element)) for element in elements)


def _joined(pieces: Sequence[Any]) -> Any:
    """Parts of a batch put together again: rows of tensors, items of lists, each of a tuple or dict by itself."""
    first = pieces[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(pieces))
    if isinstance(first, Mapping):
        return {name: _joined([piece[name] for piece in pieces]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined(column) for column in zip(*pieces, strict=True))
    return [item for piece in pieces for item in piece]


def _listed(stage: Stage) -> Stage:
    """The same, with batches that are lists, uncollated, and nothing made of them: so they can be cut and joined."""
    if not stage.batched:
        return stage
    if isinstance(stage, Batch | Bucket):
        return replace(stage, collate=list)
    return _listed(stage.upstream) if isinstance(stage, Map) else _over(stage, _listed)
