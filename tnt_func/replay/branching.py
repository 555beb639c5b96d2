"""Where a recorded run would have led with one change: both branches, step by step, side by side."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tnt_func.errors import UsageError
from tnt_func.replay.replaying import Passed, Rerun, Strayed, replayed
from tnt_func.replay.rows import Directory, Row
from tnt_func.state import State
from tnt_func.types import typed
from tnt_func.unit import FitUnit, TrainUnit


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is to be otherwise.

    Args:
        state: `State -> State`, of the state to continue from: another learning rate, say.
        unit: to continue with.
        without: steps that are not taken. Their batches are left out, counters move as if they had been, so that every
            other step has its own batch and draws in both branches.

    Example:
        >>> Change(without={138}).without
        {138}
    """

    state: Callable[[State], State] | None = None
    unit: TrainUnit | FitUnit | None = None
    without: Iterable[int] = ()


@dataclass(frozen=True)
class Branch:
    """One way that a run goes on.

    Args:
        numbers: of every step's output, by step.
        state: after the last step.
    """

    numbers: Mapping[int, Mapping[str, Any]]
    state: State


@dataclass(frozen=True)
class Branches:
    """A run as it was and as it would have been; `print` shows the numbers that both have.

    Args:
        step: after which they part.
        was: as it was recorded, replayed.
        now: with the change.
    """

    step: int
    was: Branch
    now: Branch

    def __str__(self) -> str:
        steps = sorted({*self.was.numbers, *self.now.numbers})
        names = list(next((found for found in self.was.numbers.values() if found), {}))
        head = ["step", *(f"{name} {branch}" for name in names for branch in ("was", "now"))]
        lines = [
            [str(step), *(_shown(of.numbers.get(step, {}).get(name)) for name in names for of in (self.was, self.now))]
            for step in steps
        ]
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in [head, *lines])


def _shown(value: Any) -> str:
    return "-" if value is None else f"{float(value):.6g}"


@typed
def what_if(
    directory: Directory,
    unit: TrainUnit | FitUnit,
    state: State,
    data: Any,
    step: int,
    change: Change,
    *,
    steps: int | None = None,
    **options: Any,
) -> Branches:
    """Continue a recorded run from a step, once as it was and once with a change.

    Epochs are as long as they were recorded. A branch in which a hook stops earlier is shorter.

    Args:
        directory, unit, state, data, options: as in `replay`.
        step: to continue from the state after it.
        change: what is otherwise.
        steps: to take; None goes as far as the record.

    Raises:
        As `replay`; UsageError: `without` names a step that is not among those taken.

    Example:
        >>> import tempfile
        >>> import tnt_func as tnt
        >>> def add(state, batch): return state.replace(params=state.params + batch), {"x": state.params}
        >>> unit, first, data = TrainUnit(train_step=add), State(params=0, key=tnt.key(0)), [1, 1, 50, 1]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = tnt.train(unit, first, data, max_epochs=1, observers=[tnt.replay.record(directory)])
        ...     print(what_if(directory, unit, first, data, step=1, change=Change(without=[3])))
        step  x was  x now
           2      1      1
           3      2      -
           4     52      2
    """
    rerun = Rerun.of(directory, unit, state, data, options)
    index, without = rerun.record.index(step), frozenset(change.without)
    start = replayed(rerun, index)
    rows = _rows(rerun, index, steps)
    if missing := without - {row.step for row in rows if row.row == "step"}:
        raise UsageError(
            f"what_if(step={step}, Change(without={sorted(without)})) was given steps that are not among those taken, "
            f"{sorted(missing)}; they go from {step + 1} on. Continue from an earlier step, or take more steps."
        )
    changed = start if change.state is None else change.state(start)
    other = rerun if change.unit is None else replace(rerun, unit=change.unit)
    was, now = rerun.walk(start, rows), other.walk(changed, rows, without=without)
    return Branches(step, _branch(start, was), _branch(changed, _as_far_as_it_goes(now)))


def _rows(rerun: Rerun, index: int, steps: int | None) -> list[Row]:
    """The rows after one, up to a call that begins with a state made by hand."""
    rows, first = list[Row](), rerun.record.rows[index].step
    for before, row in zip(rerun.record.rows[index:], rerun.record.rows[index + 1 :], strict=False):
        if before.row == "call" and row.row == "checkpoint":
            break
        if row.counts and (steps is None or row.step <= first + steps):
            rows.append(row)
    return rows


def _branch(state: State, way: Iterable[Passed]) -> Branch:
    found: dict[int, Mapping[str, Any]] = {}
    for passed in way:
        state = passed.state
        if passed.row.row == "step":
            found[passed.row.step] = passed.numbers
    return Branch(found, state)


def _as_far_as_it_goes(way: Iterator[Passed]) -> Iterator[Passed]:
    """A branch in which a hook stops earlier leaves the way of the record there."""
    with contextlib.suppress(Strayed):
        yield from way
