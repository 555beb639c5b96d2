"""What an optimizer remembers, and its hyper-parameters: numbers in the state, schedules in the code.

Example:
    >>> from tnt_func.optim import adamw
    >>> state = adamw(3e-4).init({"w": torch.ones(2)})
    >>> get(set_hyperparameters(state, lr=1e-4), "lr")
    tensor(0.0001, dtype=torch.float64)
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.errors import StructureError, UsageError
from tnt_func.optim.layout import is_traced
from tnt_func.pytree import pytree
from tnt_func.schedules import Schedule
from tnt_func.types import PyTree

Number: TypeAlias = int | float
Hyperparameter: TypeAlias = int | float | Schedule
"""A number, which becomes a leaf of the state, or a `Schedule` of the updates done, which stays code."""


@pytree
@dataclass(frozen=True, eq=False)
class OptState:
    """What one optimizer or transform remembers; that of a chain, or of groups, is a tuple of such states.

    Args:
        step: updates done, int64 []; what schedules count.
        hyperparameters: by name, float64 [] on the CPU, or a tuple of such; what `set_hyperparameters` changes.
        scheduled: those that follow a schedule, float64 [], as of the last update.
        slots: what else there is to remember, by name, mostly trees like the parameters.

    Example:
        >>> from tnt_func.optim import sgd
        >>> state = sgd(0.1, momentum=0.9).init({"w": torch.ones(2)})
        >>> state.step, state.hyperparameters["lr"], state.slots["momentum_buffer"]
        (tensor(0), tensor(0.1000, dtype=torch.float64), {'w': tensor([0., 0.])})
    """

    step: Tensor
    hyperparameters: Mapping[str, PyTree]
    scheduled: Mapping[str, Tensor]
    slots: Mapping[str, PyTree]


class Settings:
    """Hyper-parameters as they were given.

    Args:
        given: by name; a number, a schedule, or a tuple of numbers (and None).

    Example:
        >>> settings = Settings(lr=lambda step: 1 / (1 + step), betas=(0.9, 0.99))
        >>> state = settings.init({})
        >>> settings.now(state, traced=settings.traced(state))
        {'betas': (0.9, 0.99), 'lr': 1.0}
        >>> state = settings.after(state, {"lr": 1.0}, {})
        >>> state.step, settings.now(state, traced=False)["lr"]
        (tensor(1), 0.5)
    """

    def __init__(self, **given: Any):
        self._schedules: dict[str, Schedule] = {name: value for name, value in given.items() if callable(value)}
        self._numbers = {name: value for name, value in given.items() if not callable(value)}
        self._read: tuple[Mapping[str, PyTree], dict[str, Any]] = ({}, {})

    def init(self, slots: Mapping[str, PyTree]) -> OptState:
        """The first state."""
        scheduled = {name: as_leaf(schedule(0)) for name, schedule in self._schedules.items()}
        numbers = {name: as_leaf(value) for name, value in self._numbers.items()}
        return OptState(torch.tensor(0), numbers, scheduled, slots)

    def traced(self, state: OptState) -> bool:
        """Whether the values of the next update must not be looked at."""
        if self._read[0] is state.hyperparameters:
            return is_traced(())
        values = (value if type(value) is tuple else (value,) for value in state.hyperparameters.values())
        return is_traced(itertools.chain.from_iterable(values))

    def now(self, state: OptState, *, traced: bool) -> dict[str, Any]:
        """The values for the next update: numbers, or float64 tensors where they are traced."""
        if traced:
            held, step = state.hyperparameters, state.step
        else:
            held, step = self._numbers_of(state.hyperparameters), state.step.item() if self._schedules else 0
        return {**held, **{name: schedule(step) for name, schedule in self._schedules.items()}}

    def _numbers_of(self, hyperparameters: Mapping[str, PyTree]) -> dict[str, Any]:
        """Read once: states share their hyper-parameters until one is set."""
        if self._read[0] is not hyperparameters:
            self._read = hyperparameters, {name: as_number(x) for name, x in hyperparameters.items()}
        return self._read[1]

    def after(self, state: OptState, values: Mapping[str, Any], slots: Mapping[str, PyTree]) -> OptState:
        """The state after an update with such values."""
        scheduled = {name: as_leaf(values[name]) for name in self._schedules}
        return OptState(state.step + 1, state.hyperparameters, scheduled, slots)

    def move(self, state: OptState, values: Mapping[str, Any]) -> OptState:
        """The same in the memory of the state that is given, its slots as they are."""
        if any(isinstance(values[name], Tensor) for name in self._schedules):
            return self.after(state, values, state.slots)
        for name in self._schedules:
            state.scheduled[name].fill_(values[name])
        state.step.add_(1)
        return state


def as_leaf(value: Any) -> Any:
    """A number, or each of a tuple, as a 0-d float64 tensor on the CPU; a tensor as it is.

    Example:
        >>> as_leaf((0.5, None))
        (tensor(0.5000, dtype=torch.float64), None)
    """
    if isinstance(value, tuple):
        return tuple(map(as_leaf, value))
    return value if value is None or isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def as_number(leaf: Any) -> Any:
    """A 0-d tensor, or each of a tuple, as a float.

    Example:
        >>> as_number((torch.tensor(0.5), None))
        (0.5, None)
    """
    if isinstance(leaf, tuple):
        return tuple(map(as_number, leaf))
    return None if leaf is None else leaf.item()


def hyperparameters(opt_state: PyTree) -> list[dict[str, PyTree]]:
    """Every hyper-parameter that a state holds: a dict for each optimizer, group or transform that has any, in order.

    Example:
        >>> from tnt_func.optim import chain, clip_by_value, sgd
        >>> hyperparameters(chain(clip_by_value(2.0), sgd(lambda step: 1.0 / (1 + step))).init({}))[0]
        {'limit': tensor(2., dtype=torch.float64)}
    """
    held = ({**site.hyperparameters, **site.scheduled} for site in _sites(opt_state))
    return [values for values in held if values]


def get(opt_state: PyTree, name: str, *, group: int | None = None) -> Any:
    """A hyper-parameter by name; one that follows a schedule is that of the last update.

    Args:
        opt_state: a state that holds it.
        name: its name.
        group: which one, counted among those of that name, where there are several.

    Returns:
        float64 [], or a tuple of such.

    Raises:
        UsageError: nothing in the state has the name, or several have it and no group was given.

    Example:
        >>> from tnt_func.optim import adamw
        >>> get(adamw(3e-4).init({}), "lr")
        tensor(0.0003, dtype=torch.float64)
    """
    found = [values[name] for values in hyperparameters(opt_state) if name in values]
    if len(found) > 1 and group is None:
        raise UsageError(
            f"get was given {name!r}, which {len(found)} groups have: {found}. Write get(opt_state, {name!r}, group=0) "
            "for one, hyperparameters(opt_state) for all."
        )
    return found[_chosen(opt_state, name, group, len(found))][0]


def set_hyperparameters(opt_state: PyTree, *, group: int | None = None, **values: Any) -> PyTree:
    """The state with other hyper-parameters; the rest is shared, not copied.

    Args:
        opt_state: a state that holds them.
        group: which one to set, counted among those of that name; all of them if not given.
        values: by name; numbers or tensors, or tuples of them, cast and broadcast to what they replace.

    Raises:
        UsageError: nothing in the state has the name, or it follows a schedule.
        StructureError: the value does not fit what it replaces.

    Example:
        >>> from tnt_func.optim import adamw
        >>> state = set_hyperparameters(adamw(3e-4).init({}), lr=1e-4, betas=(0.8, 0.9))
        >>> get(state, "lr"), get(state, "betas")[0]
        (tensor(0.0001, dtype=torch.float64), tensor(0.8000, dtype=torch.float64))
    """
    sites = [*_sites(opt_state)]
    for name, value in values.items():
        having = [place for place, site in enumerate(sites) if name in site.hyperparameters or name in site.scheduled]
        for place in having[_chosen(opt_state, name, group, len(having))]:
            site = sites[place]
            if name in site.scheduled:
                raise UsageError(
                    f"set_hyperparameters was given {name}={value!r}; it follows the schedule that the optimizer was "
                    f"made with. Make the optimizer with a number for {name}, to set it, or give a group of parameters "
                    "an optimizer of its own: grouped(optimizer, [(predicate, other)])."
                )
            new = _like(site.hyperparameters[name], value, name)
            sites[place] = replace(site, hyperparameters={**site.hyperparameters, name: new})
    return _with_sites(opt_state, iter(sites))


def _sites(state: PyTree) -> Iterator[OptState]:
    """Every OptState in a state, whatever tuples, dicts and dataclasses are around it."""
    if isinstance(state, OptState):
        yield state
    elif isinstance(state, Mapping):
        for inner in state.values():
            yield from _sites(inner)
    elif isinstance(state, (tuple, list)):
        for inner in state:
            yield from _sites(inner)
    elif is_dataclass(state):
        for field in fields(state):
            yield from _sites(getattr(state, field.name))


def _with_sites(state: PyTree, sites: Iterator[OptState]) -> PyTree:
    if isinstance(state, OptState):
        return next(sites)
    if isinstance(state, Mapping):
        return {key: _with_sites(inner, sites) for key, inner in state.items()}
    if isinstance(state, (tuple, list)):
        return type(state)(_with_sites(inner, sites) for inner in state)
    if is_dataclass(state) and not isinstance(state, type):
        return replace(state, **{field.name: _with_sites(getattr(state, field.name), sites) for field in fields(state)})
    return state


def _chosen(opt_state: PyTree, name: str, group: int | None, count: int) -> slice:
    if count == 0:
        known = sorted({known for values in hyperparameters(opt_state) for known in values})
        raise UsageError(f"{name!r} was given; the state's hyper-parameters are {known}. Write one of those.")
    if group is not None and not 0 <= group < count:
        raise UsageError(f"group={group} was given; {count} have {name!r}. Write one of 0 to {count - 1}.")
    return slice(group, None if group is None else group + 1)


def _like(old: Any, value: Any, name: str) -> Any:
    """The value in place of the old one: of its dtype, device and shape."""
    if isinstance(old, tuple) and isinstance(value, tuple) and len(old) == len(value):
        return tuple(_like(was, part, name) for was, part in zip(old, value, strict=True))
    if old is None and value is None:
        return None
    like: Any = old
    try:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device).expand(like.shape).clone()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        was = old if isinstance(old, tuple) else trees.describe(old)
        raise StructureError(
            f"{name}={value!r} was given; it is put in place of {was}, to which it broadcasts. Write a number, or a "
            "tuple of as many as there are."
        ) from error
