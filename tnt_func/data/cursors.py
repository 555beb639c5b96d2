"""Plain iterables as functions of (key, epoch, position).

`iter(data)` and each `next` run in seed scopes of their own, keyed by phase, epoch and index. A shuffling, augmenting
DataLoader is thereby a function of the key: skipping n batches leaves it exactly where n batches read would have.

Laws:
    The batches from position n on are the batches of the whole epoch without the first n, to the bit.

Example:
    >>> from tnt_func.progress import Progress, RunProgress
    >>> state = State(params={}, key=rng.key(0))
    >>> shuffled = DataLoader(range(4), shuffle=True)
    >>> whole = [int(batch) for batch in batches(shuffled, state)]
    >>> two_done = state.replace(progress=RunProgress(train=Progress(steps=2, steps_in_epoch=2)))
    >>> whole[2:] == [int(batch) for batch in batches(shuffled, two_done)]
    True
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from tnt_func import rng
from tnt_func.errors import DataError, ResumeError, UsageTypeError, call, kind_of
from tnt_func.progress import Progress
from tnt_func.state import State
from tnt_func.types import Batch, Phase, Pipeline, typed

BLANK: dict[str, Any] = {"type": "", "length": -1, "batch_size": -1, "num_workers": -1, "sampler": ""}
"""What is noted of the data where no epoch is open."""


@typed
def batches(data: Any, state: State, *, phase: Phase = "train") -> Iterator[Batch]:
    """The batches that are left of the epoch that a state is in, for a loop written by hand.

    Draws and skips exactly as `train` does, whatever the global generators hold, and leaves these as they are.

    Args:
        data: any iterable, a function `epoch -> iterable`, or a `Pipeline`.
        state: its key and counters say which epoch, and from where.
        phase: whose counters count.

    Raises:
        UsageTypeError: data is none of these.
        DataError: the epoch is shorter than the state's position in it.

    Example:
        >>> list(batches([10, 20], State(params={}, key=rng.key(0))))
        [10, 20]
    """
    return Cursor(data, phase).epoch(state)


class Cursor:
    """Reads data epoch by epoch under seed scopes.

    Args:
        data: any iterable, a function `epoch -> iterable`, or a `Pipeline`.
        phase: whose counters say the epoch and the position.
        kept: whether the caller preserves the global generators, so that seeding them is enough.

    Raises:
        UsageTypeError: data is none of these.

    Example:
        >>> list(Cursor(lambda epoch: [epoch, epoch], "train").epoch(State(params={}, key=rng.key(0))))
        [0, 0]
    """

    def __init__(self, data: Any, phase: Phase, kept: bool = False):
        _check_type(data, phase)
        self.data, self.kept = data, kept
        self.phase: Phase = phase
        self.draws = not _holds_its_batches(data)
        self._used_up = self._opened = False

    def epoch(self, state: State) -> Generator[Batch, None, None]:
        """The batches of the open or next epoch, from the state's position on. The data is first touched by `next`.

        Raises:
            DataError: the data is an iterator that an earlier epoch used up.
        """
        if self._used_up:
            raise self._no_second_epoch()
        progress = state.progress.of(self.phase)
        if not self.draws:
            return self._held(progress)
        return self._read(progress, rng.fold_in(state.key, self.phase))

    def _held(self, progress: Progress) -> Generator[Batch, None, None]:
        if len(self.data) < progress.steps_in_epoch:
            raise self._too_short(len(self.data), progress)
        yield from itertools.islice(self.data, progress.steps_in_epoch, None)

    def _read(self, progress: Progress, key: rng.Key) -> Generator[Batch, None, None]:
        start = progress.steps_in_epoch
        opening = rng.fold_in(rng.fold_in(key, "iter"), progress.epochs)
        iterator, first = rng.drawing(opening, rng.ALL, self.kept, self._open, progress)
        one_shot = iterator is self.data
        first_epoch, self._opened = not self._opened, True
        keys = rng.fold_in(rng.fold_in(key, "next"), progress.epochs)
        for index in itertools.count(first):
            try:
                batch = rng.drawing(rng.fold_in(keys, index), rng.ALL, self.kept, next, iterator)
            except StopIteration:
                if index < start:
                    raise self._too_short(index, progress) from None
                if one_shot and index == 0 and not first_epoch:
                    raise self._no_second_epoch() from None
                self._used_up = one_shot
                return
            if index >= start:
                yield batch

    def _open(self, progress: Progress) -> tuple[Iterator[Batch], int]:
        """The epoch's iterator and the index of what it gives first."""
        if isinstance(self.data, Pipeline):
            return self.data.batches(progress.epochs, progress.steps_in_epoch), progress.steps_in_epoch
        if isinstance(self.data, Iterable):
            iterator = iter(self.data)
            return iterator, progress.steps_in_epoch if iterator is self.data else 0
        epoch = call(f"the {self.phase} data function", self.data, progress.epochs)
        if not isinstance(epoch, Iterable):
            raise DataError(
                f"the {self.phase} data function returned {kind_of(epoch)} for epoch {progress.epochs}; it "
                "maps an epoch to an iterable of batches. Return a list or a DataLoader."
            )
        return iter(epoch), 0

    def _too_short(self, length: int, progress: Progress) -> DataError:
        return DataError(
            f"the {self.phase} data ended after {length} batches, and the state has {progress.steps_in_epoch} steps of "
            f"epoch {progress.epochs} behind it; a run resumes on the data it began with. Pass that data, or set "
            "steps_in_epoch to 0 to begin the epoch anew."
        )

    def _no_second_epoch(self) -> DataError:
        return DataError(
            f"the {self.phase} data is a one-shot {type(self.data).__name__} that earlier epochs used up, and another "
            "epoch begins; an iterator gives its batches once. Pass a list, a DataLoader, or a function of the epoch: "
            "lambda epoch: make_batches(epoch)."
        )


def describe(data: Any) -> dict[str, Any]:
    """What can be told of the data without reading it: the note that an open epoch keeps of it.

    Example:
        >>> describe([1, 2, 3])
        {'type': 'list', 'length': 3, 'batch_size': -1, 'num_workers': -1, 'sampler': ''}
    """
    note = {**BLANK, "type": _kind(data)}
    if isinstance(data, DataLoader):
        batching = data.batch_size is not None
        note["batch_size"] = data.batch_size if batching else -1
        note["num_workers"] = data.num_workers
        note["sampler"] = type(data.sampler if batching else data.batch_sampler or data.sampler).__name__
    try:
        note["length"] = len(data)
    except TypeError:
        return note
    return note


def _kind(data: Any) -> str:
    # A pipeline's batches are the same with workers and without.
    return "Pipeline" if isinstance(data, Pipeline) else type(data).__name__


def check_resume(data: Any, noted: Mapping[str, Any], progress: Progress, phase: Phase) -> None:
    """Refuse data that cannot be brought to where a state stands.

    Args:
        data: what a run is about to continue on.
        noted: what was noted of the data when the open epoch began; BLANK compares with anything.
        progress: the phase's counters; nothing is refused at the very start.
        phase: what the message calls the data.

    Raises:
        ResumeError: the loader keeps randomness of its own between epochs, or is not the one that began the epoch.

    Example:
        >>> check_resume([1, 2], {**BLANK, "type": "list", "length": 3}, Progress(0, 1, 1), "train")
        Traceback (most recent call last):
        tnt_func.errors.ResumeError: the open train epoch began with length=3 and goes on with length=2; ...
    """
    if progress.steps == 0 and progress.epochs == 0:
        return
    anyway = "or pass allow_inexact_resume=True to go on with other bits."
    if reason := _own_randomness(data):
        raise ResumeError(
            f"the {phase} DataLoader has {reason}, whose state no checkpoint holds, and the run continues after "
            f"{progress.steps} steps; what a loader draws comes from the run's key. {_without(data)}, {anyway}"
        )
    current = describe(data)
    changed = [name for name in current if noted[name] != current[name]]
    if progress.is_open and noted != BLANK and changed:
        was = ", ".join(f"{name}={noted[name]!r}" for name in changed)
        now = ", ".join(f"{name}={current[name]!r}" for name in changed)
        raise ResumeError(
            f"the open {phase} epoch began with {was} and goes on with {now}; an epoch resumes on the data it began "
            f"with. Pass the loader as it was, {anyway}"
        )


def _own_randomness(data: Any) -> str | None:
    if not isinstance(data, DataLoader):
        return None
    if data.persistent_workers:
        return "persistent_workers=True"
    samplers = [sampler for sampler in (data.sampler, data.batch_sampler) if sampler is not None]
    samplers += [inner for sampler in samplers if (inner := getattr(sampler, "sampler", None)) is not None]
    if data.generator is not None or any(getattr(sampler, "generator", None) is not None for sampler in samplers):
        return "generator="
    for sampler in samplers:
        if any(callable(getattr(sampler, method, None)) for method in ("state_dict", "set_epoch")):
            return f"a {type(sampler).__name__} with memory of its own"
    return None


def _without(loader: DataLoader[Any]) -> str:
    if type(loader.sampler).__module__.startswith("torchdata.") and loader.generator is None:
        return "torchdata keeps a generator where shuffle=True: write sampler=torch.utils.data.RandomSampler(dataset)"
    return "Leave that argument out"


def _holds_its_batches(data: Any) -> bool:
    """Whether reading runs no code of the user's, so that nothing can be drawn."""
    numpy = sys.modules.get("numpy")
    return type(data) in (list, tuple, range, torch.Tensor) or (numpy is not None and type(data) is numpy.ndarray)


def _check_type(data: Any, phase: Phase) -> None:
    if isinstance(data, (str, bytes, Mapping)) or not (isinstance(data, (Iterable, Pipeline)) or callable(data)):
        advice = "DataLoader(dataset, batch_size=...)" if hasattr(type(data), "__getitem__") else "[batch, ...]"
        raise UsageTypeError(
            f"the {phase} data is {kind_of(data)}; data is an iterable of batches, a function epoch -> "
            f"iterable or a Pipeline. Write {advice}."
        )
    if not isinstance(data, (Iterable, Pipeline)) and not _takes_an_epoch(data):
        name = getattr(data, "__name__", "batches")
        raise UsageTypeError(
            f"the {phase} data is {kind_of(data)}, {name}{inspect.signature(data)}; a function is called with the "
            f"number of every epoch, and returns its batches. Write lambda epoch: {name}()."
        )


def _takes_an_epoch(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # Of a builtin nothing is known.
        pass
    return True
