"""Law 13: the micro-batches of a batch make the gradient of the batch."""

from collections.abc import Sequence
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func import treemath
from tnt_func.arguments import expects
from tnt_func.descent import Descent
from tnt_func.errors import LawError
from tnt_func.state import State
from tnt_func.transforms import microbatch
from tnt_func.transforms.microbatches import Split, split_rows
from tnt_func.transforms.seams import on_descent
from tnt_func.transitions import prepare
from tnt_func.types import Batch
from tnt_func.unit import FitUnit, TrainUnit


@expects(TrainUnit, FitUnit)
def check_accumulation(
    unit: TrainUnit | FitUnit,
    state: State,
    batches: Sequence[Batch],
    *,
    counts: Sequence[int] = (2, 3),
    weight: str = "num_samples",
    summed: Sequence[str] = (),
    split: Split = split_rows,
    tolerance: float = 1e-12,
) -> None:
    """Law 13. The gradient of a batch, its value and output are those of its micro-batches together.

    Floating leaves of the state and the batches are cast to float64. A step that draws, or normalises over the batch as
    BatchNorm does in training, is no mean over samples and breaks the law; so does a mean that is not over `weight`.

    Args:
        unit: its train step is made by `tnt.minimize`.
        state: where the gradient is taken.
        batches: of a number of rows that the counts do not divide, so that sizes differ.
        counts: of micro-batches.
        weight, summed, split: as in `tnt.transforms.microbatch`.
        tolerance: how far a leaf may differ, as a part of its largest element, or of 1 where that is less: what samples
            add up to may cancel, and leave their rounding.

    Raises:
        LawError: the law is broken; the message says for how many micro-batches, and on which leaves.
        UsageError: the step is not made by `tnt.minimize`.

    Example:
        >>> from tnt_func import optim, rng
        >>> from tnt_func.descent import minimize
        >>> def objective(params, state, batch):
        ...     return (params * batch).sum(), (state.buffers, {"num_samples": len(batch)})
        >>> unit = TrainUnit(train_step=minimize(objective, optim.sgd(0.1)))
        >>> check_accumulation(unit, State(params=torch.ones(3), key=rng.key(0)), [torch.ones(5, 3)], counts=[2])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 13 (accumulation) is broken: batch 0 in 2 micro-batches is not the batch
          value: 1 of 1 elements differ, by at most 7.2
          grads: 3 of 3 elements differ, by at most 2.4
        ...
    """
    state = treemath.cast(prepare(unit, state), torch.float64)
    unit = unit.train_unit if isinstance(unit, FitUnit) else unit
    whole = _descent(unit)
    for index, batch in enumerate(batches):
        batch = treemath.cast(batch, torch.float64)
        params = state.params if whole.part is None else state.params[whole.part]
        one = whole.differentiate(whole.objective, params, state, batch)
        for count in counts:
            parted = _descent(microbatch(unit, count, weight=weight, summed=summed, split=split))
            many = parted.differentiate(parted.objective, params, state, batch)
            lines = [
                line
                for part in ("value", "grads", "output")
                for line in differences(getattr(one, part), getattr(many, part), part, tolerance)
            ]
            if lines:
                at = f"law 13 (accumulation) is broken: batch {index} in {count} micro-batches is not the batch"
                raise LawError("\n  ".join([at, *lines]) + _ADVICE)


_ADVICE = (
    "\nThe objective is a mean, and the weight it names is what it is a mean over. Write loss.mean(), or a sum over "
    "what counts divided by how much counts, and return that number: microbatch(unit, count, weight='num_tokens')."
)


def _descent(unit: TrainUnit) -> Descent:
    found: list[Descent] = []
    on_descent(unit, "check_accumulation", lambda descent: (found.append(descent), descent)[1])
    return found[0]


def differences(one: Any, many: Any, name: str, tolerance: float) -> list[str]:
    """How two trees differ by more than rounding, a line a difference.

    Example:
        >>> differences({"w": torch.ones(2)}, {"w": torch.ones(2) + 1e-7}, "params", 1e-6)
        []
    """
    return trees.diff(one, trees.map(lambda a, b: a if near(a, b, tolerance) else b, one, many), name)


def near(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two leaves are the same but for a part of the largest element, or of 1 where that is less.

    Example:
        >>> near(100.0, 101.0, 0.1), near(0.0, 1.0, 0.1)
        (True, False)
    """
    if not isinstance(a, torch.Tensor | float) or type(a) is not type(b):
        return trees.same_leaf(a, b)
    x, y = torch.as_tensor(a), torch.as_tensor(b)
    if x.shape != y.shape or x.dtype != y.dtype or not (x.is_floating_point() or x.is_complex()):
        return trees.same_leaf(x, y)
    largest = x.abs().max() if x.numel() else torch.tensor(0.0)
    return bool(((x - y).abs() <= tolerance * largest.clamp(min=1)).all()) or trees.same_leaf(x, y)
