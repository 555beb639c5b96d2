"""Metrics as monoids: what a step's output adds to an epoch's number.

A `Metric` makes accumulators, an `Accumulator` merges with others of its kind and has a value. Accumulators live in
`state.metrics`, so an epoch resumed in the middle reports the same number. All arithmetic is float64 and stays on the
output's device; nothing waits for the device until a value is read.

Laws:
    `merge` is associative and `empty()` is its identity, so the value does not depend on how data is cut into batches.

Example:
    >>> loss = mean("loss", weight="num_samples")
    >>> a, b = loss.of({"loss": 1.0, "num_samples": 1}), loss.of({"loss": 4.0, "num_samples": 2})
    >>> loss.empty().merge(a).merge(b).value()
    tensor(3., dtype=torch.float64)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

from tnt_func.errors import ContractError, kind_of
from tnt_func.factories import Brief, factory
from tnt_func.pytree import pytree
from tnt_func.state import State
from tnt_func.types import Output, Phase, typed


class Accumulator(Protocol):
    """A `@pytree` class whose leaves are data and whose class is code.

    Example:
        >>> Total(torch.tensor(2.0)).merge(Total(torch.tensor(3.0))).value()
        tensor(5.)
    """

    def merge(self, other: Self, /) -> Self:
        """This accumulator and a later one, as one."""
        ...

    def value(self) -> Tensor:
        """The metric's number so far."""
        ...


@dataclass(frozen=True, repr=False)
class Metric(Brief):
    """A way to accumulate: `empty()` is nothing seen, `of(output)` is one step seen.

    Args:
        empty: the identity of merge.
        of: one step's output as an accumulator.
        elementwise: whether `of` treats every element of the entries it reads alike, as those of this module do, so
            that it takes the outputs of many steps at once, one beside the other.

    Example:
        >>> metric = Metric(empty=lambda: Total(torch.tensor(0.0)), of=lambda output: Total(output["hits"]))
        >>> metric.empty().merge(metric.of({"hits": torch.tensor(2.0)})).value()
        tensor(2.)
    """

    empty: Callable[[], Any]
    of: Callable[[Output], Any]
    elementwise: bool = False


@typed
def compute(state: State, phase: Phase) -> dict[str, Tensor]:
    """The values of a phase's metrics so far in its open or last epoch, by name.

    Example:
        >>> from tnt_func.rng import key
        >>> state = State(params={}, key=key(0), metrics={"train": {"n": Total(torch.tensor(3.0))}})
        >>> compute(state, "train")
        {'n': tensor(3.)}
        >>> compute(state, "eval")
        {}
    """
    return {name: accumulator.value() for name, accumulator in state.metrics.get(phase, {}).items()}


@pytree
@dataclass(frozen=True)
class Mean:
    """Weighted sum and weight; the value is their quotient, NaN where nothing was seen."""

    total: Tensor
    weight: Tensor

    def merge(self, other: "Mean") -> "Mean":
        """The mean over both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Tensor:
        """float64, the shape of the output's entry."""
        return self.total / self.weight


@pytree
@dataclass(frozen=True)
class Total:
    """A sum; 0 where nothing was seen."""

    total: Tensor

    def merge(self, other: "Total") -> "Total":
        """The sum over both."""
        return Total(self.total + other.total)

    def value(self) -> Tensor:
        """float64, the shape of the output's entry."""
        return self.total


@pytree
@dataclass(frozen=True)
class Minimum:
    """The smallest seen; infinity where nothing was. NaN wins over any number."""

    smallest: Tensor

    def merge(self, other: "Minimum") -> "Minimum":
        """The smaller of both."""
        return Minimum(torch.minimum(self.smallest, other.smallest))

    def value(self) -> Tensor:
        """float64, the shape of the output's entry."""
        return self.smallest


@pytree
@dataclass(frozen=True)
class Maximum:
    """The largest seen; minus infinity where nothing was. NaN wins over any number."""

    largest: Tensor

    def merge(self, other: "Maximum") -> "Maximum":
        """The larger of both."""
        return Maximum(torch.maximum(self.largest, other.largest))

    def value(self) -> Tensor:
        """float64, the shape of the output's entry."""
        return self.largest


@pytree
@dataclass(frozen=True)
class Last:
    """The latest seen; NaN where nothing was."""

    latest: Tensor
    seen: Tensor

    def merge(self, other: "Last") -> "Last":
        """The later of both, which is `other` unless it is empty."""
        return Last(torch.where(other.seen, other.latest, self.latest), self.seen | other.seen)

    def value(self) -> Tensor:
        """float64, the shape of the output's entry."""
        return self.latest


@factory
def mean(name: str, *, weight: str | None = None) -> Metric:
    """The mean of an output's entry over the epoch.

    Args:
        name: the entry, a number or a tensor of any fixed shape.
        weight: the entry that says how much a step counts, `"num_samples"` say; each counts 1 without it.

    Example:
        >>> mean("loss").of({"loss": 2.0}).value()
        tensor(2., dtype=torch.float64)
    """
    one = _scalar(1.0)

    def of(output: Output) -> Mean:
        value = _number(output, name)
        if weight is None:
            return Mean(value, one)
        share = _number(output, weight)
        return Mean(value * share, share)

    return Metric(lambda: Mean(_scalar(0.0), _scalar(0.0)), of, elementwise=True)


@factory
def total(name: str, *, weight: str | None = None) -> Metric:
    """The sum of an output's entry over the epoch, each times its weight where one is named.

    Example:
        >>> total("num_samples").of({"num_samples": 32}).value()
        tensor(32., dtype=torch.float64)
    """

    def of(output: Output) -> Total:
        value = _number(output, name)
        return Total(value if weight is None else value * _number(output, weight))

    return Metric(lambda: Total(_scalar(0.0)), of, elementwise=True)


@factory
def minimum(name: str) -> Metric:
    """The smallest value of an output's entry in the epoch.

    Example:
        >>> minimum("loss").of({"loss": 0.5}).merge(minimum("loss").of({"loss": 0.25})).value()
        tensor(0.2500, dtype=torch.float64)
    """
    return Metric(
        lambda: Minimum(_scalar(float("inf"))), lambda output: Minimum(_number(output, name)), elementwise=True
    )


@factory
def maximum(name: str) -> Metric:
    """The largest value of an output's entry in the epoch.

    Example:
        >>> maximum("loss").empty().value()
        tensor(-inf, dtype=torch.float64)
    """
    return Metric(
        lambda: Maximum(_scalar(float("-inf"))), lambda output: Maximum(_number(output, name)), elementwise=True
    )


@factory
def last(name: str) -> Metric:
    """The latest value of an output's entry.

    Example:
        >>> last("lr").of({"lr": 0.1}).merge(last("lr").empty()).value()
        tensor(0.1000, dtype=torch.float64)
    """

    def of(output: Output) -> Last:
        value = _number(output, name)
        return Last(value, torch.ones_like(value, dtype=torch.bool))

    return Metric(lambda: Last(_scalar(float("nan")), torch.tensor(False)), of, elementwise=True)


def _scalar(number: Any) -> Tensor:
    """A number, or in a graph a size that may vary, as float64 []."""
    return torch.scalar_tensor(number, dtype=torch.float64)


def entry(output: Output, name: str) -> Any:
    """What a step's output has under a name, as it is.

    Raises:
        ContractError: the output is no mapping, or has no such entry.

    Example:
        >>> entry({"loss": 2.0, "num_samples": 32}, "num_samples")
        32
    """
    if type(output) is not dict and not isinstance(output, Mapping):
        raise ContractError(
            f"the step returned {kind_of(output)} as its output, and a metric reads output[{name!r}]; the output of a "
            f"unit with metrics is a mapping. Return (state, {{{name!r}: ...}})."
        )
    if name not in output:
        have: list[Any] = sorted(output, key=str)  # pyright: ignore[reportUnknownArgumentType]
        raise ContractError(
            f"a metric reads output[{name!r}], and the step's output has {have}. Return it, or name one of those."
        )
    return cast(Any, output[name])


def _number(output: Output, name: str) -> Tensor:
    value = entry(output, name)
    if isinstance(value, (int, float, torch.SymInt)):
        return _scalar(value)
    try:
        number = value if type(value) is Tensor else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ContractError(
            f"a metric reads output[{name!r}], which is {kind_of(value)}; it takes a number, a tensor or an array. "
            "Return one of these there, or name another entry."
        ) from error
    return (number.detach() if number.requires_grad else number).double()
