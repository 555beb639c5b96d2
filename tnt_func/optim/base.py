"""Optimizers as values: pairs of pure functions, and chains of them.

An `Optimizer` turns gradients into new parameters, a `GradientTransform` turns gradients into gradients, and a chain of
transforms that ends in an optimizer is an optimizer. Whatever they remember is in the state that goes in and comes out.
A gradient that is None leaves its parameter, and what is remembered of it, alone.

Laws:
    `chain` is associative, states included, and `chain()` is its identity. Nothing that is given is changed.

Example:
    >>> import torch
    >>> from tnt_func.optim import clip_by_global_norm, sgd
    >>> optimizer = chain(clip_by_global_norm(1.0), sgd(0.1))
    >>> params = {"w": torch.tensor([3.0, 4.0])}
    >>> params, opt_state = optimizer.update({"w": torch.tensor([30.0, 40.0])}, optimizer.init(params), params)
    >>> params
    {'w': tensor([2.9400, 3.9200])}
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, overload

from tnt_func.errors import UsageError
from tnt_func.factories import Brief, factory
from tnt_func.optim.layout import unless_same
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
        >>> import torch
        >>> from tnt_func.optim import accumulate, sgd
        >>> optimizer, w = accumulate(sgd(0.5), every=4), torch.tensor(1.0)
        >>> w, opt_state = optimizer.update(torch.tensor(2.0), optimizer.init(w), w)
        >>> w, flush(optimizer, opt_state, w)[0]
        (tensor(1.), tensor(0.))
    """
    return optimizer.flush(opt_state, params)
