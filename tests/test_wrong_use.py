"""Wrong uses, a row each: what raises, which builtin it is, and the words its message must have.

A message has three parts, so a row has three patterns: what was given, what holds, what to write instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import tnt_func as tnt
from tnt_func import errors
from tnt_func.progress import RunProgress
from tnt_func.state import State
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit

# Everything below is wrong on purpose, types included.
any_tnt: Any = tnt
UNIT: Any = TrainUnit(train_step=lambda state, batch: (state, {"loss": 1.0}))
EVAL: Any = EvalUnit(eval_step=lambda state, batch: (state, {"loss": 1.0}))
PREDICT: Any = PredictUnit(predict_step=lambda state, batch: (state, {}))
FIT: Any = FitUnit(train_unit=UNIT, eval_unit=EVAL)
STATE: Any = State(params={"w": torch.zeros(2)}, key=tnt.key(0))
DATA = [1.0, 2.0]


@dataclass
class Plain:
    x: int = 0


class Pairs(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


def train(unit: Any = UNIT, state: Any = STATE, data: Any = DATA, **more: Any) -> Callable[[], Any]:
    return lambda: any_tnt.train(unit, state, data, **{"max_epochs": 1, **more})


def fit(**more: Any) -> Callable[[], Any]:
    return lambda: any_tnt.fit(FIT, STATE, DATA, DATA, **{"max_epochs": 1, **more})


def evaluate(unit: Any = EVAL, state: Any = STATE, **more: Any) -> Callable[[], Any]:
    return lambda: any_tnt.evaluate(unit, state, DATA, **more)


def step(result: Callable[[State], Any]) -> Callable[[], Any]:
    """Training with a step that returns this of the state it is given."""
    return train(TrainUnit(train_step=lambda state, batch: result(state)))


def hook(result: Callable[[State], Any]) -> Callable[[], Any]:
    return train(TrainUnit(train_step=UNIT.train_step, on_train_step_end=result))


def params(value: Any) -> Callable[[], Any]:
    """Training with a step that makes this of the parameters."""
    return step(lambda state: (state.replace(params=value), {}))


def under_inference_mode() -> None:
    with torch.inference_mode():
        train()()


def first(iterator: Any) -> Any:
    return next(iterator)


ENDLESS = {"max_epochs": None}
LIMIT = ("a limit is a non-negative integer, math.inf, or None", "Write max_epochs=10")
LEAVES = ("leaves are tensors, bool, int, float, str and None", "Register a class of your own with @pytree")
STEP = ("a step returns the new state and its output", "Write return state.replace")
LOOP = ("the loop alone moves counters and keys", "Keep a number of your own in state.memory")
KEPT = ("A step keeps structure, shapes, dtypes and devices", "Cast the update")
SILENCE = ("would end the epoch in silence", r"Call next\(iterator, default\)")
CALLBACK = ("a callback is a tnt.Callback, whose hooks are State -> State", "pass what only watches as observers=")
ORDER = ("given in the order in which they run",)
OBSERVER = ("an observer is called with every event", "pass what changes the state as callbacks=")
DATA_IS = "data is an iterable of batches, a function epoch -> iterable or a Pipeline"


class Row(NamedTuple):
    call: Callable[[], Any]
    error: type[Exception]
    builtin: type[Exception]
    words: tuple[str, str, str]


def row(call: Callable[[], Any], error: type[Exception], builtin: type[Exception], *words: Any) -> Row:
    return Row(call, error, builtin, cast(Any, words))


def usage(call: Callable[[], Any], *words: Any) -> Row:
    return row(call, errors.UsageError, ValueError, *words)


def wrong_type(call: Callable[[], Any], *words: Any) -> Row:
    return row(call, errors.UsageTypeError, TypeError, *words)


def contract(call: Callable[[], Any], *words: Any) -> Row:
    return row(call, errors.ContractError, RuntimeError, *words)


def structure(call: Callable[[], Any], *words: Any) -> Row:
    return row(call, errors.StructureError, ValueError, *words)


def data_error(call: Callable[[], Any], *words: Any) -> Row:
    return row(call, errors.DataError, ValueError, *words)


ROWS: dict[str, Row] = {
    # What is passed as a unit
    "an EvalUnit to train": wrong_type(train(EVAL), "given an EvalUnit", "takes a TrainUnit", r"tnt.evaluate\(unit"),
    "a FitUnit to train": wrong_type(train(FIT), "given a FitUnit", "takes a TrainUnit", r"tnt.train\(unit.train_unit"),
    "a TrainUnit to fit": wrong_type(
        lambda: any_tnt.fit(UNIT, STATE, DATA, DATA, max_epochs=1),
        *("given a TrainUnit", "takes a FitUnit", r"tnt.FitUnit\(train_unit=..., eval_unit=...\), or tnt.train\("),
    ),
    "a module as a unit": wrong_type(
        train(nn.Linear(1, 1)), "given a Linear", "takes a TrainUnit", r"tnt.supervised\("
    ),
    "a function as a unit": wrong_type(
        train(max), "given a builtin", "takes a TrainUnit", r"tnt.TrainUnit\(train_step="
    ),
    "a class as a unit": wrong_type(
        evaluate(EvalUnit), "given the class EvalUnit", "takes an EvalUnit", "Write tnt.Eval"
    ),
    "a step that is no function": wrong_type(
        lambda: TrainUnit(train_step=cast(Any, nn)),
        "a module as its train_step",
        "hooks and .* are functions",
        "Write a def",
    ),
    "a metric that is none": wrong_type(
        lambda: TrainUnit(train_step=UNIT.train_step, metrics=cast(Any, {"loss": "mean"})),
        *("a str as its metric 'loss'", "that is a Metric", r"metrics={'loss': tnt.metrics.mean"),
    ),
    # What is passed as a state
    "a dict as a state": wrong_type(
        train(state={}), "given a dict as its state", "takes a State", r"tnt.State\(params="
    ),
    "parameters as a state": wrong_type(
        evaluate(state=torch.zeros(2)), "given a Tensor", "takes a State", "Write tnt.State"
    ),
    "a number as a key": wrong_type(
        train(state=STATE.replace(key=0)), "state.key is 0, an int", "a run draws from a Key", r"key=tnt.key\(0\)"
    ),
    "a dataclass in a state": structure(
        train(state=STATE.replace(buffers=Plain())), "state.buffers is a Plain", *LEAVES
    ),
    "an array in a state": structure(
        train(state=STATE.replace(params={"w": np.zeros(2)})), r"state.params\['w'\] is a ndarray", *LEAVES
    ),
    "a lambda in a state": structure(
        train(state=STATE.remember("f", lambda: 0)), r"memory\['f'\] is a function", *LEAVES
    ),
    "an unknown field": usage(
        lambda: STATE.replace(param=1),
        r"given \['param'\]",
        r"a State has \['buffers', .*'params'",
        "Write one of those",
    ),
    # Keys
    "a negative seed": usage(
        lambda: tnt.key(-1), r"key\(-1\) was given", "from 0 to 2", r"Write tnt.key\(18446744073709"
    ),
    "a seed as text": wrong_type(
        lambda: any_tnt.key("0"), "seed='0'", "violates type hint", r"Write key\(..., seed=...\)"
    ),
    "a key folded by a number of NumPy": wrong_type(
        lambda: any_tnt.fold_in(tnt.key(0), np.int64(1)), "an int64", "by a str or an int", r"fold_in\(key, int\(number"
    ),
    # Limits
    "a limit as text": wrong_type(train(max_epochs="3"), "max_epochs='3'", "int | float | None", r"max_epochs=...\)"),
    "a limit of half an epoch": usage(train(max_epochs=1.5), "max_epochs=1.5", *LIMIT),
    "a limit that is a truth": usage(train(max_epochs=True), "max_epochs=True", *LIMIT),
    "a negative limit": usage(train(max_epochs=-1), "max_epochs=-1", *LIMIT),
    "a limit that is no number": usage(train(max_epochs=math.nan), "max_epochs=nan", *LIMIT),
    "no limit": usage(
        train(**ENDLESS), "neither max_epochs nor", "a run needs one that ends it", "max_epochs=math.inf"
    ),
    "no step in any epoch": usage(
        train(**ENDLESS, max_steps=3, max_steps_per_epoch=0),
        *("max_steps_per_epoch=0 was given without max_epochs", "never reach max_steps", "Write max_epochs=10"),
    ),
    "a negative cadence": usage(
        fit(evaluate_every_n_steps=-2), "evaluate_every_n_steps=-2", "a positive integer, 0 for never", "n_steps=1, say"
    ),
    # Callbacks and observers
    "a callback alone": wrong_type(
        train(callbacks=Callback(name="c")), "is a Callback, not a", *ORDER, r"callbacks=\[...\]"
    ),
    "a function as a callback": wrong_type(
        train(callbacks=[lambda state: state]), "callbacks has a function", *CALLBACK
    ),
    "a callback as an observer": wrong_type(train(observers=[Callback(name="c")]), "has a Callback", *OBSERVER),
    "an observer alone": wrong_type(train(observers=max), "observers is a builtin", *ORDER, r"observers=\[...\]"),
    "a name twice": usage(
        train(callbacks=[Callback(name="c")] * 2),
        r"named \['c', 'c'\]",
        "'c' is there twice",
        "Give one another name=",
    ),
    "the loop's own name": usage(
        lambda: Callback(name="data", memory=lambda state: 0),
        r"memory\['data'\]",
        "the loop notes there",
        "another name",
    ),
    "a name that the unit has": usage(
        train(TrainUnit(train_step=UNIT.train_step, memory={"c": id}), callbacks=[Callback(name="c", memory=id)]),
        *("the name 'c' is taken", "has a slot of its own", "Give one of them another name="),
    ),
    "hooks that would never run": usage(
        train(callbacks=[Callback(name="c", on_eval_end=lambda state: state)]),
        *("callback 'c' has eval hooks", "a TrainUnit runs train only", r"Attach it to the FitUnit: tnt.fit\("),
    ),
    "a memory that is no function": wrong_type(
        lambda: Callback(name="c", memory=cast(Any, 0)),
        r"an int as its memory\['c'\]",
        "are functions",
        "Write a def",
    ),
    "generators that there are not": usage(
        lambda: EvalUnit(eval_step=EVAL.eval_step, draws=cast(Any, "torch")),
        "draws='torch'",
        "a tuple of some of",
        r"draws=\('torch',\)",
    ),
    "pause_when that is no function": wrong_type(
        train(pause_when=5), "pause_when=5", "violates type hint", r"Write train\(..., pause_when=...\)"
    ),
    # Data
    "a dict as data": wrong_type(train(data={"x": [1]}), "the train data is a dict", DATA_IS, r"Write DataLoader\("),
    "a path as data": wrong_type(train(data="train.csv"), "the train data is a str", DATA_IS, r"Write DataLoader\("),
    "no data": wrong_type(train(data=None), "the train data is None", DATA_IS, r"Write \[batch, ...\]"),
    "a map-style dataset": wrong_type(
        train(data=Pairs()), "the train data is a Pairs", DATA_IS, r"Write DataLoader\(dataset, batch_size=...\)"
    ),
    "an iterator for two epochs": data_error(
        train(data=iter(DATA), max_epochs=2),
        *("a one-shot list_iterator", "an iterator gives its batches once", "a function of the epoch: lambda epoch:"),
    ),
    "no batch and only max_steps": data_error(
        train(data=[], **ENDLESS, max_steps=3),
        *("epoch 0 gave no batch", "no limit can be reached", "Pass data that has batches, or max_epochs"),
    ),
    # Steps
    "a step without a result": contract(step(lambda s: None), "train_step returned None", *STEP),
    "a step without an output": contract(step(lambda s: s), "train_step returned a State", *STEP),
    "a swapped pair": contract(step(lambda s: ({}, s)), "returned a tuple of dict, State", *STEP),
    "a triple": contract(step(lambda s: (s, 1, {})), "returned a tuple of State, int, dict", *STEP),
    "a step that moves the key": contract(step(lambda s: (s.replace(key=tnt.key(1)), {})), "changed state.key", *LOOP),
    "a step that counts": contract(
        step(lambda s: (s.replace(progress=RunProgress()), {})), "changed state.prog", *LOOP
    ),
    "a step that stops": contract(
        step(lambda s: (s.request_stop("done"), {})),
        "set state.stop to 'done'",
        "for hooks",
        "in on_train_step_end: return",
    ),
    "another structure": structure(params({"v": torch.zeros(2)}), r"\['w'\] from float32\[2\] to nothing", *KEPT),
    "another dtype": structure(params({"w": torch.zeros(2).double()}), r"from float32\[2\] to float64\[2\]", *KEPT),
    "another shape": structure(params({"w": torch.zeros(1, 2)}), r"from float32\[2\] to float32\[1, 2\]", *KEPT),
    "a step that raises StopIteration": contract(
        step(lambda s: first(iter([]))), "train_step raised StopIter", *SILENCE
    ),
    "evaluation that trains": contract(
        evaluate(EvalUnit(eval_step=lambda s, b: (s.replace(params={}), {}))),
        *("eval_step changed state.params", "evaluation and prediction are reads", "Return state as it came"),
    ),
    "a metric of what is not there": contract(
        train(TrainUnit(train_step=UNIT.train_step, metrics={"a": tnt.metrics.mean("acc")})),
        *(r"a metric reads output\['acc'\]", r"the step's output has \['loss'\]", "Return it, or name one of those"),
    ),
    "a metric of no number": contract(
        train(TrainUnit(train_step=lambda s, b: (s, {"loss": None}), metrics={"a": tnt.metrics.mean("loss")})),
        *(r"output\['loss'\], which is None", "takes a number, a tensor or an array", "or name another entry"),
    ),
    "a metric of no mapping": contract(
        train(TrainUnit(train_step=lambda s, b: (s, 1.0), metrics={"a": tnt.metrics.mean("loss")})),
        *(
            "returned a float as its output",
            "the output of a unit with metrics is a mapping",
            r"Return \(state, {'loss'",
        ),
    ),
    # Hooks
    "a hook without a result": contract(
        hook(lambda s: cast(Any, None)),
        "on_train_step_end returned None",
        "takes a State and returns one",
        "`return state`",
    ),
    "a hook that counts": contract(hook(lambda s: s.replace(progress=RunProgress())), "changed state.progress", *LOOP),
    "a hook that raises StopIteration": contract(
        hook(lambda s: first(iter([]))), "TrainUnit.on_train_step_end raised StopIteration", *SILENCE
    ),
    # Surroundings
    "inference mode": usage(
        under_inference_mode, r"begun under torch.inference_mode\(\)", "can never be differentiated", "Call it outside"
    ),
    "an unknown phase": wrong_type(
        lambda: any_tnt.batches(DATA, STATE, phase="test"), "phase='test'", "violates type hint", r"phase=...\)"
    ),
    "an unknown phase of metrics": wrong_type(
        lambda: any_tnt.metrics.compute(STATE, "test"), "phase='test'", "violates type hint", r"phase=...\)"
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_use_is_told_what_was_given_what_holds_and_what_to_write(name: str):
    wrong, error, builtin, words = ROWS[name]
    given, holds, instead = words
    with pytest.raises(error, match=f"(?s){given}.*{holds}.*{instead}") as caught:
        wrong()
    assert type(caught.value) is error and isinstance(caught.value, builtin)


def test_the_table_is_as_long_as_it_claims():
    assert len(ROWS) >= 30
