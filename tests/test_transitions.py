"""prepare, start_epoch, step, end_epoch: what user code runs under, and what may come back from it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.data.cursors import BLANK
from tnt_func.errors import ContractError, StructureError, UsageTypeError
from tnt_func.metrics import mean, total
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State
from tnt_func.transitions import Transitions
from tnt_func.types import Phase
from tnt_func.unit import PHASES, POINTS, Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit

KINDS: dict[Phase, type[Any]] = {"train": TrainUnit, "eval": EvalUnit, "predict": PredictUnit}


def new(**fields: Any) -> State:
    return State(**{"params": torch.tensor([1.0, 2.0]), "key": tnt.key(0), **fields})


def keep(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    return state, {}


def unit(phase: Phase, step: Callable[..., Any] = keep, **fields: Any) -> Any:
    return KINDS[phase](**{f"{phase}_step": step, **fields})


def whole_epoch(u: Any, state: State, batch: Any = 1.0) -> State:
    return tnt.end_epoch(u, tnt.step(u, tnt.start_epoch(u, state), batch))


# prepare


def test_prepare_makes_every_slot_and_every_accumulator():
    train = unit("train", metrics={"loss": mean("loss")}, memory={"average": lambda state: state.params * 0})
    evaluate = unit("eval", metrics={"hits": total("hits")})
    callback = Callback(name="best", memory=lambda state: {"value": float("inf")})
    state = tnt.prepare(FitUnit(train_unit=train, eval_unit=evaluate), new(), [callback])
    assert list(state.memory) == ["data", "average", "best"] and state.memory["data"] == BLANK
    assert torch.equal(state.memory["average"], torch.zeros(2)) and state.memory["best"] == {"value": float("inf")}
    assert {phase: list(slots) for phase, slots in state.metrics.items()} == {"train": ["loss"], "eval": ["hits"]}
    assert trees.equal(state.metrics["train"]["loss"], mean("loss").empty())


def test_prepare_keeps_slots_and_accumulators_that_are_there_and_those_of_others():
    u = unit("train", metrics={"loss": mean("loss")}, memory={"count": lambda state: 0})
    first = tnt.prepare(u, new(memory={"count": 5, "stranger": "kept"}, metrics={"eval": {"x": 1}}, output=len))
    assert (first.memory["count"], first.memory["stranger"], first.metrics["eval"]) == (5, "kept", {"x": 1})
    assert first.output is None
    seen = tnt.step(u_with_loss := unit("train", lambda s, b: (s, {"loss": b}), metrics=u.metrics), first, 3.0)
    assert trees.equal(tnt.prepare(u_with_loss, seen).metrics, seen.metrics)
    assert tnt.digest(tnt.prepare(u, first)) == tnt.digest(first)


def test_an_accumulator_that_is_false_is_kept_too():
    u = unit("train", metrics={"seen": tnt.Metric(empty=lambda: ["new"], of=lambda output: [output])})
    assert tnt.prepare(u, new(metrics={"train": {"seen": ()}})).metrics["train"]["seen"] == ()


def test_prepare_does_not_write_to_the_state_it_was_given():
    state = new(memory={"a": 1})
    before = tnt.digest(state)
    tnt.prepare(unit("train", metrics={"loss": mean("loss")}, memory={"b": lambda s: 0}), state)
    assert tnt.digest(state) == before and list(state.memory) == ["a"] and state.metrics == {}


def test_memory_functions_draw_from_the_key_by_their_name():
    def noise(state: State) -> Any:
        return {"torch": torch.rand(2), "numpy": float(np.random.rand()), "seed": torch.initial_seed()}

    u = unit("train", memory={"a": noise, "b": noise})
    before = torch.get_rng_state(), np.random.get_state(legacy=False)
    state = tnt.prepare(u, new())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state(legacy=False)) == str(before[1])
    assert state.memory["a"]["seed"] == tnt.fold_in(tnt.fold_in(tnt.key(0), "memory"), "a").seed
    assert not torch.equal(state.memory["a"]["torch"], state.memory["b"]["torch"])
    torch.manual_seed(9)
    alone = tnt.prepare(unit("train", memory={"b": noise}), new())
    assert trees.equal(alone.memory["b"], state.memory["b"])


@pytest.mark.parametrize(
    "leaf", [len, np.zeros(2), object(), lambda state: state], ids=lambda leaf: type(leaf).__name__
)
@pytest.mark.parametrize("where", ["params", "buffers", "opt_state", "memory", "first memory"])
def test_prepare_refuses_what_no_checkpoint_could_hold(where: str, leaf: Any):
    u = unit("train", memory={"slot": lambda state: leaf}) if where == "first memory" else unit("train")
    state = new() if where == "first memory" else new(**{where: {"slot": leaf}})
    with pytest.raises(StructureError, match=rf"\['slot'\] is a {type(leaf).__name__}; leaves are tensors, bool, int"):
        tnt.prepare(u, state)


def test_a_state_is_looked_at_before_any_memory_function_is_called():
    called: list[State] = []
    u = unit("train", memory={"slot": lambda state: called.append(state)})
    with pytest.raises(StructureError, match="state.params is a function"):
        tnt.prepare(u, new(params=keep))
    assert called == []


@pytest.mark.parametrize("entry", [tnt.prepare, tnt.start_epoch, tnt.end_epoch])
def test_a_key_that_is_none_is_refused(entry: Callable[..., Any]):
    with pytest.raises(UsageTypeError, match=r"state.key is 0, an int; a run draws from a Key. Write key=tnt.key\(0\)"):
        entry(unit("train"), new(key=0))


def test_a_memory_function_that_raises_stop_iteration_is_named():
    with pytest.raises(ContractError, match="the memory function of 'best' raised StopIteration"):
        tnt.prepare(unit("train", memory={"best": lambda state: next(iter(()))}), new())


# The course of a step


@pytest.mark.parametrize("phase", PHASES)
def test_hooks_and_counters_of_one_epoch(phase: Phase):
    seen: list[Any] = []

    def hook(point: str) -> Callable[[State], State]:
        def note(state: State) -> State:
            seen.append((point, tuple(state.progress.of(phase)), state.output))
            return state

        return note

    def step(state: State, batch: Any) -> Any:
        seen.append(("STEP", tuple(state.progress.of(phase)), state.output))
        return state, {"batch": batch}

    u = unit(phase, step, **{f"on_{phase}_{point}": hook(point) for point in POINTS})
    state = whole_epoch(u, new(), 7)
    assert seen == [
        ("epoch_start", (0, 0, 0), None),
        ("step_start", (0, 0, 0), None),
        ("STEP", (0, 0, 0), None),
        ("step_end", (0, 1, 1), {"batch": 7}),
        ("epoch_end", (1, 1, 0), None),
    ]
    assert state.output is None and state.progress == RunProgress().put(phase, Progress(1, 1, 0))


def test_an_open_epoch_is_left_as_it_is_and_a_closed_one_begins_with_empty_metrics():
    u = unit("train", lambda s, b: (s, {"x": b}), metrics={"x": total("x")})
    state = tnt.step(u, tnt.start_epoch(u, tnt.prepare(u, new())), 3.0)
    assert tnt.start_epoch(u, state) is state
    closed = tnt.end_epoch(u, state)
    assert float(tnt.metrics.compute(closed, "train")["x"]) == 3.0
    assert float(tnt.metrics.compute(tnt.start_epoch(u, closed), "train")["x"]) == 0.0


def test_metrics_of_other_phases_are_left_alone():
    train, evaluate = (
        unit(phase, lambda s, b: (s, {"x": b}), metrics={"x": total("x")}) for phase in ("train", "eval")
    )
    state = tnt.step(train, new(), 3.0)
    after = whole_epoch(evaluate, state, 5.0)
    assert after.metrics["train"] is state.metrics["train"]
    assert float(tnt.metrics.compute(after, "eval")["x"]) == 5.0


def test_a_step_end_hook_may_change_the_output_and_the_metrics_have_seen_the_steps_own():
    def louder(state: State) -> State:
        return state.replace(output={"x": 100.0}, memory={**state.memory, "read": state.output["x"]})

    u = unit("train", lambda s, b: (s, {"x": b}), metrics={"x": total("x")}, on_train_step_end=louder)
    run = Transitions(u)
    state = run.hooks("step_end", run.step(new(memory={"read": 0.0}), 2.0))
    assert state.output == {"x": 100.0} and state.memory["read"] == 2.0
    assert float(tnt.metrics.compute(state, "train")["x"]) == 2.0


def test_close_epoch_forgets_what_data_an_epoch_of_training_read_and_only_that():
    noted = {**BLANK, "type": "list"}
    state = new(memory={"data": noted})
    assert tnt.end_epoch(unit("train"), state).memory["data"] == BLANK
    assert tnt.end_epoch(unit("eval"), state).memory["data"] is noted
    assert tnt.end_epoch(unit("train"), new()).memory == {}


# What user code runs under


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("draws", [("torch",), ()], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_gradients_are_on_in_training_and_off_elsewhere(phase: Phase, draws: Any, outside: bool):
    seen: list[bool] = []

    def look(state: State, *batch: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return (state, {}) if batch else state

    u = unit(phase, look, draws=draws, **{f"on_{phase}_{point}": look for point in POINTS})
    with torch.set_grad_enabled(outside):
        whole_epoch(u, new())
        assert torch.is_grad_enabled() is outside
    assert seen == [phase == "train"] * 5


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("draws", [("torch",), ()], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_an_exception_restores_the_surroundings(phase: Phase, draws: Any, outside: bool):
    def fail(state: State, *batch: Any) -> Any:
        torch.rand(1)
        raise ZeroDivisionError

    with torch.set_grad_enabled(outside):
        before = torch.get_rng_state()
        for u in (unit(phase, fail, draws=draws), unit(phase, draws=draws, **{f"on_{phase}_step_start": fail})):
            with pytest.raises(ZeroDivisionError):
                tnt.step(u, new(), 1.0)
            assert torch.is_grad_enabled() is outside
            assert torch.equal(torch.get_rng_state(), before) is bool(draws)
            torch.set_rng_state(before)


@pytest.mark.parametrize("phase", PHASES)
def test_the_seed_is_a_function_of_phase_point_and_count(phase: Phase):
    seeds: dict[str, int] = {}

    def look(name: str) -> Callable[..., Any]:
        def note(state: State, *batch: Any) -> Any:
            seeds[name] = torch.initial_seed()
            return (state, {}) if batch else state

        return note

    u = unit(phase, look("step"), **{f"on_{phase}_{point}": look(point) for point in POINTS})
    state = new(key=tnt.key(5), progress=RunProgress().put(phase, Progress(2, 7, 0)))
    whole_epoch(u, state)
    counts = {"epoch_start": 2, "step_start": 7, "step": 7, "step_end": 8, "epoch_end": 3}
    root = tnt.fold_in(tnt.key(5), phase)
    assert seeds == {name: tnt.fold_in(tnt.fold_in(root, name), count).seed for name, count in counts.items()}


def test_transitions_may_be_given_states_of_different_keys_in_turn():
    u = unit("train", lambda s, b: (s, {"x": torch.rand(2)}))
    run = Transitions(u)
    a, b = new(key=tnt.key(1)), new(key=tnt.key(2))
    outputs = [run.step(state, 0).output for state in (a, b, a)]
    assert trees.equal(outputs[0], outputs[2]) and not trees.equal(outputs[0], outputs[1])
    assert trees.equal(outputs[1], Transitions(u).step(b, 0).output)


@pytest.mark.parametrize("named", [("torch",), ("numpy",), ()], ids=str)
def test_only_the_generators_that_a_unit_draws_from_are_seeded(named: Any):
    u = unit("train", lambda s, b: (s, {"torch": torch.rand(()).item(), "numpy": np.random.rand()}), draws=named)
    torch.manual_seed(3)
    np.random.seed(3)
    a, b = (Transitions(u).step(new(), 0).output for _ in range(2))
    assert {name: a[name] == b[name] for name in a} == {name: name in named for name in a}


# What may come back

WRONG_STEPS: dict[str, tuple[Callable[[State], Any], str]] = {
    "None": (lambda s: None, "returned None; a step returns the new state and its output. Write return state.replace"),
    "the state alone": (lambda s: s, "returned a State; a step"),
    "swapped": (lambda s: ({}, s), "returned a tuple of dict, State; a step"),
    "three": (lambda s: (s, {}, 1), "returned a tuple of State, dict, int; a step"),
    "empty": (lambda s: (), "returned a tuple of nothing; a step"),
    "a list": (lambda s: [s, {}], "returned a list; a step"),
    "a key": (lambda s: (s.replace(key=tnt.key(0)), {}), "changed state.key; the loop alone moves counters and keys"),
    "progress": (
        lambda s: (s.replace(progress=RunProgress()), {}),
        "changed state.progress; .* Keep a number of your own",
    ),
    "stop": (
        lambda s: (s.request_stop("now"), {}),
        r"set state.stop to 'now'; stopping is for hooks. Request it in on_",
    ),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_step_returns_a_state_and_an_output(phase: Phase, name: str):
    wrong, words = WRONG_STEPS[name]
    with pytest.raises(ContractError, match=f"{phase}_step {words}"):
        tnt.step(unit(phase, lambda state, batch: wrong(state)), new(), 0)


WRONG_HOOKS: dict[str, tuple[Callable[[State], Any], str]] = {
    "None": (lambda s: None, "returned None; a hook takes a State and returns one. End it with `return state`"),
    "a pair": (lambda s: (s, {}), "returned a tuple of State, dict; a hook"),
    "a key": (lambda s: s.replace(key=tnt.key(3)), "changed state.key"),
    "progress": (lambda s: s.replace(progress=RunProgress()), "changed state.progress"),
    "StopIteration": (lambda s: next(iter(())), "raised StopIteration; that would end the epoch in silence"),
}


@pytest.mark.parametrize("name", WRONG_HOOKS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_hook_returns_a_state(phase: Phase, name: str):
    wrong, words = WRONG_HOOKS[name]
    hooks: dict[str, Any] = {f"on_{phase}_step_start": wrong}
    callback = Callback(name="c", **hooks)
    for u, owner in (
        (unit(phase, **hooks), f"{KINDS[phase].__name__}.on_{phase}_step_start"),
        (tnt.attach(unit(phase, **{f"on_{phase}_step_start": lambda state: state}), callback), "callback 'c' on_"),
    ):
        with pytest.raises(ContractError, match=f"{owner}.*{words}"):
            tnt.step(u, new(), 0)


@pytest.mark.parametrize("part", ["params", "buffers", "opt_state"])
@pytest.mark.parametrize("phase", PHASES)
def test_evaluation_and_prediction_are_reads(phase: Phase, part: str):
    def change(state: State, *batch: Any) -> Any:
        changed = state.replace(**{part: trees.map(torch.clone, getattr(state, part))})
        return (changed, {}) if batch else changed

    state = new(buffers={"b": torch.zeros(1)}, opt_state={"o": torch.zeros(1)})
    for u, owner in (
        (unit(phase, change), f"{phase}_step"),
        (unit(phase, **{f"on_{phase}_step_end": change}), "_step_end"),
    ):
        if phase == "train":
            tnt.step(u, state, 0)
            continue
        with pytest.raises(ContractError, match=rf"{owner} changed state\.{part}; evaluation and prediction are reads"):
            tnt.step(u, state, 0)


def test_evaluation_may_change_memory_and_request_a_stop():
    u = unit("eval", lambda s, b: (s.remember("n", 2), {}), on_eval_step_end=lambda s: s.request_stop("enough"))
    state = tnt.step(u, new(memory={"n": 1}), 0)
    assert (state.memory["n"], state.stop) == (2, "enough")


PARAMS = {"w": torch.zeros(2), "b": torch.zeros(1)}
CHANGES: dict[str, tuple[Callable[[State], State], str]] = {
    "dtype": (
        lambda s: s.replace(params={**PARAMS, "w": torch.zeros(2).double()}),
        r"params\['w'\] from float32\[2\] to float64\[2\]",
    ),
    "shape": (
        lambda s: s.replace(params={**PARAMS, "w": torch.zeros(3)}),
        r"params\['w'\] from float32\[2\] to float32\[3\]",
    ),
    "a leaf less": (lambda s: s.replace(params={"w": PARAMS["w"]}), r"params\['b'\] from float32\[1\] to nothing"),
    "a leaf more": (lambda s: s.replace(params={**PARAMS, "c": 1}), r"params\['c'\] from nothing to int"),
    "a tensor for a number": (lambda s: s.replace(opt_state=torch.tensor(1)), r"opt_state from int to int64\[\]"),
    "a NumPy array": (
        lambda s: s.replace(params={**PARAMS, "w": np.zeros(2)}),
        r"params\['w'\] from float32\[2\] to ndarray",
    ),
    "containers": (lambda s: s.replace(buffers=(1,)), r"the containers of state.buffers from .*list.* to .*tuple"),
    "memory": (lambda s: s.remember("new", 1), r"memory\['new'\] from nothing to int"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_keeps_structure_shapes_and_dtypes(name: str):
    change, words = CHANGES[name]
    state = new(params=PARAMS, opt_state=1, buffers=[1])
    with pytest.raises(
        StructureError, match=rf"train_step changed .*{words}.*\. A step keeps structure, shapes, dtypes"
    ):
        tnt.step(unit("train", lambda s, b: (change(s), {})), state, 0)


def test_all_leaves_that_changed_are_listed():
    def widen(state: State, batch: Any) -> Any:
        return state.replace(params=trees.map(torch.Tensor.double, state.params)), {}

    with pytest.raises(
        StructureError, match=r"state.params\['w'\] from .*; state.params\['b'\] from float32\[1\] to float64"
    ):
        tnt.step(unit("train", widen), new(params=PARAMS), 0)


def test_structure_is_compared_at_the_first_step_of_a_call_only():
    def grow(state: State, batch: Any) -> Any:
        return (state.remember("late", 1) if batch else state), {}

    run = Transitions(unit("train", grow))
    assert run.step(run.step(new(), 0), 1).memory == {"late": 1}
