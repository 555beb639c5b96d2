"""Schedules of one piece, and the arithmetic that ints and tensors share."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tnt_func.errors import UsageError
from tnt_func.factories import factory

Real: TypeAlias = int | float
Schedule: TypeAlias = Callable[[Any], Any]
"""`step -> number`, a pure function: an int gives a float, a tensor a tensor."""


@factory
def constant(value: Real) -> Schedule:
    """The same number for every step.

    Args:
        value: the number.

    Example:
        >>> constant(0.1)(7)
        0.1
    """
    return lambda step: real(step) * 0 + value


@factory
def linear(start: Real, end: Real, *, steps: int) -> Schedule:
    """A straight line: (1 - x) start + x end, with x = min(step / steps, 1).

    Args:
        start: the number at step 0.
        end: the number from `steps` on.
        steps: the length of the line, in steps.

    Raises:
        UsageError: there is less than one step.

    Example:
        >>> [linear(1.0, 0.0, steps=4)(step) for step in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]

    References:
        torch.optim.lr_scheduler.LinearLR, whose factors are start / lr and end / lr.
    """
    return polynomial(start, end, steps=steps, power=1)


@factory
def polynomial(start: Real, end: Real = 0.0, *, steps: int, power: Real = 1.0) -> Schedule:
    """A polynomial that falls, or rises, to its end: (1 - y) end + y start, with y = (1 - min(step / steps, 1))^power.

    Args:
        start: the number at step 0.
        end: the number from `steps` on.
        steps: the length of the way, in steps.
        power: 1 is a line; above, most of the way is gone early.

    Raises:
        UsageError: there is less than one step, or the power is not positive.

    Example:
        >>> [polynomial(1.0, steps=4, power=2.0)(step) for step in (0, 2, 4)]
        [1.0, 0.25, 0.0]

    References:
        torch.optim.lr_scheduler.PolynomialLR, for an end of 0.
    """
    check_at_least(1, steps=steps)
    if power <= 0:
        raise UsageError(f"power={power} was given; the power of a polynomial is above 0. Write 1.0 for a line.")
    return lambda step: between(end, start, (1 - clip(real(step) / steps, 0, 1)) ** power)


@factory
def cosine(start: Real, end: Real = 0.0, *, steps: int) -> Schedule:
    """Half a cosine: end + (start - end) (1 + cos(pi min(step / steps, 1))) / 2.

    Args:
        start: the number at step 0.
        end: the number from `steps` on.
        steps: the length of the half wave, in steps.

    Raises:
        UsageError: there is less than one step.

    Example:
        >>> [cosine(1.0, steps=4)(step) for step in (0, 2, 4, 6)]
        [1.0, 0.5, 0.0, 0.0]

    References:
        Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; torch.optim.lr_scheduler.CosineAnnealingLR, which
        rises again after T_max.
    """
    check_at_least(1, steps=steps)
    return lambda step: between(start, end, half_wave(clip(real(step) / steps, 0, 1)))


@factory
def cosine_with_restarts(start: Real, end: Real = 0.0, *, period: int, growth: int = 1) -> Schedule:
    """Half a cosine from start to end again and again, each `growth` times as long as the one before.

    Args:
        start: the number at the beginning of each period.
        end: the number that each period falls to.
        period: the length of the first, in steps.
        growth: how many times longer each is than the last.

    Raises:
        UsageError: the period or the growth is less than 1.

    Example:
        >>> lr = cosine_with_restarts(1.0, period=2, growth=2)
        >>> [round(lr(step), 2) for step in range(7)]
        [1.0, 0.5, 1.0, 0.85, 0.5, 0.15, 1.0]

    References:
        Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983;
        torch.optim.lr_scheduler.CosineAnnealingWarmRestarts.
    """
    check_at_least(1, period=period, growth=growth)

    def begin(index: Any) -> Any:
        return period * (growth**index - 1) / (growth - 1)

    def schedule(step: Any) -> Any:
        x = real(step)
        if growth == 1:
            return between(start, end, half_wave(x % period / period))
        ratio = x * (growth - 1) / period + 1
        index = ratio.log().div(math.log(growth)).floor() if isinstance(ratio, Tensor) else int(math.log(ratio, growth))
        # The logarithm may round to the wrong side of a restart, by one.
        index = index - where(x < begin(index), 1, 0)
        index = index + where(x >= begin(index + 1), 1, 0)
        return between(start, end, half_wave((x - begin(index)) / (period * growth**index)))

    return schedule


@factory
def exponential(start: Real, *, gamma: Real) -> Schedule:
    """start gamma^step.

    Args:
        start: the number at step 0.
        gamma: the factor of each step, above 0.

    Raises:
        UsageError: gamma is not above 0.

    Example:
        >>> [exponential(1.0, gamma=0.5)(step) for step in range(3)]
        [1.0, 0.5, 0.25]

    References:
        torch.optim.lr_scheduler.ExponentialLR.
    """
    if gamma <= 0:
        raise UsageError(f"gamma={gamma} was given; the factor of a step is above 0. Write 0.99, say.")
    return lambda step: start * gamma ** real(step)


@factory
def step(start: Real, *, every: int, gamma: Real = 0.1) -> Schedule:
    """start gamma^floor(step / every): a staircase.

    Args:
        start: the number at step 0.
        every: the length of a stair, in steps.
        gamma: the factor from one stair to the next.

    Raises:
        UsageError: a stair is shorter than one step.

    Example:
        >>> [step(1.0, every=2, gamma=0.5)(n) for n in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]

    References:
        torch.optim.lr_scheduler.StepLR.
    """
    check_at_least(1, every=every)
    return lambda step: start * gamma ** (real(step) // every)


@factory
def inverse_sqrt(peak: Real, *, warmup_steps: int) -> Schedule:
    """peak min(step / warmup_steps, sqrt(warmup_steps / step)): a line up, then one over the square root.

    Args:
        peak: the number at `warmup_steps`, the largest.
        warmup_steps: the length of the line up, in steps.

    Raises:
        UsageError: there is less than one step of warm-up.

    Example:
        >>> [inverse_sqrt(1.0, warmup_steps=4)(step) for step in (0, 2, 4, 16)]
        [0.0, 0.5, 1.0, 0.5]

    References:
        Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 5.3.
    """
    check_at_least(1, warmup_steps=warmup_steps)

    def schedule(step: Any) -> Any:
        x = real(step) / warmup_steps
        return peak * clip(x, 0, 1) * clip(x, 1, math.inf) ** -0.5

    return schedule


@factory
def one_cycle(
    peak: Real,
    *,
    steps: int,
    pct_start: Real = 0.3,
    div_factor: Real = 25.0,
    final_div_factor: Real = 1e4,
    anneal: Literal["cosine", "linear"] = "cosine",
    three_phase: bool = False,
) -> Schedule:
    """From peak / div_factor up to peak, and down to peak / div_factor / final_div_factor at step `steps` - 1.

    Args:
        peak: the largest number.
        steps: the length of the whole, in steps.
        pct_start: the part of the whole in which it rises.
        div_factor: peak over the number at step 0.
        final_div_factor: the number at step 0 over the last.
        anneal: how to rise and fall.
        three_phase: whether it falls to the number at step 0 as fast as it rose, and then to the last.

    Raises:
        UsageError: there are less than two steps, or `pct_start` leaves a phase of no length.

    Example:
        >>> [round(one_cycle(1.0, steps=11)(step), 3) for step in (0, 2, 5, 10)]
        [0.04, 0.96, 0.726, 0.0]

    References:
        Smith and Topin 2018, https://arxiv.org/abs/1708.07120; torch.optim.lr_scheduler.OneCycleLR.
    """
    check_at_least(2, steps=steps)
    first, last = peak / div_factor, peak / div_factor / final_div_factor
    top = pct_start * steps - 1
    phases = [(0, top, first, peak), (top, steps - 1, peak, last)]
    if three_phase:
        again = 2 * pct_start * steps - 2
        phases = [(0, top, first, peak), (top, again, peak, first), (again, steps - 1, first, last)]
    if any(end <= begin for begin, end, _, _ in phases):
        raise UsageError(
            f"one_cycle was given steps={steps}, pct_start={pct_start}; every phase has a length: they would end at "
            f"steps {[end for _, end, _, _ in phases]}. Write a pct_start between {1 / steps:g} and "
            f"{(1 + 1 / steps) / 2 if three_phase else 1:g}, ends excluded."
        )

    def schedule(step: Any) -> Any:
        x = real(step)
        value = None
        for begin, end, low, high in phases:
            way = clip((x - begin) / (end - begin), 0, 1)
            number = between(low, high, half_wave(way) if anneal == "cosine" else way)
            value = number if value is None else where(x > begin, number, value)
        return value

    return schedule


def check_at_least(least: int, **given: int) -> None:
    """Refuse a length, by its name, that is too small."""
    for name, value in given.items():
        if value < least:
            raise UsageError(f"{name}={value} was given; it is at least {least}. Write {name}={least} or more.")


def dtype_on(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def real(step: Any) -> Any:
    """The step as a float or a tensor of floats, from 0 on."""
    return step.to(dtype_on(step.device)).clamp(min=0) if isinstance(step, Tensor) else max(float(step), 0.0)


def clip(x: Any, low: float, high: float) -> Any:
    """x, or the bound that it is beyond."""
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)


def between(start: float, end: float, x: Any) -> Any:
    """Exactly start at 0 and end at 1."""
    return start * (1 - x) + end * x


def half_wave(x: Any) -> Any:
    """Half a cosine from 0 at 0 to 1 at 1."""
    return (1 - (math.pi * x).cos()) / 2 if isinstance(x, Tensor) else (1 - math.cos(math.pi * x)) / 2


def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    a, b = (torch.as_tensor(x, dtype=dtype_on(condition.device), device=condition.device) for x in (a, b))
    return torch.where(condition, a, b)
