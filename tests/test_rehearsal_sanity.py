"""sanity_check: evaluation first, and the cheap laws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rehearsal_units import BATCHES, descend, linear, loader
from torch import nn

import tnt_func as tnt
from tnt_func.rehearsal import sanity_check
from tnt_func.state import State
from tnt_func.unit import EvalUnit, TrainUnit


def test_a_sane_unit_is_told_so():
    unit, state = linear(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)))
    found = sanity_check(unit, state, loader(shuffle=True), loader())
    assert found.ok and list(found.facts) == ["eval", "eval batch", "train", "train batch", "metrics"]
    evaluated = tnt.evaluate(unit.eval_unit, state, loader(), max_steps_per_epoch=2)
    assert found.numbers["eval loss"] == tnt.metrics.compute(evaluated, "eval")["loss"]
    assert sanity_check(unit.eval_unit, state, loader()).ok


def spoiling(spoil: Callable[[State, Any], Any]) -> TrainUnit:
    """A unit that also does what it should not."""

    def step(state: State, batch: Any) -> Any:
        spoil(state, batch)
        return state.replace(params=descend(state.params, batch)), {"loss": batch.sum()}

    return TrainUnit(train_step=step)


def leave_gradients(state: State, batch: Any) -> None:
    (state.opt_state["scale"] * batch.sum()).backward()


def draw(state: State, batch: Any) -> Any:
    return state.replace(params={name: torch.rand(2) for name in state.params}), {}


def zero(state: State) -> State:
    state.params["v"].zero_()
    return state


def widen(state: State) -> State:
    return state.replace(params={name: leaf.double() for name, leaf in state.params.items()})


sound = spoiling(lambda state, batch: None).train_step
WROTE = "wrote in place into"
BROKEN: dict[str, tuple[TrainUnit, str]] = {
    "a write into the state": (
        spoiling(lambda state, batch: state.params["w"].mul_(2)),
        f"train_step {WROTE} params['w'].",
    ),
    "a write into the batch": (spoiling(lambda state, batch: batch.mul_(2)), f"train_step {WROTE} its batch."),
    "a gradient left": (spoiling(leave_gradients), f"train_step {WROTE} opt_state['scale']."),
    "a hook that writes": (
        TrainUnit(train_step=sound, on_train_epoch_end=zero),
        f"an on_train_epoch_end hook {WROTE} params['v'].",
    ),
    "an undeclared draw": (
        TrainUnit(train_step=draw, draws=()),
        "Two runs of 2 train steps from one state differ: state.params['w']: 2 of 2 elements differ",
    ),
    "another dtype later on": (
        TrainUnit(train_step=sound, on_train_epoch_end=widen),
        "2 train steps changed params['w'] from float32[2] to float64[2], params['v'] from ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_unit_is_found_out(name: str):
    unit, expected = BROKEN[name]
    scale = torch.tensor(1.0, requires_grad=True)
    state = State(params={"w": torch.ones(2), "v": torch.ones(2)}, key=tnt.key(0), opt_state={"scale": scale})
    findings = sanity_check(unit, state, BATCHES).findings
    assert any(finding.startswith(expected) for finding in findings), findings


def test_an_evaluation_that_counts_outside_the_state_is_found_out():
    calls: list[int] = []

    def eval_step(state: State, batch: Any) -> Any:
        calls.append(1)
        return state, {"loss": float(len(calls))}

    unit = EvalUnit(eval_step=eval_step)
    (finding,) = sanity_check(unit, State(params={}, key=tnt.key(0)), BATCHES).findings
    assert finding.startswith("Two runs of 2 eval steps from one state differ: outputs[0]['loss']: float 1.0 became ")
