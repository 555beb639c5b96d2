"""Schedules: torch's numbers, in any order, for ints and tensors, traced or not."""

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from tnt_func import schedules
from tnt_func.asserts import assert_max_compilations
from tnt_func.errors import UsageError
from tnt_func.schedules import Schedule

STEPS = 300
LR = 0.7


class Squared(lr_scheduler.StepLR):
    """Inherits a closed form that is not its own."""

    def get_lr(self) -> list[float | torch.Tensor]:
        return [lr / (1 + self.last_epoch) ** 2 for lr in self.base_lrs]


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=20)
    return lr_scheduler.SequentialLR(optimizer, [rise, lr_scheduler.CosineAnnealingLR(optimizer, 400)], milestones=[20])


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 40), lr_scheduler.ExponentialLR(optimizer, 0.99)], optimizer
    )


TORCH: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "StepLR": (lr_scheduler.StepLR, {"step_size": 30, "gamma": 0.3}),
    "MultiStepLR": (lr_scheduler.MultiStepLR, {"milestones": [10, 10, 200], "gamma": 0.3}),
    "ConstantLR": (lr_scheduler.ConstantLR, {"factor": 0.3, "total_iters": 50}),
    "LinearLR": (lr_scheduler.LinearLR, {"start_factor": 0.25, "end_factor": 0.75, "total_iters": 200}),
    "ExponentialLR": (lr_scheduler.ExponentialLR, {"gamma": 0.97}),
    "PolynomialLR": (lr_scheduler.PolynomialLR, {"total_iters": 250, "power": 1.7}),
    "CosineAnnealingLR": (lr_scheduler.CosineAnnealingLR, {"T_max": STEPS, "eta_min": 0.01}),
    "CosineAnnealingLR, periodic": (lr_scheduler.CosineAnnealingLR, {"T_max": 41, "eta_min": 0.01}),
    "CosineAnnealingWarmRestarts": (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 7, "eta_min": 0.01}),
    "CosineAnnealingWarmRestarts, 2": (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 7, "T_mult": 2}),
    "CosineAnnealingWarmRestarts, 3": (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 1, "T_mult": 3}),
    "OneCycleLR": (lr_scheduler.OneCycleLR, {"max_lr": LR, "total_steps": STEPS}),
    "OneCycleLR, linear": (
        lr_scheduler.OneCycleLR,
        {"max_lr": LR, "total_steps": 311, "pct_start": 0.21, "anneal_strategy": "linear", "div_factor": 7.0},
    ),
    "OneCycleLR, three_phase": (lr_scheduler.OneCycleLR, {"max_lr": LR, "total_steps": STEPS, "three_phase": True}),
    "CyclicLR": (lr_scheduler.CyclicLR, {"base_lr": 0.1, "max_lr": LR, "step_size_up": 17}),
    "LambdaLR": (lr_scheduler.LambdaLR, {"lr_lambda": lambda n: min(n / 20, math.sqrt(20 / n)) if n else 0.0}),
    "MultiplicativeLR": (lr_scheduler.MultiplicativeLR, {"lr_lambda": lambda n: 0.9 if n % 20 else 1.2}),
    "SequentialLR": (sequential, {}),
    "ChainedScheduler": (chained, {}),
    "a subclass": (Squared, {"step_size": 3}),
}
OURS: dict[str, Schedule] = {
    "StepLR": schedules.step(LR, every=30, gamma=0.3),
    "MultiStepLR": schedules.multistep(LR, milestones=[10, 10, 200], gamma=0.3),
    "ConstantLR": schedules.piecewise([0.3 * LR, LR], boundaries=[50]),
    "LinearLR": schedules.linear(0.25 * LR, 0.75 * LR, steps=200),
    "ExponentialLR": schedules.exponential(LR, gamma=0.97),
    "PolynomialLR": schedules.polynomial(LR, steps=250, power=1.7),
    "CosineAnnealingLR": schedules.cosine(LR, 0.01, steps=STEPS),
    "CosineAnnealingWarmRestarts": schedules.cosine_with_restarts(LR, 0.01, period=7),
    "CosineAnnealingWarmRestarts, 2": schedules.cosine_with_restarts(LR, period=7, growth=2),
    "CosineAnnealingWarmRestarts, 3": schedules.cosine_with_restarts(LR, period=1, growth=3),
    "OneCycleLR": schedules.one_cycle(LR, steps=STEPS),
    "OneCycleLR, linear": schedules.one_cycle(LR, steps=311, pct_start=0.21, anneal="linear", div_factor=7.0),
    "OneCycleLR, three_phase": schedules.one_cycle(LR, steps=STEPS, three_phase=True),
    "LambdaLR": schedules.inverse_sqrt(LR, warmup_steps=20),
    "SequentialLR": schedules.warmup(schedules.cosine(LR, steps=400), steps=20, start=1e-3 * LR),
}
OTHERS: dict[str, Schedule] = {
    "constant": schedules.constant(LR),
    "warmup_stable_decay": schedules.warmup_stable_decay(LR, warmup_steps=30, stable_steps=90, decay_steps=60, end=0.1),
    "sqrt decay": schedules.warmup_stable_decay(
        LR, warmup_steps=0, stable_steps=0, decay_steps=200, end=0.1, decay="sqrt"
    ),
    "cosine decay": schedules.warmup_stable_decay(LR, warmup_steps=9, stable_steps=9, decay_steps=99, decay="cosine"),
}
NATIVE = OURS | OTHERS
ADAPTED = {name: schedules.from_torch_scheduler(cls, lr=LR, **options) for name, (cls, options) in TORCH.items()}


def imperative(name: str) -> list[float]:
    """The lr of each step, as a training loop would see it."""
    cls, options = TORCH[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.9)
    scheduler, numbers = cls(optimizer, **options), []
    for _ in range(STEPS):
        numbers.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return numbers


@pytest.mark.parametrize("name", OURS)
def test_native_schedules_give_the_numbers_of_torch(name: str):
    assert [OURS[name](step) for step in range(STEPS)] == pytest.approx(imperative(name), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", TORCH)
def test_adapted_schedulers_give_the_numbers_of_torch(name: str):
    assert [ADAPTED[name](step) for step in range(STEPS)] == pytest.approx(imperative(name), rel=1e-12, abs=1e-12)


def is_pure(make: Callable[[], Schedule]) -> bool:
    """Whether steps in any order, and from the middle on, give the numbers of steps in order."""
    in_order = [make()(step) for step in range(STEPS)]
    shuffled, resumed = random.Random(0).sample(range(STEPS), STEPS), make()
    in_disorder = make()
    return all(in_disorder(step) == in_order[step] for step in shuffled + shuffled) and all(
        resumed(step) == in_order[step] for step in range(137, STEPS)
    )


@pytest.mark.parametrize("name", TORCH)
def test_adapted_schedulers_remember_nothing(name: str):
    cls, options = TORCH[name]
    made = schedules.from_torch_scheduler(cls, lr=LR, **options)
    assert is_pure(lambda: made)
    assert made(137) == schedules.from_torch_scheduler(cls, lr=LR, **options)(137)


def test_a_schedule_that_counts_its_calls_is_found_out():
    def make() -> Schedule:
        calls = iter(range(10 * STEPS))
        return lambda step: next(calls) / STEPS

    shared = make()
    assert not is_pure(lambda: shared)


@pytest.mark.parametrize("name", NATIVE)
def test_a_tensor_gives_a_float64_tensor_of_the_same_numbers(name: str):
    schedule, steps = NATIVE[name], torch.arange(-2, STEPS)
    expected = torch.tensor([schedule(step) for step in range(-2, STEPS)], dtype=torch.float64)
    for values in (schedule(steps), torch.func.vmap(schedule)(steps)):
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert schedule(torch.tensor(3)).shape == ()
    assert isinstance(schedule(3), float) and schedule(-2) == schedule(0)


def test_all_of_them_compile_once():
    @torch.compile(backend="eager", fullgraph=True)
    def everything(step: torch.Tensor) -> list[torch.Tensor]:
        return [schedule(step) for schedule in NATIVE.values()]

    with assert_max_compilations(1):
        traced = [everything(torch.tensor(step)) for step in (0, 7, 57, 299)]
    expected = [[schedule(step) for schedule in NATIVE.values()] for step in (0, 7, 57, 299)]
    torch.testing.assert_close(torch.tensor([[float(x) for x in row] for row in traced]), torch.tensor(expected))


def test_restarts_fall_on_the_exact_step_however_far():
    period, growth = 5, 3
    schedule = schedules.cosine_with_restarts(1.0, period=period, growth=growth)
    for n in range(1, 18):
        begin = period * (growth**n - 1) // (growth - 1)
        for value in (schedule, lambda step: float(schedule(torch.tensor(step)))):
            assert value(begin) == 1.0 and value(begin - 1) < 0.5


def test_ends_are_exact():
    for schedule in (
        schedules.linear(0.3, 0.7, steps=10),
        schedules.cosine(0.3, 0.7, steps=10),
        schedules.polynomial(0.3, 0.7, steps=10, power=3),
    ):
        assert (schedule(0), schedule(10), schedule(99)) == (0.3, 0.7, 0.7)


def test_an_adapted_scheduler_takes_concrete_tensors_and_refuses_traced_ones():
    schedule = ADAPTED["LambdaLR"]
    assert schedule(torch.tensor(45)).item() == schedule(45)
    assert schedule(torch.tensor([[1, 2]])).shape == (1, 2)
    with pytest.raises(UsageError, match="traced step; it runs eagerly"):
        torch.func.vmap(schedule)(torch.arange(3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: schedules.cosine(1.0, steps=0), "steps=0 was given; it is at least 1"),
        (lambda: schedules.warmup(schedules.constant(1.0), steps=-1), "steps=-1 was given; it is at least 0"),
        (lambda: schedules.polynomial(1.0, steps=1, power=0), "power=0 was given"),
        (lambda: schedules.exponential(1.0, gamma=-0.5), "gamma=-0.5 was given"),
        (lambda: schedules.multistep(1.0, milestones=[3, 2]), r"boundaries=\[3, 2\] were given; they ascend"),
        (lambda: schedules.piecewise([1.0], boundaries=[2]), "1 values or schedules were given"),
        (lambda: schedules.one_cycle(1.0, steps=10, pct_start=0.1), "every phase has a length: .* between 0.1 and 1,"),
        (lambda: schedules.one_cycle(1.0, steps=10, pct_start=0.9, three_phase=True), "between 0.1 and 0.55,"),
        (lambda: schedules.from_torch_scheduler(lr_scheduler.ReduceLROnPlateau, lr=1.0), "follows a metric"),
    ],
)
def test_what_cannot_work_is_refused(wrong: Callable[[], Any], message: str):
    with pytest.raises(UsageError, match=message):
        wrong()


def test_adapting_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cls, options in TORCH.values():
            schedules.from_torch_scheduler(cls, lr=LR, **options)(3)
