"""Metrics of every member, and how members spread.

Example:
    >>> from tnt_func.metrics import mean
    >>> loss = per_member(mean("loss"), 2)
    >>> both = loss.empty().merge(loss.of({"loss": torch.tensor([1.0, 3.0])}))
    >>> both.value(), both.numbers("loss")["loss"]
    (tensor([1., 3.], dtype=torch.float64), 2.0)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.ensembles.members import stacked, taken
from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.metrics import Last, Maximum, Mean, Metric, Minimum, Total
from tnt_func.pytree import pytree
from tnt_func.types import Output, typed

ELEMENTWISE = {Mean, Total, Minimum, Maximum, Last}


class Spread(NamedTuple):
    """How the members of an ensemble spread.

    Args:
        mean, std: over the members; the standard deviation is that of a sample, and 0 of one member.
        quantiles: by their order.
    """

    mean: Tensor
    std: Tensor
    quantiles: dict[float, Tensor]


@typed
def spread(values: Tensor, *, quantiles: Sequence[float] = (0.05, 0.5, 0.95)) -> Spread:
    """Mean, standard deviation and quantiles over the members.

    A member that is NaN makes all of them NaN; `values[values.isfinite()]` leaves it out.

    Args:
        values: floating [members, ...], of `tnt.metrics.compute` say.
        quantiles: which, from 0 to 1; between two members they are interpolated.

    Raises:
        UsageError: there is no axis of members, or none on it.

    Example:
        >>> spread(torch.tensor([1.0, 2.0, 3.0]), quantiles=(0.25,))
        Spread(mean=tensor(2.), std=tensor(1.), quantiles={0.25: tensor(1.5000)})
    """
    if values.dim() == 0 or len(values) == 0:
        raise UsageError(
            f"spread was given {trees.describe(values)}; it takes a value of each member, [members, ...]. Write "
            "spread(tnt.metrics.compute(state, 'eval')['loss'])."
        )
    found = torch.quantile(values, torch.tensor(quantiles, dtype=values.dtype, device=values.device), dim=0)
    std = values.std(dim=0, correction=int(len(values) > 1))
    return Spread(values.mean(dim=0), std, dict(zip(quantiles, found, strict=True)))


@pytree
@dataclass(frozen=True)
class PerMember:
    """The accumulators of all members as one.

    Args:
        accumulators: stacked, as by `members.stacked`.

    Example:
        >>> PerMember(Total(torch.tensor([1.0, 2.0]))).value()
        tensor([1., 2.])
    """

    accumulators: Any

    def merge(self, other: "PerMember") -> "PerMember":
        """Every member's with its later one."""
        if self._at_once() and other._at_once():
            return PerMember(self.accumulators.merge(other.accumulators))
        return PerMember(stacked([a.merge(b) for a, b in zip(self._each(), other._each(), strict=True)]))

    def value(self) -> Tensor:
        """[members, ...]"""
        if self._at_once():
            return self.accumulators.value()
        return torch.stack([torch.as_tensor(one.value()) for one in self._each()])

    def numbers(self, name: str, *, members: bool = True) -> dict[str, float]:
        """Where a member has one number: their mean by the name, "name.std", and "name.0", "name.1", ... of each."""
        values = self.value()
        return named(name, values, members=members) if values.dim() == 1 and not values.is_complex() else {}

    def _at_once(self) -> bool:
        return type(self.accumulators) in ELEMENTWISE and all(x.dim() == 1 for x in trees.leaves(self.accumulators))

    def _each(self) -> list[Any]:
        return [taken(self.accumulators, index) for index in range(len(trees.tensors(self.accumulators)[0]))]


def named(name: str, values: Tensor, *, members: bool = True) -> dict[str, float]:
    """A number of each member as numbers of one: the mean, the standard deviation, and each, if those are wanted.

    Example:
        >>> named("loss", torch.tensor([1.0, 3.0]))
        {'loss': 2.0, 'loss.std': 1.414..., 'loss.0': 1.0, 'loss.1': 3.0}
    """
    each = values.detach().double().cpu()
    std = each.std(correction=int(len(each) > 1))
    singly = {f"{name}.{index}": value for index, value in enumerate(each.tolist())} if members else {}
    return {name: each.mean().item(), f"{name}.std": std.item(), **singly}


@factory
def per_member(metric: Metric, size: int) -> Metric:
    """The metric of an ensemble that accumulates a metric for each member.

    Of a metric that is not `elementwise`, every member's output is read by itself.

    Example:
        >>> from tnt_func.metrics import total
        >>> per_member(total("hits"), 2).of({"hits": torch.tensor([1.0, 2.0])}).value()
        tensor([1., 2.], dtype=torch.float64)
    """

    def empty() -> PerMember:
        return PerMember(stacked([metric.empty()] * size))

    def of(output: Output) -> PerMember:
        if metric.elementwise:
            found = metric.of(output)
            if all(leaf.shape in ((), (size,)) for leaf in trees.leaves(found)):
                return PerMember(trees.map(lambda leaf: leaf.expand(size), found))
        return PerMember(stacked([metric.of(taken(output, index)) for index in range(size)]))

    return Metric(empty, of)
