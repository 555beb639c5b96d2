"""Units for the usual cases, short enough to read as examples of how the pieces compose.

`supervised` makes a FitUnit and its first State of a module, a loss and an optimizer. `minimize` is the one step inside
it, for what is less usual: several losses, several optimizers, adversarial pairs.

Example:
    >>> from tnt_func.runs import fit
    >>> unit, state = supervised(nn.Linear(1, 1), nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> state = fit(unit, state, [(x, 2 * x)], [(x, 2 * x)], max_epochs=200)
    >>> bool(compute(state, "eval")["loss"] < 1e-4)
    True
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tnt_func import optim, rng
from tnt_func import pytree as trees
from tnt_func.gradients import value_and_grad
from tnt_func.metrics import Metric, compute, mean
from tnt_func.model import Model, Trainable, from_module
from tnt_func.optim import Optimizer
from tnt_func.state import State
from tnt_func.types import Batch, Output, PyTree, typed
from tnt_func.unit import EvalUnit, FitUnit, PredictUnit, Step, TrainUnit

__all__ = ["Objective", "compute", "minimize", "optim", "rng", "supervised"]

Objective: TypeAlias = Callable[[PyTree, State, Batch], tuple[Tensor, tuple[PyTree, Output]]]
"""`(params, state, batch) -> (value, (buffers, output))`: what a step makes smaller, new buffers, the step's output."""

Score: TypeAlias = Callable[[Any, Any], Any]
"""`(output of the model, targets) -> scalar`, a mean over the batch."""


@typed
def minimize(objective: Objective, optimizer: Optimizer, *, part: str | None = None) -> Step:
    """The step that takes the parameters down the gradient of an objective.

    Args:
        objective: `(params, state, batch) -> (value, (buffers, output))`; differentiated with respect to `params`.
        optimizer: what turns gradients into new parameters.
        part: the entry of `state.params` and `state.opt_state` that is trained; the whole of them if not given. The
            objective finds the other parts, an adversary's say, in `state.params`.

    Returns:
        A train step, for `TrainUnit(train_step=...)`. Steps for several parts go into units of their own, which
        `tnt.sequence` runs one after another and `tnt.alternate` in turns.

    Example:
        >>> def objective(params, state, batch):
        ...     return ((params - batch) ** 2).sum(), (state.buffers, {})
        >>> step, w = minimize(objective, optim.sgd(0.5)), torch.tensor([3.0])
        >>> state = State(params=w, key=rng.key(0), opt_state=optim.sgd(0.5).init(w))
        >>> step(state, torch.tensor([1.0]))[0].params
        tensor([1.])
    """

    def step(state: State, batch: Batch) -> tuple[State, Output]:
        params = state.params if part is None else state.params[part]
        opt_state = state.opt_state if part is None else state.opt_state[part]
        _, (buffers, output), grads = value_and_grad(lambda params: objective(params, state, batch), params)
        params, opt_state = optimizer.update(grads, opt_state, params)
        if part is not None:
            params, opt_state = {**state.params, part: params}, {**state.opt_state, part: opt_state}
        return state.replace(params=params, opt_state=opt_state, buffers=buffers), output

    return step


@typed
def supervised(
    module: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    optimizer: Optimizer,
    *,
    key: rng.Key,
    metrics: Mapping[str, Score] | None = None,
    trainable: Trainable | None = None,
) -> tuple[FitUnit, State]:
    """A module, a loss and an optimizer as a unit to train, evaluate and predict with, and its first State.

    Batches are `(inputs, targets)`. Inputs that are a mapping are passed by keyword, those that are a tuple or list by
    position, anything else as the one argument. On a device other than the CPU, batches are moved to the module's.

    Steps give the output `loss`, `num_samples` (the first dimension of the first input) and every metric; the epoch's
    metrics are their means over samples. Prediction gives what the module gives.

    Args:
        module: copied, never written to; see `tnt_func.model.from_module`.
        loss: `(output, targets) -> 0-d tensor`, a mean over the batch.
        optimizer: see `tnt_func.optim`.
        key: the run's key.
        metrics: `(output, targets) -> scalar` by name, a mean over the batch each.
        trainable: `(name, parameter) -> bool`, which parameters are trained.

    Raises:
        UsageError, UsageTypeError: as `from_module`.

    Example:
        >>> unit, state = supervised(
        ...     nn.Linear(4, 3), nn.functional.cross_entropy, optim.adamw(1e-2), key=rng.key(0),
        ...     metrics={"accuracy": lambda output, targets: (output.argmax(-1) == targets).float().mean()},
        ... )
        >>> sorted(unit.train_unit.metrics), sorted(state.params)
        (['accuracy', 'loss'], ['bias', 'weight'])
    """
    model = from_module(module, trainable=trainable)
    scores = {"loss": loss, **(metrics or {})}
    accumulated: dict[str, Metric] = {name: mean(name, weight="num_samples") for name in scores}
    device = next((leaf.device for leaf in model.params.values()), torch.device("cpu"))

    def judged(output: Any, batch: Batch) -> dict[str, Any]:
        inputs, targets = batch
        samples = next((len(leaf) for leaf in trees.tensors(inputs) if leaf.dim() > 0), 1)
        return {name: score(output, targets) for name, score in scores.items()} | {"num_samples": samples}

    def objective(params: PyTree, state: State, batch: Batch) -> tuple[Tensor, tuple[PyTree, Output]]:
        batch = _on(device, batch)
        result, buffers = _forward(model, params, state.buffers, batch[0], train=True)
        output = judged(result, batch)
        return output["loss"], (buffers, output)

    def eval_step(state: State, batch: Batch) -> tuple[State, Output]:
        batch = _on(device, batch)
        return state, judged(_forward(model, state.params, state.buffers, batch[0], train=False)[0], batch)

    def predict_step(state: State, batch: Batch) -> tuple[State, Output]:
        batch = _on(device, batch)
        return state, _forward(model, state.params, state.buffers, batch[0], train=False)[0]

    unit = FitUnit(
        train_unit=TrainUnit(train_step=minimize(objective, optimizer), metrics=accumulated),
        eval_unit=EvalUnit(eval_step=eval_step, metrics=accumulated),
        predict_unit=PredictUnit(predict_step=predict_step),
    )
    return unit, State(params=model.params, key=key, buffers=model.buffers, opt_state=optimizer.init(model.params))


def _forward(model: Model, params: PyTree, buffers: PyTree, inputs: Any, *, train: bool) -> tuple[Any, PyTree]:
    if isinstance(inputs, Mapping):
        return model.apply(params, buffers, train=train, **inputs)
    if isinstance(inputs, (tuple, list)):
        return model.apply(params, buffers, *inputs, train=train)
    return model.apply(params, buffers, inputs, train=train)


def _on(device: torch.device, batch: Batch) -> Batch:
    if device.type == "cpu":
        return batch
    return trees.map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)
