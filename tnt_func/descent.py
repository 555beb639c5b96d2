"""The step that goes down the gradient of an objective, as a value that can be taken apart.

`minimize(objective, optimizer)` is a `Step` like any other. It is a frozen dataclass and no closure, so that what
changes how a step is taken (its precision, its micro-batches) can say so by replacing a field: `tnt_func.transforms`.

Example:
    >>> import torch
    >>> from tnt_func.optim import sgd
    >>> from tnt_func.rng import key
    >>> def objective(params, state, batch):
    ...     return ((params - batch) ** 2).sum(), (state.buffers, {})
    >>> step, w = minimize(objective, sgd(0.5)), torch.tensor([3.0])
    >>> step(State(params=w, key=key(0), opt_state=sgd(0.5).init(w)), torch.tensor([1.0]))[0].params
    tensor([1.])
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeAlias, cast

from torch import Tensor

from tnt_func.donation import Storages, copied_from, noted, separated, spend
from tnt_func.errors import ContractError, kind_of
from tnt_func.factories import Brief
from tnt_func.gradients import value_and_grad
from tnt_func.optim import Optimizer
from tnt_func.optim.layout import is_traced
from tnt_func.state import State, keep
from tnt_func.types import Batch, Output, PyTree, typed

Objective: TypeAlias = Callable[[PyTree, State, Batch], tuple[Tensor, tuple[PyTree, Output]]]
"""`(params, state, batch) -> (value, (buffers, output))`: what a step makes smaller, new buffers, the step's output."""


class Slope(NamedTuple):
    """An objective at some parameters.

    Args:
        value: 0-d.
        buffers: as they are afterwards.
        output: what the step reports.
        grads: like the parameters, with None for those that the objective does not use.
    """

    value: Tensor
    buffers: PyTree
    output: Output
    grads: PyTree


Differentiate: TypeAlias = Callable[[Objective, PyTree, State, Batch], Slope]
"""`(objective, params, state, batch) -> slope`."""

Amendment: TypeAlias = Callable[[State, State, Slope], tuple[State, Slope]]
"""`(before, after, slope) -> (after, slope)`: what is done about an update, knowing the gradient it was made with."""


class Amending:
    """An amendment that says what it reads of the leaves before an update; of any other, a donating step copies all.

    Args:
        reads: fields of `before` whose tensors it looks at when the update has been made.
    """

    reads: ClassVar[tuple[str, ...]] = ("params", "opt_state")


class Guard(Amending):
    """An amendment by which an update is made or not, as the slope says.

    A donating step asks it before the update, which it then leaves out, for nothing would be left to go back to.
    """

    def allows(self, before: State, slope: Slope) -> Tensor:
        """Whether the update is made: bool []."""
        raise NotImplementedError

    def settle(self, before: State, after: State, allowed: Tensor) -> State:
        """The state after the update, or without it."""
        raise NotImplementedError

    def __call__(self, before: State, after: State, slope: Slope) -> tuple[State, Slope]:
        """The same, after the update was made."""
        return self.settle(before, after, self.allows(before, slope)), slope


def differentiate(objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
    """The slope of an objective on a batch, all of it at once.

    Example:
        >>> import torch
        >>> from tnt_func.rng import key
        >>> w = torch.tensor(3.0)
        >>> objective = lambda params, state, batch: (params * batch, (state.buffers, {}))
        >>> differentiate(objective, w, State(params=w, key=key(0)), 2.0).grads
        tensor(2.)
    """
    value, (buffers, output), grads = value_and_grad(lambda params: objective(params, state, batch), params)
    return Slope(value, buffers, output, grads)


@dataclass(frozen=True, repr=False)
class Descent(Brief):
    """One update of the parameters against the gradient of an objective. Made by `minimize`.

    Args:
        objective: what is made smaller.
        optimizer: what turns gradients into new parameters.
        part: the entry of `state.params` and `state.opt_state` that is trained, or None for the whole.
        differentiate: what finds the gradient.
        amendments: applied to the new state and the slope, in order, before the step returns.
        donates: whether it consumes the state that it is given: `tnt.donate`.
    """

    objective: Objective
    optimizer: Optimizer
    part: str | None = None
    differentiate: Differentiate = differentiate
    amendments: tuple[Amendment, ...] = ()
    donates: bool = False

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The state after the update, and the objective's output."""
        if self.donates and not is_traced(()):
            return self._consuming(state, batch)
        params, opt_state = self._own(state)
        slope = self.differentiate(self.objective, params, state, batch)
        after = self._put(state, slope, self.optimizer.update(slope.grads, opt_state, params))
        for amend in self.amendments:
            after, slope = amend(state, after, slope)
        return after, slope.output

    def donating(self) -> "Descent":
        """The same step, which may write over the params and the opt_state that it is given."""
        return replace(self, donates=True)

    def _own(self, state: State) -> tuple[PyTree, PyTree]:
        if self.part is None:
            return state.params, state.opt_state
        if not all(isinstance(tree, Mapping) and self.part in tree for tree in (state.params, state.opt_state)):
            raise _without(self.part, state)
        return state.params[self.part], state.opt_state[self.part]

    def _put(self, state: State, slope: Slope, new: tuple[PyTree, PyTree]) -> State:
        params, opt_state = new
        if self.part is not None:
            params = _with(state.params, self.part, params)
            opt_state = _with(state.opt_state, self.part, opt_state)
        return state.replace(params=params, opt_state=opt_state, buffers=slope.buffers)

    def _consuming(self, given: State, batch: Batch) -> tuple[State, Output]:
        state, storages = separated(given)
        params, opt_state = self._own(state)
        slope = _apart(self.differentiate(self.objective, params, state, batch), state, storages)
        guards, amendments, reads = _told_apart(self.amendments)
        allowed = [guard.allows(state, slope) for guard in guards]
        before = state.replace(**{name: keep(getattr(state, name)) for name in reads}) if reads else state
        new = params, opt_state
        try:
            if all(each.item() for each in allowed):
                new = (self.optimizer.consume or self.optimizer.update)(slope.grads, opt_state, params)
            after = self._put(state, slope, new)
            for guard, each in zip(guards, allowed, strict=True):
                after = guard.settle(state, after, each)
            for amend in amendments:
                after, slope = amend(before, after, slope)
            if storages.are_of(after) and after.memory is state.memory and after.buffers is slope.buffers:
                noted(after, storages.pointers)
            return after, slope.output
        finally:
            spend(given)


def _without(part: str, state: State) -> ContractError:
    have = {
        name: sorted(tree) if isinstance(tree, Mapping) else kind_of(tree)
        for name, tree in (("params", state.params), ("opt_state", state.opt_state))
    }
    return ContractError(
        f"minimize(..., part={part!r}) was given a state whose params have {have['params']} and whose opt_state has "
        f"{have['opt_state']}; both need the entry {part!r}. Write opt_state={{{part!r}: optimizer.init("
        f"params[{part!r}]), ...}}."
    )


def _with(tree: dict[str, PyTree], part: str, new: PyTree) -> dict[str, PyTree]:
    """The tree with another part; itself where it is the very same."""
    return tree if tree[part] is new else {**tree, part: new}


def _told_apart(amendments: tuple[Amendment, ...]) -> tuple[list[Guard], tuple[Amendment, ...], set[str]]:
    """The guards that nothing comes before, what follows, and what those read: guards among them are no different."""
    if not amendments:
        return [], (), set()
    guards = list(itertools.takewhile(lambda amend: isinstance(amend, Guard), amendments))
    rest = amendments[len(guards) :]
    reads = {name for amend in rest for name in (amend.reads if isinstance(amend, Amending) else Amending.reads)}
    return cast(list[Guard], guards), rest, reads


def _apart(slope: Slope, state: State, storages: Storages) -> Slope:
    """The slope with copies of what lies in the memory that is about to be written over."""
    buffers = slope.buffers if slope.buffers is state.buffers else copied_from(slope.buffers, storages)
    output = copied_from(slope.output, storages)
    if buffers is slope.buffers and output is slope.output:
        return slope
    return slope._replace(buffers=buffers, output=output)


@typed
def minimize(objective: Objective, optimizer: Optimizer, *, part: str | None = None) -> Descent:
    """The step that takes the parameters down the gradient of an objective.

    Args:
        objective: `(params, state, batch) -> (value, (buffers, output))`; differentiated with respect to `params`.
        optimizer: what turns gradients into new parameters.
        part: the entry of `state.params` and `state.opt_state` that is trained; the whole of them if not given. The
            objective finds the other parts, an adversary's say, in `state.params`.

    Returns:
        A train step, for `TrainUnit(train_step=...)`. Steps for several parts go into units of their own, which
        `tnt.sequence` runs one after another and `tnt.alternate` in turns.

    Raises:
        ContractError: at a step, where `state.params` or `state.opt_state` has no such part.

    Example:
        >>> from tnt_func.optim import sgd
        >>> critic = minimize(lambda params, state, batch: (params.sum(), (state.buffers, {})), sgd(0.5), part="critic")
        >>> critic.part
        'critic'
    """
    return Descent(objective, optimizer, part)
