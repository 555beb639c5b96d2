"""One run at four levels: a call, a generator of events, a fold, a loop by hand. All four end on the same bits.

The data is shuffled and the step draws dropout, and still nothing depends on the level: what is drawn follows from the
key in the state and its counters. Take the highest level that lets you do what you want to do.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import tnt_func as tnt

EPOCHS = 3

# A line through noise: y = 2 x1 - 3 x2.
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(96, 2, generator=generator)
targets = inputs @ torch.tensor([2.0, -3.0]) + 0.1 * torch.randn(96, generator=generator)
loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)


def train_step(state: tnt.State, batch: tuple[Tensor, Tensor]) -> tuple[tnt.State, dict[str, Tensor]]:
    def loss_of(params: Tensor) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(F.dropout(inputs, 0.1) @ params, targets)

    grads, loss = torch.func.grad_and_value(loss_of)(state.params)
    return state.replace(params=state.params - 0.1 * grads), {"loss": loss}


unit = tnt.TrainUnit(train_step=train_step, metrics={"loss": tnt.metrics.mean("loss")})
first = tnt.State(params=torch.zeros(2), key=tnt.key(0))


def as_a_call() -> tnt.State:
    """The whole run."""
    return tnt.train(unit, first, loader, max_epochs=EPOCHS)


def as_events() -> tnt.State:
    """The same loop, lazily: look at any state on the way, stop wherever you like."""
    state = first
    for event in tnt.train_events(unit, first, loader, max_epochs=EPOCHS):
        state = event.state
        if event.point == "epoch_end":
            loss = tnt.metrics.compute(state, "train")["loss"].item()
            print(f"  epoch {state.progress.train.epochs}: loss {loss:.3f}")
    return state


def as_a_fold() -> tnt.State:
    """An epoch is a fold of steps over its batches, a run is a fold of epochs."""

    def epoch(state: tnt.State, _: int) -> tnt.State:
        state = tnt.start_epoch(unit, state)
        return tnt.end_epoch(
            unit, functools.reduce(functools.partial(tnt.step, unit), tnt.batches(loader, state), state)
        )

    return functools.reduce(epoch, range(EPOCHS), tnt.prepare(unit, first))


def by_hand() -> tnt.State:
    """The pieces, in a loop of your own: nested, interleaved with another unit's, whatever it takes."""
    state = tnt.prepare(unit, first)
    while state.progress.train.epochs < EPOCHS:
        state = tnt.start_epoch(unit, state)
        for batch in tnt.batches(loader, state):
            state = tnt.step(unit, state, batch)
        state = tnt.end_epoch(unit, state)
    return state


if __name__ == "__main__":
    for level in (as_a_call, as_events, as_a_fold, by_hand):
        print(level.__name__)
        print(f"  {tnt.digest(level())}")
