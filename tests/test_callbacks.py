"""What each callback does in whole runs, what it refuses, and that nothing it knows is outside the state."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from callback_states import first, shown, started
from torch import nn

import tnt_func as tnt
from tnt_func import callbacks, optim, testing
from tnt_func import pytree as trees
from tnt_func.errors import ContractError, LawError, UsageError, UsageTypeError
from tnt_func.unit import Callback

NAN, INF = math.nan, math.inf


ROWS = torch.tensor([[1.0, 2.0, 1.0], [3.0, -1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
DATA = [(rows[:, :2], rows[:, 2:]) for rows in ROWS.split(2)]


def fitting(optimizer: Any = None) -> tuple[tnt.FitUnit, tnt.State]:
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return tnt.supervised(net, nn.functional.mse_loss, optimizer or optim.sgd(0.02), key=tnt.key(0))


def in_front(name: str) -> bool:
    return name.startswith("0.")


GRADUAL = optim.grouped(optim.sgd(0.02, momentum=0.9), [(in_front, optim.frozen(optim.adamw(0.1)))])

EACH: dict[str, tuple[Any, list[Callback]]] = {
    "early_stopping": (None, [callbacks.early_stopping("loss", patience=2, min_delta=1.0)]),
    "early_stopping of steps": (
        None,
        [callbacks.early_stopping("loss", phase="train", interval="step", interval_freq=2, patience=2, mode="max")],
    ),
    "reduce_lr_on_plateau": (None, [callbacks.reduce_lr_on_plateau("loss", patience=0, threshold=0.9, cooldown=1)]),
    "reduce_lr_on_plateau of training": (
        None,
        [callbacks.reduce_lr_on_plateau("loss", phase="train", patience=0, threshold=0.9)],
    ),
    "stop_on_nonfinite": (None, [callbacks.stop_on_nonfinite("loss", params=True)]),
    "stop_on_nonfinite where it does": (optim.sgd(1e200), [callbacks.stop_on_nonfinite(params=True)]),
    "keep_best": (None, [callbacks.keep_best("loss", mode="max")]),
    "unfreeze_at": (GRADUAL, [callbacks.unfreeze_at(steps=3)]),
    "lambda_callback": (
        None,
        [callbacks.lambda_callback(on_train_step_end=lambda state: None, on_eval_end=lambda state: state)],
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_each_obeys_every_law(name: str):
    optimizer, stack = EACH[name]
    unit, state = fitting(optimizer)
    testing.check_unit(unit, state, DATA, callbacks=stack, max_epochs=3)


def test_a_run_resumed_inside_a_patience_window_is_the_uninterrupted_one():
    unit, state = fitting()
    stack = [
        callbacks.early_stopping("loss", patience=3, min_delta=100.0),
        callbacks.reduce_lr_on_plateau("loss", patience=1, threshold=100.0, threshold_mode="abs", cooldown=1),
    ]
    whole = tnt.fit(unit, state, DATA, DATA, max_epochs=9, callbacks=stack)
    assert whole.progress.train.epochs == 4 and whole.stop is None
    assert whole.memory["early_stopping"]["wait"] == 3
    for epochs in (1, 2, 3):
        part = tnt.fit(unit, state, DATA, DATA, max_epochs=epochs, callbacks=stack)
        assert 0 <= part.memory["early_stopping"]["wait"] == epochs - 1
        assert tnt.digest(tnt.fit(unit, part, DATA, DATA, max_epochs=9, callbacks=stack)) == tnt.digest(whole)


def test_the_reason_is_that_of_the_end_event():
    unit, state = fitting()
    stop = callbacks.early_stopping("loss", patience=1, min_delta=10.0)
    *_, end = tnt.fit_events(unit, state, DATA, DATA, max_epochs=9, callbacks=[stop])
    assert end.reason is not None and end.reason.startswith("early_stopping: eval loss ")
    assert end.reason.endswith(", 1 time in a row")


# Negative controls: the same decisions with a memory elsewhere, or at the wrong place.


def hidden() -> Callback:
    seen: list[float] = []

    def decide(state: tnt.State) -> tnt.State:
        seen.append(0.0)
        return state.request_stop("patience") if len(seen) >= 3 else state

    return Callback(name="hidden", on_eval_epoch_end=decide)


def test_a_patience_in_a_closure_is_found_out():
    unit, state = fitting()
    with pytest.raises(LawError, match="law 5"):
        testing.check_resume(unit, state, DATA, callbacks=[hidden()], max_epochs=4)


def test_a_plateau_that_acts_in_the_evaluation_is_found_out():
    unit, state = fitting()

    def lower(state: tnt.State) -> tnt.State:
        return state.replace(opt_state=optim.set_hyperparameters(state.opt_state, lr=0.01))

    with pytest.raises(ContractError, match="callback 'early' on_eval_epoch_end changed state.opt_state"):
        tnt.fit(unit, state, DATA, DATA, max_epochs=1, callbacks=[Callback(name="early", on_eval_epoch_end=lower)])


# Each on its own.


def test_pending_reductions_add_up_and_a_step_applies_them_all():
    plateau = callbacks.reduce_lr_on_plateau("loss", phase="train", interval="step", patience=0, factor=0.5)
    state = started(plateau, first(opt_state=optim.sgd(0.8).init({})))
    for _ in range(3):
        state = shown(plateau, state, 1.0)
    assert state.memory["reduce_lr_on_plateau"]["pending"] == 2 and float(optim.get(state.opt_state, "lr")) == 0.8
    state = plateau.on_train_step_start(state)
    assert state.memory["reduce_lr_on_plateau"]["pending"] == 0 and float(optim.get(state.opt_state, "lr")) == 0.2
    assert plateau.on_train_step_start(state) is state


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_only_every_so_many_are_looked_at(interval: Any):
    seen: list[tuple[int, int]] = []
    keep = callbacks.keep_best("loss", phase="train", mode="max", interval=interval, interval_freq=3)
    unit, state = fitting(optim.sgd(0.5))
    for event in tnt.train_events(unit.train_unit, state, DATA, max_epochs=7, callbacks=[keep]):
        if (
            event.point == f"{interval}_end"
            and event.state.memory["keep_best"]["steps"] == event.state.progress.train.steps
        ):
            seen.append((event.state.progress.train.epochs, event.state.progress.train.steps))
    assert seen and all((epochs if interval == "epoch" else steps) % 3 == 0 for epochs, steps in seen)


def test_the_best_is_the_model_that_was_best():
    unit, state = fitting(optim.sgd(0.01, momentum=0.9))
    keep = callbacks.keep_best("loss")
    ends = [
        event.state
        for event in tnt.fit_events(unit, state, DATA, DATA, max_epochs=8, callbacks=[keep])
        if (event.phase, event.point) == ("eval", "epoch_end")
    ]
    losses = [float(tnt.metrics.compute(end, "eval")["loss"]) for end in ends]
    wanted, last = ends[losses.index(min(losses))], ends[-1]
    assert min(losses) < losses[-1], "the example has no best before the last"
    restored = callbacks.best(last)
    for part in ("params", "buffers", "opt_state"):
        assert trees.equal(getattr(restored, part), getattr(wanted, part))
    slot = last.memory["keep_best"]
    assert (slot["value"], slot["steps"]) == (min(losses), wanted.progress.train.steps)
    assert restored.progress == last.progress and restored.memory is last.memory
    evaluated = tnt.evaluate(unit.eval_unit, restored, DATA)
    assert float(tnt.metrics.compute(evaluated, "eval")["loss"]) == min(losses)


def test_what_is_kept_shares_no_memory_with_what_goes_on():
    keep = callbacks.keep_best("loss", phase="train", interval="step")
    state = shown(keep, started(keep, first()), 1.0)
    kept = callbacks.best(state).params["w"]
    assert torch.equal(kept, state.params["w"]) and kept.data_ptr() != state.params["w"].data_ptr()


@pytest.mark.parametrize(
    ("stream", "mode", "index"),
    [
        ([0.0, 1.0], "min", 0),
        ([INF, INF], "min", 0),
        ([NAN, 3.0, 3.0], "min", 1),
        ([-INF, -2.0, NAN], "max", 1),
        ([1.0, 2.0, 2.0], "max", 1),
    ],
)
def test_the_first_number_is_the_best_so_far_and_nan_never_is(stream: list[float], mode: Any, index: int):
    keep = callbacks.keep_best("loss", phase="train", interval="step", mode=mode, parts=["params"])
    state = started(keep, first())
    for number, value in enumerate(stream):
        state = shown(keep, state.replace(params={"w": torch.full((2,), float(number))}), value)
    assert float(callbacks.best(state).params["w"][0]) == index


def test_there_is_no_best_before_the_first_and_none_without_the_callback():
    keep = callbacks.keep_best("loss", phase="train", interval="step")
    for state in (started(keep, first()), shown(keep, started(keep, first()), NAN)):
        with pytest.raises(UsageError, match="'keep_best', which has seen no number .* Train further"):
            callbacks.best(state)
    with pytest.raises(
        UsageError, match=r"given 'best', and the state's memory has \['keep_best'\]; .* Write callbacks"
    ):
        callbacks.best(started(keep, first()), "best")


@pytest.mark.parametrize(
    ("names", "params", "output", "said"),
    [
        ((), False, {"loss": 1.0, "more": [torch.tensor([1.0, NAN])]}, r"output\['more'\]\[0\] is not finite"),
        (("loss",), False, {"loss": 1.0, "more": NAN}, None),
        (("loss", "more"), False, {"loss": -INF, "more": NAN}, r"output\['loss'\], output\['more'\] are not finite"),
        ((), True, None, r"params\['w'\] is not finite after train step 0"),
        ((), False, torch.tensor(NAN), "output is not finite"),
        ((), False, {"n": 3}, None),
    ],
)
def test_stop_on_nonfinite_names_what_is_not(names: tuple[str, ...], params: bool, output: Any, said: str | None):
    state = first(params={"w": torch.tensor(NAN if output is None else 1.0)}, output=output)
    after = callbacks.stop_on_nonfinite(*names, params=params).on_train_step_end(state)
    if said is None:
        assert after is state
        return
    with pytest.raises(AssertionError, match=said):
        assert after.stop is None, after.stop


# Any callables.


def test_builtins_are_hooks_and_none_passes_the_state_on(capsys: pytest.CaptureFixture[str]):
    unit, state = fitting()
    look = callbacks.lambda_callback(on_train_start=print, on_train_end=lambda state: state.request_stop("looked"))
    plain = tnt.fit(unit, state, DATA, DATA, max_epochs=1)
    *_, end = tnt.fit_events(unit, state, DATA, DATA, max_epochs=1, callbacks=[look])
    assert capsys.readouterr().out.startswith("State(") and end.reason == "looked"
    assert trees.equal(end.state.params, plain.params)


def test_a_callback_itself_must_return_the_state_and_so_must_what_returns_anything():
    unit, state = fitting()
    for callback, kind in (
        (Callback(name="c", on_train_start=print), "None"),  # pyright: ignore[reportArgumentType]
        (callbacks.lambda_callback(on_train_start=lambda state: 0), "an int"),  # pyright: ignore
    ):
        with pytest.raises(ContractError, match=f"on_train_start returned {kind}; a hook takes a State and returns"):
            tnt.fit(unit, state, DATA, DATA, max_epochs=1, callbacks=[callback])


# What cannot work is refused, in three parts.

any_callbacks: Any = callbacks
Refused = Callable[[], Any]


def fit(callback: Callback, **more: Any) -> Refused:
    unit, state = fitting(**more)
    return lambda: tnt.fit(unit, state, DATA, DATA, max_epochs=1, callbacks=[callback])


REFUSED: dict[str, tuple[Refused, str]] = {
    "no such metric": (
        fit(callbacks.early_stopping("los")),
        r"early_stopping reads the eval metric 'los' at epoch_end, where there is \['loss'\]. Name .* metrics={'los'",
    ),
    "no such output": (
        fit(callbacks.reduce_lr_on_plateau("los", interval="step")),
        r"reads the eval output 'los' at step_end, where there is \['loss', 'num_samples'\]. .* returns \(state, ",
    ),
    "no output": (
        lambda: shown(
            stop := callbacks.early_stopping("x", phase="train", interval="step"), started(stop, first()), None
        ),
        r"the train output 'x' at step_end, where there is \['loss'\]",
    ),
    "many numbers": (
        lambda: shown(
            stop := callbacks.early_stopping("loss", phase="train", interval="step"),
            started(stop, first()),
            torch.ones(3),
        ),
        r"which is float32\[3\]; it decides on one real number. .* x.mean\(\).* tnt.ensemble\(tnt.attach\(",
    ),
    "no number": (
        lambda: shown(
            stop := callbacks.early_stopping("loss", phase="train", interval="step"), started(stop, first()), "low"
        ),
        r"which is str 'low'; it decides on one real number",
    ),
    "patience": (lambda: callbacks.early_stopping("x", patience=-1), "patience=-1; it is at least 0. Write patience=0"),
    "delta": (lambda: callbacks.early_stopping("x", min_delta=NAN), "min_delta=nan; it is at least 0"),
    "frequency": (lambda: callbacks.keep_best("x", interval_freq=0), "interval_freq=0; .* at least one. Write"),
    "factor": (lambda: callbacks.reduce_lr_on_plateau("x", factor=1.0), "factor=1.0; it is below 1. Write factor=0.1"),
    "floor": (lambda: callbacks.reduce_lr_on_plateau("x", min_lr=[0.1, -0.1]), r"given min_lr\[1\]=-0.1; it is at"),
    "floors": (
        fit(callbacks.reduce_lr_on_plateau("loss", min_lr=[0.1, 0.1])),
        r"min_lr=\[0.1, 0.1\], and 1 groups of the optimizer have an lr; .* Write a number",
    ),
    "a rate that follows a schedule": (
        fit(callbacks.reduce_lr_on_plateau("loss"), optimizer=optim.sgd(lambda step: 0.1)),
        "follows the schedule that the optimizer was made with",
    ),
    "no rate": (
        lambda: started(callbacks.reduce_lr_on_plateau("loss"), first()),
        r"'lr' was given; the state's hyper-parameters are \[\]",
    ),
    "nothing to look at": (
        lambda: callbacks.stop_on_nonfinite().on_train_step_end(first(output=None)),
        "looks at every number in the output of the train step, which has None. Name an entry .* params=True",
    ),
    "no such entry": (
        lambda: callbacks.stop_on_nonfinite("y").on_train_step_end(first(output={"x": 1.0})),
        r"looks at \['y'\] in the output of the train step, which has \['x'\]",
    ),
    "neither": (lambda: callbacks.unfreeze_at(), "epochs=None and steps=None; it takes one of them"),
    "both": (lambda: callbacks.unfreeze_at(epochs=1, steps=1), "epochs=1 and steps=1; it takes one"),
    "the past": (lambda: callbacks.unfreeze_at(steps=-1), "steps=-1; it takes one of them, at least 0"),
    "nothing frozen": (fit(callbacks.unfreeze_at(steps=1)), "has 0 that are frozen. Wrap that of the group: optim"),
    "no such group": (
        fit(callbacks.unfreeze_at(steps=1, group=1), optimizer=GRADUAL),
        "given group=1, and the optimizer has 1 that are frozen",
    ),
    "no such point": (
        lambda: any_callbacks.lambda_callback(on_train_begin=print),
        "given on_train_begin; the points are on_train_start, .*, on_predict_end. Write one of those",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str):
    call, words = REFUSED[name]
    with pytest.raises(UsageError, match=words):
        call()


def test_other_types_are_refused():
    for call in (
        lambda: any_callbacks.early_stopping("x", mode="least"),
        lambda: any_callbacks.keep_best("x", parts=["memory"]),
        lambda: any_callbacks.lambda_callback(on_train_end=3),
    ):
        with pytest.raises(UsageTypeError):
            call()
