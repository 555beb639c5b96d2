"""The output of a whole batch out of those of its parts, each of which another rank has seen.

Laws:
    Where ranks see parts of a batch, and the objective is a weighted mean over samples, what all ranks have afterwards
    is what one process would have: means weighted, weights and sums added up, rows joined in the order of the batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
        means, sums = averaged(values)
        return self.whole(output, entries, means[1:], sums[1:])

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

    def whole(self, output: Output, entries: "Entries", means: Sequence[Any], sums: Sequence[Any]) -> Output:
        """The output of the whole batch.

        Args:
            output: of this rank's part.
            entries: that it has.
            means, sums: of the numbers, over ranks, as of `averaged`.
        """
        numbers = {
            name: like(total if name in self.summed else mean, value)
            for (name, value), mean, total in zip(entries.numbers.items(), means, sums, strict=True)
        }
        found = {**numbers, **(joined(self.ranks, entries.rows) if entries.rows and not self.merged else {})}
        ordered = {name: found[name] for name in output if name in found}
        return {**ordered, **self._accumulated(output)}

    def alone(self, output: Output) -> Output:
        """What `output` gives where there is one rank."""
        entries = self.told_apart(output)
        kept = {name: value for name, value in output.items() if not self.merged or name not in entries.rows}
        return {**kept, **self._accumulated(output)}

    def _accumulated(self, output: Output) -> dict[str, Any]:
        """An accumulator of the whole batch for each metric that is merged."""
        if not self.merged:
            return {}
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


def averaged(values: Sequence[Sequence[float]] | Tensor) -> tuple[Sequence[Any], Sequence[Any]]:
    """Means and sums over ranks of every column, the first of which has the weights.

    What weighs nothing counts for nothing in a mean, be it NaN. Numbers of the host become numbers, without a kernel
    for each of them; those of a device, [ranks, columns], become 0-d tensors.

    Example:
        >>> averaged([[1.0, 4.0], [3.0, 8.0]])
        ([2.5, 7.0], [4.0, 12.0])
        >>> averaged(torch.tensor([[1.0, 4.0], [0.0, torch.nan]]))[0]
        (tensor(1.), tensor(4.))
    """
    if isinstance(values, Tensor):
        weights = values[:, :1]
        means = torch.where(weights > 0, weights * values, 0.0).sum(0) / weights.sum()
        return means.unbind(), values.sum(0).unbind()
    sums = [sum(column) for column in zip(*values, strict=True)]
    parts = ([row[0] * x for x in row] for row in values if row[0] > 0)
    return [over(sum(column), sums[0]) for column in zip([0.0] * len(sums), *parts, strict=True)], sums


def over(part: Any, total: Any) -> Any:
    """A part of a total; of numbers as of tensors, where there is nothing to divide by it is NaN.

    Example:
        >>> over(1.0, 4.0), over(0.0, 0.0)
        (0.25, nan)
    """
    return part / total if isinstance(total, Tensor) or total else math.nan


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


def like(number: Any, value: Any) -> Any:
    """A number, or a 0-d tensor, of the type that another one has.

    Example:
        >>> like(2.0, 3), like(2.0, torch.ones((), dtype=torch.float16))
        (2, tensor(2., dtype=torch.float16))
    """
    if not isinstance(value, Tensor):
        return type(value)(number.item() if isinstance(number, Tensor) else number)
    wide = number if isinstance(number, Tensor) else torch.scalar_tensor(number, dtype=torch.float64)
    return wide.to(value.dtype)
