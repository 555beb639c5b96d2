"""Values of a metric that are not as they should be: not finite, out of bounds, or far from those before.

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}))
    >>> watching = tnt.observers.recorder(anomalies("loss", above=10, then=print), every_n_steps=1)
    >>> first = tnt.State(params=0, key=tnt.key(0))
    >>> _ = tnt.train(unit, first, [1.0, 12.0, float("nan")], max_epochs=1, observers=[watching])
    loss is 12 at train step 2 (epoch 0), above 10
    loss is nan at train step 3 (epoch 0), not finite
"""

import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from tnt_func.errors import UsageError
from tnt_func.observers.rows import Kind, Place, Row
from tnt_func.types import Phase, typed

SIGMA = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""


class Anomaly(NamedTuple):
    """A value that is not as it should be.

    Args:
        metric, value: its name and number.
        row: the row it is in, with step, epoch and phase.
        reason: "not finite", "above 10" and so on.

    Example:
        >>> str(Anomaly("loss", 12.0, Row(3, 1, "eval", "epoch", {"loss": 12.0}), "above 10"))
        'loss is 12 after the eval epoch at train step 3 (epoch 1), above 10'
    """

    metric: str
    value: float
    row: Row
    reason: str

    def __str__(self) -> str:
        row = self.row
        over = f"after the {row.phase} epoch at train" if row.kind == "epoch" else f"at {row.phase}"
        return f"{self.metric} is {self.value:.6g} {over} step {row.step} (epoch {row.epoch}), {self.reason}"


@typed
def anomalies(
    metric: str,
    *,
    phase: Phase = "train",
    kind: Kind | None = None,
    nonfinite: bool = True,
    above: int | float | None = None,
    below: int | float | None = None,
    spike: int | float | None = None,
    window: int = 50,
    then: Callable[[Anomaly], Any] | None = None,
) -> "Anomalies":
    """A `Writer` that looks at one metric, in the rows that a `recorder` gives it; nothing is fetched for it anew.

    Of values in a row that are wrong for the same reason the first is told. What `then` raises ends the run, with the
    last resumable state; `isolate` is for what should not.

    Args:
        metric: its name in the rows, "loss" say, or "time.data_wait_share" of a measure.
        phase, kind: of the rows; if kind is not given, those of steps in training, and of epochs elsewhere.
        nonfinite: whether infinities and NaN are told.
        above, below: bounds; a value on a bound is within.
        spike: standard deviations from the median of the `window`, on either side. The deviation is taken from the
            median of the deviations, so that a few outliers do not hide the next, and as at least 1 % of the median.
        window: rows before this one; until it is half full there are no spikes. A resumed run begins it anew.
        then: called with the `Anomaly`; if not given it is a warning, which `warnings.simplefilter("error")` raises.

    Raises:
        UsageError: a number cannot work, or there is nothing to look for.

    Example:
        >>> from tnt_func.observers import History, recorder
        >>> recorder(History(), anomalies("loss", spike=10), every_n_steps=1)
        recorder(History(0 rows), anomalies('loss'))
    """
    if not (nonfinite or above is not None or below is not None or spike is not None):
        raise UsageError(
            f"anomalies({metric!r}, nonfinite=False) was given nothing to look for; it takes bounds, or a spike. Write "
            "above=10, below=0 or spike=10."
        )
    bounds = (-math.inf if below is None else below, math.inf if above is None else above)
    if not (bounds[0] <= bounds[1] and (spike is None or spike > 0) and window >= 2):
        raise UsageError(
            f"anomalies({metric!r}, below={below}, above={above}, spike={spike}, window={window}) was given; below is "
            "not above `above`, spike is above 0, and window at least 2. Write below=0, above=10, spike=10, window=50."
        )
    where = (phase, kind or ("step" if phase == "train" else "epoch"))
    return Anomalies(metric, where, nonfinite, bounds, spike, window, _warn if then is None else then)


def _warn(anomaly: Anomaly) -> None:
    warnings.warn(str(anomaly), stacklevel=2)


class Anomalies:
    """What `anomalies` makes."""

    def __init__(
        self,
        metric: str,
        where: tuple[Phase, Kind],
        nonfinite: bool,
        bounds: tuple[float, float],
        spike: float | None,
        window: int,
        then: Callable[[Anomaly], Any],
    ):
        self._metric, self._where, self._nonfinite, self._bounds = metric, where, nonfinite, bounds
        self._spike, self._then = spike, then
        self._window = deque[float](maxlen=window)
        self._wrong = ""  # What the last value was.
        self._rows, self._known = 0, set[str]()

    def __repr__(self) -> str:
        return f"anomalies({self._metric!r})"

    def open(self, place: Place | None) -> None:
        """Begin the window anew where training starts."""
        if place is not None:
            self._window.clear()
            self._wrong = ""

    def write(self, row: Row) -> None:
        """Look at a row."""
        if (row.phase, row.kind) != self._where:
            return
        self._rows += 1
        self._known.update(row.metrics)
        value = row.metrics.get(self._metric)
        if value is None:
            return
        kind, reason = self._judge(value)
        if math.isfinite(value):
            self._window.append(value)
        was, self._wrong = self._wrong, kind
        if kind and kind != was:
            self._then(Anomaly(self._metric, value, row, reason))

    def close(self) -> None:
        """Warn where no row had the metric: its name may be another."""
        rows, known, self._rows, self._known = self._rows, self._known, 0, set()
        if rows and self._metric not in known:
            phase, kind = self._where
            warnings.warn(
                f"{self!r} was given {rows} rows of {phase} {kind}s, and none had {self._metric!r}; they have "
                f"{sorted(known)}. Write one of these, or another phase or kind.",
                stacklevel=2,
            )

    def _judge(self, value: float) -> tuple[str, str]:
        """What is wrong with a value, and in words; nothing where it is right."""
        if not math.isfinite(value):
            return ("nonfinite", "not finite") if self._nonfinite else ("", "")
        low, high = self._bounds
        if value > high:
            return "above", f"above {high}"
        if value < low:
            return "below", f"below {low}"
        if self._spike is None or 2 * len(self._window) < (self._window.maxlen or 0):
            return "", ""
        median = statistics.median(self._window)
        deviation = SIGMA * statistics.median(abs(each - median) for each in self._window)
        away = abs(value - median) / (max(deviation, abs(median) / 100) or math.ulp(0.0))
        if away <= self._spike:
            return "", ""
        return (
            "spike",
            f"{away:.3g} standard deviations from {median:.6g}, the median of the {len(self._window)} before",
        )
