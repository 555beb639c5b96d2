"""What every entry point is given, checked before anything runs: a unit, a state, callbacks, observers.

Example:
    >>> from tnt_func.unit import EvalUnit, TrainUnit
    >>> @expects(TrainUnit)
    ... def train(unit, state): return "fine"
    >>> train(EvalUnit(eval_step=max), None)
    Traceback (most recent call last):
    tnt_func.errors.UsageTypeError: train was given an EvalUnit as its unit; it takes a TrainUnit. Write ...
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

from torch import nn

from tnt_func.errors import UsageTypeError, kind_of
from tnt_func.rng import Key
from tnt_func.state import State
from tnt_func.unit import Callback, FitUnit

P = ParamSpec("P")
R = TypeVar("R")
U = TypeVar("U")

_ENTRY = {"TrainUnit": "tnt.train", "EvalUnit": "tnt.evaluate", "PredictUnit": "tnt.predict", "FitUnit": "tnt.fit"}


def expects(
    *kinds: type,
) -> Callable[[Callable[Concatenate[U, State, P], R]], Callable[Concatenate[U, State, P], R]]:
    """Check what every entry point is given: a unit of one of these kinds, a state, callbacks, observers.

    Example:
        >>> @expects(FitUnit)
        ... def run(unit, state): return "fine"
        >>> run(5, None)
        Traceback (most recent call last):
        tnt_func.errors.UsageTypeError: run was given an int as its unit; it takes a FitUnit. Write ...
    """

    def check(function: Callable[Concatenate[U, State, P], R]) -> Callable[Concatenate[U, State, P], R]:
        name = function.__name__

        @functools.wraps(function)
        def checked(unit: U, state: State, *args: P.args, **kwargs: P.kwargs) -> R:
            if not isinstance(unit, kinds):
                _refuse_unit(name, kinds, unit)
            if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageTypeError(
                    f"{name} was given {kind_of(state)} as its state; it takes a State. Write "
                    "tnt.State(params=..., key=tnt.key(0))."
                )
            if not isinstance(state.key, Key):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageTypeError(
                    f"state.key is {state.key!r}, {kind_of(state.key)}; a run draws from a Key. Write key=tnt.key(0)."
                )
            if "callbacks" in kwargs:
                _check_each("callbacks", kwargs["callbacks"], lambda item: isinstance(item, Callback), _CALLBACK)
            if "observers" in kwargs:
                _check_each("observers", kwargs["observers"], callable, _OBSERVER)
            return function(unit, state, *args, **kwargs)

        return checked

    return check


_CALLBACK = (
    "a callback is a tnt.Callback, whose hooks are State -> State. Write tnt.Callback(name=..., "
    "on_train_step_end=...), and pass what only watches as observers=[...]."
)
_OBSERVER = (
    "an observer is called with every event. Write lambda event: ..., or tnt.observers.recorder(writer) for a writer "
    "of rows, and pass what changes the state as callbacks=[...]."
)


def _check_each(name: str, given: Any, fits: Callable[[Any], bool], rule: str) -> None:
    if not isinstance(given, Sequence):
        order = f"{name} are given in the order in which they run. Write {name}=[...]."
        raise UsageTypeError(f"{name} is {kind_of(given)}, not a sequence; {order}")
    for item in cast(Sequence[Any], given):
        if not fits(item):
            raise UsageTypeError(f"{name} has {kind_of(item)}; {rule}")


def _refuse_unit(name: str, kinds: Sequence[type], unit: Any) -> NoReturn:
    kind = type(unit).__name__
    takes = [k.__name__ for k in kinds]
    if isinstance(unit, FitUnit):
        advice = f"Write tnt.{name}(unit.{kinds[0].__name__.removesuffix('Unit').lower()}_unit, ...)."
    elif kind in _ENTRY and FitUnit in kinds:
        advice = f"Write tnt.FitUnit(train_unit=..., eval_unit=...), or {_ENTRY[kind]}(unit, ...)."
    elif kind in _ENTRY:
        advice = f"Write {_ENTRY[kind]}(unit, ...)."
    elif isinstance(unit, nn.Module):
        advice = "Write unit, state = tnt.supervised(module, loss, optimizer, key=tnt.key(0))."
    elif kinds[0] is FitUnit:
        advice = "Write tnt.FitUnit(train_unit=..., eval_unit=...)."
    else:
        advice = f"Write tnt.{takes[0]}({takes[0].removesuffix('Unit').lower()}_step=...)."
    names = takes[0] if len(takes) == 1 else f"{', '.join(takes[:-1])} or {takes[-1]}"
    article = "an" if names.startswith("E") else "a"
    raise UsageTypeError(f"{name} was given {kind_of(unit)} as its unit; it takes {article} {names}. {advice}")
