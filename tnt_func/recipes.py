"""Units for the usual cases, short enough to read as examples of how the pieces compose.

`supervised` makes a FitUnit and its first State of a module, a loss and an optimizer. For what is less usual, several
losses, several optimizers, adversarial pairs, write the objective and use the step inside it, `tnt.minimize`.

Example:
    >>> from tnt_func import optim
    >>> from tnt_func.metrics import compute
    >>> from tnt_func.runs import fit
    >>> unit, state = supervised(nn.Linear(1, 1), nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> state = fit(unit, state, [(x, 2 * x)], [(x, 2 * x)], max_epochs=200)
    >>> bool(compute(state, "eval")["loss"] < 1e-4)
    True
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.descent import minimize
from tnt_func.errors import DataError, kind_of
from tnt_func.factories import Brief
from tnt_func.metrics import Metric, mean
from tnt_func.model import Model, Trainable, from_module
from tnt_func.optim import Optimizer
from tnt_func.state import State
from tnt_func.types import Batch, Output, PyTree, typed
from tnt_func.unit import EvalUnit, FitUnit, PredictUnit, TrainUnit

Score: TypeAlias = Callable[[Any, Any], Any]
"""`(output of the model, targets) -> scalar`, a mean over the batch."""


@typed
def supervised(
    module: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    optimizer: Optimizer,
    *,
    key: rng.Key,
    metrics: Mapping[str, Score | Metric] | None = None,
    trainable: Trainable | None = None,
) -> tuple[FitUnit, State]:
    """A module, a loss and an optimizer as a unit to train, evaluate and predict with, and its first State.

    Batches are `(inputs, targets)`. Inputs that are a mapping are passed by keyword, those that are a tuple or list by
    position, anything else as the one argument. On a device other than the CPU, batches are moved to the module's.

    Steps give the output `loss`, `num_samples` (the first dimension of the first input) and every score; the epoch's
    metrics are their means over samples. Where there is a `Metric`, which need not be a mean, they also give the
    module's `output` and the `targets` that it reads. Prediction gives what the module gives, of `(inputs,)` too.

    Args:
        module: copied, never written to; see `tnt_func.model.from_module`.
        loss: `(output, targets) -> 0-d tensor`, a mean over the batch.
        optimizer: see `tnt_func.optim`.
        key: the run's key.
        metrics: by name; a score `(output, targets) -> scalar`, a mean over the batch, or a `Metric`, such as
            `tnt.metrics.auroc("multiclass", num_classes=10, thresholds=200)`.
        trainable: `(name, parameter) -> bool`, which parameters are trained.

    Raises:
        UsageError, UsageTypeError: as `from_module`.
        DataError: out of the run, where a batch is something else.

    Example:
        >>> from tnt_func import optim
        >>> unit, state = supervised(
        ...     nn.Linear(4, 3), nn.functional.cross_entropy, optim.adamw(1e-2), key=rng.key(0),
        ...     metrics={"accuracy": lambda output, targets: (output.argmax(-1) == targets).float().mean()},
        ... )
        >>> sorted(unit.train_unit.metrics), sorted(state.params)
        (['accuracy', 'loss'], ['bias', 'weight'])
    """
    model = from_module(module, trainable=trainable)
    device = next((leaf.device for leaf in model.params.values()), torch.device("cpu"))
    given: dict[str, Score | Metric] = {"loss": loss, **(metrics or {})}
    scores = {name: score for name, score in given.items() if not isinstance(score, Metric)}
    # The unit is functions: it would keep the tensors that a run begins from for as long as it is there.
    judged = Supervised(replace(model, params={}, buffers={}), scores, device, shows=len(scores) < len(given))
    accumulated = {
        name: score if isinstance(score, Metric) else mean(name, weight="num_samples") for name, score in given.items()
    }

    def eval_step(state: State, batch: Batch) -> tuple[State, Output]:
        return state, judged.judge(state.params, state.buffers, batch, train=False)[0]

    def predict_step(state: State, batch: Batch) -> tuple[State, Output]:
        return state, judged.forward(state.params, state.buffers, _inputs(_on(device, batch)), train=False)[0]

    unit = FitUnit(
        train_unit=TrainUnit(train_step=minimize(judged, optimizer), metrics=accumulated),
        eval_unit=EvalUnit(eval_step=eval_step, metrics=accumulated),
        predict_unit=PredictUnit(predict_step=predict_step),
    )
    return unit, State(params=model.params, key=key, buffers=model.buffers, opt_state=optimizer.init(model.params))


@dataclass(frozen=True, repr=False)
class Supervised(Brief):
    """The objective of `supervised`: a model judged on `(inputs, targets)`, in training and in evaluation.

    Args:
        model: what is run on the inputs; its own tensors are not looked at.
        scores: `(output, targets) -> scalar` by name; `loss` is the one that is made smaller.
        device: where batches are moved to; left alone where it is the CPU.
        shows: whether steps give the module's output and the targets too.
    """

    model: Model
    scores: Mapping[str, Score]
    device: torch.device
    shows: bool = False

    def __call__(self, params: PyTree, state: State, batch: Batch) -> tuple[Tensor, tuple[PyTree, Output]]:
        """The loss, as an objective of `minimize`."""
        output, buffers = self.judge(params, state.buffers, batch, train=True)
        return output["loss"], (buffers, output)

    def judge(self, params: PyTree, buffers: PyTree, batch: Batch, *, train: bool) -> tuple[dict[str, Any], PyTree]:
        """Every score of a batch with its number of samples, and the new buffers."""
        inputs, targets = _pair(_on(self.device, batch))
        result, buffers = self.forward(params, buffers, inputs, train=train)
        scores = {name: score(result, targets) for name, score in self.scores.items()}
        seen = {"output": result, "targets": targets} if self.shows else {}
        return {**scores, **seen, "num_samples": _samples(inputs)}, buffers

    def forward(self, params: PyTree, buffers: PyTree, inputs: Any, *, train: bool) -> tuple[Any, PyTree]:
        """The model's output: a mapping is passed by keyword, a tuple or list by position."""
        if isinstance(inputs, Mapping):
            return self.model.apply(params, buffers, train=train, **inputs)
        if isinstance(inputs, (tuple, list)):
            return self.model.apply(params, buffers, *inputs, train=train)
        return self.model.apply(params, buffers, inputs, train=train)


def _pair(batch: Batch) -> tuple[Any, Any]:
    """Its inputs and targets; a mapping of two, or a tensor, would come apart as well, into its keys or its rows."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise DataError(_NO_PAIR.format(_given(batch), "(inputs, targets)"))
    return batch[0], batch[1]


def _inputs(batch: Batch) -> Any:
    """Those that are predicted on."""
    if not isinstance(batch, (tuple, list)) or not batch:
        raise DataError(_NO_PAIR.format(_given(batch), "(inputs, targets) or (inputs,)"))
    return batch[0]


_NO_PAIR = (
    "a step of supervised(...) was given a batch that is {}; its batches are {}. Let the data give these, by a "
    'collate_fn or a map: lambda batch: (batch["image"], batch["label"]). Several inputs are a tuple or a mapping in '
    "the place of one; for other batches write an objective for tnt.minimize."
)


def _given(batch: Batch) -> str:
    if isinstance(batch, (tuple, list, Mapping)):
        return f"{kind_of(batch)} of {len(batch)}" + (f": {list(batch)}" if isinstance(batch, Mapping) else "")
    return f"{kind_of(batch)} {list(batch.shape)}" if isinstance(batch, Tensor) else kind_of(batch)


def _samples(inputs: Any) -> int:
    """The first dimension of the first tensor that has one."""
    leaves = (inputs,) if isinstance(inputs, Tensor) else trees.tensors(inputs)
    return next((leaf.shape[0] for leaf in leaves if leaf.dim() > 0), 1)


def _on(device: torch.device, batch: Batch) -> Batch:
    if device.type == "cpu":
        return batch
    return trees.map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)
