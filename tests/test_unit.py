"""Units, callbacks, and attaching one to the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func import unit as units
from tnt_func.errors import UsageError, UsageTypeError
from tnt_func.state import State
from tnt_func.types import Phase
from tnt_func.unit import (
    PHASES,
    POINTS,
    Callback,
    EvalUnit,
    FitUnit,
    PhaseUnit,
    PredictUnit,
    TrainUnit,
    attach,
    hook_of,
    identity,
)

KINDS: dict[Phase, type[Any]] = {"train": TrainUnit, "eval": EvalUnit, "predict": PredictUnit}


def note(name: str) -> Callable[[State], State]:
    """A hook that writes its name behind those already there."""
    return lambda state: state.replace(params=(*state.params, name))


def blank() -> State:
    return State(params=(), key=tnt.key(0))


def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    return state, {}


def noting(phase: Phase) -> PhaseUnit:
    hooks = {f"on_{phase}_{point}": note(f"unit {point}") for point in POINTS}
    return KINDS[phase](**{f"{phase}_step": step}, **hooks)


def callback(name: str, *phases: Phase, **fields: Any) -> Callback:
    hooks = {f"on_{phase}_{point}": note(f"{name} {phase} {point}") for phase in phases for point in POINTS}
    return Callback(name=name, **hooks, **fields)


FIT = FitUnit(train_unit=TrainUnit(train_step=step), eval_unit=EvalUnit(eval_step=step))
ALL = FitUnit(train_unit=FIT.train_unit, eval_unit=FIT.eval_unit, predict_unit=PredictUnit(predict_step=step))


# Units


@pytest.mark.parametrize("phase", PHASES)
def test_a_unit_has_a_step_and_hooks_that_do_nothing_unless_given(phase: Phase):
    unit = KINDS[phase](**{f"{phase}_step": step})
    assert unit.phase == phase and units.step_of(unit) is step and units.parts(unit) == (unit,)
    assert all(hook_of(unit, phase, point) is identity for point in POINTS)
    state = blank()
    assert identity(state) is state


def test_a_unit_shows_what_it_was_made_of_and_neither_defaults_nor_tensors():
    stop = Callback(name="stop", on_train_end=identity, on_train_step_end=step_end)
    assert repr(stop) == "Callback(name='stop', on_train_step_end=step_end)"
    assert repr(FIT) == "FitUnit(train_unit=TrainUnit(train_step=step), eval_unit=EvalUnit(eval_step=step))"
    module = torch.nn.Linear(1, 1)
    shown = repr(tnt.supervised(module, torch.nn.functional.mse_loss, tnt.optim.sgd(0.1), key=tnt.key(0))[0])
    assert "Model(module=Linear(in_features=1, out_features=1, bias=True))" in shown
    assert "tensor(" not in shown and "identity" not in shown


def step_end(state: State) -> State:
    return state


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("point", POINTS)
def test_a_hook_is_found_by_phase_and_point(phase: Phase, point: str):
    hook = note("mine")
    unit = KINDS[phase](**{f"{phase}_step": step, f"on_{phase}_{point}": hook})
    assert hook_of(unit, phase, point) is hook
    assert [other for other in POINTS if hook_of(unit, phase, other) is not identity] == [point]
    hooks: dict[str, Any] = {f"on_{phase}_{point}": hook}
    bundle = Callback(name="c", **hooks)
    assert hook_of(bundle, phase, point) is hook and bundle.phases() == (phase,)


def test_a_callback_has_the_phases_of_its_hooks():
    assert callback("c").phases() == ()
    assert callback("c", "predict", "train").phases() == ("train", "predict")


def test_the_parts_of_a_fit_unit_are_those_that_are_there():
    assert units.parts(FIT) == (FIT.train_unit, FIT.eval_unit)
    assert [part.phase for part in units.parts(ALL)] == ["train", "eval", "predict"]


# What cannot work is refused where it is written


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train_step": 3}, "TrainUnit was given an int as its train_step; steps, hooks"),
        (
            {"on_train_end": None},
            "TrainUnit was given None as its on_train_end; .* are functions. Write a def",
        ),
        ({"memory": {"count": 0}}, r"TrainUnit was given an int as its memory\['count'\]; .* functions"),
        ({"metrics": {"loss": "loss"}}, r"a str as its metric 'loss'; that is a Metric. Write metrics={'loss': tnt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_unit_refuses_what_no_run_could_use(fields: dict[str, Any], words: str):
    with pytest.raises(UsageTypeError, match=words):
        TrainUnit(**{"train_step": step, **fields})


@pytest.mark.parametrize("phase", PHASES)
def test_units_of_every_phase_refuse_a_step_that_is_no_function(phase: Phase):
    with pytest.raises(UsageTypeError, match=f"given None as its {phase}_step"):
        KINDS[phase](**{f"{phase}_step": None})


def test_a_callback_refuses_what_no_run_could_use():
    with pytest.raises(UsageTypeError, match=r"Callback was given a list as its memory\['best'\]"):
        Callback(name="best", memory=[])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageTypeError, match="Callback was given a State as its on_eval_end"):
        Callback(name="best", on_eval_end=blank())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("draws", ["torch", ["torch"], ("torch", "cuda")], ids=repr)
def test_generators_that_cannot_be_seeded_are_refused(draws: Any):
    with pytest.raises(UsageError, match=r"given draws=.*it is a tuple of some of \('torch', 'numpy', 'random'\)"):
        EvalUnit(eval_step=step, draws=draws)


def test_a_fit_unit_takes_the_parts_it_names():
    with pytest.raises(
        UsageTypeError, match="an EvalUnit as its train_unit; that is a TrainUnit. Write train_unit=tnt"
    ):
        FitUnit(train_unit=FIT.eval_unit, eval_unit=FIT.eval_unit)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageTypeError, match="None as its eval_unit"):
        FitUnit(train_unit=FIT.train_unit, eval_unit=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageTypeError, match="a TrainUnit as its predict_unit"):
        FitUnit(train_unit=FIT.train_unit, eval_unit=FIT.eval_unit, predict_unit=FIT.train_unit)  # pyright: ignore[reportArgumentType]


# Chains


def test_a_chain_runs_its_hooks_in_order_and_leaves_out_those_that_do_nothing():
    chain = units.then(("a", note("a")), ("nothing", identity), ("b", note("b")))
    assert chain(blank()).params == ("a", "b")
    assert [name for name, _ in units.links(chain, "outer")] == ["a", "b"]
    longer = units.then(("outer", chain), ("c", note("c")))
    assert [name for name, _ in units.links(longer, "")] == ["a", "b", "c"]
    assert units.then(("nothing", identity)) is identity and units.links(identity, "nothing") == ()


# Attaching


@pytest.mark.parametrize("phase", PHASES)
def test_the_unit_goes_first_then_the_callbacks_in_order(phase: Phase):
    unit = attach(noting(phase), callback("a", phase), callback("b", phase))
    for point in POINTS:
        assert hook_of(unit, phase, point)(blank()).params == (
            f"unit {point}",
            f"a {phase} {point}",
            f"b {phase} {point}",
        )


def test_attaching_has_an_identity_and_is_associative():
    a, b, c = (callback(name, "train", memory=identity, draws=("random",)) for name in "abc")
    unit = noting("train")
    assert attach(unit) is unit
    assert attach(attach(unit, a), b, c) == attach(attach(unit, a, b), c) == attach(unit, a, b, c)
    assert attach(attach(FIT, a), b) == attach(FIT, a, b)
    assert attach(unit, a, b) != attach(unit, b, a)


def test_memory_and_draws_are_united_and_neither_unit_nor_callback_is_written_to():
    unit = TrainUnit(train_step=step, memory={"mine": identity}, draws=("torch",))
    both = attach(unit, callback("a", memory=note("a"), draws=("random", "torch")), callback("b", draws=("numpy",)))
    assert list(both.memory) == ["mine", "a"] and both.memory["mine"] is identity
    assert both.draws == ("torch", "random", "numpy")
    assert list(unit.memory) == ["mine"] and unit.draws == ("torch",)


def test_each_part_of_a_fit_unit_gets_the_hooks_of_its_phase_and_all_the_memory():
    unit = attach(ALL, callback("a", "train", "eval", "predict", memory=identity))
    for part in units.parts(unit):
        assert hook_of(part, part.phase, "end")(blank()).params == (f"a {part.phase} end",)
    assert list(units.memories(unit)) == ["a"] and units.memories(unit)["a"] is identity
    assert attach(FIT, callback("a", "eval")).train_unit == FIT.train_unit
    assert attach(FIT, callback("a", "train")).predict_unit is None


def test_every_link_has_the_name_that_an_error_gives_it():
    unit = attach(noting("eval"), callback("a", "eval"))
    assert [name for name, _ in units.links(unit.on_eval_end, "")] == [  # pyright: ignore[reportAttributeAccessIssue]
        "EvalUnit.on_eval_end",
        "callback 'a' on_eval_end",
    ]


@pytest.mark.parametrize(
    ("unit", "phases", "words"),
    [
        (FIT.train_unit, ("eval",), r"has eval hooks, and a TrainUnit runs train only; .* to the FitUnit: tnt.fit"),
        (FIT.eval_unit, ("train", "eval"), r"has train hooks, and an EvalUnit runs eval only"),
        (
            FIT,
            ("predict",),
            r"has predict hooks, and a FitUnit runs train and eval only; .* FitUnit with a predict_unit",
        ),
        (FIT.train_unit, ("eval", "predict"), r"has eval and predict hooks"),
    ],
    ids=["eval on train", "train on eval", "predict on fit", "two phases"],
)
def test_hooks_that_would_never_be_called_are_refused(unit: Any, phases: tuple[Phase, ...], words: str):
    with pytest.raises(UsageError, match=f"callback 'plateau' {words}"):
        attach(unit, callback("plateau", *phases))


def test_a_name_is_given_once():
    with pytest.raises(UsageError, match=r"named \['a', 'b', 'a'\]; 'a' is there twice. Give one another name="):
        attach(FIT, callback("a"), callback("b"), callback("a"))


def test_a_slot_belongs_to_one():
    unit = TrainUnit(train_step=step, memory={"best": identity})
    remembering = callback("best", memory=note("best"))
    with pytest.raises(UsageError, match="the name 'best' is taken in state.memory"):
        attach(unit, remembering)
    with pytest.raises(UsageError, match="the name 'best' is taken"):
        attach(attach(FIT, remembering), remembering)
    assert list(attach(unit, callback("best")).memory) == ["best"], "a callback without memory has no slot"


def test_the_loops_own_slot_is_nobodys():
    for refused in (
        lambda: Callback(name="data", memory=identity),
        lambda: TrainUnit(train_step=step, memory={"data": identity}),
    ):
        with pytest.raises(UsageError, match=r"was given memory\['data'\]; the loop notes there what data"):
            refused()
    assert attach(FIT, callback("data")) == FIT


def test_the_parts_of_a_fit_unit_share_a_slot_only_if_it_begins_alike():
    average, other = note("average"), note("other")
    unit = FitUnit(
        train_unit=TrainUnit(train_step=step, memory={"average": average, "mine": other}),
        eval_unit=EvalUnit(eval_step=step, memory={"average": average}),
    )
    assert units.memories(unit) == {"average": average, "mine": other}
    torn = FitUnit(train_unit=unit.train_unit, eval_unit=EvalUnit(eval_step=step, memory={"average": other}))
    with pytest.raises(UsageError, match=r"memory\['average'\] is given two first values by the parts of a FitUnit"):
        units.memories(torn)
