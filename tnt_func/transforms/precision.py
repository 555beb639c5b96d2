"""The forward pass in half precision, and for float16 a scale of the loss that keeps small gradients from vanishing.

Example:
    >>> from tnt_func import optim
    >>> from tnt_func.descent import minimize
    >>> from tnt_func.unit import TrainUnit
    >>> sorted(autocast(TrainUnit(train_step=minimize(max, optim.sgd(0.1))), torch.float16).memory)
    ['loss_scale']
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tnt_func import treemath
from tnt_func.descent import Descent, Differentiate, Guard, Objective, Slope
from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.state import State
from tnt_func.transforms.seams import Around, U, amended, device_of, kept_unless, on_descent, on_reads, with_slot
from tnt_func.types import Batch, PyTree


@factory
def autocast(
    unit: U,
    dtype: torch.dtype = torch.bfloat16,
    *,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    name: str = "loss_scale",
) -> U:
    """The objective and the steps of evaluation and prediction run under `torch.autocast`; the backward pass does not.

    Parameters, gradients and the optimizer's state keep their dtype. With float16 the loss is scaled before and the
    gradient after the backward pass. Where the gradient is not finite, params and opt_state stay, the scale is
    multiplied by the backoff factor and the step is counted as skipped; after so many good steps in a row it is
    multiplied by the growth factor. Buffers move all the same, as in the imperative loop.

    Args:
        unit: its train step is made by `minimize`.
        dtype: bfloat16 or float16.
        init_scale, growth_factor, backoff_factor, growth_interval: of the scale; float16 only.
        name: of the slot of memory: `scale` float32 [], `growth_tracker` int64 [], `skipped` int64 []; float16 only.

    Raises:
        UsageError: the dtype is another, the step is not made by `minimize`, or the name is taken.

    Example:
        >>> from tnt_func import optim, rng
        >>> from tnt_func.recipes import supervised
        >>> layer = torch.nn.Linear(2, 1)
        >>> unit, state = supervised(layer, torch.nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
        >>> autocast(unit).predict_unit.predict_step(state, [torch.ones(1, 2)])[1].dtype
        torch.bfloat16

    References:
        torch.autocast; torch.amp.GradScaler: the same bits.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(
            f"autocast was given {dtype}; it casts to half precision. Write torch.bfloat16, or torch.float16, which "
            "scales the loss."
        )
    unit = on_descent(unit, "autocast", lambda descent: replace(descent, objective=Autocast(descent.objective, dtype)))
    unit = on_reads(unit, lambda step: Autocast(step, dtype))
    if dtype is torch.bfloat16:
        return unit

    def first(state: State) -> PyTree:
        device = device_of(state)
        scale = torch.tensor(init_scale, device=device)
        return {"scale": scale, "growth_tracker": _zero(device), "skipped": _zero(device)}

    def scaled(descent: Descent) -> Descent:
        return replace(descent, differentiate=Scaled(descent.differentiate, name))

    rule = Rescale(name, growth_factor, backoff_factor, growth_interval)
    return with_slot(amended(on_descent(unit, "autocast", scaled), "autocast", lambda descent: rule), name, first)


@dataclass(frozen=True)
class Autocast(Around):
    """An objective or a step that runs in half precision, on the device of the state's parameters."""

    dtype: torch.dtype

    def __call__(self, *args: Any) -> Any:
        """What it gives; `args` end with a state and a batch."""
        with torch.autocast(device_of(args[-2]).type, dtype=self.dtype):
            return self.inner(*args)


@dataclass(frozen=True)
class Scaled:
    """The slope by way of that of a multiple of the objective."""

    differentiate: Differentiate
    name: str

    def __call__(self, objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
        """The slope, no longer scaled."""
        scale = state.memory[self.name]["scale"]

        def scaled(params: PyTree, state: State, batch: Batch) -> Any:
            value, aux = objective(params, state, batch)
            return value * scale, aux

        slope = self.differentiate(scaled, params, state, batch)
        value, grads = treemath.scale((slope.value, slope.grads), scale.reciprocal())
        return slope._replace(value=value, grads=grads)


def unscaled(differentiate: Differentiate) -> Differentiate:
    """What finds the slope where scales are taken off.

    Example:
        >>> unscaled(Scaled(Scaled(max, "outer"), "inner"))
        <built-in function max>
    """
    while isinstance(differentiate, Scaled):
        differentiate = differentiate.differentiate
    return differentiate


@dataclass(frozen=True)
class Rescale(Guard):
    """The rule of the scale, as an amendment."""

    name: str
    growth_factor: float
    backoff_factor: float
    growth_interval: int

    def allows(self, before: State, slope: Slope) -> Tensor:
        """Whether the gradient is finite."""
        return treemath.all_finite(slope.grads)

    def settle(self, before: State, after: State, allowed: Tensor) -> State:
        """The old parameters where it is not; the next scale."""
        scale, tracker, skipped = (before.memory[self.name][key] for key in ("scale", "growth_tracker", "skipped"))
        due = allowed & (tracker + 1 == self.growth_interval)
        larger = scale * self.growth_factor
        grown = torch.where(due & larger.isfinite(), larger, scale)
        slot = {
            "scale": torch.where(allowed, grown, scale * self.backoff_factor),
            "growth_tracker": torch.where(allowed & ~due, tracker + 1, _zero(tracker.device)),
            "skipped": skipped + ~allowed,
        }
        return kept_unless(allowed, before, after, ("params", "opt_state")).remember(self.name, slot)


def _zero(device: torch.device) -> Tensor:
    return torch.tensor(0, device=device)
