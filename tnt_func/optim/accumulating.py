"""An update with the mean of several gradients.

Example:
    >>> from tnt_func.optim import adamw
    >>> accumulate(adamw(3e-4), every=4)
    accumulate(adamw(0.0003), 4)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnt_func import treemath
from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.optim.base import Optimizer, Update, consuming
from tnt_func.optim.layout import check_grads, is_traced, layout
from tnt_func.pytree import pytree
from tnt_func.types import PyTree


@pytree
@dataclass(frozen=True, eq=False)
class Accumulated:
    """The state of `accumulate`.

    Args:
        inner: the state of the optimizer that is wrapped.
        total: the sum of the gradients of the open window, like the parameters, in float32 at least.
        seen: which parameters had a gradient in the open window, bool [leaves].
        count: gradients in the open window, int64 [].

    Example:
        >>> from tnt_func.optim import sgd
        >>> accumulate(sgd(0.1), every=2).init({"w": torch.ones(2)}).total
        {'w': tensor([0., 0.])}
    """

    inner: PyTree
    total: PyTree
    seen: Tensor
    count: Tensor


@factory
def accumulate(optimizer: Optimizer, every: int) -> Optimizer:
    """One update of an optimizer with the mean of every so many gradients; in between, parameters stay.

    The open window is part of the state: it goes on across epochs and evaluations, and `flush` applies it. All
    gradients weigh the same; micro-batches of unequal size are for the step to weigh. Schedules inside count updates.
    Traced, the update is computed every time and dropped where it is not due.

    Args:
        optimizer: gets the mean of the gradients, and None for a parameter that had none in the whole window; traced,
            for one that has none now.
        every: gradients in a window.

    Raises:
        UsageError: the window is shorter than one gradient; or, later, a traced `flush`.

    Example:
        >>> from tnt_func.optim import sgd
        >>> optimizer, w = accumulate(sgd(1.0), every=2), torch.tensor(0.0)
        >>> opt_state = optimizer.init(w)
        >>> for grad in (1.0, 3.0, 10.0):
        ...     w, opt_state = optimizer.update(torch.tensor(grad), opt_state, w)
        >>> w, opt_state.count
        (tensor(-2.), tensor(1))

    References:
        optax.MultiSteps.
    """
    if every < 1:
        raise UsageError(f"accumulate was given every={every}; a window has at least one gradient. Write every=1.")

    def empty(params: PyTree, inner: PyTree) -> Accumulated:
        here = layout(params)
        total = [None if x is None else torch.zeros_like(x, dtype=_sum_dtype(x)) for x in here.leaves]
        seen = torch.zeros(len(total), dtype=torch.bool)
        return Accumulated(inner, here.give(total), seen, torch.tensor(0))

    def init(params: PyTree) -> Accumulated:
        return empty(params, optimizer.init(params))

    def apply(state: Accumulated, params: PyTree, seen: list[bool], update: Update) -> tuple[PyTree, PyTree]:
        here = layout(params)
        sums = zip(here.leaves, here.take(state.total, "opt_state.total"), seen, strict=True)
        mean = [(total / state.count.to(x.device)).to(x.dtype) if had else None for x, total, had in sums]
        return update(here.give(mean), state.inner, params)

    def update(grads: PyTree, state: Accumulated, params: PyTree) -> tuple[PyTree, PyTree]:
        here = layout(params)
        new = here.take(grads, "grads")
        check_grads(here, new, sparse=True)
        had = [grad is not None for grad in new]
        sums = zip(here.take(state.total, "opt_state.total"), new, strict=True)
        total = here.give([old if grad is None else old + grad for old, grad in sums])
        grown = Accumulated(state.inner, total, state.seen | torch.tensor(had, dtype=torch.bool), state.count + 1)
        traced = is_traced([grown.count])
        if not traced and grown.count.item() < every:
            return params, grown
        applied, inner = apply(grown, params, had if traced else grown.seen.tolist(), optimizer.update)
        due = applied, empty(applied, inner)
        return treemath.where(grown.count >= every, due, (params, grown)) if traced else due

    def consume(grads: PyTree, state: Accumulated, params: PyTree) -> tuple[PyTree, PyTree]:
        if is_traced([state.count]):
            return update(grads, state, params)
        here = layout(params)
        new, total = here.take(grads, "grads"), here.take(state.total, "opt_state.total")
        check_grads(here, new, sparse=True)
        for old, grad in zip(total, new, strict=True):
            if grad is not None:
                old.add_(grad)
        state.seen.logical_or_(torch.tensor([grad is not None for grad in new], dtype=torch.bool))
        if state.count.add_(1).item() < every:
            return params, state
        params, inner = apply(state, params, state.seen.tolist(), consuming(optimizer))
        for held in (*total, state.seen, state.count):
            if held is not None:
                held.zero_()
        return params, state if inner is state.inner else replace(state, inner=inner)

    def apply_open(state: Accumulated, params: PyTree) -> tuple[PyTree, PyTree]:
        if is_traced([state.count]):
            raise UsageError(
                "flush was given a traced state; whether a window is open is a value, so it runs eagerly. Call it from "
                "a hook outside of the compiled or vmapped step."
            )
        if state.count.item():
            params, inner = apply(state, params, state.seen.tolist(), optimizer.update)
            state = empty(params, inner)
        params, inner = optimizer.flush(state.inner, params)
        return params, replace(state, inner=inner)

    return Optimizer(init, update, apply_open, consume=consume, traceable=optimizer.traceable)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
