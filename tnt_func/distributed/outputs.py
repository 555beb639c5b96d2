"""The output of a whole batch out of those of its parts, each of which another rank has seen.

Laws:
    Where ranks see parts of a batch, and the objective is a weighted mean over samples, what all ranks have afterwards
    is what one process would have: means weighted, weights and sums added up, rows joined in the order of the batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.distributed.collectives import Scalars, rows_of_all
from tnt_func.distributed.world import Ranks
from tnt_func.errors import ContractError, kind_of
from tnt_func.metrics import Metric
from tnt_func.types import Output, PyTree


@dataclass(frozen=True)
class Sharing:
    """How what ranks have found becomes what one process would have found.

    Args:
        ranks: who share a batch.
        weight: the entry of the output that the objective is a mean over.
        summed: the entries that are added up, the weight among them.
        merged: metrics that each rank takes of its own output.
    """

    ranks: Ranks
    weight: str = "num_samples"
    summed: frozenset[str] = frozenset({"num_samples"})
    merged: Mapping[str, Metric] = field(default_factory=dict[str, Metric])

    def output(self, point: str, count: int, output: Output) -> Output:
        """The output of the whole batch."""
        if self.ranks.size == 1:
            return self.alone(output)
        entries = self.told_apart(output)
        scalars = Scalars(self.ranks, point, count, entries.names, [], [output[self.weight], *entries.numbers.values()])
        _, values = scalars.wait()
        return self.whole(output, entries, *averaged(values[:, 0], values[:, 1:]))

    def told_apart(self, output: Output) -> "Entries":
        """The entries that are numbers, and those that have rows.

        Raises:
            ContractError: the output has no weight, or an entry is neither.
        """
        if not isinstance(output, Mapping) or not {self.weight, *self.summed} <= output.keys():
            given = sorted(output) if isinstance(output, Mapping) else kind_of(output)
            raise ContractError(
                f"data_parallel was given the output {given}; it weighs the ranks' parts of a batch by {self.weight!r} "
                f"and adds up {sorted(self.summed)}. Return them, {{'loss': loss, 'num_samples': len(inputs)}}, or "
                "name the weight: data_parallel(unit, mesh, weight=...)."
            )
        entries = Entries({}, {})
        for name, value in output.items():
            if name in self.summed and _is_number(value):
                entries.numbers[name] = value
            elif isinstance(value, float) or (_is_number(value) and isinstance(value, Tensor) and not _is_whole(value)):
                entries.numbers[name] = value
            elif name not in self.summed and (leaves := trees.leaves(value)) and all(map(_has_rows, leaves)):
                entries.rows[name] = value
            else:
                raise ContractError(
                    f"data_parallel was given the output {name!r}: {trees.describe(value)}; of 0-d floating tensors "
                    "and floats it takes means over ranks, tensors with a row a sample it joins; others it cannot. "
                    f"Return a mean, write summed=[{name!r}] to add up a number, or leave it out."
                )
        return entries

    def whole(self, output: Output, entries: "Entries", means: Tensor, sums: Tensor) -> Output:
        """The output of the whole batch.

        Args:
            output: of this rank's part.
            entries: that it has.
            means, sums: of the numbers, over ranks: float64 [numbers].
        """
        numbers = {
            name: _like(total if name in self.summed else mean, value)
            for (name, value), mean, total in zip(entries.numbers.items(), means.unbind(), sums.unbind(), strict=True)
        }
        found = {**numbers, **({} if self.merged else joined(self.ranks, entries.rows))}
        ordered = {name: found[name] for name in output if name in found}
        return {**ordered, **self._accumulated(output)}

    def alone(self, output: Output) -> Output:
        """What `output` gives where there is one rank."""
        entries = self.told_apart(output)
        kept = {name: value for name, value in output.items() if not self.merged or name not in entries.rows}
        return {**kept, **self._accumulated(output)}

    def _accumulated(self, output: Output) -> dict[str, Any]:
        """An accumulator of the whole batch for each metric that is merged."""
        with torch.no_grad():
            own = {name: metric.of(output) for name, metric in self.merged.items()}
        if taken := own.keys() & output.keys():
            raise ContractError(
                f"data_parallel was given merged={sorted(own)} and an output that has {sorted(taken)}; the output gets "
                "an entry of the name of each metric that is merged. Rename the metric, or the entry."
            )
        leaves, structure = trees.flatten(own)
        if self.ranks.size == 1 or not leaves:
            return own
        if odd := [trees.describe(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]:
            raise ContractError(
                f"data_parallel was given merged={sorted(own)}, whose accumulators hold {odd}; what ranks send each "
                "other are tensors. Write torch.tensor(...) in Metric.of."
            )
        first, *others = (trees.unflatten(each, structure) for each in rows_of_all(self.ranks, leaves))
        for other in others:
            first = {name: first[name].merge(other[name]) for name in own}
        return first


@dataclass(frozen=True)
class Entries:
    """The entries of an output: numbers, which become one number, and rows, which are joined."""

    numbers: dict[str, Any]
    rows: dict[str, PyTree]

    @property
    def names(self) -> tuple[str, ...]:
        """What ranks tell each other of, in this order."""
        return *self.numbers, *self.rows


def averaged(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sums over ranks: float64 [values] each. What weighs nothing counts for nothing in a mean.

    Example:
        >>> averaged(torch.tensor([1.0, 3.0]), torch.tensor([[4.0], [8.0]]))
        (tensor([7.]), tensor([12.]))
    """
    weights = weights[:, None]
    parts = torch.where(weights > 0, weights * values, 0.0)
    return parts.sum(0) / weights.sum(), values.sum(0)


def joined(ranks: Ranks, tree: PyTree) -> PyTree:
    """A tree of tensors with a row a sample, with those of all ranks in order.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     joined(Ranks.of(mesh(world)), {"scores": torch.ones(2)})
        {'scores': tensor([1., 1.])}
    """
    leaves, structure = trees.flatten(tree)
    if ranks.size == 1 or not leaves:
        return tree
    found = rows_of_all(ranks, leaves)
    return trees.unflatten([torch.cat(each) for each in zip(*found, strict=True)], structure)


def of_step(name: str) -> Callable[[Output], Any]:
    """What a metric that is merged adds for a step: the accumulator that is in the output."""
    return lambda output: output[name]


def check_rows(output: PyTree) -> None:
    """Refuse a prediction that has no row a sample.

    Raises:
        ContractError: a leaf is no tensor, or has no dimension.
    """
    if odd := [f"output{path}: {trees.describe(x)}" for path, x in trees.named_leaves(output) if not _has_rows(x)]:
        raise ContractError(
            f"data_parallel was given the prediction {'; '.join(odd)}; those of all ranks are joined, a row a sample. "
            "Return tensors whose first dimension counts samples."
        )


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex())


def _is_whole(value: Tensor) -> bool:
    return not value.is_floating_point()


def _like(number: Tensor, value: Any) -> Any:
    return number.to(value.dtype) if isinstance(value, Tensor) else type(value)(number.item())
