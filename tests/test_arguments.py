"""What every entry point is given, checked before anything runs."""

import inspect
from typing import Any, cast

import pytest
import torch

import tnt_func as tnt
from tnt_func.arguments import expects
from tnt_func.errors import UsageTypeError
from tnt_func.state import State
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit

STATE = State(params={}, key=tnt.key(0))
TRAIN = TrainUnit(train_step=lambda state, batch: (state, {}))
EVAL = EvalUnit(eval_step=lambda state, batch: (state, {}))
PREDICT = PredictUnit(predict_step=lambda state, batch: (state, {}))
FIT = FitUnit(train_unit=TRAIN, eval_unit=EVAL)


@expects(TrainUnit)
def train(
    unit: TrainUnit, state: State, data: Any = None, *, callbacks: Any = (), observers: Any = ()
) -> tuple[Any, ...]:
    """Train."""
    return unit, state, data, callbacks, observers


@expects(EvalUnit)
def evaluate(unit: EvalUnit, state: State) -> str:
    return "evaluated"


@expects(FitUnit)
def fit(unit: FitUnit, state: State) -> str:
    return "fitted"


@expects(TrainUnit, EvalUnit, PredictUnit)
def step(unit: Any, state: State) -> str:
    return "stepped"


def test_what_fits_goes_through_by_position_and_by_name():
    callbacks, observers = [Callback(name="a")], (print,)
    given = (TRAIN, STATE, [1], callbacks, observers)
    assert train(TRAIN, STATE, [1], callbacks=callbacks, observers=observers) == given
    assert cast(Any, train)(unit=TRAIN, state=STATE, data=[1], callbacks=callbacks, observers=observers) == given
    assert train(TRAIN, STATE) == (TRAIN, STATE, None, (), ())
    assert [step(unit, STATE) for unit in (TRAIN, EVAL, PREDICT)] == ["stepped"] * 3


def test_the_function_keeps_its_name_its_docstring_and_its_signature():
    assert (train.__name__, train.__doc__) == ("train", "Train.")
    assert list(inspect.signature(train).parameters) == ["unit", "state", "data", "callbacks", "observers"]


class Subunit(TrainUnit):
    pass


def test_a_subclass_of_the_unit_fits():
    unit = Subunit(train_step=TRAIN.train_step)
    assert train(unit, STATE)[0] is unit


NEW = "tnt.TrainUnit(train_step=...)"
REFUSALS: dict[str, tuple[Any, Any, str, str, str]] = {
    "another phase": (train, EVAL, "an EvalUnit", "a TrainUnit", "tnt.evaluate(unit, ...)"),
    "predict": (train, PREDICT, "a PredictUnit", "a TrainUnit", "tnt.predict(unit, ...)"),
    "train": (evaluate, TRAIN, "a TrainUnit", "an EvalUnit", "tnt.train(unit, ...)"),
    "a whole": (train, FIT, "a FitUnit", "a TrainUnit", "tnt.train(unit.train_unit, ...)"),
    "a whole to evaluate": (evaluate, FIT, "a FitUnit", "an EvalUnit", "tnt.evaluate(unit.eval_unit, ...)"),
    "a whole to a step": (
        step,
        FIT,
        "a FitUnit",
        "a TrainUnit, EvalUnit or PredictUnit",
        "tnt.step(unit.train_unit, ...)",
    ),
    "a part": (
        fit,
        TRAIN,
        "a TrainUnit",
        "a FitUnit",
        "tnt.FitUnit(train_unit=..., eval_unit=...), or tnt.train(unit, ...)",
    ),
    "a function": (train, TRAIN.train_step, "a function", "a TrainUnit", NEW),
    "a class": (train, TrainUnit, "the class TrainUnit", "a TrainUnit", NEW),
    "a module": (
        *(train, torch.nn.Linear(1, 1), "a Linear", "a TrainUnit"),
        "unit, state = tnt.supervised(module, loss, optimizer, key=tnt.key(0))",
    ),
    "None": (evaluate, None, "None", "an EvalUnit", "tnt.EvalUnit(eval_step=...)"),
    "an int": (fit, 3, "an int", "a FitUnit", "tnt.FitUnit(train_unit=..., eval_unit=...)"),
    "nothing to prepare": (tnt.prepare, 3, "an int", "a TrainUnit, EvalUnit, PredictUnit or FitUnit", NEW),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_another_unit_is_refused(name: str):
    function, unit, given, takes, instead = REFUSALS[name]
    with pytest.raises(UsageTypeError) as caught:
        function(unit, STATE)
    expected = f"{function.__name__} was given {given} as its unit; it takes {takes}. Write {instead}."
    assert str(caught.value) == expected


def test_a_state_is_a_state():
    for given, kind in (({}, "a dict"), (None, "None"), (TRAIN, "a TrainUnit")):
        with pytest.raises(
            UsageTypeError, match=rf"given {kind} as its state; it takes a State. Write tnt.State\(params"
        ):
            train(TRAIN, given)  # pyright: ignore[reportArgumentType]


SEQUENCES: list[tuple[dict[str, Any], str]] = [
    (
        {"callbacks": Callback(name="a")},
        r"callbacks is a Callback, not a sequence; callbacks are given in the order .* Write callbacks=\[...\].",
    ),
    ({"callbacks": None}, "callbacks is None, not a sequence"),
    ({"callbacks": (each for each in ())}, "callbacks is a generator, not a sequence"),
    ({"callbacks": [Callback(name="a"), print]}, r"callbacks has a builtin_function_or_method; .* as observers="),
    (
        {"observers": print},
        r"observers is a builtin_function_or_method, not a sequence; .* Write observers=\[...\].",
    ),
    ({"observers": [print, Callback(name="a")]}, r"observers has a Callback; .* as callbacks=\[...\]."),
    ({"observers": "log"}, "observers has a str"),
]


@pytest.mark.parametrize(("arguments", "words"), SEQUENCES, ids=range(len(SEQUENCES)))
def test_callbacks_and_observers_are_sequences_of_their_kind(arguments: dict[str, Any], words: str):
    with pytest.raises(UsageTypeError, match=words):
        train(TRAIN, STATE, **arguments)
