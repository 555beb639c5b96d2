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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from tnt_func.gradients import value_and_grad
from tnt_func.optim import Optimizer
from tnt_func.state import State
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


@dataclass(frozen=True)
class Descent:
    """One update of the parameters against the gradient of an objective. Made by `minimize`.

    Args:
        objective: what is made smaller.
        optimizer: what turns gradients into new parameters.
        part: the entry of `state.params` and `state.opt_state` that is trained, or None for the whole.
        differentiate: what finds the gradient.
        amendments: applied to the new state and the slope, in order, before the step returns.
    """

    objective: Objective
    optimizer: Optimizer
    part: str | None = None
    differentiate: Differentiate = differentiate
    amendments: tuple[Amendment, ...] = ()

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The state after the update, and the objective's output."""
        params = state.params if self.part is None else state.params[self.part]
        opt_state = state.opt_state if self.part is None else state.opt_state[self.part]
        slope = self.differentiate(self.objective, params, state, batch)
        params, opt_state = self.optimizer.update(slope.grads, opt_state, params)
        if self.part is not None:
            params, opt_state = {**state.params, self.part: params}, {**state.opt_state, self.part: opt_state}
        after = state.replace(params=params, opt_state=opt_state, buffers=slope.buffers)
        for amend in self.amendments:
            after, slope = amend(state, after, slope)
        return after, slope.output


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

    Example:
        >>> from tnt_func.optim import sgd
        >>> critic = minimize(lambda params, state, batch: (params.sum(), (state.buffers, {})), sgd(0.5), part="critic")
        >>> critic.part
        'critic'
    """
    return Descent(objective, optimizer, part)
