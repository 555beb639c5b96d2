"""Law 9: the order of hooks and the counters are TorchTNT's, the deliberate differences aside.

`observed` notes what tnt_func does with a setting; `check_oracle` does so with a unit of yours, and compares.

Laws:
    `observed(setting)` is `reference(setting, DIFFERENCES)`.

Example:
    >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}))
    >>> check_oracle(unit, State(params={}, key=key(0)), [1, 2], max_epochs=2)
"""

from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from tnt_func import runs
from tnt_func.arguments import expects
from tnt_func.errors import LawError, UsageTypeError
from tnt_func.events import Event
from tnt_func.progress import Progress, RunProgress
from tnt_func.rng import key
from tnt_func.state import State
from tnt_func.testing.case import Case
from tnt_func.testing.reference import (
    DIFFERENCES,
    RAISED,
    Action,
    Counts,
    Entry,
    Seen,
    Setting,
    Source,
    Trace,
    reference,
)
from tnt_func.types import Batch, Output, Phase
from tnt_func.unit import (
    PHASES,
    POINTS,
    Callback,
    EvalUnit,
    FitUnit,
    Hook,
    PredictUnit,
    Step,
    TrainUnit,
    Unit,
    hook_of,
    parts,
    step_of,
)

_ENTRY: dict[Phase, Entry] = {"train": "train", "eval": "evaluate", "predict": "predict"}
_IDLE_TRAIN = TrainUnit(train_step=lambda state, batch: (state, {}), draws=())
_IDLE_EVAL = EvalUnit(eval_step=lambda state, batch: (state, {}), draws=())
_IDLE: dict[Entry, Unit] = {
    "train": _IDLE_TRAIN,
    "fit": FitUnit(train_unit=_IDLE_TRAIN, eval_unit=_IDLE_EVAL),
    "evaluate": _IDLE_EVAL,
    "predict": PredictUnit(predict_step=lambda state, batch: (state, {}), draws=()),
}


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_oracle(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 9. Every hook is called when TorchTNT would call it, and sees the counters that it would see.

    The unit is run once, with hooks that note their calls around its own. Where one of its hooks requests a stop,
    TorchTNT's loop is told to stop at that call. What the unit raises is raised as it is.

    Args:
        unit, state, callbacks, options: as in `check_unit`; a FitUnit is fitted, and a stop in the state is cleared.
        batches, eval_batches: as there, and with a length: a list, a DataLoader.

    Raises:
        LawError: the run differs from TorchTNT's; the message shows the first call that does.
        UsageTypeError: the data has no length.

    Example:
        >>> unit = EvalUnit(eval_step=lambda state, batch: (state, {}))
        >>> check_oracle(unit, State(params={}, key=key(0)), [1, 2, 3], max_steps_per_epoch=2)
    """
    case = Case.of(unit, state.replace(stop=None), batches, eval_batches, callbacks, options)
    setting = Setting(
        entry="fit" if isinstance(unit, FitUnit) else _ENTRY[unit.phase],
        data=_source(case.data),
        eval_data=_source(case.eval_data) if isinstance(unit, FitUnit) else Source(0),
        n_callbacks=len(callbacks),
        unit_step_hooks=True,
        progress=dict(zip(PHASES, _counts(state), strict=True)),
        **{name.replace("max_train_", "max_"): value for name, value in case.options.items()},
    )
    log = _Log(setting)
    log.run(unit, case.state, case.feeds, callbacks, case.options)
    expected = reference(replace(setting, inject=log.stops), DIFFERENCES)
    if difference := first_difference(expected, log.trace("ok")):
        raise LawError(
            f"law 9 (oracle) is broken: {setting.entry} does not do what TorchTNT does; {difference}\n"
            "The loop alone calls hooks and moves counters. Write nothing into state.progress, not even in place; "
            "where no hook does, this is a bug of tnt_func."
        )


def observed(setting: Setting, data: Callable[[int], Any] = range) -> Trace:
    """What tnt_func does with a setting: a unit and callbacks that only note what they see, and do as it says.

    A step may not request a stop, nor is there a hook where a batch was fetched: the unit's next hook requests it.

    Args:
        setting: the call.
        data: makes the data that starts anew each epoch, from its length.

    Example:
        >>> observed(Setting(entry="predict", data=Source(3), max_steps_per_epoch=2)).final[2]
        (1, 2, 0)
    """
    log, outcome = _Log(setting), "ok"
    callbacks = [Callback(name=f"C{i}") for i in range(setting.n_callbacks)]
    sources = (setting.data, setting.eval_data) if setting.entry == "fit" else (setting.data,)
    feeds = [data(source.n) if source.reiterable else iter(range(source.n)) for source in sources]
    progress = RunProgress(*(Progress(*setting.progress[phase]) for phase in PHASES))
    state = State(params={}, key=key(0), progress=progress)
    try:
        log.run(_IDLE[setting.entry], state, feeds, callbacks, setting.limits())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and "ki" not in setting.inject.values():
            raise
        outcome = type(error).__name__
    return log.trace(outcome)


def first_difference(expected: Trace, seen: Trace) -> str | None:
    """Where a trace is not as expected, in words; None where it is.

    Example:
        >>> trace = observed(Setting(entry="evaluate", data=Source(0)))
        >>> first_difference(trace, replace(trace, outcome="ValueError"))
        "the outcome is 'ValueError' and should be 'ok'."
    """
    expected, seen = expected.comparable(), seen.comparable()
    before = "the beginning"
    for wanted, got in zip_longest(expected.events, seen.events):
        if wanted != got:
            return f"after {before}\n    comes      {got or 'the end'}\n    instead of {wanted or 'the end'}."
        before = f"{wanted}"
    for name in ("outcome", "final", "training"):
        wanted, got = getattr(expected, name), getattr(seen, name)
        if wanted != got:
            return f"the {name} is {got!r} and should be {wanted!r}."
    return None


class _Log:
    """Wraps hooks and steps so that they note what they see and do as a setting says."""

    def __init__(self, setting: Setting):
        self.setting, self.events = setting, list[Seen]()
        self.stops: dict[int, Action] = {}
        self.stop_next = False
        self.module = torch.nn.Identity().train(setting.training)
        self.final = setting.progress["train"], setting.progress["eval"], setting.progress["predict"]

    def run(self, unit: Unit, state: State, data: Sequence[Any], callbacks: Sequence[Callback], options: Any) -> None:
        phases: list[Phase] = [part.phase for part in parts(unit)]
        noted = [self.callback(f"C{i}", callback, phases) for i, callback in enumerate(callbacks)]
        run = getattr(runs, self.setting.entry)
        run(self.unit(unit), state, *data, callbacks=noted, observers=[self.watch], **options)

    def trace(self, outcome: str) -> Trace:
        return Trace(tuple(self.events), outcome, self.final, self.module.training)

    def unit(self, unit: Any) -> Any:
        if isinstance(unit, FitUnit):
            return replace(unit, **{f"{part.phase}_unit": self.unit(part) for part in parts(unit)})
        phase = unit.phase
        hooks = {f"on_{phase}_{point}": self.hook("U", unit, phase, point) for point in POINTS}
        return replace(unit, **hooks, **{f"{phase}_step": self.step(phase, step_of(unit))})

    def callback(self, who: str, callback: Callback, phases: Sequence[Phase]) -> Callback:
        hooks = {f"on_{phase}_{point}": self.hook(who, callback, phase, point) for phase in phases for point in POINTS}
        return replace(callback, **hooks)

    def hook(self, who: str, owner: Any, phase: Phase, point: str) -> Hook:
        inner = hook_of(owner, phase, point)
        counts = who != "U" or point not in ("step_start", "step_end") or self.setting.unit_step_hooks

        def noted(state: State) -> State:
            if counts:
                self.see(who, f"on_{phase}_{point}", phase, state)
            if self.stop_next:
                state, self.stop_next = state.request_stop("told to"), False
            after = inner(state)
            if isinstance(after, State) and state.stop is None and after.stop is not None:
                self.stops[len(self.events) - 1] = "stop"
            return after

        return noted

    def step(self, phase: Phase, inner: Step) -> Step:
        def noted(state: State, batch: Batch) -> tuple[State, Output]:
            self.see("U", f"{phase}_step", phase, state)
            return inner(state, batch)

        return noted

    def watch(self, event: Event) -> None:
        self.final = _counts(event.state)
        if event.point == "failed":
            self.see("run", "failed", event.phase, event.state)
        if event.point == "fetched":
            for i in range(self.setting.n_callbacks):
                self.see(f"C{i}", f"on_{event.phase}_get_next_batch_end", event.phase, event.state)

    def see(self, who: str, hook: str, phase: Phase, state: State) -> None:
        action = self.setting.inject.get(len(self.events))
        gradients = "inference" if torch.is_inference_mode_enabled() else "on" if torch.is_grad_enabled() else "no_grad"
        self.events.append(Seen(who, hook, phase, self.module.training, gradients, *_counts(state)))
        if action == "stop":
            self.stop_next = True
        elif action is not None:
            raise RAISED[action]


def _source(data: Any) -> Source:
    if not isinstance(data, Sized):
        raise UsageTypeError(
            f"the batches are a {type(data).__name__}, which has no length; what TorchTNT does with a run depends on "
            "it. Write list(batches)."
        )
    return Source(len(data))


def _counts(state: State) -> tuple[Counts, Counts, Counts]:
    train, evaluated, predicted = (state.progress.of(phase) for phase in PHASES)
    return _count(train), _count(evaluated), _count(predicted)


def _count(progress: Progress) -> Counts:
    return progress.epochs, progress.steps, progress.steps_in_epoch
