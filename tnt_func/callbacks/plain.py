"""Any callables as hooks.

Example:
    >>> lambda_callback(on_eval_epoch_end=print).phases()
    ('eval',)
"""

from collections.abc import Callable
from typing import Any

from tnt_func.errors import UsageError, UsageTypeError, kind_of
from tnt_func.factories import factory
from tnt_func.state import State
from tnt_func.types import Generator
from tnt_func.unit import PHASES, POINTS, Callback, Hook, Memory

HOOKS = tuple(f"on_{phase}_{point}" for phase in PHASES for point in POINTS)


@factory
def lambda_callback(
    name: str = "lambda_callback",
    *,
    memory: Memory | None = None,
    draws: tuple[Generator, ...] = (),
    **hooks: Callable[[State], State | None],
) -> Callback:
    """A callback out of any callables, which may return None: then the state goes on as it was.

    A Callback's own rule is stricter: its hooks return a State, always, and a forgotten `return state` is an error.
    Here nobody notices, which suits what only looks, `print` for one; what decides is better written as a Callback.
    Effects that go with checkpoints, or that shall not come twice where a step is run again, are an observer's.

    Args:
        name, memory, draws: as of a Callback.
        hooks: by the name of the point, `on_train_step_end` say; each is called with the state alone.

    Raises:
        UsageError: there is no such point.
        UsageTypeError: what is given for it cannot be called.

    Example:
        >>> from tnt_func.rng import key
        >>> from tnt_func.runs import train
        >>> from tnt_func.unit import TrainUnit
        >>> steps = lambda_callback(on_train_step_end=lambda state: print(state.progress.train))
        >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}))
        >>> _ = train(unit, State(params=0, key=key(0)), [1.0], max_epochs=1, callbacks=[steps])
        Progress(epochs=0, steps=1, steps_in_epoch=1)

    References:
        torchtnt.framework.callbacks.Lambda.
    """
    for point, function in hooks.items():
        if point not in HOOKS:
            raise UsageError(
                f"lambda_callback was given {point}; the points are {', '.join(HOOKS)}. Write one of those."
            )
        if not callable(function):
            raise UsageTypeError(
                f"lambda_callback was given {kind_of(function)} as its {point}; a hook is called with the state. Write "
                f"{point}=lambda state: ..."
            )
    passing: dict[str, Any] = {point: _passing(function) for point, function in hooks.items()}
    return Callback(name=name, memory=memory, draws=draws, **passing)


def _passing(function: Callable[[State], State | None]) -> Hook:
    def hook(state: State) -> State:
        result = function(state)
        return state if result is None else result

    return hook
