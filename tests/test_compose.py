"""Units out of units."""

from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.compose import alternate, focus, sequence
from tnt_func.errors import ContractError, UsageError, UsageTypeError
from tnt_func.state import State
from tnt_func.unit import EvalUnit, TrainUnit


def adding(name: str, amount: float, **fields: Any) -> TrainUnit:
    """Adds to params; its output and its hooks' marks carry its name."""

    def train_step(state: State, batch: float) -> tuple[State, dict[str, Any]]:
        return state.replace(params=state.params + amount * batch), {name: amount * batch}

    return TrainUnit(train_step=train_step, **fields)


def marking(letter: str):
    return lambda state: state.replace(buffers={"marks": state.buffers["marks"] + letter})


def start(**fields: Any) -> State:
    return State(params=torch.tensor(0.0), key=tnt.key(0), buffers={"marks": ""}, **fields)


def test_a_sequence_steps_hooks_and_measures_in_order():
    a = adding("a", 1, on_train_epoch_end=marking("a"), metrics={"a": tnt.metrics.mean("a")}, draws=("torch",))
    b = adding("b", 10, on_train_epoch_end=marking("b"), memory={"slot": lambda state: 7}, draws=("numpy",))
    unit = sequence(a, b)
    state = tnt.train(unit, start(), [1.0, 2.0], max_epochs=1)
    assert state.params == 33 and state.buffers["marks"] == "ab" and state.memory["slot"] == 7
    assert tnt.metrics.compute(state, "train")["a"] == 1.5
    assert unit.draws == ("torch", "numpy")


def test_sequence_is_associative_and_has_an_identity():
    a, b, c = adding("a", 1), adding("b", 10, on_train_step_end=marking("b")), adding("c", 100)
    nothing = TrainUnit(train_step=lambda state, batch: (state, {}))
    runs = [
        tnt.train(unit, start(), [1.0, 2.0, 3.0], max_epochs=2)
        for unit in (
            sequence(a, sequence(b, c)),
            sequence(sequence(a, b), c),
            sequence(a, b, c),
            sequence(nothing, a, b, c, nothing),
        )
    ]
    assert len({tnt.digest(state) for state in runs}) == 1


def test_a_sequence_refuses_outputs_of_one_name():
    with pytest.raises(ContractError, match="two steps of a sequence return the output 'a'"):
        tnt.train(sequence(adding("a", 1), adding("a", 2)), start(), [1.0], max_epochs=1)


def test_a_sequence_refuses_outputs_that_are_no_mappings():
    unit = TrainUnit(train_step=lambda state, batch: (state, batch))
    with pytest.raises(ContractError, match="returned a float as its output"):
        tnt.train(sequence(unit), start(), [1.0], max_epochs=1)


@pytest.mark.parametrize("compose", [sequence, alternate])
def test_units_of_two_phases_or_none_are_refused(compose: Any):
    with pytest.raises(UsageTypeError, match="units of one phase"):
        compose(adding("a", 1), EvalUnit(eval_step=lambda state, batch: (state, {})))
    with pytest.raises(UsageTypeError, match="no unit"):
        compose()


@pytest.mark.parametrize("field", ["metrics", "memory"])
def test_a_name_used_by_two_units_is_refused(field: str):
    entry: Any = {"metrics": tnt.metrics.mean("a"), "memory": lambda state: 0}[field]
    other: Any = {"metrics": tnt.metrics.mean("b"), "memory": lambda state: 0}[field]
    with pytest.raises(UsageError, match="named 'x'"):
        sequence(adding("a", 1, **{field: {"x": entry}}), adding("b", 1, **{field: {"x": other}}))


def test_alternate_takes_turns_by_the_steps_of_the_lifetime():
    critic = adding("c", 1, on_train_step_start=marking("("), on_train_step_end=marking("c"))
    generator = adding("g", 100, on_train_step_end=marking("g"), on_train_epoch_end=marking("!"))
    unit = alternate(critic, generator, turns=(0, 0, 1))
    state = tnt.train(unit, start(), [1.0, 1.0], max_epochs=2)
    assert state.params == 103 and state.buffers["marks"] == "(c(c!g(c!"
    assert tnt.train(unit, state, [1.0], max_steps=5).params == 104
    assert tnt.train(unit, state, [1.0, 1.0], max_steps=6).params == 204


def test_alternate_measures_each_unit_on_its_own_steps():
    a = adding("a", 1, metrics={"a": tnt.metrics.mean("a")})
    b = adding("b", 10, metrics={"b": tnt.metrics.mean("b")})
    state = tnt.train(alternate(a, b), start(), [1.0, 2.0, 3.0, 4.0], max_epochs=1)
    assert tnt.metrics.compute(state, "train") == {"a": 2.0, "b": 30.0}


@pytest.mark.parametrize("turns", [(), (2,), (-1,)])
def test_turns_that_name_no_unit_are_refused(turns: tuple[int, ...]):
    with pytest.raises(UsageError, match="turns are indices of units from 0 to 1"):
        alternate(adding("a", 1), adding("b", 1), turns=turns)


def remembering(letter: str) -> TrainUnit:
    def count(state: State) -> State:
        assert state.output == {letter: 1.0} and state.metrics["train"]["mean"].value() == 1.0
        return state.remember("count", state.memory["count"] + 1)

    return adding(
        letter,
        1,
        memory={"count": lambda state: int(state.params)},
        metrics={"mean": tnt.metrics.mean(letter)},
        on_train_step_end=count,
    )


def test_focus_works_on_its_part_and_under_its_name():
    left, right = focus(remembering("a"), "left"), focus(remembering("a"), "right")
    first = State(params={"left": torch.tensor(1.0), "right": torch.tensor(5.0), "still": 0}, key=tnt.key(0))
    state = tnt.train(sequence(left, right), first, [1.0, 1.0], max_epochs=1)
    assert state.params == {"left": 3.0, "right": 7.0, "still": 0}
    assert state.memory["left/count"] == 3 and state.memory["right/count"] == 7
    assert tnt.metrics.compute(state, "train") == {"left/mean": 1.0, "right/mean": 1.0}


def test_a_focused_evaluation_is_a_read():
    unit = focus(EvalUnit(eval_step=lambda state, batch: (state, {"gap": batch - state.params})), "a")
    state = State(params={"a": 1.0}, key=tnt.key(0))
    assert tnt.evaluate(unit, state, [1.0]).params is state.params


def test_a_stop_requested_in_focus_is_a_stop():
    unit = focus(adding("a", 1, on_train_step_end=lambda state: state.request_stop("enough")), "part")
    events = list(tnt.train_events(unit, State(params={"part": 0.0}, key=tnt.key(0)), [1.0, 1.0], max_epochs=3))
    assert events[-1].reason == "enough" and events[-1].state.progress.train.steps == 1


@pytest.mark.parametrize("params", [{"other": 0.0}, 0.0])
def test_focus_on_a_part_that_is_not_there_is_refused(params: Any):
    with pytest.raises(ContractError, match="need the entry 'part'"):
        tnt.train(focus(adding("a", 1), "part"), State(params=params, key=tnt.key(0)), [1.0], max_epochs=1)
