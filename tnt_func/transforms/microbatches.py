"""The gradient of a batch, found on one part of it after another: the memory of a part, the step of the whole.

Laws:
    The gradient, the value and the output are those of the whole batch, up to rounding, where the objective is a
    weighted mean over samples and draws nothing. BatchNorm in training is no such mean: it normalises each part by
    itself, and its averages move once a part.

Example:
    >>> from tnt_func import optim, rng
    >>> from tnt_func.descent import minimize
    >>> from tnt_func.unit import TrainUnit
    >>> def objective(params, state, batch):
    ...     return (params * batch).mean(), (state.buffers, {"num_samples": len(batch)})
    >>> unit = TrainUnit(train_step=minimize(objective, optim.sgd(1.0)))
    >>> w, batch = torch.tensor(0.0), torch.tensor([1.0, 2.0, 6.0])
    >>> state = State(params=w, key=rng.key(0), opt_state=optim.sgd(1.0).init(w))
    >>> microbatch(unit, 2).train_step(state, batch)[0].params, unit.train_step(state, batch)[0].params
    (tensor(-3.), tensor(-3.))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.descent import Descent, Differentiate, Objective, Slope
from tnt_func.errors import ContractError, UsageError, UsageTypeError, kind_of
from tnt_func.factories import factory
from tnt_func.optim.layout import layout
from tnt_func.schedules.curves import dtype_on
from tnt_func.state import State
from tnt_func.transforms.precision import unscaled
from tnt_func.transforms.seams import U, on_descent
from tnt_func.types import Batch, Output, PyTree

Split: TypeAlias = Callable[[Batch, int], Sequence[Batch]]
"""`(batch, count) -> parts`, at most so many."""


def split_rows(batch: Batch, count: int) -> list[Batch]:
    """A batch in parts: every tensor split along its first dimension, sizes differing by one at most.

    0-d tensors, numbers and None go into every part. A batch of fewer rows than parts gives a part a row.

    Raises:
        UsageTypeError: a leaf is nothing of the kind, or tensors have different first dimensions.

    Example:
        >>> split_rows((torch.arange(5), 0.5), 2)
        [(tensor([0, 1, 2]), 0.5), (tensor([3, 4]), 0.5)]

    References:
        torch.tensor_split.
    """
    leaves, structure = trees.flatten(batch)
    rows = {path: leaf for path, leaf in trees.named_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0}
    strange = [leaf for leaf in leaves if not isinstance(leaf, Tensor | bool | int | float | None)]
    if strange or len({len(leaf) for leaf in rows.values()}) > 1:
        given = ", ".join(f"batch{path}: {trees.describe(leaf)}" for path, leaf in trees.named_leaves(batch))
        raise UsageTypeError(
            f"microbatch was given {given}; it splits tensors of one first dimension, and shares numbers and None. "
            "Give tensors a row a sample, or write microbatch(unit, count, split=...) with a function of your own."
        )
    if not rows:
        return [batch]
    count = max(1, min([count, *(len(leaf) for leaf in rows.values())]))
    columns = [
        leaf.tensor_split(count) if isinstance(leaf, Tensor) and leaf.dim() > 0 else (leaf,) * count for leaf in leaves
    ]
    return [trees.unflatten(part, structure) for part in zip(*columns, strict=True)]


@factory
def microbatch(
    unit: U, count: int, *, weight: str = "num_samples", summed: Sequence[str] = (), split: Split = split_rows
) -> U:
    """The step finds its gradient on parts of the batch, one after another, and makes one update.

    grad = sum(w_i grad_i) / sum(w_i), with w_i the weight that part i names in its output; so are the value, and the
    output's 0-d tensors and floats. The weight itself is added up, and what else is `summed`. Other tensors, which have
    a row a sample, are joined. Buffers go from part to part. A part of weight 0 counts for nothing, whatever its
    gradient. With equal weights, gradients are added up and divided by the count.

    Args:
        unit: its train step is made by `minimize`, and its output is a mapping.
        count: parts in a batch, from 1; a batch of fewer rows has a part a row.
        weight: the entry of the output, a number, that the objective is a mean over: samples, tokens that count.
        summed: further entries to add up.
        split: `(batch, count) -> parts`.

    Raises:
        UsageError: the count is not positive, the step is not made by `minimize`, or other processes take part in it.
        UsageTypeError: at a step, where the batch cannot be split.
        ContractError: at a step, where the output has no weight, or an entry of which no mean can be taken.

    Example:
        >>> from tnt_func import optim
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.unit import TrainUnit
        >>> microbatch(TrainUnit(train_step=minimize(max, optim.sgd(0.1))), 4).train_step.differentiate.count
        4
    """
    if count < 1:
        raise UsageError(f"microbatch was given count={count}; a batch has at least one part. Write count=1.")
    names = frozenset((weight, *summed))

    def parted(descent: Descent) -> Descent:
        if isinstance(unscaled(descent.differentiate), OnceAStep):
            raise UsageError(
                f"microbatch was given a unit of data_parallel, whose ranks wait for each other where a gradient is "
                "found; they do so once a step, and not for each micro-batch. Apply data_parallel last: "
                f"data_parallel(tnt.transforms.microbatch(unit, {count}), mesh)."
            )
        return replace(descent, differentiate=Microbatches(descent.differentiate, count, weight, names, split))

    return on_descent(unit, "microbatch", parted)


class OnceAStep:
    """What finds a gradient together with other processes: of a whole batch, and of no part of one.

    Example:
        >>> isinstance(Microbatches(max, 2, "num_samples", frozenset(), split_rows), OnceAStep)
        False
    """


@dataclass(frozen=True)
class Microbatches:
    """The slope of a batch out of those of its parts."""

    differentiate: Differentiate
    count: int
    weight: str
    summed: frozenset[str]
    split: Split

    def __call__(self, objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
        """The weighted mean of the parts' slopes."""
        parts = self.split(batch, self.count)
        if len(parts) == 1:
            return self.differentiate(objective, params, state, parts[0])
        weights: list[Any] = []
        ratio: Any = 1

        def share(params: PyTree, state: State, batch: Batch) -> tuple[Tensor, tuple[PyTree, Output]]:
            """A part's share of the mean, but for a factor that is 1 where weights are equal."""
            nonlocal ratio
            value, (buffers, output) = objective(params, state, batch)
            self._check(output)
            weight = output[self.weight]
            weights.append(weight.to(dtype_on(weight.device)) if isinstance(weight, Tensor) else weight)
            ratio = weights[-1] / _or_one(weights[0])
            shares = {name: _share(ratio, x / len(parts)) for name, x in self._told_apart(output)[0].items()}
            return _share(ratio, value / len(parts)), (buffers, {**output, **shares})

        slope = total = cast(Any, None)
        rows: list[dict[str, Tensor]] = []
        here = layout(params)
        for part in parts:
            slope = self.differentiate(share, params, state, part)
            state = state.replace(buffers=slope.buffers)
            means, sums, its_rows = self._told_apart(slope.output)
            rows.append(its_rows)
            means = {name: _counted(ratio, mean) for name, mean in means.items()}
            found = [_counted(ratio, slope.value), *(_counted(ratio, x) for x in here.take(slope.grads, "grads"))]
            total = [means, sums, ratio, *found] if total is None else _sum(total, [means, sums, ratio, *found])
        means, sums, ratios, value, *grads = total
        rest = ratios / len(parts)
        grads = here.give([_divided(x, rest, like) for x, like in zip(grads, here.leaves, strict=True)])
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        means = {name: _divided(mean, rest, slope.output[name]) for name, mean in means.items()}
        found = {**means, **sums, **joined}
        output = {name: found[name] for name in slope.output}
        return Slope(_divided(value, rest, slope.value), state.buffers, output, grads)

    def _told_apart(self, output: Output) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
        """The entries to take means of, to add up, and to join."""
        sums = {name: x for name, x in output.items() if name in self.summed}
        rows = {name: x for name, x in output.items() if name not in sums and isinstance(x, Tensor) and x.dim() > 0}
        return {name: x for name, x in output.items() if name not in sums and name not in rows}, sums, rows

    def _check(self, output: Output) -> None:
        if not isinstance(output, Mapping) or not self.summed <= output.keys():
            given = sorted(output) if isinstance(output, Mapping) else kind_of(output)
            raise ContractError(
                f"microbatch was given the output {given}; it weighs parts by {self.weight!r} and adds up "
                f"{sorted(self.summed)}. Return them from the objective, {{'loss': loss, 'num_samples': len(inputs)}}, "
                "or name the weight: microbatch(unit, count, weight=...)."
            )
        means, sums, _ = self._told_apart(output)
        for name, value in {**means, **sums}.items():
            number = isinstance(value, Tensor) and value.dim() == 0
            if name in sums and (number or isinstance(value, int | float)):
                continue
            if name in sums or not (isinstance(value, float) or number and value.is_floating_point()):
                raise ContractError(
                    f"microbatch was given the output {name!r}: {trees.describe(value)}; of 0-d floating tensors and "
                    f"floats it takes means, tensors with a row a sample it joins; others it cannot. Return a mean, "
                    f"write summed=[{name!r}] to add up a number, or leave it out."
                )


def _or_one(weight: Any) -> Any:
    return torch.where(weight > 0, weight, torch.ones_like(weight)) if isinstance(weight, Tensor) else weight or 1


def _share(ratio: Any, x: Any) -> Any:
    if isinstance(ratio, Tensor):
        return x * (ratio.to(x.device, x.dtype) if isinstance(x, Tensor) else ratio)
    return x if ratio == 1 else x * ratio


def _counted(ratio: Any, leaf: Any) -> Any:
    """What a part adds to a sum, in float32 at least: nothing where it weighs nothing, be it NaN."""
    if not isinstance(leaf, Tensor):
        return leaf if leaf is None or ratio else 0.0
    wide = leaf if leaf.dtype in _WIDE else leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    if isinstance(ratio, Tensor):
        return torch.where(ratio.to(wide.device) > 0, wide, torch.zeros_like(wide))
    return wide if ratio else torch.zeros_like(wide)


_WIDE = (torch.float32, torch.float64)


def _sum(a: list[Any], b: list[Any]) -> list[Any]:
    return [trees.map(_plus, x, y) if isinstance(x, dict) else _plus(x, y) for x, y in zip(a, b, strict=True)]


def _plus(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _divided(x: Any, rest: Any, like: Any) -> Any:
    if isinstance(rest, Tensor) and isinstance(x, Tensor):
        x = x / rest.to(x.device, x.real.dtype)
    elif x is not None and not (isinstance(rest, float) and rest == 1):
        x = x / rest
    return x.to(like.dtype) if isinstance(x, Tensor) and isinstance(like, Tensor) else x
