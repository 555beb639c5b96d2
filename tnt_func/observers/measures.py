"""Measures: numbers about a run's pace that are in no state, for the rows of a `recorder` or to be read by oneself.

Every moment between two events of a phase belongs to the later one. What ends with `fetched` was waiting for data, what
ends with `step_end` was the step and its hooks, and all else is overhead: the loop, the observers, opening and closing
epochs. The moments of an evaluation inside training are the evaluation's.

The clock is the host's, and nothing here waits for a device. On CUDA a step only queues its work, so a single step may
seem short; over many steps the host goes at the pace of the device, for the queue is bounded.

Observers take time too: of one that comes before the measure it goes to the event itself, of one that comes after, to
the next. A checkpointer, which saves at `step_done`, belongs before, as overhead; after, it would be waiting for data.

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    >>> history = tnt.observers.History()
    >>> observers = [tnt.observers.recorder(history, every_n_steps=2, measures=[timing()])]
    >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1, 2, 3], max_epochs=1, observers=observers)
    >>> [(row.step, row.kind) for row in history], sorted(history[0].metrics)
    ([(2, 'step'), (3, 'epoch')], ['time.data_wait', 'time.data_wait_share', 'time.overhead', 'time.step'])
"""

import time
from collections.abc import Callable, Mapping
from operator import sub
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch

from tnt_func import pytree as trees
from tnt_func.errors import UsageError, kind_of
from tnt_func.events import Event
from tnt_func.observers.combinators import needs_all
from tnt_func.types import Batch, Phase, Point, typed

Count: TypeAlias = Callable[[Batch], int]


@runtime_checkable
class Measure(Protocol):
    """An observer that has numbers to read. `recorder` calls it with every event, and reads it for every row.

    Laws:
        It can change nothing. What `read` returns is about the time since it was last read at an event of this phase
        and point, or since the run started; a number that cannot be told yet is left out.

    Example:
        >>> isinstance(timing(), Measure)
        True
    """

    def __call__(self, event: Event) -> Any:
        """Take note of an event."""
        ...

    def read(self, event: Event) -> Mapping[str, float]:
        """The numbers at an event of which it has taken note."""
        ...


class Totals(NamedTuple):
    """What a phase has used so far.

    Args:
        seconds: from its start, or, where its epochs are inside training, in all of them.
        data_wait, step: seconds of these that were waiting for data, and that were steps.
        batches, samples, tokens: of completed steps; 0 where nobody counts them.
    """

    seconds: float = 0.0
    data_wait: float = 0.0
    step: float = 0.0
    batches: int = 0
    samples: int = 0
    tokens: int = 0


@typed
def timing(*, clock: Callable[[], float] = time.perf_counter) -> "Pace":
    """A measure of where the time of a step goes, in seconds of the host's clock, means over the steps since last read.

    Its numbers: "time.step", the step and its hooks; "time.data_wait", waiting for the batch; "time.overhead", the
    rest; "time.data_wait_share", the part of all the time, 0 to 1, that was waiting for data.

    Args:
        clock: seconds since some moment, never falling.

    Example:
        >>> timing()
        timing()
    """
    return Pace("timing()", _times, clock)


@typed
def throughput(
    *, samples: Count | None = None, tokens: Count | None = None, clock: Callable[[], float] = time.perf_counter
) -> "Pace":
    """A measure of what a phase gets through in a second of the host's clock, waiting and overhead included.

    Its numbers, of the completed steps of this process: "throughput.batches_per_second",
    "throughput.samples_per_second" and "throughput.tokens_per_second" since last read, so over the steps from row to
    row, or the epoch; "throughput.run.batches_per_second" and so on since the run started.

    Args:
        samples: how many a batch has; if not given, the first dimension of its first tensor.
        tokens: how many a batch has; if not given, none are told.
        clock: as in `timing`.

    Raises:
        UsageError: out of the run, when samples is not given and a batch has no tensor with a dimension.

    Example:
        >>> throughput(tokens=lambda batch: batch["input_ids"].numel())
        throughput()
    """
    return Pace("throughput()", _rates, clock, first_dimension if samples is None else samples, tokens)


class Stopwatch:
    """An observer that keeps the totals of every phase of a run.

    Args:
        clock, samples, tokens: as in `throughput`; None counts none.
    """

    def __init__(self, clock: Callable[[], float], samples: Count | None = None, tokens: Count | None = None):
        self._clock, self._samples, self._tokens = clock, samples, tokens
        self._last: float | None = None
        self._outer: Phase | None = None  # The phase of the run that is under way.
        self._begin()

    def _begin(self) -> None:
        self._totals: dict[Phase, list[Any]] = {phase: [*Totals()] for phase in ("train", "eval", "predict")}
        self._taken: dict[tuple[Phase, Point], Totals] = {}

    def __call__(self, event: Event) -> None:
        """Add the time since the event before, and the batch of a completed step."""
        now, phase, point = self._clock(), event.phase, event.point
        totals = self._totals[phase]
        took, self._last = 0.0 if self._last is None else now - self._last, now
        totals[0] += took
        if point == "fetched":
            totals[1] += took
        elif point == "step_end":
            totals[2] += took
            totals[3] += 1
            if self._samples is not None:
                totals[4] += self._samples(event.batch)
            if self._tokens is not None:
                totals[5] += self._tokens(event.batch)
        elif point == "start" and (phase == "train" or self._outer != "train"):
            self._outer = phase
            self._begin()
        elif point in ("end", "paused", "failed") and phase == self._outer:
            self._outer = None

    check_part = needs_all

    def take(self, event: Event) -> tuple[Totals, Totals]:
        """The totals of the phase since they were last taken at this point of it, and since the run started."""
        now = Totals._make(self._totals[event.phase])
        since = Totals._make(map(sub, now, self._taken.get(event[:2], Totals())))
        self._taken[event[:2]] = now
        return since, now


class Pace(Stopwatch):
    """What `timing` and `throughput` make: a stopwatch, and the numbers that are read off it.

    Args:
        said: its repr.
        numbers: of the totals since last read, and of those since the run started.
        clock, samples, tokens: as in `throughput`; None counts none.
    """

    def __init__(
        self,
        said: str,
        numbers: Callable[[Totals, Totals], Mapping[str, float]],
        clock: Callable[[], float],
        samples: Count | None = None,
        tokens: Count | None = None,
    ):
        super().__init__(clock, samples, tokens)
        self._said, self._numbers = said, numbers

    def __repr__(self) -> str:
        return self._said

    def read(self, event: Event) -> Mapping[str, float]:
        """The numbers of the phase, since last read at this point of it; none where no step was completed."""
        since, run = self.take(event)
        return self._numbers(since, run) if since.batches and since.seconds > 0 else {}


def _times(since: Totals, run: Totals) -> dict[str, float]:
    return {
        "time.step": since.step / since.batches,
        "time.data_wait": since.data_wait / since.batches,
        "time.overhead": (since.seconds - since.step - since.data_wait) / since.batches,
        "time.data_wait_share": since.data_wait / since.seconds,
    }


def _rates(since: Totals, run: Totals) -> dict[str, float]:
    return {
        f"throughput.{over}{counted}_per_second": count / totals.seconds
        for over, totals in (("", since), ("run.", run))
        for counted, count in zip(("batches", "samples", "tokens"), totals[3:], strict=True)
        if count
    }


def first_dimension(batch: Batch) -> int:
    """The first dimension of the first tensor of a batch.

    Raises:
        UsageError: it has none.

    Example:
        >>> first_dimension({"images": torch.zeros(8, 3), "labels": torch.zeros(8)})
        8
    """
    first = batch
    while type(first) in (tuple, list) and first:  # Most batches; flattening one costs microseconds.
        first = first[0]
    if not isinstance(first, torch.Tensor):
        first = next(iter(trees.tensors(batch)), None)
    if first is None or first.ndim == 0:
        found = "has no tensor" if first is None else "begins with a tensor of no dimension"
        raise UsageError(
            f"throughput() was given a batch, {kind_of(batch)}, that {found}; samples are counted by the first "
            "dimension of the first tensor. Write throughput(samples=lambda batch: len(batch)), say."
        )
    return first.shape[0]
