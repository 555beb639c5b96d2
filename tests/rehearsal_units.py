"""Units, states and data that the tests of rehearsals share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tnt_func as tnt
from tnt_func.state import State
from tnt_func.unit import FitUnit, TrainUnit

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 2, generator=GENERATOR)
Y = X @ torch.tensor([[2.0], [-1.0]])


def loader(rows: int = 40, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X[:rows], Y[:rows]), batch_size=batch_size, **options)


def linear(module: nn.Module | None = None, optimizer: Any = None) -> tuple[FitUnit, State]:
    torch.manual_seed(0)
    optimizer = optimizer or tnt.optim.adam(0.1)
    return tnt.supervised(module or nn.Linear(2, 1), F.mse_loss, optimizer, key=tnt.key(0))


def stepping(step: Callable[[Any, Any], Any], **fields: Any) -> tuple[TrainUnit, State]:
    """A unit whose parameters a function of them and the batch gives."""
    unit = TrainUnit(
        train_step=lambda state, batch: (state.replace(params=step(state.params, batch)), {"loss": batch.sum()}),
        **fields,
    )
    return unit, State(params={"w": torch.ones(2), "v": torch.ones(2)}, key=tnt.key(0))


def descend(params: Any, batch: Any) -> Any:
    return {name: leaf - 0.1 * batch for name, leaf in params.items()}


BATCHES = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 7.0])]
