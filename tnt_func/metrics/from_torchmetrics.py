"""Metrics of torchmetrics as monoids: their own update, reductions and compute, on states that are in the State.

Example:
    >>> from torchmetrics import MeanSquaredError
    >>> error = from_torchmetrics(MeanSquaredError(), preds="output", target="targets")
    >>> a = error.of({"output": torch.tensor([1.0, 2.0]), "targets": torch.tensor([1.0, 4.0])})
    >>> b = error.of({"output": torch.tensor([0.0]), "targets": torch.tensor([0.0])})
    >>> error.empty().merge(a).merge(b).value()
    tensor(1.3333, dtype=torch.float64)
"""

import copy
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from tnt_func.errors import ContractError, UsageError, UsageTypeError, kind_of, optional
from tnt_func.factories import factory
from tnt_func.metrics.accumulators import Metric, entry
from tnt_func.pytree import pytree
from tnt_func.types import Output

States: TypeAlias = dict[str, Tensor]


def torchmetrics(name: str) -> Any:
    """The module, imported when it is first needed.

    Args:
        name: of what needs it, for the error.

    Raises:
        MissingExtraError: it is not installed.

    Example:
        >>> torchmetrics("accuracy").Accuracy
        <class 'torchmetrics.classification.accuracy.Accuracy'>
    """
    return optional("torchmetrics", user=f"metrics.{name}", extra="torchmetrics")


@factory
def from_torchmetrics(metric: Any, **arguments: str) -> Metric:
    """A metric of torchmetrics over the epoch.

    A step's accumulator is what `update` makes of the metric's first state; two merge by the reductions that its states
    were added with: sum, mean (weighted by updates), max, min, or a function of its own, which is given both stacked.
    Floating states are float64. The value is what `compute` gives, in the dtype that it gives it; NaN where
    nothing was seen. The metric is copied and never written to, and does not synchronise ranks.

    `update` runs after the step, outside of it; of a compiled step it is a part, and must look at no value. Most
    metrics look at their inputs' values first, which waits for the device; `validate_args=False` spares that.

    Args:
        metric: any whose states are tensors of a fixed shape.
        arguments: of its `update`, each with the entry of the step's output that is passed for it:
            `preds="logits", target="targets"`.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        UsageTypeError: it is no metric of torchmetrics.
        UsageError: it keeps lists, states without a reduction, other metrics, or nothing; or `update` is called
            otherwise.
        ContractError: later, `update` wrote to what is no state, or `compute` gives no tensor.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> accuracy = from_torchmetrics(MulticlassAccuracy(3, average="micro"), preds="logits", target="labels")
        >>> accuracy.of({"logits": torch.eye(3), "labels": torch.tensor([0, 1, 1])}).value()
        tensor(0.6667)

    References:
        torchmetrics.Metric.
    """
    module = torchmetrics("from_torchmetrics")
    if not isinstance(metric, module.Metric):
        rule = "it takes one torchmetrics.Metric; each of a collection has a name of its own in metrics={...}"
        line = "Write from_torchmetrics(torchmetrics.MeanSquaredError(), preds='output', target='targets')."
        raise UsageTypeError(f"from_torchmetrics was given {kind_of(metric)}; {rule}. {line}")
    _check_states(metric, module)
    _check_arguments(metric, arguments)
    code = _Code(metric)
    accumulator = _accumulator(code)

    def of(output: Output) -> Any:
        given = {argument: entry(output, name) for argument, name in arguments.items()}
        states, device = code.update(given)
        return accumulator(states, torch.ones((), dtype=torch.int64, device=device))

    def empty() -> Any:
        return accumulator(code.first(torch.device("cpu")), torch.zeros((), dtype=torch.int64))

    return Metric(empty, of)


class _Code:
    """A metric as functions of its states; equal to another of the same class with the same settings."""

    def __init__(self, metric: Any):
        self._metric: Any = copy.deepcopy(metric)
        self._metric.reset()
        self._kind: Any = type(metric)
        # No trace can copy it.
        self._on: dict[torch.device, Any] = {self._metric.device: self._metric}
        self.name: str = self._kind.__name__
        self._settings = (self._kind, _hashable(self._metric.__getstate__()))
        utilities: Any = importlib.import_module("torchmetrics.utilities")
        names = {getattr(utilities, f"dim_zero_{name}"): name for name in ("sum", "mean", "max", "min")}
        self._reductions: dict[str, Any] = {
            state: names.get(reduction, reduction) for state, reduction in metric._reductions.items()
        }
        defaults: dict[str, Tensor] = self._metric._defaults
        self._defaults = {name: self._kept(name, default.detach()) for name, default in defaults.items()}
        self._not_from_zero = {name for name, default in self._defaults.items() if bool(default.any())}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Code) and self._settings == other._settings

    def __hash__(self) -> int:
        return hash(self._settings)

    def first(self, device: torch.device) -> States:
        """The states of a metric that has seen nothing."""
        return {name: default.to(device, copy=True) for name, default in self._defaults.items()}

    def update(self, given: Mapping[str, Any]) -> tuple[States, torch.device]:
        """The states of a metric that has seen this, and where they are."""
        given = {name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()}
        device = next((value.device for value in given.values() if isinstance(value, Tensor)), torch.device("cpu"))
        work = self._working(self.first(device), device)
        before = _attributes(work)
        with torch.no_grad():
            self._kind.update(work, **given)
        after = _attributes(work)
        if written := [name for name in after if name not in self._reductions and after[name] is not before.get(name)]:
            raise ContractError(
                f"{self.name}.update wrote to {written}, which are no states of it; from_torchmetrics keeps states "
                "alone. Set what they depend on where the metric is made, or add_state them."
            )
        return {name: self._kept(name, after[name]) for name in self._reductions}, device

    def joined(self, a: States, b: States, updates_a: Tensor, updates_b: Tensor) -> States:
        """The states of both, by the reduction of each."""
        return {name: self._join(name, a[name], b[name], updates_a, updates_b) for name in self._reductions}

    def value(self, states: States) -> Tensor:
        """What the metric computes of its states."""
        device = next(iter(states.values())).device
        work = self._working({name: state.clone() for name, state in states.items()}, device)
        with torch.no_grad():
            value: Any = self._kind.compute(work)
        if not isinstance(value, Tensor):
            raise ContractError(
                f"{self.name}.compute gives {kind_of(value)}; the value of a metric is one tensor. Write a subclass "
                "whose compute returns the entry that counts, or torch.stack of them."
            )
        return value.squeeze() if value.numel() == 1 else value

    def _join(self, name: str, x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> Tensor:
        reduction = self._reductions[name]
        if reduction == "sum":
            # Each began at its default, and both together do so once.
            return x + y - self._defaults[name].to(x.device) if name in self._not_from_zero else x + y
        if reduction == "mean":
            both = (n * x + m * y) / (n + m)
        elif reduction == "max" or reduction == "min":
            both = torch.maximum(x, y) if reduction == "max" else torch.minimum(x, y)
        else:
            both = cast(Callable[[Tensor], Tensor], reduction)(torch.stack(cast(Any, torch).broadcast_tensors(x, y)))
        return torch.where(n == 0, y, torch.where(m == 0, x, both))

    def _kept(self, name: str, state: Tensor) -> Tensor:
        return state.double() if state.is_floating_point() or self._reductions[name] == "mean" else state

    def _at(self, device: torch.device) -> Any:
        if device not in self._on:
            self._on[device] = copy.deepcopy(self._metric).to(device)
        return self._on[device]

    def _working(self, states: States, device: torch.device) -> Any:
        """A metric with these states that may be written to."""
        metric = self._at(device)
        work: Any = object.__new__(self._kind)
        work.__dict__.update(metric.__dict__ | states, _buffers=dict(metric._buffers))
        return work


def _attributes(metric: Any) -> dict[str, Any]:
    return {**vars(metric), **metric._buffers}


@functools.cache
def _accumulator(code: _Code) -> Any:
    """The class of a metric's accumulators: its class is code, its leaves are data."""

    @dataclass(frozen=True)
    class Folded:
        states: States
        updates: Tensor

        def merge(self, other: Any) -> Any:
            # What is empty was made before anyone knew where the data would be.
            device = self.updates.device if other.updates.device.type == "cpu" else other.updates.device
            n, m = self.updates.to(device), other.updates.to(device)
            a, b = ({name: state.to(device) for name, state in one.states.items()} for one in (self, other))
            return type(self)(code.joined(a, b, n, m), n + m)

        def value(self) -> Tensor:
            # Some metrics warn or raise where there is nothing to compute of.
            return code.value(self.states) if self.updates.item() else torch.tensor(math.nan, dtype=torch.float64)

    Folded.__name__ = Folded.__qualname__ = code.name
    return pytree(Folded)


def _hashable(value: Any) -> Any:
    """What equals that of other settings only where they are the same."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), tuple(cast(Any, value).flatten().tolist())
    if isinstance(value, Mapping):
        return tuple((name, _hashable(item)) for name, item in cast("dict[Any, Any]", value).items())
    if isinstance(value, list | tuple):
        return tuple(_hashable(item) for item in cast("list[Any]", value))
    if isinstance(value, set):
        return frozenset(_hashable(item) for item in cast("set[Any]", value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def _check_states(metric: Any, module: Any) -> None:
    given = f"from_torchmetrics was given {kind_of(metric)}"
    if inner := [kind_of(part) for part in metric.modules() if part is not metric and isinstance(part, module.Metric)]:
        raise UsageError(
            f"{given}, which has in it {' and '.join(inner)}; a metric's own states are kept, and no wrapper's. Give "
            "each metric inside a name of its own in metrics={...}, and combine the values."
        )
    if not metric._defaults:
        raise UsageError(f"{given}, which has no states; there is nothing to accumulate. Write add_state in it.")
    for name, default in metric._defaults.items():
        reduction = metric._reductions[name]
        if isinstance(default, list) or getattr(reduction, "__name__", "") == "dim_zero_cat":
            binned = "thresholds" in inspect.signature(type(metric).__init__).parameters
            raise UsageError(
                f"{given}, whose state {name!r} grows with the data; what is in a State keeps its shape. "
                + (
                    f"Write {type(metric).__name__}(..., thresholds=200), which counts in bins."
                    if binned
                    else "Choose a metric that sums, or sum what it needs in the step and give tnt.metrics.total(...)."
                )
            )
        if reduction is None:
            raise UsageError(
                f"{given}, whose state {name!r} was added with no reduction; two of them could not be merged. Write a "
                "subclass whose add_state has dist_reduce_fx='sum', or a tnt.Metric."
            )


def _check_arguments(metric: Any, arguments: Mapping[str, str]) -> None:
    signature = inspect.signature(cast(Any, type(metric)).update)
    try:
        signature.bind(metric, **arguments)
    except TypeError as error:
        names = list(signature.parameters)[1:]
        example = ", ".join(f"{name}=..." for name in names)
        raise UsageError(
            f"from_torchmetrics was given {sorted(arguments)} for the update of {kind_of(metric)}, whose arguments are "
            f"{names} ({error}). Name an entry of the step's output for each: {example}."
        ) from error
