"""Schedules made of others: one after another."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.schedules.curves import (
    Real,
    Schedule,
    between,
    check_at_least,
    clip,
    constant,
    cosine,
    linear,
    real,
    where,
)


@factory
def joined(schedules: Sequence[Schedule], *, boundaries: Sequence[int]) -> Schedule:
    """One schedule after another, each counting from where it begins.

    Args:
        schedules: one more than there are boundaries.
        boundaries: the steps at which the second, third, ... begins; ascending.

    Raises:
        UsageError: the boundaries do not ascend, or are not one fewer than the schedules.

    Example:
        >>> from tnt_func.schedules import exponential, linear
        >>> lr = joined([linear(0.0, 1.0, steps=2), exponential(1.0, gamma=0.5)], boundaries=[2])
        >>> [lr(step) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.25]

    References:
        torch.optim.lr_scheduler.SequentialLR; optax.join_schedules.
    """
    begins = [0, *boundaries]
    if list(boundaries) != sorted(boundaries):
        raise UsageError(f"boundaries={list(boundaries)} were given; they ascend. Write {sorted(boundaries)}.")
    if len(schedules) != len(begins):
        raise UsageError(
            f"{len(schedules)} values or schedules were given with boundaries={list(boundaries)}; there is one more of "
            f"them than boundaries. Write {len(begins)}."
        )

    def schedule(step: Any) -> Any:
        if not isinstance(step, Tensor):
            index = max(bisect_right(begins, step) - 1, 0)
            return schedules[index](step - begins[index])
        value = schedules[0](step)
        for begin, later in zip(boundaries, schedules[1:], strict=True):
            value = where(step >= begin, later(step - begin), value)
        return value

    return schedule


@factory
def piecewise(values: Sequence[Real], *, boundaries: Sequence[int]) -> Schedule:
    """values[n], with n the number of boundaries that the step has reached.

    Args:
        values: one more than there are boundaries.
        boundaries: steps, ascending.

    Raises:
        UsageError: the boundaries do not ascend, or are not one fewer than the values.

    Example:
        >>> [piecewise([0.1, 0.3], boundaries=[2])(step) for step in range(4)]
        [0.1, 0.1, 0.3, 0.3]
    """
    return joined([constant(value) for value in values], boundaries=boundaries)


@factory
def multistep(start: Real, *, milestones: Sequence[int], gamma: Real = 0.1) -> Schedule:
    """start gamma^n, with n the number of milestones that the step has reached.

    Args:
        start: the number at step 0.
        milestones: steps, ascending.
        gamma: the factor at each milestone.

    Raises:
        UsageError: the milestones do not ascend.

    Example:
        >>> [multistep(1.0, milestones=[2, 3], gamma=0.5)(n) for n in range(5)]
        [1.0, 1.0, 0.5, 0.25, 0.25]

    References:
        torch.optim.lr_scheduler.MultiStepLR.
    """
    return piecewise([start * gamma**n for n in range(len(milestones) + 1)], boundaries=milestones)


@factory
def warmup(schedule: Schedule, *, steps: int, start: Real = 0.0) -> Schedule:
    """A line from `start` to where another schedule starts, then that schedule.

    Args:
        schedule: counts from the end of the warm-up.
        steps: the length of the warm-up; 0 is none.
        start: the number at step 0.

    Raises:
        UsageError: the length is negative.

    Example:
        >>> [warmup(constant(1.0), steps=4)(step) for step in (0, 1, 4, 5)]
        [0.0, 0.25, 1.0, 1.0]

    References:
        Goyal et al. 2017, https://arxiv.org/abs/1706.02677.
    """
    check_at_least(0, steps=steps)
    return joined([linear(start, schedule(0), steps=steps), schedule], boundaries=[steps]) if steps else schedule


@factory
def warmup_stable_decay(
    peak: Real,
    *,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    start: Real = 0.0,
    end: Real = 0.0,
    decay: Literal["linear", "cosine", "sqrt"] = "linear",
) -> Schedule:
    """A line up, a plateau, and a decay that can begin whenever training is to end.

    Args:
        peak: the number on the plateau.
        warmup_steps: the length of the line up, in steps; 0 is none.
        stable_steps: the length of the plateau, in steps.
        decay_steps: the length of the decay, in steps.
        start: the number at step 0, where there is a warm-up.
        end: the number after the decay.
        decay: how to fall: a line, half a cosine, or 1 - sqrt(x).

    Raises:
        UsageError: a length is negative, or there is less than one step of decay.

    Example:
        >>> lr = warmup_stable_decay(1.0, warmup_steps=2, stable_steps=4, decay_steps=2)
        >>> [lr(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]

    References:
        Hu et al. 2024, https://arxiv.org/abs/2404.06395; the square root: Hagele et al. 2024,
        https://arxiv.org/abs/2405.18392.
    """
    check_at_least(0, stable_steps=stable_steps)
    check_at_least(1, decay_steps=decay_steps)
    falls: dict[str, Schedule] = {
        "linear": linear(peak, end, steps=decay_steps),
        "cosine": cosine(peak, end, steps=decay_steps),
        "sqrt": lambda step: between(peak, end, clip(real(step) / decay_steps, 0, 1) ** 0.5),
    }
    plateau = joined([constant(peak), falls[decay]], boundaries=[stable_steps])
    return warmup(plateau, steps=warmup_steps, start=start)
