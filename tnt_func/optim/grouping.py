"""Several optimizers as one, each of parameters of its own.

Example:
    >>> import torch
    >>> from tnt_func.optim import adamw, muon
    >>> optimizer = grouped(adamw(3e-4), [(lambda name: "hidden" in name, muon(0.02))])
    >>> len(optimizer.init({"hidden": torch.zeros(2, 2), "bias": torch.zeros(2)}))
    2
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tnt_func.factories import factory
from tnt_func.optim.base import Optimizer, Update, consuming
from tnt_func.optim.layout import Layout, Predicate, first_claim, layout, unless_same
from tnt_func.optim.state import set_hyperparameters
from tnt_func.types import PyTree


@factory
def grouped(optimizer: Optimizer, groups: Sequence[tuple[Predicate, Optimizer | Mapping[str, Any]]]) -> Optimizer:
    """Some parameters with an optimizer of their own, or the same with other hyper-parameters.

    Each group's optimizer is given the whole tree with None in place of what others update, so a `clip_by_global_norm`
    inside a group sees that group's norm, and one chained before sees all.

    Args:
        optimizer: of the parameters that no group claims.
        groups: pairs; the first whose predicate holds for a parameter's name, "body.0.bias" say, claims it. With a
            mapping, the group has `optimizer` with those hyper-parameters; one that follows a schedule is changed by an
            optimizer of the group's own.

    Returns:
        An Optimizer. Its state is a tuple, one for each group, in order, that of `optimizer` last.

    Raises:
        UsageError: at `init`, `optimizer` has not a hyper-parameter that a group changes.

    Example:
        >>> import torch
        >>> from tnt_func.optim import sgd
        >>> is_bias = lambda name: name.endswith("bias")
        >>> optimizer = grouped(sgd(0.5, weight_decay=1.0), [(is_bias, {"weight_decay": 0.0})])
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
