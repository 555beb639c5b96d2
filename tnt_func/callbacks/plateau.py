"""A learning rate that follows a metric.

Example:
    >>> reduce_lr_on_plateau("loss").phases()
    ('train', 'eval')
"""

from collections.abc import Sequence
from typing import Any

import torch

from tnt_func.callbacks.monitors import (
    Interval,
    Monitor,
    MonitoredPhase,
    Number,
    ThresholdMode,
    better,
    check_not_negative,
    worst,
)
from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.optim import get, hyperparameters, set_hyperparameters
from tnt_func.state import State
from tnt_func.types import Mode, PyTree
from tnt_func.unit import Callback

AT_ONCE = 4
"""Reductions that one step carries out at most: inside a graph they are written one after another."""


@factory
def reduce_lr_on_plateau(
    monitor: str,
    *,
    phase: MonitoredPhase = "eval",
    mode: Mode = "min",
    factor: Number = 0.1,
    patience: int = 10,
    threshold: Number = 1e-4,
    threshold_mode: ThresholdMode = "rel",
    cooldown: int = 0,
    min_lr: Number | Sequence[Number] = 0.0,
    eps: Number = 1e-8,
    interval: Interval = "epoch",
    interval_freq: int = 1,
    name: str = "reduce_lr_on_plateau",
) -> Callback:
    """Multiply every learning rate by a factor where a metric has stopped improving.

    A value counts as improvement where it is better than best (1 -+ threshold), or best -+ threshold in threshold_mode
    "abs". After more than `patience` looks without one, `lr <- max(lr factor, min_lr)`, unless that is less than `eps`
    of a change. An evaluation is a read, so the decision is noted in memory, as `pending`, and carried out at the next
    on_train_step_start: no step sees another rate than in torch. Of more than four that are pending the rest are
    carried out by the steps that follow.

    Args:
        monitor: the metric of the phase; with interval "step", the entry of the step's output.
        phase: whose metric.
        mode: whether less or more is better.
        factor: from 0 to below 1.
        patience: looks in a row without improvement that are put up with.
        threshold: what an improvement must exceed.
        threshold_mode: whether `threshold` is absolute, or relative to the best value.
        cooldown: looks after a reduction that count for nothing.
        min_lr: below which no rate falls; or one for each group that has an lr, in order.
        eps: a change that is not greater is not made.
        interval, interval_freq: when to look, at the end of every so many epochs or steps of the phase.
        name: of the slot, `{"best": float, "num_bad_epochs": int, "cooldown_counter": int, "pending": int}`.

    Raises:
        UsageError: a number is negative, or the factor not below 1; when the run begins, the optimizer has no lr that
            could be set, or `min_lr` has another number of groups; in the run, there is no such metric.

    Example:
        >>> from tnt_func import optim, rng
        >>> plateau = reduce_lr_on_plateau("loss", phase="train", interval="step", patience=0, factor=0.5)
        >>> state = State(params={}, key=rng.key(0), opt_state=optim.sgd(0.1).init({}), output={"loss": 1.0})
        >>> state = state.remember("reduce_lr_on_plateau", plateau.memory(state))
        >>> state = plateau.on_train_step_end(plateau.on_train_step_end(state))
        >>> float(optim.get(plateau.on_train_step_start(state).opt_state, "lr"))
        0.05

    References:
        torch.optim.lr_scheduler.ReduceLROnPlateau, with which it agrees to the bit.
    """
    floors = [min_lr] if isinstance(min_lr, int | float) else [*min_lr]
    check_not_negative(
        "reduce_lr_on_plateau", factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, eps=eps
    )
    check_not_negative("reduce_lr_on_plateau", **{f"min_lr[{group}]": floor for group, floor in enumerate(floors)})
    if factor >= 1:
        raise UsageError(f"reduce_lr_on_plateau was given factor={factor!r}; it is below 1. Write factor=0.1.")
    watched = Monitor("reduce_lr_on_plateau", monitor, phase, interval, interval_freq)
    sign = 1.0 if mode == "max" else -1.0

    def lowered(opt_state: PyTree, due: bool | torch.Tensor = True) -> PyTree:
        groups = sum("lr" in values for values in hyperparameters(opt_state))
        each = floors * max(groups, 1) if isinstance(min_lr, int | float) else floors
        if len(each) != max(groups, 1):
            raise UsageError(
                f"reduce_lr_on_plateau was given min_lr={min_lr!r}, and {groups} groups of the optimizer have an lr; "
                "there is one floor for each, in order. Write a number, for all of them."
            )
        for group, floor in enumerate(each):
            old = get(opt_state, "lr", group=group)
            new = torch.clamp(old * factor, min=floor)
            opt_state = set_hyperparameters(opt_state, group=group, lr=torch.where((old - new > eps) & due, new, old))
        return opt_state

    def memory(state: State) -> PyTree:
        lowered(state.opt_state)  # What could not be set is refused before the first epoch, not after the last.
        return {"best": worst(mode), "num_bad_epochs": 0, "cooldown_counter": 0, "pending": 0}

    def decide(state: State) -> State:
        slot = state.memory[name]
        best, bad, cooling = slot["best"], slot["num_bad_epochs"], slot["cooldown_counter"]
        value = watched.read(state)
        needed = best * (1.0 + sign * threshold) if threshold_mode == "rel" else best + sign * threshold
        best, bad = (value, 0) if better(value, needed, mode) else (best, bad + 1)
        if cooling > 0:
            cooling, bad = cooling - 1, 0
        pending = slot["pending"]
        if bad > patience:
            cooling, bad, pending = cooldown, 0, pending + 1
        return state.remember(
            name, {"best": best, "num_bad_epochs": bad, "cooldown_counter": cooling, "pending": pending}
        )

    def apply(state: State) -> State:
        slot, opt_state = state.memory[name], state.opt_state
        pending: Any = slot["pending"]
        if isinstance(pending, int) and not pending:
            return state  # Between fused steps it is a tensor, at which nobody can look.
        for place in range(AT_ONCE):
            opt_state = lowered(opt_state, pending > place)
        left = (pending - AT_ONCE) * (pending > AT_ONCE)
        return state.replace(opt_state=opt_state).remember(name, {**slot, "pending": left})

    return Callback(name=name, memory=memory, on_train_step_start=apply, **watched.hooks(decide))
