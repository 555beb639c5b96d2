"""What is switched for a run is switched back, when it ends well and when it does not."""

import contextlib
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import during, every, garbage_collection, on, profiler, tf32

FIRST = tnt.State(params=0.0, key=tnt.key(0))


def step(state: tnt.State, batch: Any) -> Any:
    return state, {"inverse": 1 / batch}


FIT = tnt.FitUnit(train_unit=tnt.TrainUnit(train_step=step), eval_unit=tnt.EvalUnit(eval_step=step))
RUNS: dict[str, Any] = {
    "train": lambda *observers: tnt.train(FIT.train_unit, FIRST, [1, 2, 3], max_epochs=2, observers=observers),
    "evaluate": lambda *observers: tnt.evaluate(FIT.eval_unit, FIRST, [1, 2, 3], observers=observers),
    "predict": lambda *observers: tnt.predict(
        tnt.PredictUnit(predict_step=step), FIRST, [1, 2, 3], observers=observers
    ),
    "fit": lambda *observers: tnt.fit(FIT, FIRST, [1, 2, 3], [1], max_epochs=2, observers=observers),
    "fails": lambda *observers: tnt.train(FIT.train_unit, FIRST, [1, 0], max_epochs=1, observers=observers),
    "fails inside": lambda *observers: tnt.fit(FIT, FIRST, [1], [1, 0], max_epochs=1, observers=observers),
}


def run(entry: str, *observers: Any) -> None:
    with pytest.raises(ZeroDivisionError) if "fails" in entry else contextlib.nullcontext():
        RUNS[entry](*observers)


@pytest.mark.parametrize("around", ["plain", "every", "on"])
@pytest.mark.parametrize("entry", RUNS)
def test_a_scope_is_entered_once_a_run_and_left_however_it_ends(entry: str, around: str):
    told: list[str] = []

    class Scope:  # A generator would be left when it is thrown away, too.
        def __enter__(self) -> None:
            told.append("entered")

        def __exit__(self, *error: object) -> None:
            told.append("left")

    inside = during(Scope)
    observer = {"plain": inside, "every": every(inside, steps=2), "on": on("end", inside)}[around]
    for _ in range(2):
        run(entry, lambda event: told.append("event") if event.point == "step_end" else None, observer)
    ran = [each for each in told if each != "event"]
    assert ran == ["entered", "left"] * 2 and told[0] == "entered" and told[-1] == "left"


def test_a_scope_that_cannot_be_entered_is_not_left():
    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        raise OSError("no")
        yield

    with pytest.raises(OSError, match="no"):
        RUNS["train"](during(scope))


@pytest.mark.parametrize("was", [True, False])
@pytest.mark.parametrize("entry", RUNS)
def test_garbage_is_collected_at_its_steps_alone_and_as_before_afterwards(entry: str, was: bool):
    switched: list[bool] = []

    def witness(event: Any) -> None:
        switched.append(gc.isenabled() or not gc.get_freeze_count())

    try:
        gc.enable() if was else gc.disable()
        run(entry, garbage_collection(every_n_steps=2), witness)
        assert switched and not any(switched) and gc.isenabled() == was and not gc.get_freeze_count()
    finally:
        gc.enable()


def test_what_somebody_else_froze_stays_frozen():
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        RUNS["train"](garbage_collection(every_n_steps=2))
        assert 0.9 * before < gc.get_freeze_count() <= before  # What is no longer used leaves, frozen or not.
    finally:
        gc.unfreeze()


def test_garbage_is_collected_every_n_steps():
    class Cyclic:
        def __init__(self) -> None:
            self.me = self

    left: list[Any] = []
    gone: list[bool] = []

    def littering(state: tnt.State, batch: Any) -> Any:
        left.append(weakref.ref(Cyclic()))
        return state, {}

    def witness(event: Any) -> None:
        if event.point == "step_end":
            gone.append(left[-1]() is None)

    unit = tnt.TrainUnit(train_step=littering)
    tnt.train(unit, FIRST, range(6), max_epochs=1, observers=[garbage_collection(every_n_steps=3), witness])
    assert gone == [False, False, True] * 2


def precisions() -> list[str]:
    backends: Any = torch.backends
    return [part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]


@pytest.mark.parametrize(("enabled", "inside"), [(True, "tf32"), (False, "ieee")])
@pytest.mark.parametrize("entry", ["fit", "fails"])
def test_tf32_is_switched_and_switched_back(entry: str, enabled: bool, inside: str):
    before, seen = precisions(), []
    run(entry, tf32(enabled), lambda event: seen.append(precisions()))
    assert seen and all(each == [inside] * 3 for each in seen)
    assert precisions() == before and repr(tf32(enabled)) == f"tf32({enabled})"
    assert torch.backends.cuda.matmul.allow_tf32 is False  # The older switches can be read again.


@pytest.mark.parametrize(("steps", "recorded"), [(9, [[3, 4], [8, 9]]), (4, [[3, 4]]), (2, [])])
@pytest.mark.parametrize("fails", [False, True])
def test_the_profiler_writes_a_trace_of_every_cycle(tmp_path: Path, steps: int, recorded: list[list[int]], fails: bool):
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": torch.ones(2) @ torch.ones(2) / batch}))
    data: list[Any] = [1.0] * steps + ["a"] * fails
    observer = profiler(tmp_path / "traces", wait=2, warmup=1, active=2, repeat=0)
    assert repr(observer) == f"profiler({str(tmp_path / 'traces')!r})"
    with pytest.raises(TypeError) if fails else contextlib.nullcontext():
        tnt.train(unit, FIRST, data, max_epochs=1, observers=[observer])
    traces = [json.loads(path.read_text()) for path in sorted((tmp_path / "traces").glob("*.pt.trace.json"))]
    names = [{event.get("name", "") for event in trace["traceEvents"]} for trace in traces]
    found = [sorted(int(name.partition("#")[2]) for name in each if name.startswith("ProfilerStep#")) for each in names]
    assert found == recorded and all("aten::dot" in each for each in names)


@pytest.mark.parametrize("numbers", [{"wait": -1}, {"warmup": 0}, {"active": 0}, {"repeat": -1}, {"skip_first": -1}])
def test_the_profiler_says_what_its_schedule_is_made_of(numbers: Any):
    with pytest.raises(UsageError, match="none is negative, .* Write warmup=1, active=3"):
        profiler("traces", **numbers)


def test_garbage_collection_needs_a_cadence():
    with pytest.raises(UsageError, match="every_n_steps=0.* at least 1"):
        garbage_collection(every_n_steps=0)


@pytest.mark.parametrize("by", ["us", "torch"])
def test_one_profiler_at_a_time(tmp_path: Path, by: str):
    """Torch's, one inside of another, end the process."""
    others = [profiler(tmp_path / "a")] if by == "us" else []
    around = torch.profiler.profile() if by == "torch" else contextlib.nullcontext()
    with around, pytest.raises(UsageError, match=r"profiler\('.*b'\) .* is under way; .* Write one profiler"):
        RUNS["train"](*others, profiler(tmp_path / "b"))
    RUNS["train"](profiler(tmp_path / "b", wait=0, warmup=1, active=1))
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_a_run_inside_of_another_leaves_the_scope_of_that_one_open():
    switched: list[bool] = []
    collecting = garbage_collection(every_n_steps=100)

    def inside(event: Any) -> None:
        if event.point == "epoch_done":
            tnt.evaluate(FIT.eval_unit, FIRST, [1], observers=[collecting])
        elif event.point == "step_end":
            switched.append(gc.isenabled())

    RUNS["train"](collecting, inside)
    assert switched == [False] * 6 and gc.isenabled()
