"""The deliberate differences from TorchTNT 0.2.4 that the loop makes, each under its number.

`theirs` is TorchTNT itself where it is installed, else the reference that test_oracle.py holds to its recorded runs.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from typing import Any

import pytest
import torch
from torchtnt_runs import live

from tnt_func import (
    Callback,
    EvalUnit,
    Event,
    FitUnit,
    PredictUnit,
    State,
    TrainUnit,
    digest,
    evaluate,
    fit,
    key,
    predict,
    train,
    train_events,
)
from tnt_func.errors import ContractError, DataError, UsageError
from tnt_func.progress import Progress, RunProgress
from tnt_func.testing.oracle import observed as ours
from tnt_func.testing.reference import Counts, Setting, Source, Trace, reference

INSTALLED = find_spec("torchtnt") is not None
FIRST = State(params=torch.zeros(2), key=key(0))
TRAIN = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + torch.rand(2) * batch), {}))
EVAL = EvalUnit(eval_step=lambda state, batch: (state, {}))
FIT = FitUnit(train_unit=TRAIN, eval_unit=EVAL)


def theirs(setting: Setting) -> Trace:
    return live(setting) if INSTALLED else reference(setting)


def hooks(trace: Trace) -> list[str]:
    return [seen.hook for seen in trace.events]


def mid_epoch(train: Counts) -> dict[Any, Counts]:
    return {"train": train, "eval": (0, 0, 0), "predict": (0, 0, 0)}


def stop_iteration(*_: Any) -> Any:
    return next(iter(()))


def test_d1_a_stop_iteration_ends_no_epoch():
    in_the_step = Setting(entry="train", data=Source(4), max_epochs=1, inject={2: "si"})
    assert (theirs(in_the_step).outcome, theirs(in_the_step).final[0]) == ("ok", (1, 0, 0))
    assert (ours(in_the_step).outcome, ours(in_the_step).final[0]) == ("ContractError", (0, 0, 0))


def test_d1_a_stop_iteration_in_a_due_evaluation_leaves_their_module_in_eval_mode():
    setting = Setting(entry="fit", data=Source(1), max_epochs=1, evaluate_every_n_steps=1, inject={3: "si"})
    assert [seen.training for seen in theirs(setting).events if seen.hook == "on_train_epoch_end"] == [False]
    assert ours(setting).outcome == "ContractError"


@pytest.mark.parametrize(
    ("unit", "callbacks", "owner"),
    [
        (replace(FIT, train_unit=replace(TRAIN, train_step=stop_iteration)), [], "train_step"),
        (replace(FIT, eval_unit=replace(EVAL, eval_step=stop_iteration)), [], "eval_step"),
        (
            replace(FIT, train_unit=replace(TRAIN, on_train_epoch_end=stop_iteration)),
            [],
            "TrainUnit.on_train_epoch_end",
        ),
        (FIT, [Callback(name="faulty", on_train_step_start=stop_iteration)], "callback 'faulty' on_train_step_start"),
        (FIT, [Callback(name="faulty", on_eval_start=stop_iteration)], "callback 'faulty' on_eval_start"),
    ],
)
def test_d1_the_error_names_where_it_came_from(unit: FitUnit, callbacks: list[Callback], owner: str):
    with pytest.raises(ContractError, match=f"^{owner} raised StopIteration") as caught:
        fit(unit, FIRST, [1], [1], max_epochs=1, callbacks=callbacks)
    assert isinstance(caught.value.__cause__, StopIteration)


def test_d2_epochs_without_a_batch_that_could_never_end():
    # Only the injected error ends TorchTNT's run.
    empty = Setting(entry="train", data=Source(0), max_steps=3, inject={50: "raise"})
    assert (theirs(empty).outcome, theirs(empty).final[0]) == ("Injected", (25, 0, 0))
    assert (ours(empty).outcome, ours(empty).final[0]) == ("DataError", (0, 0, 0))

    no_steps = Setting(entry="train", data=Source(4), max_steps=3, max_steps_per_epoch=0, inject={50: "raise"})
    assert (theirs(no_steps).outcome, theirs(no_steps).final[0]) == ("Injected", (25, 0, 0))
    assert (ours(no_steps).outcome, ours(no_steps).events) == ("UsageError", ())


def test_d2_the_error_says_what_to_write():
    with pytest.raises(DataError, match="or max_epochs"):
        train(TRAIN, FIRST, [], max_steps=3)
    with pytest.raises(UsageError, match="max_steps_per_epoch=0.*Write max_epochs"):
        train(TRAIN, FIRST, [1], max_steps=3, max_steps_per_epoch=0)
    assert train(TRAIN, FIRST, [], max_epochs=2).progress.train == (2, 0, 0)


def test_d3_a_due_evaluation_runs_in_full_after_a_stop():
    stopped = Setting(entry="fit", data=Source(4), eval_data=Source(3), max_epochs=2, inject={2: "stop"})
    assert theirs(stopped).final[:2] == ((1, 1, 0), (1, 0, 0))
    assert ours(stopped).final[:2] == ((1, 1, 0), (1, 3, 0))


def test_d3_a_stop_during_an_evaluation_cuts_it_and_then_training():
    setting = Setting(
        entry="fit", data=Source(4), eval_data=Source(3), max_epochs=2, evaluate_every_n_steps=2, inject={6: "stop"}
    )
    assert hooks(ours(setting))[6] == "eval_step"
    assert ours(setting).final == theirs(replace(setting, evaluate_every_n_epochs=0)).final
    assert ours(setting).final[:2] == ((1, 2, 0), (1, 1, 0))


def test_d4_the_module_is_never_touched():
    fits = Setting(entry="fit", data=Source(1), eval_data=Source(1), max_epochs=1, training=False)
    assert {seen.hook for seen in theirs(fits).events if seen.training} == {
        h for h in hooks(theirs(fits)) if "train" in h
    }
    assert not any(seen.training for seen in ours(fits).events)

    fails = Setting(entry="evaluate", data=Source(1), training=True, inject={2: "raise"})
    assert (theirs(fails).training, ours(fails).training) == (False, True)


def test_d4_a_submodule_that_the_user_put_in_eval_mode_stays_so():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    module[1].eval()
    unit = replace(TRAIN, train_step=lambda state, batch: (state, {"out": module(torch.ones(2)).detach()}))
    train(unit, FIRST, [1, 2], max_epochs=2)
    evaluate(EVAL, FIRST, [1, 2])
    assert [part.training for part in module.modules()] == [True, True, False]


def test_d5_one_failed_event_for_any_error():
    fails = Setting(entry="train", data=Source(2), max_epochs=1, n_callbacks=1, inject={6: "raise", 7: "si"})
    # The second error, of the unit's on_exception, hides the first, and the callback is not told.
    assert (theirs(fails).outcome, hooks(theirs(fails))[7:]) == ("StopIteration", ["on_exception"])
    assert (ours(fails).outcome, hooks(ours(fails))[7:]) == ("Injected", ["failed"])

    interrupted = replace(fails, inject={6: "ki"})
    assert (theirs(interrupted).outcome, hooks(theirs(interrupted))[7:]) == ("KeyboardInterrupt", [])
    assert (ours(interrupted).outcome, hooks(ours(interrupted))[7:]) == ("KeyboardInterrupt", ["failed"])


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt("first"), SystemExit("first")])
def test_d5_the_first_error_surfaces_and_every_observer_is_told_and_closed(error: BaseException):
    class Watching:
        def __init__(self):
            self.events, self.closed = list[Event](), 0

        def __call__(self, event: Event) -> None:
            self.events.append(event)
            if event.point == "failed":
                raise RuntimeError("second")

        def close(self) -> None:
            self.closed += 1

    def fail_in_step_3(state: State) -> State:
        if state.progress.train.steps == 3:
            raise error
        return state

    watching = [Watching(), Watching()]
    with pytest.raises(type(error), match="^first") as caught:
        train(replace(TRAIN, on_train_step_end=fail_in_step_3), FIRST, [1, 2], max_epochs=2, observers=watching)
    assert caught.value is error
    assert len(error.__notes__) == 2 and all("second" in note for note in error.__notes__)
    for observer in watching:
        assert (observer.events[-1].point, observer.events[-1].error, observer.closed) == ("failed", error, 1)
        # The last resumable state: the failed step is not in it.
        assert observer.events[-1].state.progress.train == (1, 2, 0)


@pytest.mark.parametrize(
    ("n_steps", "n_epochs", "their_evaluations", "our_evaluations"),
    [
        (None, "omitted", 2, 2),
        (None, None, 0, 2),
        (None, 0, 0, 0),
        (None, 1, 2, 2),
        (2, "omitted", 4, 2),
        (2, None, 2, 2),
        (2, 0, 2, 2),
        (2, 1, 4, 4),
        (0, "omitted", 2, 2),
    ],
)
def test_d6_how_often_a_fit_evaluates(n_steps: Any, n_epochs: Any, their_evaluations: int, our_evaluations: int):
    setting = Setting(
        entry="fit",
        data=Source(2),
        eval_data=Source(1),
        max_epochs=2,
        evaluate_every_n_steps=n_steps,
        evaluate_every_n_epochs=n_epochs,
    )
    assert theirs(setting).final[1] == (their_evaluations, their_evaluations, 0)
    assert ours(setting).final[1] == (our_evaluations, our_evaluations, 0)


def test_d7_a_run_without_a_limit_is_refused():
    endless = Setting(entry="train", data=Source(1), inject={50: "raise"})
    assert theirs(endless).outcome == "Injected"
    assert (ours(endless).outcome, ours(endless).events) == ("UsageError", ())
    with pytest.raises(ValueError, match=r"math\.inf"):
        train(TRAIN, FIRST, [1])
    assert ours(replace(endless, max_epochs=inf, inject={50: "stop"})).outcome == "ok"


def test_d8_an_open_epoch_skips_what_it_has_had():
    half_way = Setting(entry="train", data=Source(4), max_epochs=1, progress=mid_epoch((0, 2, 2)))
    assert theirs(half_way).final[0] == (1, 6, 0)
    assert ours(half_way).final[0] == (1, 4, 0)

    one_shot = replace(half_way, data=Source(2, reiterable=False))
    assert theirs(one_shot).final[0] == ours(one_shot).final[0] == (1, 4, 0)

    nothing_left = replace(half_way, data=Source(2))
    assert (ours(nothing_left).outcome, ours(nothing_left).final[0]) == ("ok", (1, 2, 0))
    assert ours(replace(half_way, data=Source(1))).outcome == "DataError"


@pytest.mark.parametrize("data", [["a", "b", "c"], lambda epoch: iter(["a", "b", "c"]), iter("c")])
def test_d8_the_batches_that_are_left(data: Any):
    state = FIRST.replace(progress=RunProgress(Progress(0, 2, 2)))
    events = train_events(replace(TRAIN, train_step=lambda state, batch: (state, {})), state, data, max_epochs=1)
    assert [event.batch for event in events if event.point == "fetched"] == ["c"]


def test_d9_an_iterator_that_an_earlier_epoch_used_up():
    used_up = Setting(entry="train", data=Source(3, reiterable=False), max_epochs=3)
    assert theirs(used_up).final[0] == (3, 3, 0)
    assert (ours(used_up).outcome, ours(used_up).final[0]) == ("DataError", (1, 3, 0))
    with pytest.raises(DataError, match="function of the epoch"):
        train(TRAIN, FIRST, iter([1, 2, 3]), max_epochs=2)

    twice = Setting(entry="fit", data=Source(1), eval_data=Source(1, reiterable=False), max_epochs=2)
    assert theirs(twice).final[1] == (2, 1, 0)
    assert ours(twice).outcome == "DataError"


def test_d9_an_iterator_that_epochs_share_is_none():
    shared = Setting(entry="train", data=Source(4, reiterable=False), max_epochs=2, max_steps_per_epoch=2)
    assert theirs(shared).final[0] == ours(shared).final[0] == (2, 4, 0)


def pause_after(calls: int) -> Callable[[], bool]:
    answers = iter([*[False] * (calls - 1), True])
    return lambda: next(answers, False)


def test_d10_a_pause_keeps_the_position():
    stopped = Setting(entry="train", data=Source(4), max_epochs=1, inject={3: "stop"})
    assert hooks(theirs(stopped))[3] == "train_step"
    assert theirs(stopped).final[0] == (1, 2, 0)

    data = [1.0, 2.0, 3.0, 4.0]
    paused = train(TRAIN, FIRST, data, max_epochs=2, pause_when=pause_after(2))
    assert (paused.progress.train, paused.stop) == ((0, 2, 2), None)
    assert digest(train(TRAIN, paused, data, max_epochs=2)) == digest(train(TRAIN, FIRST, data, max_epochs=2))


def patience(steps: int) -> Callback:
    """Stops after so many steps, which it counts itself."""

    def count(state: State) -> State:
        counted = state.memory["patience"] + 1
        state = state.remember("patience", counted)
        return state.request_stop("impatient") if counted == steps else state

    return Callback(name="patience", memory=lambda state: 0, on_train_step_end=count)


def test_d11_memory_and_randomness_are_in_the_state():
    data = [1.0, 2.0, 3.0, 4.0]
    whole = train(TRAIN, FIRST, data, max_epochs=3, callbacks=[patience(6)])
    paused = train(TRAIN, FIRST, data, max_epochs=3, callbacks=[patience(6)], pause_when=pause_after(3))
    assert (paused.memory["patience"], paused.progress.train) == (3, (0, 3, 3))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        resumed = train(TRAIN, paused, data, max_epochs=3, callbacks=[patience(6)])
    assert resumed.progress.train == (2, 6, 0)
    assert digest(resumed) == digest(whole)


@pytest.mark.skipif(not INSTALLED, reason="TorchTNT is not installed: pip install 'tnt-func[oracle]'")
def test_d11_their_checkpoints_hold_neither():
    from torchtnt import framework
    from torchtnt.framework.callbacks import EarlyStopping
    from torchtnt.framework.callbacks._checkpoint_utils import _prepare_app_state_for_checkpoint
    from torchtnt.utils.early_stop_checker import EarlyStopChecker

    class Unit(framework.TrainUnit[int]):
        loss = 1.0

        def train_step(self, state: framework.State, data: int) -> None: ...

    class Saver(framework.Callback):
        def on_train_step_end(self, state: framework.State, unit: Any) -> None:
            assert list(_prepare_app_state_for_checkpoint(state, unit, intra_epoch=True)) == ["train_progress"]

    unit, patient = Unit(), EarlyStopping("loss", EarlyStopChecker("min", patience=2), "step")
    framework.train(unit, [1, 2, 3, 4], max_epochs=1, callbacks=[patient, Saver()])
    assert unit.train_progress.num_steps_completed == 3


def test_d15_an_open_epoch_is_entered_and_closed():
    at_its_limit = Setting(entry="train", data=Source(4), max_steps=2, progress=mid_epoch((0, 2, 2)))
    assert (hooks(theirs(at_its_limit)), theirs(at_its_limit).final[0]) == (
        ["on_train_start", "on_train_end"],
        (0, 2, 2),
    )
    assert hooks(ours(at_its_limit)) == ["on_train_start", "on_train_epoch_end", "on_train_end"]
    assert ours(at_its_limit).final[0] == (1, 2, 0)


def test_d16_prediction_makes_no_inference_tensors():
    one_step = Setting(entry="predict", data=Source(1))
    assert {seen.gradients for seen in theirs(one_step).events} == {"inference"}
    assert {seen.gradients for seen in ours(one_step).events} == {"no_grad"}

    weight = torch.ones(2, requires_grad=True)
    unit = PredictUnit(predict_step=lambda state, batch: (state, state.params * batch))
    _, outputs = predict(unit, FIRST.replace(params=weight), [2.0])
    assert not outputs[0].requires_grad and not outputs[0].is_inference()
    # An inference tensor could not be saved for this.
    (gradient,) = torch.autograd.grad((weight * outputs[0]).sum(), weight)
    assert torch.equal(gradient, outputs[0])
