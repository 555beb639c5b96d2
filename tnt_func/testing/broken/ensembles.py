"""What a member must not do in an ensemble (law 11): each way to break it beside its sound twin.

Example:
    >>> from tnt_func.testing.ensemble import check_ensemble
    >>> make, words = ENSEMBLES["drawing_step"]
    >>> check_ensemble(*make(False))
    >>> check_ensemble(*make(True))
    Traceback (most recent call last):
    tnt_func.errors.LawError: law 11 (ensemble) is broken after train step_done (epoch 0, step 1): member 1 of 3 is ...
      params: 1 of 1 elements differ, ...
    ...
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tnt_func import metrics, rng
from tnt_func.metrics import Metric
from tnt_func.state import State
from tnt_func.types import Output
from tnt_func.unit import Step, TrainUnit

Make = Callable[[bool], tuple[TrainUnit, list[State], list[Any]]]


class Control(NamedTuple):
    """What `check_ensemble` is given, broken or sound, anew at every call; what the message says."""

    make: Make
    words: tuple[str, ...]


ENSEMBLES: dict[str, Control] = {}
"""Every control by its name."""


def _control(*words: str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        ENSEMBLES[getattr(make, "__name__", "")] = Control(make, words)
        return make

    return enter


def _three(step: Step, **options: Any) -> tuple[TrainUnit, list[State], list[Any]]:
    states = [State(params=torch.tensor([x]), key=rng.key(0)) for x in (1.0, 2.0, -3.0)]
    return TrainUnit(train_step=step, **options), states, [torch.tensor(x) for x in (0.5, 0.25)]


@_control("member 1 of 3", "params: 1 of 1 elements differ", "Give noise as data")
def drawing_step(broken: bool) -> Any:
    def step(state: State, batch: Any) -> tuple[State, Output]:
        noise = torch.rand(1).double() if broken else batch
        return state.replace(params=state.params - noise), {}

    return _three(step)


@_control("member 0 of 3", "metrics['train']['total'].total")
def metric_of_all_members(broken: bool) -> Any:
    def step(state: State, batch: Any) -> tuple[State, Output]:
        return state.replace(params=state.params * batch), {"loss": state.params.sum()}

    def of(output: Output) -> metrics.Total:
        return metrics.Total(output["loss"].sum() if broken else output["loss"])

    return _three(step, metrics={"total": Metric(lambda: metrics.Total(torch.tensor(0.0).double()), of, True)})


@_control("member 0 of 3", "params: 1 of 1 elements differ")
def step_that_counts(broken: bool) -> Any:
    calls = list[int]()

    def step(state: State, batch: Any) -> tuple[State, Output]:
        calls.append(1)
        return state.replace(params=state.params + (len(calls) if broken else 1) * batch), {}

    return _three(step)
