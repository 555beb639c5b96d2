"""What a compiled step must not do (law 12): each way to break it beside its sound twin.

Example:
    >>> from tnt_func.testing.compiling import check_compiled
    >>> make, words = COMPILATIONS["counted_in_python"]
    >>> check_compiled(*make(False))
    >>> check_compiled(*make(True))
    Traceback (most recent call last):
    tnt_func.errors.LawError: law 12 (compiled) is broken: train_step 0, compiled, is not the step
      state.params: 2 of 2 elements differ by more than ...
    ...
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tnt_func import rng
from tnt_func.state import State
from tnt_func.types import Output
from tnt_func.unit import Step, TrainUnit

Make = Callable[[bool], tuple[TrainUnit, State, list[Any]]]


class Control(NamedTuple):
    """What `check_compiled` is given, broken or sound, anew at every call; what the message says."""

    make: Make
    words: tuple[str, ...]


def _made(step: Step, batches: list[Any]) -> tuple[TrainUnit, State, list[Any]]:
    state = State(params=torch.ones(2), opt_state={"count": torch.tensor(0)}, key=rng.key(0))
    return TrainUnit(train_step=step), state, batches


def counted_in_python(broken: bool) -> tuple[TrainUnit, State, list[Any]]:
    """A count that the step keeps for itself, or in the state."""
    calls: list[int] = []

    def train_step(state: State, batch: Any) -> tuple[State, Output]:
        calls.append(0)
        count = state.opt_state["count"] + 1
        w = state.params - batch / (len(calls) if broken else count)
        return state.replace(params=w, opt_state={"count": count}), {}

    return _made(train_step, [torch.ones(2)] * 3)


def number_in_the_batch(broken: bool) -> tuple[TrainUnit, State, list[Any]]:
    """A scale that comes with every batch, as a number or as a tensor."""

    def train_step(state: State, batch: Any) -> tuple[State, Output]:
        return state.replace(params=state.params * batch["scale"]), {}

    scales = [0.5, 0.25, 0.125]
    return _made(train_step, [{"scale": scale if broken else torch.tensor(scale)} for scale in scales])


COMPILATIONS: dict[str, Control] = {
    "counted_in_python": Control(counted_in_python, ("is not the step", "state.params")),
    "number_in_the_batch": Control(
        number_in_the_batch, ("compiled 3 times for 1 structures", "batch['scale'] was float 0.5 and is float 0.25")
    ),
}
"""Every control by its name."""
