"""Law 9 on recorded runs of TorchTNT 0.2.4, on random ones, and on TorchTNT itself where it is installed."""

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchtnt_runs import RECORDINGS, live, record, recordings

import tnt_func.testing.reference as reference_module
from tnt_func import Callback, EvalUnit, FitUnit, PredictUnit, State, TrainUnit, attach, key, runs
from tnt_func.errors import LawError, UsageError, UsageTypeError
from tnt_func.loop import Due, Limits
from tnt_func.progress import Progress, RunProgress
from tnt_func.testing.oracle import check_oracle, first_difference, observed
from tnt_func.testing.reference import DIFFERENCES, Action, Entry, Setting, Source, Trace, reference
from tnt_func.transitions import Transitions
from tnt_func.unit import PHASES, POINTS

RECORDED = recordings()
INSTALLED = find_spec("torchtnt") is not None
needs_torchtnt = pytest.mark.skipif(not INSTALLED, reason="TorchTNT is not installed: pip install 'tnt-func[oracle]'")


class Reiterable:
    """Starts anew each epoch, and has no length."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self) -> Iterator[int]:
        yield from range(self.n)


DATA: dict[str, Callable[[int], Any]] = {
    "list": lambda n: list(range(n)),
    "iterable": Reiterable,
    "function of the epoch": lambda n: lambda epoch: iter(range(n)),
    "DataLoader": lambda n: DataLoader(cast(Any, range(n)), batch_size=None),
}


def check(setting: Setting, trace: Trace, data: Callable[[int], Any]) -> frozenset[str]:
    """tnt_func does what TorchTNT did, or, under the numbers returned, what the differences say."""
    expected = reference(setting, DIFFERENCES)
    seen = observed(setting, data)
    difference = first_difference(expected if expected.met else trace, seen)
    assert difference is None, f"{setting}\nmeets {sorted(expected.met) or 'no difference'}: {difference}"
    if expected.met <= {"D4", "D16"}:
        assert order(seen) == order(trace), setting
    return expected.met


def order(trace: Trace) -> tuple[Any, ...]:
    """Without the training flag (D4) and the gradient mode (D16): hooks, counters, how it ends."""
    return (
        [(seen.who, seen.hook, seen.phase, *seen[5:]) for seen in trace.comparable().events],
        trace.outcome,
        trace.final,
    )


def show(capsys: pytest.CaptureFixture[str], title: str, met: list[frozenset[str]], begun: float) -> None:
    """Seen with xdist too, whose workers have a stderr only."""
    same = sum(numbers <= {"D4", "D16"} for numbers in met)
    counts = "  ".join(f"{number}: {sum(number in numbers for numbers in met)}" for number in DIFFERENCES)
    with capsys.disabled():
        print(
            f"\n{len(met)} {title} in {time.perf_counter() - begun:.0f} s: "
            f"{met.count(frozenset())} the same, {same} in order and counters; by difference {counts}",
            file=sys.stderr,
        )


def test_reference_reproduces_every_recording():
    for setting, trace in RECORDED:
        assert reference(setting) == trace, setting


def test_every_recording(capsys: pytest.CaptureFixture[str]):
    begun = time.perf_counter()
    met = [check(setting, trace, range) for setting, trace in RECORDED]
    show(capsys, "recorded runs of TorchTNT", met, begun)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_every_recording_with_other_data(data: Callable[[int], Any]):
    for setting, trace in RECORDED:
        check(setting, trace, data)


def test_every_recording_where_the_caller_has_gradients_off():
    # `failed` is told under the caller's mode, the rest under the run's.
    for setting, trace in RECORDED:
        if reference(setting, DIFFERENCES).outcome == "ok":
            with torch.no_grad():
                check(setting, trace, DATA["list"])


counts = st.tuples(st.integers(0, 2), st.integers(0, 4), st.sampled_from([0, 0, 0, 1, 2]))
sources = st.builds(Source, st.integers(0, 4), st.sampled_from([True, True, False]))
limits = st.sampled_from([None, None, 0, 1, 2, 3])
actions: st.SearchStrategy[Action] = st.sampled_from(["stop", "stop", "stop", "raise", "si", "ki"])
starts = st.sampled_from([(0, 0, 0)]) | counts


@st.composite
def any_setting(draw: st.DrawFn) -> Setting:
    setting = Setting(
        entry=draw(st.sampled_from(["fit", "train", "evaluate", "predict", "fit", "fit"])),
        data=draw(sources),
        eval_data=draw(sources),
        max_epochs=draw(st.sampled_from([2, 1, 3, 4, 0, None, None])),
        max_steps=draw(st.sampled_from([None, 0, 1, 2, 3, 5, 7])),
        max_steps_per_epoch=draw(limits),
        max_eval_steps_per_epoch=draw(limits),
        evaluate_every_n_steps=draw(limits),
        evaluate_every_n_epochs=draw(st.sampled_from(["omitted", "omitted", None, 0, 1, 2])),
        n_callbacks=draw(st.integers(0, 2)),
        progress={phase: draw(starts) for phase in PHASES},
        training=draw(st.booleans()),
        inject=draw(st.just({}) | st.dictionaries(st.integers(0, 30), actions, min_size=1, max_size=2)),
    )
    # Ends what TorchTNT would never end.
    return setting if setting.max_epochs is not None else replace(setting, inject={100: "raise", **setting.inject})


# Rare among all settings: an evaluation that is due after a stop.
stopped_fits = st.builds(
    Setting,
    entry=st.just("fit"),
    data=sources,
    eval_data=sources,
    max_epochs=st.integers(1, 3),
    evaluate_every_n_steps=limits,
    n_callbacks=st.integers(0, 2),
    inject=st.dictionaries(st.integers(0, 12), st.just("stop"), min_size=1, max_size=2),
)
random_settings = st.integers(0, 9).flatmap(lambda tenth: stopped_fits if tenth == 9 else any_setting())
random_data = st.sampled_from(sorted(DATA))


@settings(max_examples=300)
@given(random_settings, random_data)
def test_random_settings(setting: Setting, data: str):
    check(setting, reference(setting), DATA[data])


@needs_torchtnt
def test_recordings_are_what_torchtnt_does():
    for line in RECORDINGS.read_text().splitlines():
        assert record(line) == line


@needs_torchtnt
def test_random_settings_against_torchtnt(capsys: pytest.CaptureFixture[str]):
    met, begun = list[frozenset[str]](), time.perf_counter()

    @settings(max_examples=2_000)
    @given(random_settings, random_data)
    def agree(setting: Setting, data: str):
        trace = live(setting)
        assert reference(setting) == trace
        met.append(check(setting, trace, DATA[data]))

    agree()
    show(capsys, "random runs against TorchTNT", met, begun)
    assert frozenset().union(*met) == set(DIFFERENCES), "a difference that no run meets is not tested"
    assert frozenset() in met


LIMITS: dict[Entry, str] = {
    "train": "max_epochs max_steps max_steps_per_epoch",
    "fit": "max_epochs max_steps max_steps_per_epoch max_eval_steps_per_epoch "
    "evaluate_every_n_steps evaluate_every_n_epochs",
    "evaluate": "max_steps_per_epoch",
    "predict": "max_steps_per_epoch",
}


@pytest.mark.parametrize(
    ("entry", "name"), [(entry, name) for entry, names in LIMITS.items() for name in names.split()]
)
def test_a_negative_limit_is_refused_before_anything_runs(entry: Entry, name: str):
    setting = replace(Setting(entry=entry, data=Source(2), max_epochs=1), **{name: -1})
    assert (observed(setting).events, observed(setting).outcome) == ((), "UsageError")
    if INSTALLED:
        assert (live(setting).events, live(setting).outcome) == ((), "ValueError")


# One line of the reference changed.
MUTANTS = {
    "epoch_start inside an epoch": ("if done.steps_in_epoch == 0:", "if True:"),
    "eval epoch_start inside an epoch": ("if self.counters[phase].steps_in_epoch == 0:", "if True:"),
    "an epoch that is not counted": ("self.counters[phase].epochs += 1", "pass"),
    "an epoch that goes on counting": ("self.counters[phase].steps_in_epoch = 0", "pass"),
    "a step that is not counted": ("self.counters[phase].steps += 1", "pass"),
    "the last callback first": ("self.everyone()[not unit :]", "self.everyone()[not unit :][::-1]"),
    "a stop that is forgotten": ("self.stopping = True", "pass"),
    "a limit that is reached late": ("limit is None or count < limit", "limit is None or count <= limit"),
    "an evaluation every n + 1": ("count % every == 0", "count % (every + 1) == 0"),
    "another default cadence": ("given or 0", "given or 1"),
    "evaluation with gradients": ('else "no_grad"', 'else "on"'),
    "gradients left off": ("self.gradients = gradients", "pass"),
    "a StopIteration that ends no epoch": ("raise RAISED[action]", 'raise RAISED["raise"]'),
    "a phase that stays active": ('self.phase = "train"', "pass"),
    "a module that is not put back": ("self.training = before", "pass"),
    "data that does not start anew": ("if data.reiterable:", "if False:"),
    "an error that only the unit hears of": ("for who in self.everyone() if", 'for who in ["U"] if'),
}


@pytest.mark.parametrize(("line", "changed"), MUTANTS.values(), ids=MUTANTS)
def test_one_changed_line_disagrees_with_the_recordings(monkeypatch: pytest.MonkeyPatch, line: str, changed: str):
    source = inspect.getsource(reference_module)
    assert source.count(line) == 1
    mutant = ModuleType("mutant")
    # Dataclasses look the names in their annotations up in sys.modules.
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(source.replace(line, changed), vars(mutant))
    # The cap on a changed loop that would not end is an error that no recording has.
    capped = (replace(setting, inject={**setting.inject, 300: "ki"}) for setting, _ in RECORDED)
    traces = [mutant.reference(setting) for setting in capped]
    assert any(
        (ours.events, ours.outcome, ours.final, ours.training) != (told.events, told.outcome, told.final, told.training)
        for ours, (_, told) in zip(traces, RECORDED, strict=True)
    )


def close_epoch_after_its_hooks(self: Transitions, state: State) -> State:
    state = self.hooks("epoch_end", state)
    return state.replace(progress=state.progress.put(self.phase, state.progress.of(self.phase).after_epoch()))


# The loop changed in one place.
LOOPS = {
    "epoch_end before the counters move": (Transitions, "close_epoch", close_epoch_after_its_hooks),
    "the last callback first": (runs, "attach", lambda unit, *callbacks: attach(unit, *reversed(callbacks))),
    "an epoch that a stop does not close": (Limits, "closes", lambda limits, state: False),
    "a limit per call": (Limits, "reached", lambda limits, state: None if state.progress.train.epochs < 4 else "over"),
    "an evaluation after every epoch": (Due, "after_epoch", lambda due, state: True),
    "a step that counts twice": (Progress, "after_step", lambda done: Progress(done[0], done[1] + 2, done[2] + 1)),
}


@pytest.mark.parametrize(("owner", "name", "changed"), LOOPS.values(), ids=LOOPS)
def test_a_changed_loop_disagrees(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, changed: Any):
    stop = Callback(name="stop", on_train_step_end=lambda state: stopped_at(state, 4))
    case = {"max_epochs": 3, "evaluate_every_n_epochs": 2, "callbacks": [Callback(name="idle"), stop]}
    check_oracle(FIT, FIRST, [1, 2, 3], **case)
    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(LawError, match="law 9"):
        check_oracle(FIT, FIRST, [1, 2, 3], **case)
    with pytest.raises(AssertionError):
        for setting, trace in RECORDED:
            check(setting, trace, DATA["list"])


def stopped_at(state: State, steps: int) -> State:
    return state.request_stop("enough") if state.progress.train.steps == steps else state


FIRST = State(params=torch.zeros(2), key=key(0))
TRAIN = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + torch.rand(2)), {}))
EVAL = EvalUnit(eval_step=lambda state, batch: (state, state.params * batch))
PREDICT = PredictUnit(predict_step=lambda state, batch: (state, state.params * batch))
FIT = FitUnit(train_unit=TRAIN, eval_unit=EVAL, predict_unit=PREDICT)


@pytest.mark.parametrize("unit", [TRAIN, EVAL, PREDICT, FIT], ids=["train", "evaluate", "predict", "fit"])
@pytest.mark.parametrize("done", [Progress(), Progress(1, 4, 1)], ids=["anew", "mid-epoch"])
def test_check_oracle_passes_units_that_stop_anywhere(unit: Any, done: Progress):
    first = FIRST.replace(progress=RunProgress(done, done, done))
    phases = ["train", "eval", "predict"] if unit is FIT else [unit.phase]
    for hook in [f"on_{phase}_{point}" for phase in phases for point in POINTS]:
        stop = replace(Callback(name="stop"), **{hook: lambda state: state.request_stop("enough")})
        whole = attach(unit, stop)
        check_oracle(unit, first, [1, 2, 3], callbacks=[Callback(name="idle"), stop])
        check_oracle(
            whole, first.replace(stop="before"), DataLoader(cast(Any, range(3))), callbacks=[Callback(name="idle")]
        )


def test_check_oracle_takes_the_limits_of_the_entry_point():
    check_oracle(
        FIT, FIRST, [1, 2, 3], eval_batches=[], max_steps=5, max_train_steps_per_epoch=2, evaluate_every_n_steps=2
    )
    check_oracle(EVAL, FIRST, [1, 2, 3], max_steps_per_epoch=0)


def test_an_evaluation_that_was_cut_short_is_continued():
    events = runs.fit_events(FIT, FIRST, [1, 2, 3], [1, 2], max_epochs=1, evaluate_every_n_steps=2)
    cut = next(event.state for event in events if event.phase == "eval" and event.point == "step_end")
    assert cut.progress.eval.is_open and cut.progress.train.is_open
    check_oracle(FIT, cut, [1, 2, 3], eval_batches=[1, 2], max_epochs=2, evaluate_every_n_steps=2)


def test_check_oracle_sees_counters_moved_in_place():
    def cheat(state: State) -> State:
        vars(state)["progress"] = RunProgress(Progress(1, 9, 1))
        return state

    with pytest.raises(LawError, match=r"train=\(1, 9, 1\)"):
        check_oracle(replace(TRAIN, on_train_epoch_start=cheat), FIRST, [1, 2, 3])


def test_check_oracle_raises_what_the_unit_raises():
    def boom(state: State) -> State:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check_oracle(replace(TRAIN, on_train_epoch_start=boom), FIRST, [1])


def test_check_oracle_needs_data_that_it_can_count():
    with pytest.raises(UsageTypeError, match="no length"):
        check_oracle(TRAIN, FIRST, lambda epoch: [1])
    with pytest.raises(UsageError, match="one-shot"):
        check_oracle(TRAIN, FIRST, iter([1]))
