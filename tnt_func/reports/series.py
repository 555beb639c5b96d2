"""The numbers of a run by name, and the points of them that a picture needs.

Laws:
    `thinned` keeps the first and the last point, the least and the greatest of every stretch, and one of every kind
    that is not finite; every point that it keeps is one that was there.

Example:
    >>> from tnt_func.observers.rows import Row
    >>> rows = [Row(step, 0, "train", "step", {"loss": 1 / step}) for step in (1, 2)]
    >>> [(series.name, series.steps, series.values) for series in collected(rows)]
    [('loss', [1, 2], [1.0, 0.5])]
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnt_func.errors import UsageError, UsageTypeError, kind_of
from tnt_func.observers.rows import Row

HYPERPARAMETERS = "optim"
"""How the names of hyper-parameters begin; those that are numbered are of groups or of a tuple, not of members."""
POINTS = "points"
"""How the names begin of the time that the points of a run take; they are drawn together."""
MEASURED = ("time", "throughput", "system", "gpu", POINTS)
"""How the names begin of what is measured with a clock or of a machine: no two runs agree on it."""
QUANTILES = (0.0, 0.25, 0.75, 1.0)


class Name(NamedTuple):
    """What a series is of."""

    phase: str
    kind: str
    metric: str


@dataclass(frozen=True)
class Series:
    """One number over a run.

    Args:
        phase, kind, name: of its rows, and of the metric.
        steps: train steps of the lifetime.
        values: at these.
    """

    phase: str
    kind: str
    name: str
    steps: list[int]
    values: list[float]

    @property
    def key(self) -> Name:
        """What it is of."""
        return Name(self.phase, self.kind, self.name)

    @property
    def group(self) -> str:
        """What the name begins with before its first dot; empty where there is none, and of numbered members."""
        return self.name.partition(".")[0] if "." in self.chart or self.chart == POINTS else ""

    @property
    def chart(self) -> str:
        """The metric without the number of its member: these are drawn together."""
        base, _, last = self.name.rpartition(".")
        if self.name.startswith(f"{POINTS}."):
            return POINTS
        return base if base and last.isdecimal() else self.name

    @property
    def member(self) -> int | None:
        """Which member of an ensemble it is of."""
        if self.chart == self.name or self.group in (HYPERPARAMETERS, POINTS):
            return None
        return int(self.name.rpartition(".")[2])


@dataclass(frozen=True)
class Band:
    """The members of an ensemble together, at every step of any of them; NaN where no member is finite.

    Args:
        phase, kind, name: of its members, and of the metric without their numbers.
        members: how many.
        steps: train steps of the lifetime.
        mean: float64 [steps], over the members that are finite.
        quantiles: float64 [steps, 4], likewise: the least, the quartiles, the greatest.
    """

    phase: str
    kind: str
    name: str
    members: int
    steps: list[int]
    mean: Tensor
    quantiles: Tensor


def collected(rows: Iterable[Row]) -> list[Series]:
    """The series of rows, in the order in which they begin.

    Raises:
        UsageError: the steps of the rows fall, so they are not of one run.
        UsageTypeError: something is no row.
    """
    found: dict[Name, tuple[list[int], list[float]]] = {}
    last = -1
    for number, row in enumerate(rows):
        try:
            step, phase, kind, metrics = row.step, row.phase, row.kind, row.metrics.items()
        except AttributeError as error:
            raise UsageTypeError(
                f"row {number} is {kind_of(row)}; a row has step, epoch, phase, kind and metrics. Give a History, "
                "or several runs one by one: report(first, second)."
            ) from error
        if step < last:
            raise UsageError(
                f"row {number} is of step {step} and the one before it of step {last}; the steps of a run never fall. "
                "Give several runs one by one: report(first, second)."
            )
        last = step
        for metric, value in metrics:
            steps, values = found.setdefault(Name(phase, kind, metric), ([], []))
            steps.append(step)
            values.append(float(value))
    return [Series(*name, *columns) for name, columns in found.items()]


def bands(series: Sequence[Series]) -> list[Band]:
    """A band for every metric that two members or more have.

    Example:
        >>> members = [Series("train", "step", f"loss.{i}", [1, 2], [float(i), 1.0]) for i in range(3)]
        >>> band, = bands(members)
        >>> band.name, band.mean.tolist(), band.quantiles[0].tolist()
        ('loss', [1.0, 1.0], [0.0, 0.5, 1.5, 2.0])
    """
    together: dict[Name, list[Series]] = {}
    for one in series:
        if one.member is not None:
            together.setdefault(Name(one.phase, one.kind, one.chart), []).append(one)
    return [_band(name, members) for name, members in together.items() if len(members) > 1]


def _band(name: Name, members: list[Series]) -> Band:
    steps = members[0].steps
    if any(member.steps != steps for member in members):
        steps = sorted({step for member in members for step in member.steps})
        known: list[dict[int, float]] = [dict(zip(member.steps, member.values, strict=True)) for member in members]
        columns = [[values.get(step, torch.nan) for step in steps] for values in known]
    else:
        columns = [member.values for member in members]
    values = torch.tensor(columns, dtype=torch.float64).T
    values = values.where(values.isfinite(), torch.nan)
    quantiles = values.nanquantile(torch.tensor(QUANTILES, dtype=torch.float64), dim=1).T
    return Band(*name, len(members), steps, values.nanmean(1), quantiles)


def thinned(columns: Sequence[Tensor], points: int) -> list[int]:
    """The indices of the points to draw: all of them, or about `points` of them.

    Args:
        columns: float64 [n] each; of each the extremes are kept.
        points: about how many, where there are more; further ones are kept for what is not finite.

    Example:
        >>> spike = torch.zeros(1000, dtype=torch.float64)
        >>> spike[500] = 9.0
        >>> kept = thinned([spike], 20)
        >>> len(kept) <= 22, {0, 500, 999} <= set(kept)
        (True, True)
    """
    n = len(columns[0])
    if n <= points:
        return list(range(n))
    size = stretch(n, points // len(columns))
    keep = torch.zeros(n, dtype=torch.bool)
    keep[0] = keep[-1] = True
    for column in columns:
        finite = column.isfinite()
        found = [
            _stretches(column.where(finite, torch.inf), size, torch.inf).argmin(1),
            _stretches(column.where(finite, -torch.inf), size, -torch.inf).argmax(1),
        ]
        for odd in () if finite.all() else (column.isnan(), column == torch.inf, column == -torch.inf):
            # The first of a stretch where there is one; of a stretch without one the least point is kept anyway.
            there = _stretches(odd.double(), size, 0.0)
            found.append(torch.where(there.any(1), there.argmax(1), found[0]))
        for index in found:
            index = index + size * torch.arange(len(index))
            keep[index[index < n]] = True
    return keep.nonzero().flatten().tolist()


def averaged(steps: Sequence[int], values: Tensor, points: int) -> list[list[float]]:
    """For a smoothed curve over thinned points: of every stretch the mean step, the mean, and how many are finite."""
    size = stretch(len(values), points)
    finite = values.isfinite()
    count = _stretches(finite.double(), size, 0.0).sum(1)
    x, y = torch.tensor(steps, dtype=torch.float64), values.where(finite, 0.0)
    columns = [_stretches(column.where(finite, 0.0), size, 0.0).sum(1) / count for column in (x, y)]
    there = count > 0
    return [[float(f"{number:.7g}") for number in column[there].tolist()] for column in (*columns, count)]


def stretch(n: int, points: int) -> int:
    """How many points a stretch has, of which the extremes are kept."""
    return -(-n // max(points // 2, 1))


def _stretches(column: Tensor, size: int, fill: Any) -> Tensor:
    return torch.nn.functional.pad(column, (0, -len(column) % size), value=fill).reshape(-1, size)
