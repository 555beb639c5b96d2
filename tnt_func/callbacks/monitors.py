"""What a callback decides on: one number, and the point at which it is there.

Example:
    >>> from tnt_func.metrics import Total
    >>> from tnt_func.rng import key
    >>> state = State(params={}, key=key(0), metrics={"eval": {"loss": Total(torch.tensor(3.0))}})
    >>> Monitor("early_stopping", "loss", "eval").read(state)
    3.0
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from tnt_func.errors import UsageError, kind_of
from tnt_func.pytree import describe
from tnt_func.state import State
from tnt_func.types import Mode
from tnt_func.unit import Hook

MonitoredPhase: TypeAlias = Literal["train", "eval"]
Interval: TypeAlias = Literal["epoch", "step"]
ThresholdMode: TypeAlias = Literal["abs", "rel"]
Number: TypeAlias = int | float


@dataclass(frozen=True)
class Monitor:
    """One number of a phase: a metric at the end of its epochs, or an entry of the output at the end of its steps.

    Args:
        callback: who asks, for the errors.
        name: of the metric or entry.
        phase: whose it is.
        interval: when it is looked at. Every look waits for the device.
        interval_freq: at every so many completed epochs or steps of the phase.

    Raises:
        UsageError: `interval_freq` is below 1.

    Example:
        >>> Monitor("early_stopping", "loss", "train", "step", 2).hooks(len)
        {'on_train_step_end': ...}
    """

    callback: str
    name: str
    phase: MonitoredPhase
    interval: Interval = "epoch"
    interval_freq: int = 1

    def __post_init__(self) -> None:
        if self.interval_freq < 1:
            raise UsageError(
                f"{self.callback} was given interval_freq={self.interval_freq}; it decides at every so many completed "
                f"{self.interval}s, at least one. Write interval_freq=1."
            )

    def hooks(self, decide: Hook) -> dict[str, Any]:
        """The hook that decides, by the field of a Callback that it is for."""

        def on_end(state: State) -> State:
            progress = state.progress.of(self.phase)
            completed = progress.epochs if self.interval == "epoch" else progress.steps
            return decide(state) if completed % self.interval_freq == 0 else state

        return {f"on_{self.phase}_{self.interval}_end": on_end}

    def read(self, state: State) -> float:
        """The number now.

        Raises:
            UsageError: there is none of that name, or it is not one number.
        """
        of_epoch = self.interval == "epoch"
        have: Any = state.metrics.get(self.phase, {}) if of_epoch else state.output
        what = f"the {self.phase} {'metric' if of_epoch else 'output'} {self.name!r}"
        fix = f"metrics={{{self.name!r}: tnt.metrics.mean(...)}}" if of_epoch else f"(state, {{{self.name!r}: ...}})"
        if not isinstance(have, Mapping) or self.name not in have:
            there = sorted(have, key=str) if isinstance(have, Mapping) else kind_of(have)
            raise UsageError(
                f"{self.callback} reads {what} at {self.interval}_end, where there is {there}. Name one of these, or "
                f"give the {self.phase} unit {fix if of_epoch else f'a step that returns {fix}'}."
            )
        value: Any = have[self.name].value() if of_epoch else have[self.name]
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if not isinstance(value, int | float):
            raise UsageError(
                f"{self.callback} reads {what}, which is {describe(value)}; it decides on one real number. Name an "
                "entry that is one, or reduce it where it is made: x.mean(). For members of an ensemble to decide each "
                "for itself, attach the callback inside: tnt.ensemble(tnt.attach(unit, callback), size)."
            )
        return float(value)

    def __str__(self) -> str:
        return f"{self.phase} {self.name}"


def worst(mode: Mode) -> float:
    """What every number is better than.

    Example:
        >>> worst("max")
        -inf
    """
    return math.inf if mode == "min" else -math.inf


def better(a: float, b: float, mode: Mode) -> bool:
    """Whether a is strictly better than b; NaN is never better, nor worse.

    Example:
        >>> better(1.0, 2.0, "min"), better(1.0, 2.0, "max"), better(math.nan, math.inf, "min")
        (True, False, False)
    """
    return a < b if mode == "min" else a > b


def check_not_negative(callback: str, **numbers: Number) -> None:
    """Refuse what is negative, or NaN.

    Example:
        >>> check_not_negative("early_stopping", patience=-1)
        Traceback (most recent call last):
        tnt_func.errors.UsageError: early_stopping was given patience=-1; it is at least 0. Write patience=0.
    """
    for name, number in numbers.items():
        if not number >= 0:
            raise UsageError(f"{callback} was given {name}={number!r}; it is at least 0. Write {name}=0.")
