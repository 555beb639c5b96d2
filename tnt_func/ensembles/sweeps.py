"""A grid of hyper-parameters trained in one run, and its results as a table.

Example:
    >>> from tnt_func import optim
    >>> from tnt_func.recipes import supervised
    >>> from tnt_func.rng import key
    >>> from tnt_func.runs import fit
    >>> loss = torch.nn.functional.mse_loss
    >>> unit, state = supervised(torch.nn.Linear(1, 1, bias=False), loss, optim.sgd(0.1), key=key(0))
    >>> state = state.replace(params={"weight": torch.zeros(1, 1)})
    >>> x = torch.ones(1, 1)
    >>> grid = sweep(unit, {"lr": [0.25, 0.5], "weight_decay": [0.0, 1.0]})
    >>> end = fit(grid.unit, grid.start(state), [(x, x)], [(x, x)], max_epochs=1)
    >>> grid.table(end)
      lr  weight_decay  loss
    0.25             0  0.25
    0.25             1  0.25
     0.5             0     0
     0.5             1     0
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tnt_func import optim
from tnt_func.ensembles.ensemble import Sharing, ensemble
from tnt_func.ensembles.metrics import spread
from tnt_func.ensembles.stacking import size_of, stack
from tnt_func.errors import UsageError, optional
from tnt_func.metrics import compute
from tnt_func.state import State
from tnt_func.types import Mode, Phase, typed
from tnt_func.unit import Unit

U = TypeVar("U", bound=Unit)
Value = int | float | tuple[int | float, ...]
"""Of a hyper-parameter; a tuple of `betas`, say."""


@dataclass(frozen=True)
class Table:
    """Results, a row for each point of a grid.

    Args:
        axes: the values of each hyper-parameter, by name; the rows go through the last one fastest.
        columns: by name, those of the axes first; a value for each row.

    Example:
        >>> table = Table({"lr": (0.1, 1.0)}, {"lr": [0.1, 1.0], "loss": [2.0, 3.0]})
        >>> table.best("loss"), table.grid("loss")
        ({'lr': 0.1, 'loss': 2.0}, tensor([2., 3.], dtype=torch.float64))
    """

    axes: Mapping[str, Sequence[Value]]
    columns: Mapping[str, Sequence[Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, row, strict=True))

    def __len__(self) -> int:
        return math.prod(map(len, self.axes.values()))

    @typed
    def best(self, name: str, mode: Mode = "min") -> dict[str, Any]:
        """The row whose value is least, or most in mode "max"; NaN is never.

        Raises:
            UsageError, UsageTypeError: there is no such column, no number in it, or no such mode.
        """
        sign = 1.0 if mode == "min" else -1.0
        rows = [row for row, value in zip(self, self._column(name), strict=True) if not math.isnan(value)]
        if not rows:
            raise UsageError(
                f"best({name!r}) was asked of a table in which all {len(self)} are NaN; none is best. Sweep smaller "
                "learning rates."
            )
        return min(rows, key=lambda row: sign * row[name])

    def grid(self, name: str) -> Tensor:
        """A column in the shape of the grid: float64 [values of the first axis, of the second, ...], for a heat map."""
        return torch.tensor(self._column(name), dtype=torch.float64).reshape([*map(len, self.axes.values())])

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return optional("pandas", user="Table.to_pandas", extra="pandas").DataFrame(dict(self.columns))

    def __repr__(self) -> str:
        texts = [[name, *map(_text, values)] for name, values in self.columns.items()]
        widths = [max(map(len, column)) for column in texts]
        rows = zip(*texts, strict=True)
        return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)

    def _column(self, name: str) -> Sequence[Any]:
        if name not in self.columns:
            raise UsageError(f"{name!r} was asked of a table that has {sorted(self.columns)}. Write one of those.")
        return self.columns[name]


@dataclass(frozen=True)
class Sweep(Generic[U]):
    """A run over a grid. Made by `sweep`.

    Args:
        unit: the ensemble's.
        axes: the values of each hyper-parameter, by name.
        seeds: members at each point.
    """

    unit: U = field(repr=False)
    axes: Mapping[str, Sequence[Value]]
    seeds: int = 1

    @property
    def points(self) -> list[dict[str, Any]]:
        """The hyper-parameters of each point, the last axis fastest; member i is at point i // seeds."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def start(self, *states: State) -> State:
        """The first State: at each point those given, with its hyper-parameters.

        Args:
            states: of one member; as many as there are seeds.

        Raises:
            UsageError: there are more or fewer, or the optimizer has no such hyper-parameter.
        """
        if len(states) != self.seeds:
            raise UsageError(
                f"start was given {len(states)} states, and the sweep has seeds={self.seeds}: at every point it begins "
                "with each of as many. Write sweep(unit, grid, seeds=...), or start(state, ...)."
            )

        def at(state: State, point: dict[str, Any]) -> State:
            return state.replace(opt_state=optim.set_hyperparameters(state.opt_state, **point))

        return stack([at(state, point) for point in self.points for state in states])

    def table(self, state: State, phase: Phase = "eval") -> Table:
        """The metrics of a phase that are one number, by point: of several seeds the mean, and the deviation as ".std".

        Args:
            state: of the run.
            phase: whose.

        Raises:
            UsageError: the state is no ensemble's, one of another size, or has no metrics of the phase.
        """
        size, points = size_of(state), self.points
        if size != len(points) * self.seeds:
            raise UsageError(
                f"table was given a state of {size} members; the sweep has {len(points)} points, seeds={self.seeds}. "
                "Pass the state of its own run."
            )
        metrics = compute(state, phase)
        if not metrics:
            raise UsageError(
                f"table was given a state without metrics of the phase {phase!r}; it has those of "
                f"{sorted(state.metrics)}. Write table(state, 'train') after tnt.train, or evaluate the state first."
            )
        columns: dict[str, Sequence[Any]] = {name: [point[name] for point in points] for name in self.axes}
        for name, values in metrics.items():
            if values.shape != (size,) or values.is_complex():
                continue
            at_points = spread(values.double().reshape(len(points), self.seeds).T, quantiles=())
            columns[name] = at_points.mean.tolist()
            if self.seeds > 1:
                columns[f"{name}.std"] = at_points.std.tolist()
        return Table(self.axes, columns)


@typed
def sweep(
    unit: U,
    grid: Mapping[str, Sequence[Value]],
    *,
    seeds: int = 1,
    batch: Sharing = "shared",
    chunk_size: int | None = None,
    loop: bool | None = None,
) -> Sweep[U]:
    """Every combination of some hyper-parameters in one run.

    Args:
        unit: of one member. What the grid names is a hyper-parameter of its optimizer, and follows no schedule.
        grid: values by name, `{"lr": [1e-3, 1e-2], "weight_decay": [0.0, 0.1]}`.
        seeds: members at each point, which begin with different states.
        batch, chunk_size, loop: as in `ensemble`.

    Returns:
        What has the unit to train, the state to begin with (`start`) and the results (`table`).

    Raises:
        UsageError: the grid is empty, or an argument out of range.

    Example:
        >>> from tnt_func.unit import TrainUnit
        >>> sweep(TrainUnit(train_step=max), {"lr": [0.1, 1.0]}, seeds=3).points
        [{'lr': 0.1}, {'lr': 1.0}]
    """
    size = math.prod(map(len, grid.values())) * seeds
    if not grid or size < 1:
        raise UsageError(
            f"sweep was given {dict(grid)} with seeds={seeds}; every axis has a value, and every point a member. Write "
            "sweep(unit, {'lr': [1e-3, 1e-2]})."
        )
    whole = ensemble(unit, size, batch=batch, chunk_size=chunk_size, loop=loop)
    return Sweep(whole, {name: tuple(values) for name, values in grid.items()}, seeds)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
