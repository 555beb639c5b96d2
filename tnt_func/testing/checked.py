"""The laws of single calls, held at every step of a real run: for a debug run of a unit that misbehaves late.

Example:
    >>> import torch
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params - batch), {}))
    >>> tnt.train(checked(unit), tnt.State(params=torch.zeros(1), key=tnt.key(0)), [1.0, 2.0], max_epochs=1).params
    tensor([-3.])
"""

from typing import Any, TypeVar

from tnt_func import rng
from tnt_func.testing.calls import pure, structured
from tnt_func.testing.case import Call, law_error, watched
from tnt_func.testing.runs import NOTHING_OUTSIDE, declared
from tnt_func.testing.snapshot import changes, freeze
from tnt_func.types import typed
from tnt_func.unit import Callback, Unit

U = TypeVar("U", bound=Unit | Callback)


@typed
def checked(unit: U) -> U:
    """The same unit or callback, whose every step and hook is found to be pure, repeatable and structure-keeping.

    Laws 1, 2 and 3, where `check_unit` looks at a few small batches, on the run itself: each call is made twice, from
    the same generators, and what it is given is compared with a copy. The numbers are those of the unit alone; it takes
    more than twice as long.

    Args:
        unit: of any kind, or a callback.

    Raises:
        LawError: out of the run, as soon as a call writes into what it is given, draws from a generator that is not
            declared, changes the structure of the state, or gives another result the second time.

    Example:
        >>> import torch
        >>> from tnt_func.rng import key
        >>> from tnt_func.runs import train
        >>> from tnt_func.state import State
        >>> from tnt_func.unit import TrainUnit
        >>> seen = []
        >>> def train_step(state, batch):
        ...     seen.append(batch)
        ...     return state.replace(params=state.params / len(seen)), {}
        >>> train(checked(TrainUnit(train_step=train_step)), State(params=torch.ones(1), key=key(0)), [1], max_epochs=1)
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 2 (determinism) is broken at train step (epoch 0, step 0): train_step gave ...
          result[0].params: 1 of 1 elements differ, by at most 0.5
        What is not in the state is not in the run: ...
    """
    return watched(unit, _checking)


def _checking(call: Call) -> Any:
    with rng.preserved():
        result = _inside(structured, _inside(pure, _inside(declared, call))).make()
    once = freeze(result)
    if lines := changes(once, freeze(call.make()), "result"):
        said = f"{call.owner} gave another result the second time"
        raise law_error("determinism", f"at {call.where()}", said, lines, NOTHING_OUTSIDE)
    return result


def _inside(find: Any, call: Call) -> Call:
    """The same call, made by a law."""
    return call._replace(function=lambda *_: find(call))
