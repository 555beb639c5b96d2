"""Averages of the parameters along a run, and states that have them in place of the parameters.

The average is a slot of memory: `params`, a tree like the parameters, and `count`, int64 [], how many it is of. The
training itself is untouched.

Example:
    >>> from tnt_func import rng
    >>> from tnt_func.runs import train
    >>> from tnt_func.unit import TrainUnit
    >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> state = train(ema(unit, 0.5), State(params=torch.tensor(0.0), key=rng.key(0)), [1.0, 1.0], max_epochs=1)
    >>> state.params, averaged(state, "ema").params
    (tensor(2.), tensor(1.5000))
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnt_func import treemath
from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.model import from_module
from tnt_func.optim.layout import is_traced
from tnt_func.state import State
from tnt_func.transforms.seams import Around, U, on_reads
from tnt_func.types import Batch, Output, PyTree, typed
from tnt_func.unit import Callback, FitUnit, attach


@factory
def ema(
    unit: U,
    decay: float = 0.999,
    *,
    warmup: bool = False,
    every_n_steps: int = 1,
    evaluate: bool = False,
    name: str = "ema",
) -> U:
    """The unit with an exponential moving average: average = decay average + (1 - decay) params, after each step.

    The first update is the parameters themselves. BatchNorm's averages are buffers, and are not averaged again.

    Args:
        unit: with any train step.
        decay: from 0, no memory, to 1.
        warmup: whether the decay is min(decay, (1 + n) / (10 + n)), n being the updates before.
        every_n_steps: steps of the lifetime from one update to the next: the `every` of `optim.accumulate`, say.
        evaluate: whether evaluation and prediction are of the average.
        name: of the slot of memory.

    Raises:
        UsageError: the decay or the cadence is out of range, the name is taken, or a unit that only trains was to
            evaluate.

    Example:
        >>> from tnt_func.unit import TrainUnit
        >>> ema(TrainUnit(train_step=max)).memory.keys()
        dict_keys(['ema'])

    References:
        torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn(decay): the same bits.
    """
    if not 0.0 <= decay <= 1.0:
        raise UsageError(f"ema was given decay={decay}; it is from 0 to 1. Write ema(unit, 0.999).")
    if every_n_steps < 1:
        raise UsageError(f"ema was given every_n_steps={every_n_steps}; it is 1 or more. Write every_n_steps=1.")

    def weight(count: Any) -> Any:
        if not warmup:
            return 1 - decay
        early = (1 + count) / (10 + count)
        return 1 - (early.clamp(max=decay) if isinstance(early, Tensor) else min(decay, early))

    def update(state: State) -> State:
        # Where every step counts, which one it is goes unread: such a hook can be fused.
        return (
            state if every_n_steps > 1 and state.progress.train.steps % every_n_steps else _moved(state, name, weight)
        )

    return _averaging(unit, Callback(name=name, memory=_first, on_train_step_end=update), evaluate)


@factory
def swa(unit: U, *, start_epoch: int = 0, every_n_epochs: int = 1, evaluate: bool = False, name: str = "swa") -> U:
    """The unit with the mean of its parameters at the ends of epochs, for a learning rate that stays high.

    BatchNorm's averages in the buffers belong to the parameters, not to their mean: `update_bn` finds the mean's.

    Args:
        unit: with any train step.
        start_epoch: epochs of the lifetime before the first that counts.
        every_n_epochs: epochs from one that counts to the next.
        evaluate: whether evaluation and prediction are of the mean, once there is one.
        name: of the slot of memory.

    Raises:
        UsageError: an epoch is out of range, the name is taken, or a unit that only trains was to evaluate.

    Example:
        >>> from tnt_func.unit import TrainUnit
        >>> swa(TrainUnit(train_step=max), start_epoch=10).memory.keys()
        dict_keys(['swa'])

    References:
        Izmailov et al. 2018, https://arxiv.org/abs/1803.05407; torch.optim.swa_utils.AveragedModel with
        get_swa_multi_avg_fn(): the same bits in float32.
    """
    if start_epoch < 0 or every_n_epochs < 1:
        given = f"start_epoch={start_epoch}, every_n_epochs={every_n_epochs}"
        raise UsageError(f"swa was given {given}; they are at least 0 and 1. Write swa(unit, start_epoch=10).")

    def update(state: State) -> State:
        past = state.progress.train.epochs - 1 - start_epoch
        return state if past < 0 or past % every_n_epochs else _moved(state, name, lambda count: 1 / (count + 1))

    return _averaging(unit, Callback(name=name, memory=_first, on_train_epoch_end=update), evaluate)


@typed
def averaged(state: State, name: str) -> State:
    """The state with an average in place of its parameters, to evaluate, export or fine-tune; its own before the first.

    Args:
        state: of a run whose unit was transformed by `ema` or `swa`.
        name: of the slot of memory.

    Raises:
        UsageError: the state has no such average.

    Example:
        >>> from tnt_func import rng
        >>> averaged(State(params=torch.tensor(0.0), key=rng.key(0)), "ema")
        Traceback (most recent call last):
        tnt_func.errors.UsageError: averaged was given 'ema' and a state that remembers []; ...
    """
    slot = state.memory.get(name)
    if not isinstance(slot, dict) or slot.keys() != {"params", "count"}:
        raise UsageError(
            f"averaged was given {name!r} and a state that remembers {sorted(state.memory)}; an average is in the slot "
            "that ema or swa made. Train with tnt.transforms.ema(unit), and pass the name that it was given."
        )
    if is_traced([slot["count"]]):
        return state.replace(params=treemath.where(slot["count"] > 0, slot["params"], state.params))
    if is_traced([slot["count"]]):
        return state.replace(params=treemath.where(slot["count"] > 0, slot["params"], state.params))
    return state.replace(params=slot["params"]) if slot["count"] > 0 else state


@typed
def update_bn(module: nn.Module, state: State, data: Iterable[Any]) -> State:
    """The state with BatchNorm's averages anew: those of its parameters on the data, every batch weighing the same.

    Args:
        module: the one that the parameters are of; left as it is.
        state: `averaged(state, "swa")`, say.
        data: batches; of a tuple or list, the first entry is the module's input.

    Example:
        >>> from tnt_func import rng
        >>> layer = nn.BatchNorm1d(1)
        >>> model = from_module(layer)
        >>> state = State(params=model.params, buffers=model.buffers, key=rng.key(0))
        >>> update_bn(layer, state, [torch.tensor([[1.0], [3.0]])]).buffers["running_mean"]
        tensor([2.])

    References:
        torch.optim.swa_utils.update_bn: the same bits.
    """
    equal = copy.deepcopy(module).train()
    norms = {name: part for name, part in equal.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    buffers = dict(state.buffers)
    for name, part in norms.items():
        part.momentum = None  # which makes all batches weigh the same
        for own, _ in part.named_buffers():
            path = f"{name}.{own}" if name else own
            buffers[path] = (torch.ones_like if own == "running_var" else torch.zeros_like)(buffers[path])
    model = from_module(equal)
    with torch.no_grad():
        for batch in data if norms else ():
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            _, buffers = model.apply(state.params, buffers, inputs, train=True)
    return state.replace(buffers=buffers)


def _first(state: State) -> PyTree:
    return {"params": state.params, "count": torch.tensor(0)}


def _moved(state: State, name: str, weight: Callable[[Any], Any]) -> State:
    """The state whose average has moved towards the parameters, all the way at first."""
    average, count = state.memory[name]["params"], state.memory[name]["count"]
    if is_traced([count]):
        share = torch.where(count > 0, torch.as_tensor(weight(count), dtype=torch.float64), 1.0)
        moved = treemath.lerp(average, state.params, share)
    else:
        moved = treemath.lerp(average, state.params, weight(count.item())) if count > 0 else state.params
    return state.remember(name, {"params": moved, "count": count + 1})


def _averaging(unit: U, callback: Callback, evaluate: bool) -> U:
    unit = attach(unit, callback)
    if not evaluate:
        return unit
    if not isinstance(unit, FitUnit):
        raise UsageError(
            f"{callback.name} was given evaluate=True and a {type(unit).__name__}, which does not evaluate. Transform "
            "the FitUnit, or evaluate tnt.transforms.averaged(state, name)."
        )
    return on_reads(unit, lambda step: OnAverage(step, callback.name))


@dataclass(frozen=True)
class OnAverage(Around):
    """A step of evaluation or prediction that sees an average in place of the parameters."""

    name: str

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step; the state has its own parameters afterwards."""
        after, output = self.inner(averaged(state, self.name), batch)
        return after.replace(params=state.params), output
