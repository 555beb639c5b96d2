"""Law 4: the events of a run are a word of one language, and the counters are a function of them.

    train:   start (epoch_start (fetched step_start step_end [eval] step_done)* epoch_end [eval] epoch_done)* end
    eval:    start epoch_start (fetched step_start step_end)* epoch_end end                (predict likewise)

A run that continues an open epoch begins with `start`, without `epoch_start`. `paused` may follow whatever is resumable
or a step of an evaluation, `failed` anything; nothing follows them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tnt_func.arguments import expects
from tnt_func.errors import LawError
from tnt_func.events import Event
from tnt_func.state import State
from tnt_func.testing.case import Case, law_error, where
from tnt_func.types import Phase
from tnt_func.unit import PHASES, Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit, Unit

TRAIN = {
    "": "start",
    "start": "epoch_start end",
    "start of an open epoch": "fetched epoch_end",
    "epoch_start": "fetched epoch_end",
    "fetched": "step_start",
    "step_start": "step_end",
    "step_end": "step_done",
    "step_done": "fetched epoch_end",
    "epoch_end": "epoch_done",
    "epoch_done": "epoch_start end",
    "end": "",
}
"""What may follow each point of training; evaluations go in between where they are due."""

PASS = {
    "": "start",
    "start": "epoch_start",
    "start of an open epoch": "fetched epoch_end",
    "epoch_start": "fetched epoch_end",
    "fetched": "step_start",
    "step_start": "step_end",
    "step_end": "fetched epoch_end",
    "epoch_end": "end",
    "end": "",
}
"""What may follow each point of an evaluation or prediction."""

_STEP = ("fetched", "step_start", "step_end", "step_done")
_ADVICE = (
    "The loop alone moves counters and opens, closes and ends. A loop of your own yields these events from tnt.step, "
    "tnt.start_epoch and tnt.end_epoch; where the run came from tnt.train or its like, this is a bug of tnt_func."
)


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_grammar(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 4. The events are a word of the language, the counters a function of them, the limits lifetime totals.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.

    Raises:
        LawError: an event may not follow the one before, or holds other counters than the events before it make; or a
            step or hook moved a counter or a key by hand.

    Example:
        >>> from tnt_func.progress import RunProgress
        >>> from tnt_func.rng import key
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(progress=RunProgress()), {}))
        >>> check_grammar(unit, State(params=0, key=key(0)), [1.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 4 (grammar) is broken after train step_start (epoch 0, step 0), and the loop ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    check_events(case.events(), case)


def check_events(events: Iterable[Event], case: Case) -> None:
    """Law 4 of events that are there already.

    Args:
        events: of one call.
        case: what they came from: its state, the kind of its unit and its limits count.

    Raises:
        LawError: as `check_grammar`.

    Example:
        >>> from tnt_func.rng import key
        >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}))
        >>> case = Case.of(unit, State(params=0, key=key(0)), [1.0])
        >>> check_events((event for event in case.events() if event.point != "step_done"), case)
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 4 (grammar) is broken at train epoch_end (epoch 1, step 1): after train ...
    """
    reader = _Reader(case)
    for event in events:
        if wrong := reader.wrong(event):
            raise _error(f"at {where(event.phase, event.point, event.state)}", wrong)
        reader.read(event)
    if not reader.over:
        raise _error("at the last event", f"the events stop after {reader.phase} {reader.point or 'nothing'}")


def _error(at: str, wrong: str) -> LawError:
    return law_error("grammar", at, wrong, [], _ADVICE)


class _Reader:
    """Reads events one by one, and says of the next one what is wrong with it."""

    def __init__(self, case: Case):
        self.case, self.limits = case, _limits(case)
        self.outer: Phase = "train" if isinstance(case.unit, FitUnit) else case.unit.phase
        self.phase: Phase = self.outer
        self.point, self.over = "", False
        self.train_point = ""  # where an evaluation inside training began
        self.stop: str | None = None
        progress = case.state.progress
        self.counts = {phase: list(progress.of(phase)) for phase in PHASES}
        self.batches: dict[str, Any] = {}

    def wrong(self, event: Event) -> str | None:
        """What is wrong with the next event, or None."""
        place = f"{event.phase} {event.point}"
        if self.over:
            return f"{place} follows the last event"
        if event.point == "failed":
            return None if event.error is not None else "a failed event has its error"
        allowed = self._allowed()
        if place not in allowed:
            may = " or ".join(sorted(allowed))
            return f"after {self.phase} {self.point or 'nothing'} came {place}, and what may come is {may}"
        return self._wrong_field(event) or (None if event.point == "paused" else self._wrong_count(event))

    def _allowed(self) -> set[str]:
        open_epoch = self.point == "start" and self.counts[self.phase][2] > 0
        table = TRAIN if self.phase == "train" else PASS
        follows = table["start of an open epoch" if open_epoch else self.point].split()
        allowed = {f"{self.phase} {point}" for point in follows if self._within_limits(point)}
        if self.phase == self.outer == "train":
            if self._due():
                allowed = {"eval start"}
            elif self.point in ("step_done", "epoch_done"):
                allowed.add("train paused")
        elif self.outer == "train":
            allowed |= {"train paused"} if self.point == "step_end" else set()
            allowed |= {f"train {TRAIN[self.train_point]}"} if self.point == "end" else set()
        return allowed

    def _within_limits(self, point: str) -> bool:
        if point == "fetched" and self.stop is not None:
            return False
        if self.phase != "train":
            return point != "fetched" or self.counts[self.phase][2] < self.limits["pass"]
        epochs, steps, steps_in_epoch = self.counts["train"]
        if point == "fetched":
            return steps < self.limits["steps"] and steps_in_epoch < self.limits["epoch"]
        done = self.stop is not None or steps >= self.limits["steps"] or epochs >= self.limits["epochs"]
        return done if point == "end" else not done if point == "epoch_start" else True

    def _due(self) -> bool:
        if not isinstance(self.case.unit, FitUnit):
            return False
        by_epochs, by_steps = (self.case.options.get(f"evaluate_every_n_{what}") for what in ("epochs", "steps"))
        if by_epochs is None:
            by_epochs = 0 if by_steps else 1
        epochs, steps, _ = self.counts["train"]
        if self.point == "step_end":
            return bool(by_steps) and steps % by_steps == 0
        return self.point == "epoch_end" and by_epochs > 0 and epochs % by_epochs == 0

    def _wrong_field(self, event: Event) -> str | None:
        resumable = event.phase == "train" and event.point in ("step_done", "epoch_done", "paused")
        if event.resumable is not resumable:
            return f"resumable is {event.resumable}"
        if (event.reason is not None) is not (event.point in ("end", "paused")):
            return f"the reason is {event.reason!r}; end and paused have one, and no other event"
        if event.state.output is not None and event.point != "step_end":
            return "the state has an output, which only step_end has"
        if event.point in _STEP[1:] and event.batch is not self.batches[event.phase]:
            return "the batch is another than the one that was fetched"
        if event.point not in _STEP and event.batch is not None:
            return "there is a batch outside of a step"
        return None

    def _wrong_count(self, event: Event) -> str | None:
        counts = {phase: list(self.counts[phase]) for phase in PHASES}
        _move(counts[event.phase], event.point)
        for phase in PHASES:
            found, numbers = list(event.state.progress.of(phase)), counts[phase]
            if found != numbers:
                return (
                    f"the {phase} counters (epochs, steps, steps_in_epoch) are {found}, and the events make {numbers}"
                )
        return None

    def read(self, event: Event) -> None:
        """Take the event as read."""
        self.over = event.point in ("failed", "paused") or (event.point == "end" and event.phase == self.outer)
        if event.point == "start" and event.phase != self.outer:
            self.train_point = self.point
        if event.point == "fetched":
            self.batches[event.phase] = event.batch
        self.phase, self.point, self.stop = event.phase, event.point, event.state.stop
        _move(self.counts[event.phase], event.point)


def _move(counts: list[int], point: str) -> None:
    if point == "step_end":
        counts[1] += 1
        counts[2] += 1
    if point == "epoch_end":
        counts[0] += 1
        counts[2] = 0


def _limits(case: Case) -> Mapping[str, float]:
    options, fits = case.options, isinstance(case.unit, FitUnit)
    names = {
        "epochs": "max_epochs",
        "steps": "max_steps",
        "epoch": "max_train_steps_per_epoch" if fits else "max_steps_per_epoch",
        "pass": "max_eval_steps_per_epoch" if fits else "max_steps_per_epoch",
    }
    given = {what: options.get(name) for what, name in names.items()}
    return {what: math.inf if value is None else value for what, value in given.items()}
