import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

import tnt_func as tnt
from tnt_func import callbacks, metrics, optim, schedules, transforms
from tnt_func.errors import UsageTypeError
from tnt_func.factories import Brief, Formula, factory, said
from tnt_func.optim import GradientTransform, Optimizer
from tnt_func.schedules import Schedule

KINDS: tuple[Any, ...] = (Optimizer, GradientTransform, Schedule, tnt.Metric, tnt.Callback, tnt.pausing.Pause)


def step(state: tnt.State, batch: Any) -> tuple[tnt.State, Any]:
    return state, {}


def is_bias(path: str) -> bool:
    return "bias" in path


def descending() -> tnt.TrainUnit:
    return tnt.TrainUnit(train_step=tnt.minimize(max, optim.sgd(0.1)))


UNIT = tnt.TrainUnit(train_step=step)
WRITTEN: list[tuple[str, Callable[[], Any]]] = [
    ("adamw()", optim.adamw),
    ("adamw(0.001, weight_decay=0.01)", lambda: optim.adamw(weight_decay=0.01, lr=1e-3)),
    ("muon(weight_decay=0.0, nesterov=False)", lambda: optim.muon(nesterov=False, weight_decay=0.0)),
    ("add_noise(Key(seed=3), eta=1.0)", lambda: optim.add_noise(tnt.key(3), eta=1.0)),
    ("from_torch(SGD, lr=0.1)", lambda: optim.from_torch(torch.optim.SGD, lr=0.1)),
    (
        "chain(clip_by_global_norm(1.0), accumulate(adam(cosine(0.1, steps=9)), 2))",
        lambda: optim.chain(
            optim.clip_by_global_norm(max_norm=1.0), optim.accumulate(optim.adam(schedules.cosine(0.1, steps=9)), 2)
        ),
    ),
    (
        "grouped(sgd(0.1), [(is_bias, {'lr': 0.2}), (<lambda>, adam())])",
        lambda: optim.grouped(optim.sgd(0.1), [(is_bias, {"lr": 0.2}), (eval("lambda path: True"), optim.adam())]),
    ),
    ("linear(0.1, 0.0, steps=9)", lambda: schedules.linear(0.1, 0.0, steps=9)),
    (
        "warmup(warmup_stable_decay(1.0, warmup_steps=0, stable_steps=2, decay_steps=3), steps=2)",
        lambda: schedules.warmup(
            schedules.warmup_stable_decay(1.0, warmup_steps=0, stable_steps=2, decay_steps=3), steps=2
        ),
    ),
    (
        "any_of(time_limit(3600), until(<lambda>))",
        lambda: tnt.pausing.any_of(tnt.pausing.time_limit(seconds=3600), tnt.pausing.until(eval("lambda: True"))),
    ),
    ("mean('loss', weight='num_samples')", lambda: metrics.mean("loss", weight="num_samples")),
    ("accuracy('binary', preds='p')", lambda: metrics.accuracy("binary", preds="p")),
    ("early_stopping('loss', patience=5)", lambda: callbacks.early_stopping("loss", patience=5)),
    (
        "compiled(microbatch(TrainUnit(train_step=Descent(objective=max, optimizer=sgd(0.1))), 4), dynamic=False)",
        lambda: tnt.compiled(transforms.microbatch(descending(), 4), dynamic=False),
    ),
    (
        "donate(TrainUnit(train_step=Descent(objective=max, optimizer=sgd(0.1))))",
        lambda: tnt.donate(descending()),
    ),
    ("ensemble(TrainUnit(train_step=step), 3)", lambda: tnt.ensemble(UNIT, 3)),
    ("alternate(TrainUnit(train_step=step), turns=(0, 0))", lambda: tnt.alternate(UNIT, turns=(0, 0))),
]


@pytest.mark.parametrize("written", [written for written, _ in WRITTEN])
def test_what_a_factory_makes_says_how(written: str):
    assert repr(dict(WRITTEN)[written]()) == written


def makes(kind: Any) -> bool:
    """Whether what is returned is one of those kinds, or the kind of unit that is given."""
    return kind in KINDS or bool(isinstance(kind, TypeVar) and (kind.__bound__ or kind.__constraints__))


def test_every_public_function_that_makes_such_a_thing_is_a_factory():
    gathered = (tnt, optim, schedules, metrics, callbacks, transforms, tnt.ensembles, tnt.distributed, tnt.pausing)
    found = {
        value
        for module in gathered
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and makes(value.__annotations__.get("return"))
    }
    others = {value.__name__ for value in found if value.__code__ is not factory(step).__code__}
    assert others == {"attach", "factory"} and len(found) > 50


def test_what_is_given_back_and_what_is_made_of_it_say_what_they_are():
    one = schedules.constant(1)
    assert schedules.warmup(one, steps=0) is one and repr(one) == "constant(1)"
    assert optim.chain(sgd := optim.sgd(0.1)) is sgd and repr(sgd) == "sgd(0.1)"
    stop = callbacks.stop_on_nonfinite()
    assert repr(replace(stop, name="mine")).startswith("Callback(name='mine', ")
    assert repr(copy.copy(stop)) == repr(copy.deepcopy(stop)) == repr(stop) and replace(stop) == stop
    by_hand = Optimizer(init=dict, update=optim.sgd(0.1).update)
    assert repr(by_hand) == "Optimizer(init=dict, update=leafwise.<locals>.update)"


def test_a_factory_checks_its_arguments_and_keeps_its_name():
    with pytest.raises(UsageTypeError, match=r"adamw\(..., lr=...\)"):
        optim.adamw("fast")  # pyright: ignore[reportArgumentType]
    assert optim.adamw.__name__ == "adamw" and "weight_decay" in inspect.signature(optim.adamw).parameters


@factory
def folded(keep: Any) -> Formula:
    return Formula(max)


def test_what_is_made_can_be_sent_to_another_process():
    made = folded(step)
    assert repr(pickle.loads(pickle.dumps(made))) == repr(made) == "folded(step)"


@dataclass(frozen=True, repr=False)
class Held(Brief):
    what: Any
    other: Any = 1.0


def test_addresses_and_tensors_are_left_out():
    assert repr(Held(object())) == repr(Held(object(), 1)) == "Held(what=<object object>)"
    assert repr(Held(torch.zeros(3, 2), torch.tensor(0.5))) == "Held(what=float32[3, 2], other=tensor(0.5000))"
    assert repr(Held(nn.Sequential(nn.ReLU()))) == "Held(what=Sequential(...))"
    assert said([Held(step), max, Held, said]).count("Held") == 2 and "0x" not in said([Held(step).__repr__])
