"""The time that every point of a run takes: fetching, the hooks, the step, evaluations, and what is between them.

Every moment between two events belongs to the later one, as in `measures`: "points.train.step_end" is the step with its
hooks, "points.train.fetched" waiting for the batch, "points.eval.step_end" the steps of the evaluations. What observers
take at an event goes to the next one, or to the event itself where they come before the recorder.

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    >>> history = tnt.observers.History()
    >>> observers = [tnt.observers.recorder(history, every_n_steps=2, measures=[points()])]
    >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1, 2, 3, 4], max_epochs=1, observers=observers)
    >>> sorted(history[1].metrics)
    ['points.train.fetched', 'points.train.step_done', 'points.train.step_end', 'points.train.step_start']
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from tnt_func.events import Event
from tnt_func.observers.combinators import needs_all
from tnt_func.types import typed


@typed
def points(*, clock: Callable[[], float] = time.perf_counter) -> "Points":
    """A measure of what every point of a run takes, for `recorder(measures=[points()])`; a report draws them together.

    Its numbers are in the rows of train steps, "points.phase.point": seconds of the host's clock since the row before,
    or since the run started, divided by the train steps since then. So they add up to all the time of the run.

    Args:
        clock: seconds since some moment, never falling.

    Example:
        >>> points()
        points()
    """
    return Points(clock)


class Points:
    """What `points` makes.

    Args:
        clock: as in `points`.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._last: float | None = None
        self._begin()

    def _begin(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps = 0

    def __repr__(self) -> str:
        return "points()"

    def __call__(self, event: Event) -> None:
        """Add the time since the event before to this one's point."""
        now = self._clock()
        if event.phase == "train" and event.point == "start":
            self._begin()
        elif self._last is not None:
            self._seconds[f"points.{event.phase}.{event.point}"] += now - self._last
        self._steps += event.phase == "train" and event.point == "step_end"
        self._last = now

    check_part = needs_all

    def read(self, event: Event) -> Mapping[str, float]:
        """The numbers, at a train step."""
        if event.phase != "train" or event.point != "step_end" or not self._steps:
            return {}
        found = {name: seconds / self._steps for name, seconds in self._seconds.items()}
        self._begin()
        return found

    def close(self) -> None:
        """Forget the last event: the time between two runs is of neither."""
        self._last = None
