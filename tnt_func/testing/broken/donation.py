"""What breaks law 12, donated: each way beside its sound twin.

Example:
    >>> from tnt_func.testing.donation import check_donation
    >>> make, words = DONATIONS["another_update"]
    >>> check_donation(*make(False))
    >>> check_donation(*make(True))
    Traceback (most recent call last):
    tnt_func.errors.LawError: law 12 (donation) is broken at train step_end (epoch 0, step 1): ...
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnt_func.descent import Guard, Slope, minimize
from tnt_func.donation import spend
from tnt_func.optim import Optimizer
from tnt_func.rng import key
from tnt_func.state import State
from tnt_func.types import Output, PyTree
from tnt_func.unit import TrainUnit

Make = Callable[[bool], tuple[TrainUnit, State, list[Any]]]


class Control(NamedTuple):
    """What `check_donation` is given, broken or sound, anew at every call; what the message says."""

    make: Make
    words: tuple[str, ...]


DONATIONS: dict[str, Control] = {}
"""Every control by its name."""


def _control(*words: str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        DONATIONS[getattr(make, "__name__", "")] = Control(make, words)
        return make

    return enter


def _objective(params: PyTree, state: State, batch: Any) -> tuple[Tensor, tuple[PyTree, Output]]:
    loss = (params["w"] - batch).square().sum()
    return loss, (state.buffers, {"loss": loss, "w": params["w"]})


def _update(grads: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    return {"w": params["w"] - 0.1 * grads["w"]}, {"sum": opt_state["sum"] + grads["w"]}


def _consume(grads: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    return {"w": params["w"].sub_(0.1 * grads["w"])}, {"sum": opt_state["sum"].add_(grads["w"])}


def _init(params: PyTree) -> PyTree:
    return {"sum": torch.zeros_like(params["w"])}


SOUND = Optimizer(_init, _update, consume=_consume)


def _trained(unit: TrainUnit) -> tuple[TrainUnit, State, list[Any]]:
    params = {"w": torch.tensor([1.0, -2.0])}
    return unit, State(params=params, key=key(0), opt_state=_init(params)), [torch.tensor(x) for x in (0.5, 2.0, 1.0)]


@_control("state.params['w']: 2 of 2 elements differ")
def another_update(broken: bool) -> Any:
    """An update in place that is another one."""

    def consume(grads: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        params, opt_state = _consume(grads, opt_state, params)
        return {"w": params["w"].mul_(0.5) if broken else params["w"]}, opt_state

    return _trained(TrainUnit(train_step=minimize(_objective, Optimizer(_init, _update, consume=consume))))


@_control("state.memory['change']")
def held_outside(broken: bool) -> Any:
    """Hooks that hold on to a tensor outside of the state, over a step."""
    held: list[Tensor] = []

    def hold(state: State) -> State:
        held[:] = [state.params["w"] if broken else state.params["w"].clone()]
        return state

    def change(state: State) -> State:
        return state.remember("change", (state.params["w"] - held[0]).abs().sum())

    return _trained(
        TrainUnit(
            train_step=minimize(_objective, SOUND),
            on_train_step_start=hold,
            on_train_step_end=change,
            memory={"change": lambda state: torch.tensor(0.0)},
        )
    )


@dataclass(frozen=True)
class Late(Guard):
    """Skips an update, by what the parameters were before it."""

    reads = ()

    def allows(self, before: State, slope: Slope) -> Tensor:
        return torch.tensor(True)

    def settle(self, before: State, after: State, allowed: Tensor) -> State:
        return after if before.params["w"][0] > 0.9 else after.replace(params=before.params)


@dataclass(frozen=True)
class Early(Late):
    """The same, decided before the update."""

    def allows(self, before: State, slope: Slope) -> Tensor:
        return before.params["w"][0] > 0.9

    def settle(self, before: State, after: State, allowed: Tensor) -> State:
        return after if allowed else after.replace(params=before.params, opt_state=before.opt_state)


@_control("state.params['w']")
def late_guard(broken: bool) -> Any:
    """A guard that goes back, after the update, to what has been written over."""
    amendments = (Late() if broken else Early(),)
    return _trained(TrainUnit(train_step=replace(minimize(_objective, SOUND), amendments=amendments)))


@dataclass(frozen=True)
class InPlace:
    """A step of one's own that donates."""

    broken: bool
    donates: bool = False

    def donating(self) -> "InPlace":
        return replace(self, donates=True)

    def __call__(self, state: State, batch: Any) -> tuple[State, Output]:
        w = state.params["w"]
        if not self.donates:
            return state.replace(params={"w": w - batch}), {"was": w.sum()}
        if self.broken:
            new, was = {"w": w.sub_(batch)}, w.sum()
        else:
            was, new = w.sum(), {"w": w.sub_(batch)}
        spend(state)
        return State(**{**_fields(state), "params": new}), {"was": was}


def _fields(state: State) -> dict[str, Any]:
    names = ("params", "key", "buffers", "opt_state", "progress", "metrics", "memory", "output", "stop")
    return {name: getattr(state, name) for name in names}


@_control("state.output['was']")
def read_after_writing(broken: bool) -> Any:
    """A step that reads what it has written over."""
    return _trained(TrainUnit(train_step=InPlace(broken)))
