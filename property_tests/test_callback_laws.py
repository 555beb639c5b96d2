"""Law 8 of callbacks: however they are attached, the run is the same; and law 5, whatever stack of them is resumed."""

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnt_func import callbacks, metrics, optim, rng, testing
from tnt_func.errors import LawError
from tnt_func.recipes import minimize
from tnt_func.state import State
from tnt_func.testing.case import Case
from tnt_func.testing.strategies import cases
from tnt_func.unit import Callback, EvalUnit, FitUnit, TrainUnit, attach

RUNS = settings.default.max_examples // 20 if settings.default else 10
"""Each example is some dozens of runs."""


@given(cases())
def test_attaching_has_an_identity_and_is_associative(case: Case):
    case.check(testing.check_composition)


@given(cases())
def test_units_out_of_attaching_are_equal(case: Case):
    """As values, before anything runs: the same hooks, in the same order, by the same names."""
    assert attach(case.unit) == case.unit
    one_by_one = case.unit
    for callback in case.callbacks:
        one_by_one = attach(one_by_one, callback)
    assert one_by_one == attach(case.unit, *case.callbacks)


# The callbacks of the library, in stacks.

OPTIMIZER = optim.grouped(optim.sgd(0.3, momentum=0.5), [(lambda path: "b" in path, optim.frozen(optim.adamw(0.1)))])


def objective(params: Any, state: State, batch: Any) -> Any:
    loss = ((params["a"] * batch + params["b"] - 1) ** 2).mean()
    return loss, (state.buffers, {"loss": loss.detach()})


def eval_step(state: State, batch: Any) -> Any:
    return state, objective(state.params, state, batch)[1][1]


LOSS = {"loss": metrics.mean("loss")}
UNIT = FitUnit(
    train_unit=TrainUnit(train_step=minimize(objective, OPTIMIZER), metrics=LOSS),
    eval_unit=EvalUnit(eval_step=eval_step, metrics=LOSS),
)
phases: st.SearchStrategy[Any] = st.sampled_from(["eval", "train"])
modes: st.SearchStrategy[Any] = st.sampled_from(["min", "max"])
looks: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"phase": phases, "mode": modes},
    optional={"interval": st.sampled_from(["step", "epoch"]), "interval_freq": st.integers(1, 2)},
)
patiences = st.integers(0, 2)


KINDS: dict[str, Any] = {
    "early_stopping": lambda name, look, patience, threshold: callbacks.early_stopping(
        "loss", name=name, patience=patience, min_delta=threshold, **look
    ),
    "reduce_lr_on_plateau": lambda name, look, patience, threshold: callbacks.reduce_lr_on_plateau(
        "loss", name=name, patience=patience, threshold=threshold, cooldown=1, factor=0.5, **look
    ),
    "keep_best": lambda name, look, patience, threshold: callbacks.keep_best("loss", name=name, **look),
    "unfreeze_at": lambda name, look, patience, threshold: callbacks.unfreeze_at(steps=patience, name=name),
    "stop_on_nonfinite": lambda name, look, patience, threshold: callbacks.stop_on_nonfinite(
        params=True, phase=look["phase"], name=name
    ),
    "lambda_callback": lambda name, look, patience, threshold: callbacks.lambda_callback(
        name, on_eval_end=lambda state: None, on_train_step_end=lambda state: state
    ),
}


@st.composite
def stacks(draw: st.DrawFn) -> list[Callback]:
    """Up to three callbacks in any order, of one kind twice as well."""
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3))
    threshold = st.sampled_from([0.0, 0.25])
    return [KINDS[kind](f"{n}", draw(looks), draw(patiences), draw(threshold)) for n, kind in enumerate(kinds)]


def fitted(stack: list[Callback], batches: list[float]) -> Case:
    params = {"a": torch.tensor(0.5, dtype=torch.float64), "b": torch.tensor(-0.5, dtype=torch.float64)}
    state = State(params=params, key=rng.key(0), opt_state=OPTIMIZER.init(params))
    data = [torch.tensor([x, 1.0], dtype=torch.float64) for x in batches]
    return Case.of(UNIT, state, data, data[:1], stack, {"max_epochs": 2})


batch_lists = st.lists(st.sampled_from([1.0, -1.0, 0.5, 3.0, float("nan")]), min_size=1, max_size=2)


@settings(max_examples=RUNS)
@given(stacks(), batch_lists)
def test_a_stack_in_every_order_composes(stack: list[Callback], batches: list[float]):
    for order in itertools.permutations(stack):
        assert attach(UNIT, *order) == functools.reduce(attach, order, UNIT)
    for order in (stack, stack[::-1]):
        fitted(order, batches).check(testing.check_composition)


@settings(max_examples=RUNS)
@given(stacks(), batch_lists)
def test_a_stack_resumed_anywhere_goes_on_the_same(stack: list[Callback], batches: list[float]):
    fitted(stack, batches).check(testing.check_resume)


def hidden() -> Callback:
    seen: list[int] = []

    def on_train_step_end(state: State) -> State:
        seen.append(1)
        return state.request_stop("enough") if len(seen) == 5 else state

    return Callback(name="hidden", on_train_step_end=on_train_step_end)


@pytest.mark.parametrize("law", [testing.check_composition, testing.check_resume])
def test_a_stack_with_a_hidden_counter_is_found_out(law: Any):
    with pytest.raises(LawError):
        fitted([callbacks.keep_best("loss"), hidden()], [1.0, 3.0]).check(law)
