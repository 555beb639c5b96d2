"""Torch's schedulers as functions of the step."""

import copy
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.schedules.curves import Real, Schedule, dtype_on


@factory
def from_torch_scheduler(cls: Callable[..., Any], *, lr: Real, **options: Any) -> Schedule:
    """A torch scheduler as a function of the step, for any whose lr depends on the number of steps alone.

    The numbers come from stepping it beside an optimizer without gradients; one with a closed form is asked for the
    step itself, another runs from step 0 to the largest step asked for, once. Runs eagerly, outside `torch.compile`
    and `torch.func.vmap`.

    Args:
        cls: a subclass of `torch.optim.lr_scheduler.LRScheduler`, or a function that makes one of an optimizer.
        lr: the lr that the optimizer starts with.
        options: as the class takes them.

    Raises:
        UsageError: the class is ReduceLROnPlateau; or, later, the step is traced.

    Example:
        >>> from torch.optim.lr_scheduler import LambdaLR, StepLR
        >>> [from_torch_scheduler(StepLR, lr=1.0, step_size=2, gamma=0.5)(step) for step in (4, 0, 3)]
        [0.25, 1.0, 0.5]
        >>> from_torch_scheduler(LambdaLR, lr=1.0, lr_lambda=lambda epoch: 1 / (1 + epoch))(3)
        0.25
    """
    # With a momentum, which OneCycleLR and CyclicLR want to cycle too.
    optimizer = torch.optim.SGD([torch.zeros(())], lr=lr, momentum=0.9)
    scheduler: Any = cls(optimizer, **options)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UsageError(
            "from_torch_scheduler was given ReduceLROnPlateau, which follows a metric; a schedule is a function of the "
            "step. Write a callback that notes the metric and sets the lr with optim.set_hyperparameters."
        )
    cast(Any, optimizer).step()
    values, lock = [float(optimizer.param_groups[0]["lr"])], threading.Lock()
    # A subclass that overrides get_lr inherits a closed form that is not its own.
    own = next(vars(owner) for owner in type(scheduler).__mro__ if "get_lr" in vars(owner))

    def schedule(step: Any) -> Any:
        if isinstance(step, Tensor):
            if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(step):  # pyright: ignore
                raise UsageError(
                    f"a schedule of {type(scheduler).__name__} was given a traced step; it runs eagerly. Write the "
                    "schedule of this module that is like it, or set the lr with a hook."
                )
            numbers: list[float] = [schedule(int(number)) for number in step.reshape(-1)]
            return torch.tensor(numbers, dtype=dtype_on(step.device), device=step.device).reshape(step.shape)
        index = max(int(step), 0)
        if "_get_closed_form_lr" in own:
            at_step = copy.copy(scheduler)
            at_step.last_epoch = index
            return float(own["_get_closed_form_lr"](at_step)[0])
        with lock:
            while len(values) <= index:
                scheduler.step()
                values.append(float(optimizer.param_groups[0]["lr"]))
        return values[index]

    return schedule
