"""Where a transform takes hold of a unit: its step, what the step descends, and the state before and after.

A step made by `minimize` is a `Descent`, whose fields can be replaced; what runs around a step or an objective is an
`Around`, which the next transform sees through. So transforms compose in any order.

Example:
    >>> inside(Around(Around(3)), int, lambda found: found + 1)
    Around(inner=Around(inner=4))
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func import treemath
from tnt_func.descent import Amendment, Descent
from tnt_func.donation import donates, donating
from tnt_func.errors import UsageError, kind_of
from tnt_func.optim.layout import is_traced
from tnt_func.state import State
from tnt_func.types import PyTree
from tnt_func.unit import Callback, FitUnit, Memory, TrainUnit, attach, parts, step_of

U = TypeVar("U", TrainUnit, FitUnit)


@dataclass(frozen=True)
class Around:
    """A function that is called in some setting, which a subclass says.

    Args:
        inner: a step, or an objective.
    """

    inner: Any

    @property
    def donates(self) -> bool:
        """Whether the step inside consumes the states that it is given."""
        return donates(self.inner)

    def donating(self) -> Self:
        """The same around a step that does."""
        return replace(self, inner=donating(self.inner))


def inside(function: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The function with the part of a kind that is inside of it changed; None where there is none.

    Example:
        >>> inside(Around("step"), int, lambda found: found + 1) is None
        True
    """
    if isinstance(function, kind):
        return change(function)
    inner = inside(function.inner, kind, change) if isinstance(function, Around) else None
    return None if inner is None else replace(function, inner=inner)


def on_train_step(unit: U, change: Callable[[Any], Any]) -> U:
    """The unit with another train step.

    Example:
        >>> on_train_step(TrainUnit(train_step=max), lambda step: min).train_step is min
        True
    """
    if isinstance(unit, FitUnit):
        return replace(unit, train_unit=on_train_step(unit.train_unit, change))
    return replace(unit, train_step=change(unit.train_step))


def on_descent(unit: U, name: str, change: Callable[[Descent], Descent]) -> U:
    """The unit whose train step goes down its gradient in another way.

    Args:
        unit: its step is made by `minimize`.
        name: of the transform, for the error.
        change: `descent -> descent`.

    Raises:
        UsageError: the step is not made by `minimize`.

    Example:
        >>> on_descent(TrainUnit(train_step=max), "microbatch", lambda descent: descent)
        Traceback (most recent call last):
        tnt_func.errors.UsageError: microbatch was given a unit whose train_step is max; it reaches ...
    """

    def changed(step: Any) -> Any:
        found = inside(step, Descent, change)
        if found is None:
            what = getattr(step, "__qualname__", kind_of(step))
            raise UsageError(
                f"{name} was given a unit whose train_step is {what}; it reaches into steps that tnt.minimize makes. "
                "Write train_step=tnt.minimize(objective, optimizer), and transform units before sequence, alternate, "
                "focus, ensemble or compiled makes one of them."
            )
        return found

    return on_train_step(unit, changed)


def amended(unit: U, name: str, amendment: Callable[[Descent], Amendment]) -> U:
    """The unit whose step, made by `minimize`, has one amendment more, which may depend on what it was.

    Example:
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.optim import sgd
        >>> unit = TrainUnit(train_step=minimize(max, sgd(0.1)))
        >>> amended(unit, "skip", lambda descent: lambda before, after, slope: (before, slope)).train_step.amendments
        (<function ...>,)
    """
    return on_descent(
        unit, name, lambda descent: replace(descent, amendments=(*descent.amendments, amendment(descent)))
    )


def on_reads(unit: U, change: Callable[[Any], Any]) -> U:
    """The unit with other steps of evaluation and prediction, where it has any.

    Example:
        >>> on_reads(TrainUnit(train_step=max), lambda step: min) == TrainUnit(train_step=max)
        True
    """
    if not isinstance(unit, FitUnit):
        return unit
    changed: dict[str, Any] = {
        f"{part.phase}_unit": replace(part, **{f"{part.phase}_step": change(step_of(part))})
        for part in parts(unit)
        if not isinstance(part, TrainUnit)
    }
    return replace(unit, **changed)


def with_slot(unit: U, name: str, memory: Memory) -> U:
    """The unit with a slot of memory.

    Raises:
        UsageError: the name is taken.

    Example:
        >>> with_slot(TrainUnit(train_step=max), "skipped", lambda state: 0).memory.keys()
        dict_keys(['skipped'])
    """
    return attach(unit, Callback(name=name, memory=memory))


def device_of(state: State) -> torch.device:
    """The device of the first parameter; the CPU where there is none.

    Example:
        >>> from tnt_func.rng import key
        >>> device_of(State(params={"w": torch.zeros(2)}, key=key(0)))
        device(type='cpu')
    """
    return next((leaf.device for leaf in trees.tensors(state.params)), torch.device("cpu"))


def kept_unless(fine: Tensor, before: State, after: State, parts: tuple[str, ...]) -> State:
    """The new state where all is fine, else the new state with some parts as they were.

    Nothing waits for the device, unless something in those parts is on the CPU (an optimizer's count of its updates,
    say), where the verdict is needed then anyway.

    Args:
        fine: bool [].
        before, after: the state before and after an update.
        parts: names of fields.

    Example:
        >>> from tnt_func.rng import key
        >>> before, after = (State(params=torch.tensor(x), key=key(0)) for x in (1.0, 2.0))
        >>> kept_unless(torch.tensor(False), before, after, ("params",)).params
        tensor(1.)
    """
    old, new = ({part: getattr(state, part) for part in parts} for state in (before, after))
    if not is_traced([fine]) and (fine.is_cpu or any(leaf.is_cpu for leaf in trees.tensors(new))):
        return after if fine.item() else after.replace(**old)

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return new if new is old else treemath.where(fine, new, old)

    return after.replace(**trees.map(choose, new, old))
