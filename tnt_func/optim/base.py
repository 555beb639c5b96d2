"""Optimizers as values: pairs of pure functions, and what is made of several.

An `Optimizer` turns gradients into new parameters, a `GradientTransform` turns gradients into gradients, and a chain of
transforms that ends in an optimizer is an optimizer. Whatever they remember is in the state that goes in and comes out.
A gradient that is None leaves its parameter, and what is remembered of it, alone.

Laws:
    `chain` is associative, states included, and `chain()` is its identity. Nothing that is given is changed.

Example:
    >>> from tnt_func.optim import clip_by_global_norm, sgd
    >>> optimizer = chain(clip_by_global_norm(1.0), sgd(0.1))
    >>> params = {"w": torch.tensor([3.0, 4.0])}
    >>> params, opt_state = optimizer.update({"w": torch.tensor([30.0, 40.0])}, optimizer.init(params), params)
    >>> params
    {'w': tensor([2.9400, 3.9200])}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from tnt_func import treemath
from tnt_func.errors import UsageError
from tnt_func.factories import Brief, factory
from tnt_func.optim.layout import Layout, Predicate, check_grads, first_claim, is_traced, layout, unless_same
from tnt_func.optim.state import set_hyperparameters
from tnt_func.pytree import pytree
from tnt_func.types import PyTree

Update: TypeAlias = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
"""`(grads, state, params) -> (new, state)`, where what is new are parameters, or gradients."""


def untouched(opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    """The flush of an optimizer that holds nothing back.

    Example:
        >>> untouched("state", "params")
        ('params', 'state')
    """
    return params, opt_state


@dataclass(frozen=True, repr=False)
class Optimizer(Brief):
    """Gradients in, parameters out.

    Args:
        init: `params -> opt_state`.
        update: `(grads, opt_state, params) -> (params, opt_state)`; `grads` has the structure of `params`, with None
            for what has no gradient.
        flush: `(opt_state, params) -> (params, opt_state)`; applies gradients that are held back.
        links: the parts of a chain.
        consume: an update that may write over the `opt_state` and `params` that it is given, and gives the same bits;
            None where there is no other than `update`.
        traceable: whether `update` runs under `torch.func.vmap`, and in a graph.

    Example:
        >>> def update(grads, opt_state, params): return params - 0.5 * grads, opt_state
        >>> Optimizer(init=lambda params: (), update=update).update(2.0, (), 3.0)
        (2.0, ())
    """

    init: Callable[[PyTree], PyTree]
    update: Update
    flush: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = untouched
    links: "tuple[Link, ...] | None" = field(default=None, repr=False)
    consume: Update | None = field(default=None, repr=False)
    traceable: bool = field(default=True, repr=False)


@dataclass(frozen=True, repr=False)
class GradientTransform(Brief):
    """Gradients in, gradients out.

    Args:
        init: `params -> state`.
        update: `(grads, state, params) -> (grads, state)`; what is None stays None.
        links: the parts of a chain.
        consume: an update that may write over the `state` that it is given, not over the gradients; None where there is
            no other than `update`.

    Example:
        >>> def update(grads, state, params): return -grads, state
        >>> GradientTransform(init=lambda params: (), update=update).update(2.0, (), 3.0)
        (-2.0, ())
    """

    init: Callable[[PyTree], PyTree]
    update: Update
    links: "tuple[Link, ...] | None" = field(default=None, repr=False)
    consume: Update | None = field(default=None, repr=False)


Link: TypeAlias = GradientTransform | Optimizer


@overload
def chain(*links: GradientTransform) -> GradientTransform: ...  # pyright: ignore[reportOverlappingOverload]


@overload
def chain(*links: Link) -> Optimizer: ...


@factory
def chain(*links: Link) -> Any:
    """Transforms one after another, each on the gradients that the one before gives; the last link may be an optimizer.

    Args:
        links: transforms, and at most one optimizer, at the end. A chain among them is taken apart, so the state is the
            same flat tuple however the chain was put together.

    Returns:
        An Optimizer where the last link is one, else a GradientTransform. A link alone is itself.

    Raises:
        UsageError: an optimizer stands before the end.

    Example:
        >>> from tnt_func.optim import centralize, clip_by_value, sgd
        >>> a, b, c = clip_by_value(1.0), centralize(), sgd(0.1)
        >>> chain(chain(a, b), c).links == chain(a, chain(b, c)).links == chain(a, chain(), b, c).links == (a, b, c)
        True

    References:
        optax.chain.
    """
    flat = tuple(part for link in links for part in ((link,) if link.links is None else link.links))
    if len(flat) == 1:
        return flat[0]
    for place, link in enumerate(flat[:-1]):
        if isinstance(link, Optimizer):
            raise UsageError(
                f"chain was given an Optimizer as link {place} of {len(flat)}; it takes one at most, at the end. Write "
                "chain(*transforms, optimizer), and grouped(...) for several optimizers."
            )

    def init(params: PyTree) -> PyTree:
        return tuple(link.init(params) for link in flat)

    def transform(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        states = [*state]
        for place, link in enumerate(flat):
            grads, states[place] = link.update(grads, states[place], params)
        return grads, tuple(states)

    def consume(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        states = [*state]
        for place, link in enumerate(flat):
            grads, states[place] = consuming(link)(grads, states[place], params)
        return grads, unless_same(state, tuple(states))

    def last_flush(state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        params, last = flat[-1].flush(state[-1], params)  # pyright: ignore
        return params, (*state[:-1], last)

    # The last link's update gives parameters where the others give gradients: an optimizer's chain is the same fold.
    if flat and isinstance(flat[-1], Optimizer):
        return Optimizer(init, transform, last_flush, links=flat, consume=consume, traceable=flat[-1].traceable)
    return GradientTransform(init, transform, links=flat, consume=consume)


def consuming(link: Link) -> Update:
    """The update that writes over what it is given, where a link has one.

    Example:
        >>> def update(grads, opt_state, params): return params - 0.5 * grads, opt_state
        >>> consuming(Optimizer(init=lambda params: (), update=update)) is update
        True
    """
    return link.update if link.consume is None else link.consume


def flush(optimizer: Optimizer, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    """Apply what an optimizer holds back, the open window of `accumulate`; where there is none, change nothing.

    Args:
        optimizer: any.
        opt_state: its state.
        params: the parameters.

    Returns:
        New parameters and state, in the order of `update`.

    Example:
        >>> from tnt_func.optim import sgd
        >>> optimizer, w = accumulate(sgd(0.5), every=4), torch.tensor(1.0)
        >>> w, opt_state = optimizer.update(torch.tensor(2.0), optimizer.init(w), w)
        >>> w, flush(optimizer, opt_state, w)[0]
        (tensor(1.), tensor(0.))
    """
    return optimizer.flush(opt_state, params)


@factory
def grouped(optimizer: Optimizer, groups: Sequence[tuple[Predicate, Optimizer | Mapping[str, Any]]]) -> Optimizer:
    """Some parameters with an optimizer of their own, or the same with other hyper-parameters.

    Each group's optimizer is given the whole tree with None in place of what others update, so a `clip_by_global_norm`
    inside a group sees that group's norm, and one chained before sees all.

    Args:
        optimizer: of the parameters that no group claims.
        groups: pairs; the first whose predicate holds for a parameter's path claims it. With a mapping, the group has
            `optimizer` with those hyper-parameters.

    Returns:
        An Optimizer. Its state is a tuple, one for each group, in order, that of `optimizer` last.

    Raises:
        UsageError: at `init`, `optimizer` has not a hyper-parameter that a group changes.

    Example:
        >>> from tnt_func.optim import hyperparameters, sgd
        >>> optimizer = grouped(sgd(0.5, weight_decay=1.0), [(lambda path: "bias" in path, {"weight_decay": 0.0})])
        >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
        >>> optimizer.update({"weight": torch.zeros(1), "bias": torch.zeros(1)}, optimizer.init(params), params)[0]
        {'weight': tensor([0.5000]), 'bias': tensor([1.])}
    """
    optimizers = [own if isinstance(own, Optimizer) else optimizer for _, own in groups] + [optimizer]
    changes = [{} if isinstance(own, Optimizer) else own for _, own in groups] + [{}]
    group_of = first_claim([claims for claims, _ in groups])

    def init(params: PyTree) -> PyTree:
        here = layout(params)
        states = (one.init(mine) for one, mine in zip(optimizers, parts(here, here.leaves), strict=True))
        return tuple(
            set_hyperparameters(state, **dict(change)) if change else state
            for state, change in zip(states, changes, strict=True)
        )

    def parts(here: Any, leaves: list[Any]) -> list[PyTree]:
        owners = group_of(here)
        return [
            here.give([leaf if owner == n else None for leaf, owner in zip(leaves, owners, strict=True)])
            for n in range(len(optimizers))
        ]

    def whole(here: Any, results: list[tuple[PyTree, PyTree]]) -> tuple[list[Any], tuple[PyTree, ...]]:
        new = [here.take(mine, "params") for mine, _ in results]
        return [new[owner][n] for n, owner in enumerate(group_of(here))], tuple(state for _, state in results)

    def run(here: Layout, updates: list[Update], grads: PyTree, states: PyTree) -> Any:
        mine = zip(updates, parts(here, here.take(grads, "grads")), states, parts(here, here.leaves), strict=True)
        return whole(here, [update(grads, state, params) for update, grads, state, params in mine])

    def update(grads: PyTree, states: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        here = layout(params)
        leaves, new = run(here, [one.update for one in optimizers], grads, states)
        return here.give(leaves), new

    def consume(grads: PyTree, states: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        here = layout(params)
        leaves, new = run(here, [*map(consuming, optimizers)], grads, states)
        return here.give(leaves, params), unless_same(states, new)

    def flush_all(states: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        here = layout(params)
        mine = zip(optimizers, states, parts(here, here.leaves), strict=True)
        leaves, new = whole(here, [one.flush(state, params) for one, state, params in mine])
        return here.give(leaves), new

    traceable = all(one.traceable for one in optimizers)
    return Optimizer(init, update, flush_all, consume=consume, traceable=traceable)


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
