"""The first batches of a run, read without a trace and held, and what can be told of the data from them.

Example:
    >>> from tnt_func.rng import key
    >>> feed = read([torch.zeros(2), torch.ones(2)], State(params={}, key=key(0)), "train", 1)
    >>> [read.batch for read in feed.reads], feed.length
    ([tensor([0., 0.])], 2)
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.data.cursors import BLANK, batches, check_resume, describe
from tnt_func.errors import ResumeError, UsageError, kind_of
from tnt_func.progress import Progress
from tnt_func.rehearsal.findings import nonfinite, several, shapes, tree_of
from tnt_func.replay.marks import mark_of_batch
from tnt_func.state import State
from tnt_func.types import Batch, Phase, Pipeline
from tnt_func.unit import EvalUnit, FitUnit, TrainUnit


@dataclass(frozen=True)
class Read:
    """One batch that was read.

    Args:
        batch: as the data gave it.
        seconds: that reading it took.
    """

    batch: Batch
    seconds: float


@dataclass(frozen=True)
class Held:
    """Batches as a Pipeline: every epoch gives copies of them, wherever it begins, so that no step can spoil them.

    Example:
        >>> list(Held(([1], [2])).batches(epoch=3, start=7))
        [[1], [2]]
    """

    held: tuple[Batch, ...]

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Copies of all of them."""
        return map(copied, self.held)


@dataclass(frozen=True)
class Feed:
    """The first batches of an epoch, and the data that they are of.

    Args:
        name: of the data, in findings: "train" or "eval".
        data: as a run takes it.
        state: says which epoch, and from where.
        reads: what was read.
        length: batches in an epoch, or None where the data does not say.
    """

    name: Phase
    data: Any
    state: State
    reads: tuple[Read, ...]
    length: int | None

    @property
    def held(self) -> Held:
        """The batches, to train and evaluate on."""
        return Held(tuple(read.batch for read in self.reads))

    @property
    def overlaps(self) -> bool:
        """Whether batches are loaded while steps are taken."""
        return getattr(self.data, "num_workers", 0) > 0


def read(data: Any, state: State, name: Phase, count: int) -> Feed:
    """The first batches that a run from a state would read.

    Args:
        data: what `train` takes, but for an iterator.
        state: says which epoch, and from where.
        name: the phase.
        count: how many.

    Raises:
        UsageError: the data is an iterator, or has no batch.
    """
    if isinstance(data, Iterator):
        raise UsageError(
            f"the {name} data is a one-shot {type(data).__name__}; what a rehearsal reads of it, the run would miss. "
            "Pass a list, a DataLoader, or a function of the epoch: lambda epoch: make_batches(epoch)."
        )
    reads = _reads(data, state, name, count)
    if not reads:
        raise UsageError(
            f"the {name} data gave no batch in epoch {state.progress.of(name).epochs}; there is nothing to rehearse. "
            "Pass data that has batches: is the dataset empty, or smaller than one batch with drop_last=True?"
        )
    length = describe(data)["length"]
    return Feed(name, data, state, tuple(reads), length if length >= 0 else None)


def _reads(data: Any, state: State, phase: Phase, count: int) -> list[Read]:
    reads: list[Read] = []
    started = perf_counter()
    epoch: Any = batches(_passing(data), state, phase=phase)
    with _own_generators_kept(data), closing(epoch):
        for batch in islice(epoch, count):
            reads.append(Read(batch, perf_counter() - started))
            started = perf_counter()
    return reads


def read_each(
    name: str, unit: TrainUnit | EvalUnit | FitUnit, state: State, data: Any, eval_data: Any, count: int
) -> list[Feed]:
    """What a unit trains and evaluates on.

    Args:
        name: of the rehearsal, for errors.
        unit, state, data, eval_data: as it was given them.
        count: how many batches.

    Raises:
        UsageError: the count is below 1, eval_data is there without use or not there, or as `read`.
    """
    if count < 1:
        raise UsageError(f"{name}(steps={count}) was given; a rehearsal takes at least 1. Write steps=2.")
    if not isinstance(unit, FitUnit):
        if eval_data is not None:
            raise UsageError(
                f"{name} was given {kind_of(unit)} and eval_data, which it has no use for. Write tnt.{name}("
                "tnt.FitUnit(train_unit=..., eval_unit=...), state, train_data, eval_data), or leave eval_data out."
            )
        return [read(data, state, unit.phase, count)]
    if eval_data is None:
        raise UsageError(
            f"{name} was given a FitUnit and no eval_data; it evaluates, as the run does. Write "
            f"tnt.{name}(unit, state, train_data, eval_data), or tnt.{name}(unit.train_unit, state, train_data)."
        )
    return [read(data, state, "train", count), read(eval_data, state, "eval", count)]


def unclean(feed: Feed) -> list[str]:
    """What is to be said of batches that are not finite."""
    start = feed.state.progress.of(feed.name).steps_in_epoch
    found = [
        one
        for index, read in enumerate(feed.reads, start)
        for one in nonfinite(tree_of(read.batch), f"{feed.name} batch {index}")
    ]
    return [f"{several(found)} {'is' if len(found) == 1 else 'are'} not finite. Clean the data."] if found else []


def looked_at(feed: Feed) -> list[str]:
    """What is to be said of the data: batches that are not finite, differ when drawn again, or are all the same."""
    held, start = [tree_of(read.batch) for read in feed.reads], feed.state.progress.of(feed.name).steps_in_epoch
    marks = [mark_of_batch(batch) for batch in held]
    found = unclean(feed)
    # Only what the run's key does not decide can differ now.
    rng.seed(rng.fold_in(feed.state.key, "drawn again"))
    again = [mark_of_batch(tree_of(one.batch)) for one in _reads(feed.data, feed.state, feed.name, len(held))]
    differ = [str(index) for index, pair in enumerate(zip_longest(marks, again), start) if pair[0] != pair[1]]
    if differ:
        found.append(
            f"{feed.name} batch {several(differ)} is another one when it is drawn again: it depends on more than the "
            "run's key, so no run could be repeated or resumed. Draw from the global generators of torch, NumPy and "
            "random, which the run seeds; keep no generator, clock or counter in the dataset."
        )
    if len(marks) > 1 and len(set(marks)) == 1 and marks[0] is not None:
        found.append(f"All of the first {len(marks)} {feed.name} batches are the same. Does the dataset use its index?")
    try:
        check_resume(feed.data, BLANK, Progress(epochs=1, steps=feed.length or len(held)), feed.name)
    except ResumeError as error:
        found.append(f"If this run were stopped, it could not be resumed exactly: {error}")
    return found


def last_batch(feed: Feed) -> tuple[Batch, str] | None:
    """The last batch of an epoch, where it has another shape than the first and can be had without reading it all.

    Returns:
        The batch, and in words how it differs; None where it does not, or nobody knows.

    Example:
        >>> from tnt_func.rng import key
        >>> loader = DataLoader(range(5), batch_size=2)
        >>> last_batch(read(loader, State(params={}, key=key(0)), "train", 1))
        (tensor([0]), 'The last batch of an epoch has 1 of 2 rows')
    """
    data, first = feed.data, feed.reads[0].batch
    if isinstance(data, DataLoader):
        rows = _rows_left(data)
        leaves = trees.tensors(first)
        if not rows or not leaves or any(leaf.dim() == 0 or len(leaf) != data.batch_size for leaf in leaves):
            return None
        cut = trees.map(lambda leaf: leaf[:rows] if isinstance(leaf, torch.Tensor) else leaf, first)
        return cut, f"The last batch of an epoch has {rows} of {data.batch_size} rows"
    last = _seek_last(feed)
    if last is None or shapes(last) == shapes(first):
        return None
    return last, f"The last batch of an epoch is {shapes(last)}"


def _rows_left(loader: DataLoader[Any]) -> int:
    """How many rows the last batch has less than the others; 0 where it is full."""
    if loader.batch_size is None or loader.drop_last or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return 0
    try:
        return len(loader.sampler) % loader.batch_size  # pyright: ignore[reportArgumentType]
    except TypeError:
        return 0


def _seek_last(feed: Feed) -> Batch | None:
    if not feed.length:
        return None
    if isinstance(feed.data, Pipeline):
        progress = Progress(feed.state.progress.of(feed.name).epochs, steps_in_epoch=feed.length - 1)
        state = feed.state.replace(progress=feed.state.progress.put(feed.name, progress))
        epoch: Any = batches(feed.data, state, phase=feed.name)
        with closing(epoch):
            return next(epoch, None)
    return feed.data[-1] if isinstance(feed.data, Sequence) else None


def copied(batch: Batch) -> Batch:
    """A batch in memory of its own.

    Example:
        >>> batch = [torch.ones(1)]
        >>> copied(batch)[0].add_(1), batch
        (tensor([2.]), [tensor([1.])])
    """
    return trees.map(_copied, batch)


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return copy.deepcopy(leaf)
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _passing(data: Any) -> Any:
    """The data; of a loader a copy, whose workers go when they have been read."""
    if not isinstance(data, DataLoader):
        return data
    data = copy.copy(data)
    vars(data)["persistent_workers"] = False  # An assignment is refused.
    return data


@contextmanager
def _own_generators_kept(data: Any) -> Iterator[None]:
    """Generators that a loader or its samplers own stand afterwards where they stood."""
    owners = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    owners += [getattr(owner, "sampler", None) for owner in owners]
    found = [getattr(owner, "generator", None) for owner in owners]
    kept = [(one, one.get_state()) for one in found if isinstance(one, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)
