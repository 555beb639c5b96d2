"""A bar for the open epoch, by tqdm, in a terminal or a notebook.

Example:
    >>> import io
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}))
    >>> terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    >>> first = tnt.State(params=0, key=tnt.key(0))
    >>> _ = tnt.train(unit, first, [0.5] * 10, max_epochs=1, observers=[progress_bar(file=terminal)])
    >>> "train epoch 1: 100%" in terminal.getvalue(), "10/10" in terminal.getvalue()
    (True, True)
"""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tnt_func.errors import UsageError, optional
from tnt_func.events import Event
from tnt_func.observers.combinators import is_rank_zero, needs_all
from tnt_func.observers.console import Text
from tnt_func.observers.rows import metrics_of
from tnt_func.replay.marks import numbers
from tnt_func.types import Phase, typed
from tnt_func.unit import RESERVED


@typed
def progress_bar(
    *,
    totals: Mapping[Phase, int] | None = None,
    max_epochs: int | None = None,
    metrics_every_seconds: int | float = 1.0,
    file: Text | None = None,
) -> "ProgressBar":
    """An observer that shows how far the epoch is, its speed, and its metrics so far, in a terminal or a notebook.

    Where there is neither, for a `file` that is no terminal, and on ranks other than 0 that have no `file` of their
    own, it shows nothing and fetches nothing.

    The steps of an epoch are taken from `totals`, else from the epoch before, else, in training, from the length of the
    data. Where an epoch is over its bar is full: it counts what there was.

    Args:
        totals: steps of an epoch, by phase.
        max_epochs: shown behind the epoch.
        metrics_every_seconds: how often numbers are fetched from the device, which waits for it; besides, when an epoch
            is over. They are the unit's metrics, or, where it has none, the numbers of the step's output.
        file: open, written to; None is the standard error, or in a notebook, with ipywidgets, the output of the cell.

    Raises:
        UsageError: a number is negative; max_epochs is below 1.
        MissingExtraError: tqdm is not installed.

    Example:
        >>> progress_bar(totals={"train": 1000, "eval": 100}, max_epochs=4)
        progress_bar()
    """
    given = [metrics_every_seconds, *(totals or {}).values(), 0 if max_epochs is None else max_epochs - 1]
    if not all(number >= 0 for number in given):
        raise UsageError(
            f"progress_bar(totals={totals}, max_epochs={max_epochs}, metrics_every_seconds={metrics_every_seconds}) "
            "was given; none is negative, and epochs are at least 1. Write totals={'train': 1000}, max_epochs=4, say."
        )
    module = "tqdm.auto" if file is None else "tqdm"
    tqdm = optional(module, user="progress_bar", extra="progress", package="tqdm").tqdm
    return ProgressBar(tqdm, dict(totals or {}), max_epochs, metrics_every_seconds, file)


class ProgressBar:
    """What `progress_bar` makes: called with every event, closed at the end."""

    def __init__(self, tqdm: Any, totals: dict[Phase, int], max_epochs: int | None, seconds: float, file: Text | None):
        self._tqdm, self._totals, self._max_epochs, self._seconds, self._file = tqdm, totals, max_epochs, seconds, file
        self._before: dict[Phase, int] = {}
        self._bars: dict[Phase, Any] = {}
        self._due = -math.inf

    def __repr__(self) -> str:
        return "progress_bar()"

    def __call__(self, event: Event) -> None:
        """Move the bar of the phase."""
        phase, point = event.phase, event.point
        if point in ("step_end", "epoch_end"):
            if phase in self._bars:
                self._move(event, self._bars[phase])
            elif point == "step_end":
                raise UsageError(
                    f"progress_bar() was told that a {phase} step is over, and not that it was fetched; it needs all "
                    "the events of a phase. Write when(lambda event: event.phase == 'train', progress_bar()), say."
                )
        elif point in ("epoch_start", "fetched"):
            if phase not in self._bars:
                self._bars[phase] = self._bar(event)
        elif point in ("paused", "failed") or (point == "start" and phase == "train"):
            self.close()

    check_part = needs_all

    def close(self) -> None:
        """Leave the bars that are open as they are."""
        while self._bars:
            self._bars.popitem()[1].close()
        self._before = {}

    def _bar(self, event: Event) -> Any:
        phase, state = event.phase, event.state
        done = state.progress.of(phase)
        length = state.memory.get(RESERVED, {}).get("length", -1) if phase == "train" else -1
        total = self._totals.get(phase, self._before.get(phase, length))
        epoch = f"{done.epochs + 1}" + (f"/{self._max_epochs}" if phase == "train" and self._max_epochs else "")
        return self._tqdm(
            desc=f"{phase} epoch {epoch}",
            total=None if total < 0 else total,
            initial=done.steps_in_epoch,
            leave=not self._bars,  # One inside another goes when it is over.
            file=sys.stderr if self._file is None else self._file,
            disable=None if self._file is not None or is_rank_zero() else True,  # None: where it is no terminal.
            dynamic_ncols=True,
        )

    def _move(self, event: Event, bar: Any) -> None:
        if bar.disable:
            return
        phase, state = event.phase, event.state
        over = event.point == "epoch_end"
        if not over:
            bar.update(state.progress.of(phase).steps_in_epoch - bar.n)
        if (now := time.monotonic()) >= self._due or over:
            self._due = now + self._seconds
            found = metrics_of(event, members=False)
            if found or not over:
                bar.set_postfix(found or numbers(state.output), refresh=False)
        if over:
            self._before[phase] = bar.total = bar.n
            bar.refresh()
            bar.close()
            del self._bars[phase]
