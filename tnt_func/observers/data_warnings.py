"""Warnings about the data of a run: none came, or it comes slowly. They say what to change.

Example:
    >>> import warnings
    >>> import tnt_func as tnt
    >>> unit = tnt.EvalUnit(eval_step=lambda state, batch: (state, {}))
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = tnt.evaluate(unit, tnt.State(params=0, key=tnt.key(0)), [], observers=[warn_on_empty_data()])
    >>> str(caught[0].message)
    'the eval epoch 1 had no batch: ...'
"""

import time
import warnings
from collections.abc import Callable

from tnt_func.errors import UsageError
from tnt_func.events import Event, Observer
from tnt_func.observers.combinators import needs_all
from tnt_func.observers.measures import Stopwatch
from tnt_func.types import Phase, typed
from tnt_func.unit import RESERVED


@typed
def warn_on_empty_data() -> Observer:
    """An observer that warns of an epoch, of any phase, that had no batch.

    Example:
        >>> warn_on_empty_data()
        warn_on_empty_data()
    """
    return _Empty()


class _Empty:
    def __init__(self) -> None:
        self._empty: set[Phase] = set()  # Phases whose open epoch has had no batch.

    def __repr__(self) -> str:
        return "warn_on_empty_data()"

    check_part = needs_all

    def __call__(self, event: Event) -> None:
        if event.point == "epoch_start":
            self._empty.add(event.phase)
        elif event.point == "fetched":
            self._empty.discard(event.phase)
        elif event.point == "epoch_end" and event.phase in self._empty:
            self._empty.discard(event.phase)
            epoch = event.state.progress.of(event.phase).epochs
            warnings.warn(
                f"the {event.phase} epoch {epoch} had no batch: the data gave none, or the limit of its steps is 0. An "
                "iterator gives its batches once: pass a list, a loader, or a function of the epoch. A loader with "
                "drop_last=True gives none where there are fewer samples than a batch has: make the batches smaller.",
                stacklevel=2,
            )


@typed
def warn_on_slow_data(
    *, share: int | float = 0.25, n_steps: int = 100, clock: Callable[[], float] = time.perf_counter
) -> Observer:
    """An observer that warns, once a phase and run, where steps wait for data most of the time.

    The first n steps of a run are passed over: workers start, caches fill. Of every n steps of a phase after them the
    share of the time that was waiting is taken, as "time.data_wait_share" of `timing`, with what is said there of CUDA.

    Args:
        share: of the time, 0 to 1, above which it warns.
        n_steps: over which the share is taken.
        clock: as in `timing`.

    Raises:
        UsageError: share is not between 0 and 1, or n_steps is below 1.

    Example:
        >>> warn_on_slow_data(share=0.1)
        warn_on_slow_data(share=0.1)
    """
    if not 0 < share < 1 or n_steps < 1:
        raise UsageError(
            f"warn_on_slow_data(share={share}, n_steps={n_steps}) was given; the share is above 0 and below 1, and "
            "the steps are at least 1. Write share=0.25, n_steps=100."
        )
    return _Slow(share, n_steps, clock)


class _Slow:
    def __init__(self, share: float, n_steps: int, clock: Callable[[], float]):
        self._share, self._n_steps = share, n_steps
        self._watch = Stopwatch(clock)
        self.close()

    def __repr__(self) -> str:
        return f"warn_on_slow_data(share={self._share})"

    check_part = needs_all

    def close(self) -> None:
        """Forget what was warned of."""
        self._steps: dict[Phase, int] = {"train": 0, "eval": 0, "predict": 0}
        self._warned: set[Phase] = set()

    def __call__(self, event: Event) -> None:
        self._watch(event)
        phase = event.phase
        if event.point != "step_end" or phase in self._warned:
            return
        self._steps[phase] += 1
        if self._steps[phase] % self._n_steps:
            return
        since, _ = self._watch.take(event)
        if self._steps[phase] > self._n_steps and since.data_wait > self._share * since.seconds:
            self._warned.add(phase)
            warnings.warn(
                f"of the last {since.batches} {phase} steps {100 * since.data_wait / since.seconds:.0f} % of the time "
                f"was waiting for data: {since.data_wait / since.batches:.3g} s a step, of "
                f"{since.seconds / since.batches:.3g} s. {_advice(event)}",
                stacklevel=2,
            )


def _advice(event: Event) -> str:
    workers = event.state.memory.get(RESERVED, {}).get("num_workers", -1) if event.phase == "train" else -1
    if workers > 0:
        return f"The loader has num_workers={workers}: give it more of them, or make what they do cheaper."
    if workers == 0:
        return "The loader has num_workers=0: write DataLoader(..., num_workers=4), and batches are made ahead."
    return (
        "Let worker processes make batches ahead: DataLoader(..., num_workers=4), or "
        "tnt.data.loader(pipeline, num_workers=4)."
    )
