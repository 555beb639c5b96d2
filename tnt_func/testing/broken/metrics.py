"""What an accumulator must not be: no monoid (law 8)."""

from dataclasses import dataclass
from typing import Any

import torch

from tnt_func import metrics
from tnt_func.metrics import Metric
from tnt_func.pytree import pytree
from tnt_func.testing.broken.control import Subject, control


def _measured(metric: Metric) -> Subject:
    return Subject(metric=metric, outputs=[torch.tensor(value) for value in (1.0, 2.0, 6.0, -3.0)])


@pytree
@dataclass(frozen=True)
class Running:
    """The mean of what it was given, which forgets of how many."""

    mean: Any

    def merge(self, other: "Running") -> "Running":
        """Halfway between both: a mean of means."""
        if self.mean.isnan() or other.mean.isnan():
            return other if self.mean.isnan() else self
        return Running((self.mean + other.mean) / 2)

    def value(self) -> Any:
        """The mean."""
        return self.mean


@control("composition", "the value depends on the cut into outputs", "a weighted sum and a weight")
def mean_of_means(broken: bool) -> Subject:
    sound = Metric(
        lambda: metrics.Mean(torch.tensor(0.0), torch.tensor(0.0)), lambda x: metrics.Mean(x, torch.tensor(1.0))
    )
    wrong = Metric(lambda: Running(torch.tensor(float("nan"))), Running)
    return _measured(wrong if broken else sound)


@control("composition", "empty() is no identity", "empty().merge(a) is not a", "infinity of a minimum")
def minimum_from_zero(broken: bool) -> Subject:
    first = 0.0 if broken else float("inf")
    return _measured(Metric(lambda: metrics.Minimum(torch.tensor(first)), metrics.Minimum))


@pytree
@dataclass(frozen=True)
class Accumulated:
    """A total, in one tensor of its own."""

    total: Any
    in_place: bool

    def merge(self, other: "Accumulated") -> "Accumulated":
        """The total of both."""
        if not self.in_place:
            return Accumulated(self.total + other.total, False)
        return Accumulated(self.total.add_(other.total), True)

    def value(self) -> Any:
        """The total."""
        return self.total


@control("composition", "merge wrote into its operands", "operands[0].total", "returns a new one")
def merge_in_place(broken: bool) -> Subject:
    return _measured(Metric(lambda: Accumulated(torch.tensor(0.0), broken), lambda x: Accumulated(x, broken)))


@control("composition", "of(output) gives other bits the second time", "accumulator.total")
def metric_that_counts(broken: bool) -> Subject:
    seen: list[Any] = []

    def of(output: Any) -> Any:
        seen.append(output)
        return metrics.Total(output + (len(seen) if broken else 0.0))

    return _measured(Metric(lambda: metrics.Total(torch.tensor(0.0)), of))


@control("composition", "no checkpoint can hold", "accumulator.total is a list_iterator")
def accumulator_of_an_object(broken: bool) -> Subject:
    def of(output: Any) -> Any:
        held: Any = iter([1.0]) if broken else output
        return metrics.Total(held)

    return _measured(Metric(lambda: metrics.Total(torch.tensor(0.0)), of))
