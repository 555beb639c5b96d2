"""TorchTNT 0.2.4's loop, reduced to what can be compared: which hook is called when, what it sees, how the run ends.

Where tnt_func departs from it on purpose, a number of `DIFFERENCES` says so, and is off unless asked for. Nothing of
the loop itself is used here.

Laws:
    `reference(setting)` is what TorchTNT does, and `reference(setting, DIFFERENCES)` what tnt_func does.
    Where no difference was met on the way, the two agree.

Example:
    >>> [seen.hook for seen in reference(Setting(entry="train", data=Source(1), max_epochs=1)).events]
    ['on_train_start', 'on_train_epoch_start', 'train_step', 'on_train_epoch_end', 'on_train_end']
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from tnt_func.errors import ContractError, DataError, UsageError
from tnt_func.types import Limit, Phase
from tnt_func.unit import PHASES

DIFFERENCES = {
    "D1": "a StopIteration from user code is an error, and ends no epoch",
    "D2": "epochs without a batch, and no limit that they could reach, are an error",
    "D3": "an evaluation that is due after a stop runs in full",
    "D4": "a module's training flag is never touched",
    "D5": "whatever is raised, one `failed` event tells of it and it surfaces",
    "D6": "evaluate_every_n_epochs that is not given is 1, and never where a cadence of steps is given",
    "D7": "a run without a limit is refused",
    "D8": "an open epoch skips the batches that it has had; data shorter than that is an error",
    "D9": "an iterator that an earlier epoch used up is an error",
    "D15": "an open epoch is entered and closed, whatever the limits",
    "D16": "prediction turns gradients off, and makes no inference tensors",
}
"""What tnt_func does instead of TorchTNT, as far as a trace shows it. Pausing (D10) and memory (D11) it cannot show."""

Entry: TypeAlias = Literal["train", "fit", "evaluate", "predict"]
Action: TypeAlias = Literal["stop", "raise", "si", "ki"]
Counts: TypeAlias = tuple[int, int, int]
"""Epochs, steps, and steps in the open epoch."""


class Injected(Exception):
    """What a hook raises that is told to `raise`.

    Example:
        >>> reference(Setting(entry="evaluate", data=Source(1), inject={0: "raise"})).outcome
        'Injected'
    """


RAISED: dict[Action, type[BaseException]] = {"raise": Injected, "si": StopIteration, "ki": KeyboardInterrupt}


@dataclass(frozen=True)
class Source:
    """Data by its length.

    Args:
        n: batches.
        reiterable: whether it starts anew each epoch; else it is a one-shot iterator.

    Example:
        >>> Source(4, reiterable=False)
        Source(n=4, reiterable=False)
    """

    n: int
    reiterable: bool = True


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One call of an entry point.

    Args:
        entry: which.
        data, eval_data: what it reads; `eval_data` is for `fit`.
        max_epochs ... evaluate_every_n_epochs: as in `tnt_func.fit`; "omitted" leaves TorchTNT its default, which is
            not what None means to it.
        n_callbacks: beside the unit.
        unit_step_hooks: whether the unit has step_start and step_end hooks, which TorchTNT's have not.
        progress: the counters at the start.
        training: the training flag of the module at the start.
        inject: what the hook or step of an event does, by the index of the event: request a stop, or raise an
            `Injected`, a StopIteration, a KeyboardInterrupt.

    Example:
        >>> Setting(entry="evaluate", data=Source(3), max_steps_per_epoch=2).progress["eval"]
        (0, 0, 0)
    """

    entry: Entry
    data: Source
    eval_data: Source = Source(0)
    max_epochs: Limit = None
    max_steps: Limit = None
    max_steps_per_epoch: Limit = None
    max_eval_steps_per_epoch: Limit = None
    evaluate_every_n_steps: int | None = None
    evaluate_every_n_epochs: int | Literal["omitted"] | None = "omitted"
    n_callbacks: int = 0
    unit_step_hooks: bool = False
    progress: Mapping[Phase, Counts] = field(default_factory=lambda: dict.fromkeys(PHASES, (0, 0, 0)))
    training: bool = True
    inject: Mapping[int, Action] = field(default_factory=dict[int, Action])

    @property
    def phase(self) -> Phase:
        """The phase that the entry point runs; a fit trains."""
        return "eval" if self.entry == "evaluate" else "predict" if self.entry == "predict" else "train"

    def limits(self) -> dict[str, Any]:
        """The entry point's keyword arguments; TorchTNT and tnt_func call them the same.

        Example:
            >>> Setting(entry="evaluate", data=Source(3), max_steps_per_epoch=2).limits()
            {'max_steps_per_epoch': 2}
        """
        given: dict[str, Any] = {"max_steps_per_epoch": self.max_steps_per_epoch}
        if self.phase == "train":
            given |= {"max_epochs": self.max_epochs, "max_steps": self.max_steps}
        if self.entry == "fit":
            given["max_train_steps_per_epoch"] = given.pop("max_steps_per_epoch")
            given["max_eval_steps_per_epoch"] = self.max_eval_steps_per_epoch
            given["evaluate_every_n_steps"] = self.evaluate_every_n_steps
            given["evaluate_every_n_epochs"] = self.evaluate_every_n_epochs
        return {name: value for name, value in given.items() if value != "omitted"}


class Seen(NamedTuple):
    """What a hook or step saw when it was called.

    Args:
        who: "U" for the unit, "C0", "C1", ... for the callbacks, "run" for the run itself.
        hook: its name, or `failed`.
        phase: which phase is active.
        training: the module's training flag.
        gradients: "on", "no_grad" or "inference".
        train, eval, predict: the counters.

    Example:
        >>> reference(Setting(entry="evaluate", data=Source(0))).events[0].hook
        'on_eval_start'
    """

    who: str
    hook: str
    phase: Phase
    training: bool
    gradients: str
    train: Counts
    eval: Counts
    predict: Counts


@dataclass(frozen=True)
class Trace:
    """What a run does, to its end.

    Args:
        events: in order, those of `on_*_get_next_batch_end` among them, a hook of callbacks that TorchTNT alone has.
        outcome: "ok", or the name of the error that surfaced.
        final: the counters of the three phases afterwards.
        training: the module's training flag afterwards.
        met: the differences that were met on the way.

    Example:
        >>> reference(Setting(entry="evaluate", data=Source(0)), DIFFERENCES).met
        frozenset({'D4'})
    """

    events: tuple[Seen, ...]
    outcome: str
    final: tuple[Counts, Counts, Counts]
    training: bool
    met: frozenset[str] = field(default=frozenset(), compare=False)

    def comparable(self) -> "Trace":
        """Without the events of the hook that tnt_func has not; they counted only for the indices of `inject`."""
        return replace(self, events=tuple(seen for seen in self.events if not seen.hook.endswith("get_next_batch_end")))


def reference(setting: Setting, differences: Collection[str] = ()) -> Trace:
    """What TorchTNT does with a setting, or what a loop does that differs from it under these numbers.

    Example:
        >>> stopped = Setting(entry="fit", data=Source(1), eval_data=Source(2), max_epochs=1, inject={1: "stop"})
        >>> reference(stopped).final[1], reference(stopped, ["D3"]).final[1]
        ((1, 0, 0), (1, 2, 0))
    """
    loop = _Reference(setting, differences)
    outcome = loop.run()
    return Trace(tuple(loop.events), outcome, loop.counted(), loop.training, frozenset(loop.met))


@dataclass
class _Counters:
    epochs: int
    steps: int
    steps_in_epoch: int


class _Data:
    """A source while it is read."""

    def __init__(self, source: Source):
        self.n, self.reiterable = source.n, source.reiterable
        self.position = 0
        self.read = self.read_before = self.fed = self.used_up = False


def _below(count: int, limit: Limit) -> bool:
    return limit is None or count < limit


class _Reference:
    """The loop. `differs` is asked where a difference would matter, and notes that it was met."""

    def __init__(self, setting: Setting, differences: Collection[str]):
        self.setting, self.differences, self.met = setting, differences, set[str]()
        self.events: list[Seen] = []
        self.counters = {phase: _Counters(*setting.progress[phase]) for phase in PHASES}
        self.data = {setting.phase: _Data(setting.data)}
        if setting.entry == "fit":
            self.data["eval"] = _Data(setting.eval_data)
        self.unlimited = setting.max_epochs in (None, math.inf)
        self.phase: Phase = setting.phase
        self.training, self.gradients, self.stopping = setting.training, "on", False
        self.resumable = self.counted()

    def differs(self, number: str) -> bool:
        if number in self.differences:
            self.met.add(number)
        return number in self.differences

    def counted(self) -> tuple[Counts, Counts, Counts]:
        train, evaluated, predicted = ((c.epochs, c.steps, c.steps_in_epoch) for c in self.counters.values())
        return train, evaluated, predicted

    def run(self) -> str:
        if self.setting.phase == "train" and self.never_ends():
            return UsageError.__name__
        try:
            self.train() if self.setting.phase == "train" else self.one_epoch(self.setting.phase)
        except BaseException as error:
            return self.failed(error)
        return "ok"

    def never_ends(self) -> bool:
        if self.setting.max_epochs is None and self.setting.max_steps is None:
            return self.differs("D7")
        return self.unlimited and self.setting.max_steps_per_epoch == 0 and self.differs("D2")

    def train(self) -> None:
        before = self.set_mode(True)
        self.at("train", "start")
        while self.enters():
            self.train_epoch()
            self.resumable = self.counted()
        self.at("train", "end")
        self.training = before

    def enters(self) -> bool:
        done, limits = self.counters["train"], self.setting
        if not self.stopping and _below(done.steps, limits.max_steps) and _below(done.epochs, limits.max_epochs):
            return True
        return done.steps_in_epoch > 0 and self.differs("D15")

    def train_epoch(self) -> None:
        done, limits, self.phase = self.counters["train"], self.setting, "train"
        self.open("train")
        if done.steps_in_epoch == 0:
            self.at("train", "epoch_start")
        while not self.stopping and _below(done.steps, limits.max_steps) and self.below_epoch_limit("train"):
            try:
                self.step("train")
                self.evaluate_if_due(done.steps, limits.evaluate_every_n_steps)
            except StopIteration:
                break
            self.resumable = self.counted()
        self.close("train")
        self.evaluate_if_due(done.epochs, self.evaluate_every_n_epochs())

    def evaluate_if_due(self, count: int, every: int | None) -> None:
        if self.setting.entry == "fit" and every and count % every == 0:
            self.one_epoch("eval")
            self.phase = "train"

    def evaluate_every_n_epochs(self) -> int:
        given = self.setting.evaluate_every_n_epochs
        theirs = 1 if given == "omitted" else given or 0
        ours = given if isinstance(given, int) else 0 if self.setting.evaluate_every_n_steps else 1
        return ours if self.setting.entry == "fit" and ours != theirs and self.differs("D6") else theirs

    def one_epoch(self, phase: Phase) -> None:
        """Evaluate or predict."""
        before, self.phase, gradients = self.set_mode(False), phase, self.gradients
        stopped = self.stopping and self.differs("D3")
        self.stopping = self.stopping and not stopped
        self.gradients = "inference" if phase == "predict" and not self.differs("D16") else "no_grad"
        try:
            self.at(phase, "start")
            self.open(phase)
            if self.counters[phase].steps_in_epoch == 0:
                self.at(phase, "epoch_start")
            while not self.stopping and self.below_epoch_limit(phase):
                try:
                    self.step(phase)
                except StopIteration:
                    break
            self.close(phase)
            self.at(phase, "end")
        finally:
            self.gradients = gradients
        self.training, self.stopping = before, self.stopping or stopped

    def set_mode(self, training: bool) -> bool:
        before = self.training
        if before is not training and not self.differs("D4"):
            self.training = training
        return before

    def below_epoch_limit(self, phase: Phase) -> bool:
        nested = phase == "eval" and self.setting.entry == "fit"
        limit = self.setting.max_eval_steps_per_epoch if nested else self.setting.max_steps_per_epoch
        return _below(self.counters[phase].steps_in_epoch, limit)

    def open(self, phase: Phase) -> None:
        data, done = self.data[phase], self.counters[phase].steps_in_epoch
        if data.used_up and self.differs("D9"):
            raise DataError
        if data.reiterable:
            data.position = done if done and self.differs("D8") else 0
        data.read_before, data.fed = data.read, False

    def fetch(self, phase: Phase) -> None:
        data = self.data[phase]
        data.read = True
        if data.position > data.n:
            raise DataError
        if data.position < data.n:
            data.position, data.fed = data.position + 1, True
            return
        if not data.reiterable:
            if data.read_before and not data.fed and self.differs("D9"):
                raise DataError
            data.used_up = True
        empty = phase == "train" and self.counters[phase].steps_in_epoch == 0
        if empty and self.unlimited and self.differs("D2"):
            raise DataError
        raise StopIteration

    def step(self, phase: Phase) -> None:
        self.fetch(phase)
        self.at(phase, "get_next_batch_end", unit=False)
        self.at(phase, "step_start", unit=self.setting.unit_step_hooks)
        self.call("U", f"{phase}_step")
        self.counters[phase].steps += 1
        self.counters[phase].steps_in_epoch += 1
        self.at(phase, "step_end", unit=self.setting.unit_step_hooks)

    def close(self, phase: Phase) -> None:
        self.counters[phase].epochs += 1
        self.counters[phase].steps_in_epoch = 0
        self.at(phase, "epoch_end")

    def at(self, phase: Phase, point: str, unit: bool = True) -> None:
        for who in self.everyone()[not unit :]:
            self.call(who, f"on_{phase}_{point}")

    def everyone(self) -> list[str]:
        return ["U", *(f"C{i}" for i in range(self.setting.n_callbacks))]

    def call(self, who: str, hook: str) -> None:
        action = self.setting.inject.get(len(self.events))
        self.events.append(Seen(who, hook, self.phase, self.training, self.gradients, *self.counted()))
        if action == "stop":
            self.stopping = True
        elif action == "si" and self.differs("D1"):
            raise ContractError
        elif action is not None:
            raise RAISED[action]

    def failed(self, error: BaseException) -> str:
        if self.differs("D5"):
            self.phase = self.setting.phase
            self.counters = {phase: _Counters(*counts) for phase, counts in zip(PHASES, self.resumable, strict=True)}
            self.events.append(Seen("run", "failed", self.phase, self.training, self.gradients, *self.resumable))
            return type(error).__name__
        try:
            for who in self.everyone() if isinstance(error, Exception) else ():
                self.call(who, "on_exception")
        except BaseException as second:
            return type(second).__name__
        return type(error).__name__
