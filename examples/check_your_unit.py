"""A unit with a memory that resuming cannot know of: the laws find it, name it, and say what to write instead.

The learning rate of this unit falls with the number of steps. First the step counts them itself, in a closure: it
trains well, and no test of its loss would notice. Then it reads the counter that the state has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import tnt_func as tnt
from tnt_func.errors import LawError
from tnt_func.testing import check_unit

Batch = tuple[Tensor, Tensor]

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(3, 8, 2, generator=generator)
batches = [(batch, batch @ torch.tensor([2.0, -3.0])) for batch in inputs]
first = tnt.State(params=torch.zeros(2), key=tnt.key(0))


def sgd_step(state: tnt.State, batch: Batch, lr: float) -> tuple[tnt.State, dict[str, Tensor]]:
    def loss_of(params: Tensor) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(inputs @ params, targets)

    grads, loss = torch.func.grad_and_value(loss_of)(state.params)
    return state.replace(params=state.params - lr * grads), {"loss": loss}


def broken_unit() -> tnt.TrainUnit:
    """The counter starts from zero in every process, wherever the state stands."""
    steps = 0

    def train_step(state: tnt.State, batch: Batch) -> tuple[tnt.State, dict[str, Tensor]]:
        nonlocal steps
        steps += 1
        return sgd_step(state, batch, lr=0.1 / steps)

    return tnt.TrainUnit(train_step=train_step)


def mended_unit() -> tnt.TrainUnit:
    """What a run must remember is in its state."""

    def train_step(state: tnt.State, batch: Batch) -> tuple[tnt.State, dict[str, Tensor]]:
        return sgd_step(state, batch, lr=0.1 / (1 + state.progress.train.steps))

    return tnt.TrainUnit(train_step=train_step)


if __name__ == "__main__":
    try:
        check_unit(broken_unit(), first, batches)
    except LawError as error:
        print(f"LawError: {error}\n")

    check_unit(mended_unit(), first, batches)
    print("the mended unit keeps every law: it may be paused, resumed, observed and composed")
