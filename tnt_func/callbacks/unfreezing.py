"""Parameters that join the training later.

Example:
    >>> unfreeze_at(epochs=3).phases()
    ('train',)
"""

from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.optim import hyperparameters, set_hyperparameters
from tnt_func.state import State
from tnt_func.types import PyTree
from tnt_func.unit import Callback


@factory
def unfreeze_at(
    *, epochs: int | None = None, steps: int | None = None, group: int | None = None, name: str = "unfreeze_at"
) -> Callback:
    """Thaw what an `optim.frozen` optimizer holds, before the first step with so many train epochs or steps behind it.

    The parameters are in `state.params` from the start and the optimizer's state is as large as it will be, so that no
    structure changes. Until then neither moves: no averages are gathered from gradients that were not applied, and a
    schedule inside begins with the thaw.

    Args:
        epochs, steps: one of them, of training, completed, lifetime.
        group: which frozen optimizer, counted among those that are frozen, in order; all of them if not given. Several
            `unfreeze_at`, each with its group and name, thaw a model layer by layer.
        name: of the slot, `{"done": bool}`. Once done, it does nothing further: what is frozen again by hand stays so.

    Raises:
        UsageError: not exactly one of `epochs` and `steps` is given, or it is negative; when the run begins, the
            optimizer has no such frozen group.

    Example:
        >>> from tnt_func import optim, rng
        >>> from tnt_func.optim import adamw, frozen, grouped
        >>> optimizer = grouped(adamw(1e-3), [(lambda name: "backbone" in name, frozen(adamw(1e-4)))])
        >>> callback = unfreeze_at(steps=0)
        >>> state = State(params={}, key=rng.key(0), opt_state=optimizer.init({}))
        >>> state = callback.on_train_step_start(state.remember("unfreeze_at", callback.memory(state)))
        >>> optim.get(state.opt_state, "frozen"), state.memory["unfreeze_at"]
        (tensor(0., dtype=torch.float64), {'done': True})

    References:
        lightning.pytorch.callbacks.BaseFinetuning, which adds the parameters to the optimizer at that point; Howard and
        Ruder 2018, https://arxiv.org/abs/1801.06146, for layer by layer.
    """
    at = steps if epochs is None else epochs
    if at is None or (epochs is None) == (steps is None) or at < 0:
        raise UsageError(
            f"unfreeze_at was given epochs={epochs} and steps={steps}; it takes one of them, at least 0. Write "
            "unfreeze_at(epochs=3)."
        )

    def memory(state: State) -> PyTree:
        count = sum("frozen" in values for values in hyperparameters(state.opt_state))
        if not (count if group is None else 0 <= group < count):
            raise UsageError(
                f"unfreeze_at was given group={group}, and the optimizer has {count} that are frozen. Wrap that of the "
                "group: optim.grouped(optimizer, [(lambda name: 'backbone' in name, optim.frozen(optimizer))])."
            )
        return {"done": False}

    def thaw(state: State) -> State:
        progress = state.progress.train
        if state.memory[name]["done"] or (progress.steps if epochs is None else progress.epochs) < at:
            return state
        opt_state = set_hyperparameters(state.opt_state, group=group, frozen=0.0)
        return state.replace(opt_state=opt_state).remember(name, {"done": True})

    return Callback(name=name, memory=memory, on_train_step_start=thaw)
