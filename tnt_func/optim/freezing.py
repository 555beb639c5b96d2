"""An optimizer that stands still until it is told to go.

Example:
    >>> import torch
    >>> from tnt_func.optim import set_hyperparameters, sgd
    >>> optimizer, w = frozen(sgd(1.0)), torch.tensor(3.0)
    >>> opt_state = optimizer.init(w)
    >>> w, opt_state = optimizer.update(torch.tensor(1.0), opt_state, w)
    >>> w, optimizer.update(torch.tensor(1.0), set_hyperparameters(opt_state, frozen=0), w)[0]
    (tensor(3.), tensor(2.))
"""

from collections.abc import Callable

from tnt_func import treemath
from tnt_func.factories import factory
from tnt_func.optim.base import Optimizer, consuming
from tnt_func.optim.layout import is_traced, unless_same
from tnt_func.optim.state import Settings
from tnt_func.types import PyTree


@factory
def frozen(optimizer: Optimizer) -> Optimizer:
    """An optimizer that changes nothing while its hyper-parameter `frozen` is not 0, which it is not at first.

    Its parameters stand still, and so does all that it remembers: averages, step counts, schedules. It begins as an
    optimizer does that is made at the moment of thawing. `callbacks.unfreeze_at` thaws it. The gradients are computed
    all the same, and a clip chained in front of a whole `grouped` optimizer counts them in; one chained inside does
    not. Parameters that are never trained are better left out: `from_module(trainable=...)`. The averages of a
    BatchNorm are no parameters: put that module in eval mode to freeze them.

    Args:
        optimizer: mostly that of a group.

    Example:
        >>> import torch
        >>> from tnt_func.optim import adamw, grouped
        >>> optimizer = grouped(adamw(1e-3), [(lambda name: "backbone" in name, frozen(adamw(1e-4)))])
        >>> params = {"backbone": torch.ones(1), "head": torch.ones(1)}
        >>> new, opt_state = optimizer.update(params, optimizer.init(params), params)
        >>> new["backbone"], new["head"]
        (tensor([1.]), tensor([0.9990]))
    """
    gate = Settings(frozen=1.0)

    def init(params: PyTree) -> PyTree:
        return gate.init({}), optimizer.init(params)

    def unless_frozen(
        state: PyTree, params: PyTree, act: Callable[[PyTree, bool], tuple[PyTree, PyTree]]
    ) -> tuple[PyTree, PyTree]:
        held, inner = state
        closed = held.hyperparameters["frozen"]
        traced = is_traced([closed])
        if not traced and closed.item():
            return params, state
        new, inner = act(inner, traced)
        if not traced:
            return new, unless_same(state, (held, inner))
        return treemath.where(closed != 0, (params, state), (new, (held, inner)))

    def update(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        return unless_frozen(state, params, lambda inner, traced: optimizer.update(grads, inner, params))

    def consume(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        def act(inner: PyTree, traced: bool) -> tuple[PyTree, PyTree]:
            return (optimizer.update if traced else consuming(optimizer))(grads, inner, params)

        return unless_frozen(state, params, act)

    def flush(state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        return unless_frozen(state, params, lambda inner, traced: optimizer.flush(inner, params))

    return Optimizer(init, update, flush, consume=consume, traceable=optimizer.traceable)
