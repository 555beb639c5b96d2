"""Where two runs part.

Example:
    >>> from tnt_func.observers.rows import Row
    >>> from tnt_func.reports.reading import read
    >>> rows = [Row(step, 0, "train", "step", {"loss": 1.0}) for step in (1, 2)]
    >>> other = [rows[0], rows[1]._replace(metrics={"loss": 0.5})]
    >>> first_difference(read(rows, "a"), read(other, "b"))
    Parting(step=2, said='train loss: 1 and 0.5')
"""

from itertools import chain
from typing import NamedTuple

from tnt_func.replay.differing import diff_records
from tnt_func.reports.reading import Run
from tnt_func.reports.series import MEASURED, Series


class Parting(NamedTuple):
    """The first difference of two runs.

    Args:
        step: train steps completed.
        said: what differs there.
    """

    step: int
    said: str


def first_difference(a: Run, b: Run) -> Parting | None:
    """The first step at which two runs differ, None where all that both have is the same.

    Of two records it is the one that `tnt.replay.diff` finds, batches and digests included; else the first at which a
    metric differs that both have there. What is measured of time and machine is left out: it always differs.
    """
    if a.record is not None and b.record is not None:
        found = diff_records(a.record, b.record)
        if found is None or found.step is None:
            return None
        return Parting(found.step, found.said if found.path is None else f"state{found.path}: {found.said}")
    theirs = {series.key: series for series in b.series}
    shared = [(one, theirs[one.key]) for one in a.series if one.key in theirs and one.group not in MEASURED]
    return min(filter(None, (_parting(one, other) for one, other in shared)), default=None, key=lambda at: at.step)


def _parting(a: Series, b: Series) -> Parting | None:
    known: dict[int, list[float]] = {}
    for step, value in zip(b.steps, b.values, strict=True):
        known.setdefault(step, []).append(value)
    # Of an evaluation after a step and one after the epoch that it ended, each has its own.
    theirs = {step: iter(values) for step, values in known.items()}
    for step, value in zip(a.steps, a.values, strict=True):
        other = next(theirs.get(step, iter(())), None)
        if other is not None and repr(other) != repr(value):
            return Parting(step, f"{a.phase} {a.name}: {value:.6g} and {other:.6g}")
    return None


def last_shared(a: Run, b: Run) -> int:
    """The last step of which both runs have something."""
    return min(max(chain.from_iterable(one.steps[-1:] for one in run.series), default=0) for run in (a, b))
